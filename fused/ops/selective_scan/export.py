"""The scan as a pure function of its arguments, for `torch.export` and ONNX, which take no loops over scratch memory.

    h_t = a_t h_{t-1} + w_t           a_t = exp(delta_t * A)

The tokens are cut into splits. All splits advance together, one token a step, each from a state of zero. Splits are then joined
by their decays, twice as many at each step. Last, every token adds the state that entered its split, multiplied by the decays
since then. A graph has about 8 + log2(L) steps for L tokens, and holds all L states at once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fused.runtime.autocast import no_autocast
from fused.runtime.dtypes import accumulation_dtype

TOKENS_PER_SPLIT = 8  # with fewer, joining splits costs more memory traffic than it saves graph nodes


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None,
    softplus: bool, state: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (y (B, L, E), final_state (B, E, N)) as `fused.selective_scan` does.

    A call holds five tensors of B * L * E * N elements.
    """
    dtype = accumulation_dtype(u.dtype)
    with no_autocast(u.device):
        x, delta, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
        delta = delta if delta_bias is None else delta + delta_bias.to(dtype)
        delta = F.softplus(delta) if softplus else delta
        tokens = delta, delta * x, _by_channel(B, x.shape[2]), _by_channel(C, x.shape[2])
        delta, delta_x, B, C = (t.flip(1) for t in tokens) if reverse else tokens
        state = x.new_zeros(x.shape[0], *A.shape) if state is None else state.to(dtype)
        y, state = _scan(delta, delta_x, B, C, A, state)
        y = y.flip(1) if reverse else y
        y = y if D is None else y + D.to(dtype) * x
        y = y if z is None else y * F.silu(z.to(dtype))
        return y.to(u.dtype), state


def _by_channel(x: Tensor, channels: int) -> Tensor:
    """Return (B, L, N) or (B, L, G, N) as (B, L, 1 or E, N)."""
    return x.unsqueeze(2) if x.dim() == 3 else x.repeat_interleave(channels // x.shape[2], dim=2)


def _scan(delta: Tensor, x: Tensor, B: Tensor, C: Tensor, A: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return y (B, L, E) and the final state for delta and x (B, L, E), B and C (B, L, 1 or E, N)."""
    length = delta.shape[1]
    if length == 0:
        return x, state
    # tokens of delta 0 fill up the last split: they keep the state as it is
    delta, x, B, C = (_split(t) for t in (delta, x, B, C))
    decays, inputs = (delta.unsqueeze(-1) * A).exp().split(1, 2), (x.unsqueeze(-1) * B).split(1, 2)
    # the states of a split that zero enters, and the products of its decays up to each token
    local_states, decay_products = [inputs[0]], [decays[0]]
    for decay, new in zip(decays[1:], inputs[1:], strict=True):
        local_states.append(decay * local_states[-1] + new)
        decay_products.append(decay * decay_products[-1])
    initial_states, state = _join(decay_products[-1].squeeze(2), local_states[-1].squeeze(2), state)
    pairs = zip(local_states, decay_products, strict=True)
    states = torch.cat([local + decay * initial_states.unsqueeze(2) for local, decay in pairs], dim=2)
    y = states @ C.transpose(-1, -2) if C.shape[3] == 1 else (states * C).sum(-1, keepdim=True)
    return y.squeeze(-1).flatten(1, 2)[:, :length], state


def _join(decay: Tensor, final: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states that enter every split, (B, splits, E, N), and the final state (B, E, N), by doubling the span of each.

    `decay` and `final` are (B, splits, E, N): the decay over a split, and its final state if a state of zero enters it. `state`
    (B, E, N) enters the first split.
    """
    final = torch.cat((final[:, :1] + decay[:, :1] * state.unsqueeze(1), final[:, 1:]), dim=1)
    span = 1
    while span < decay.shape[1]:
        final = torch.cat((final[:, :span], final[:, span:] + decay[:, span:] * final[:, :-span]), dim=1)
        decay = torch.cat((decay[:, :span], decay[:, span:] * decay[:, :-span]), dim=1)
        span *= 2
    return torch.cat((state.unsqueeze(1), final[:, :-1]), dim=1), final[:, -1]


def _split(x: Tensor) -> Tensor:
    """Return (B, L, ...) as (B, splits, TOKENS_PER_SPLIT, ...), zeros after the last token."""
    missing = -x.shape[1] % TOKENS_PER_SPLIT
    if missing:
        x = torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), dim=1)
    return x.unflatten(1, (-1, TOKENS_PER_SPLIT))
