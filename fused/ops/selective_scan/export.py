"""The operators as pure functions of their arguments, for `torch.export` and ONNX, which take no loops over scratch memory.

    s_t = a_t s_{t-1} + w_t           a_t = exp(delta_t * A)

The scan cuts time into chunks that step together, each from a state of zero; chunks are joined by their decays, twice as many
at each step; and the product of the decays up to each token adds what the state that entered its chunk is worth there. A
graph so has about 8 + log2(L) steps for L tokens, at the price of holding all L states at once. Formulas
and arguments are those of `selective_scan`, `causal_conv1d` and `add_norm`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fused.runtime.checks import no_autocast
from fused.runtime.dtypes import accumulation_dtype

STEPS = 8  # tokens of a chunk: with fewer, joining chunks costs more memory traffic than it saves nodes


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None,
    softplus: bool, state: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, final_state); the price of one call is five tensors of B * L * E * N elements."""
    precise = accumulation_dtype(u.dtype)
    with no_autocast(u.device):
        x, rate, A, B, C = (t.to(precise) for t in (u, delta, A, B, C))
        rate = rate if delta_bias is None else rate + delta_bias.to(precise)
        rate = F.softplus(rate) if softplus else rate
        walked = rate, rate * x, _by_channel(B, x.shape[2]), _by_channel(C, x.shape[2])
        rate, gained, B, C = (t.flip(1) for t in walked) if reverse else walked
        state = x.new_zeros(x.shape[0], *A.shape) if state is None else state.to(precise)
        y, state = _walk(rate, gained, B, C, A, state)
        y = y.flip(1) if reverse else y
        y = y if D is None else y + D.to(precise) * x
        y = y if z is None else y * F.silu(z.to(precise))
        return y.to(u.dtype), state


def _by_channel(x: Tensor, channels: int) -> Tensor:
    """(B, L, N) or (B, L, G, N) to (B, L, 1 or E, N)."""
    return x.unsqueeze(2) if x.dim() == 3 else x.repeat_interleave(channels // x.shape[2], dim=2)


def _walk(delta: Tensor, x: Tensor, B: Tensor, C: Tensor, A: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """delta and x (B, L, E), B and C (B, L, 1 or E, N): y (B, L, E) and the state behind the last token."""
    length = delta.shape[1]
    if length == 0:
        return x, state
    # tokens of no duration fill up the last chunk: they keep the state as it is
    delta, x, B, C = (_chunked(t) for t in (delta, x, B, C))
    decays, inputs = (delta.unsqueeze(-1) * A).exp().split(1, 2), (x.unsqueeze(-1) * B).split(1, 2)
    local, passed = [inputs[0]], [decays[0]]  # passed: what is left of the state that entered the chunk
    for decay, new in zip(decays[1:], inputs[1:], strict=True):
        local.append(decay * local[-1] + new)
        passed.append(decay * passed[-1])
    entering, state = _join(passed[-1].squeeze(2), local[-1].squeeze(2), state)
    states = torch.cat([own + left * entering.unsqueeze(2) for own, left in zip(local, passed, strict=True)], dim=2)
    y = states @ C.transpose(-1, -2) if C.shape[3] == 1 else (states * C).sum(-1, keepdim=True)
    return y.squeeze(-1).flatten(1, 2)[:, :length], state


def _join(left: Tensor, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What enters every chunk, (B, chunks, E, N), and what leaves the last, by doubling the stretch that each one spans."""
    added = torch.cat((added[:, :1] + left[:, :1] * state.unsqueeze(1), added[:, 1:]), dim=1)
    span = 1
    while span < left.shape[1]:
        added = torch.cat((added[:, :span], added[:, span:] + left[:, span:] * added[:, :-span]), dim=1)
        left = torch.cat((left[:, :span], left[:, span:] * left[:, :-span]), dim=1)
        span *= 2
    return torch.cat((state.unsqueeze(1), added[:, :-1]), dim=1), added[:, -1]


def _chunked(x: Tensor) -> Tensor:
    """(B, L, ...) to (B, chunks, STEPS, ...), zeros behind the end."""
    missing = -x.shape[1] % STEPS
    if missing:
        x = torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), dim=1)
    return x.unflatten(1, (-1, STEPS))
