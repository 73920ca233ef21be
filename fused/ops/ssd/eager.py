"""The SSD scan in PyTorch operations, for any device: chunk after chunk, each by matrix products.

With decays L_ij = exp(sum of d_k A over j < k <= i), 0 for i < j, a chunk that the state S enters gives

    y  = ((C B^T) o L o d) x + exp(cumsum(d A)) C S^T        S' = exp(sum(d A)) S + (L_last o d o x)^T B

L is summed entry by entry, so that no difference of large sums loses digits. Scratch memory is that of one chunk. Under
autograd a chunk keeps its inputs and the state that enters it; the backward computes the rest again.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused.runtime.autocast import no_autocast
from fused.runtime.dtypes import accumulation_dtype
from fused.runtime.library import wants_gradients
from fused.runtime.modes import is_batch_invariant

CHUNK = 64  # tokens
MAX_VALUES = 2**22  # of a chunk's matrices, (B, H, tokens, tokens), above which chunks are shorter


def ssd_eager(
    x: Float[Tensor, "B L H P"],
    dt: Float[Tensor, "B L H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "B L G N"],
    C: Float[Tensor, "B L G N"],
    D: Tensor | None = None,
    z: Float[Tensor, "B L H P"] | None = None,
    dt_bias: Float[Tensor, " H"] | None = None,
    *,
    softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Float[Tensor, "B H P N"] | None = None,
    seq_idx: Int[Tensor, "B L"] | None = None,
    reverse: bool = False,
    final: bool = True,
) -> tuple[Float[Tensor, "B L H P"], Float[Tensor, "B H P N"]]:
    """Scan as `fused.ssd` says; no argument is checked. The state comes free, also without `final`."""
    precise = accumulation_dtype(x.dtype)
    clips, length, heads, channels = x.shape
    if clips > 1 and is_batch_invariant():  # the bits of a product of matrices depend on how many there are
        tensors = (dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
        found = [_scan_clip(i, x, *tensors, softplus, dt_limit, reverse) for i in range(clips)]
        y, S = (torch.cat(parts) for parts in zip(*found, strict=True))
        return y, S
    with no_autocast(x.device):
        d = discretise(dt, dt_bias, softplus, dt_limit, precise)
        if initial_state is None:
            initial_state = torch.zeros((clips, heads, channels, B.shape[3]), dtype=precise, device=x.device)
        S, decay = initial_state.to(precise), A.to(precise)
        tokens = chunk_length(clips, heads, length)
        spans = [slice(i, min(i + tokens, length)) for i in range(0, length, tokens)]
        before = None if seq_idx is None else seq_idx[:, -1] if reverse else seq_idx[:, 0]
        tracked = wants_gradients(x, d, decay, B, C, S)
        outputs = []
        for span in reversed(spans) if reverse else spans:
            ids = None if seq_idx is None else seq_idx[:, span]
            arguments = x[:, span], d[:, span], B[:, span], C[:, span], decay, S, ids, before, reverse
            if tracked:
                y, S = checkpoint(_scan_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                y, S = _scan_chunk(*arguments)
            before = None if ids is None else ids[:, 0] if reverse else ids[:, -1]
            outputs.append(y)
        y = torch.cat(outputs[::-1] if reverse else outputs, dim=1) if outputs else x.new_empty(x.shape, dtype=precise)
        if D is not None:
            y = y + (D if D.dim() == 2 else D[:, None]).to(precise) * x.to(precise)
        if z is not None:
            y = y * F.silu(z.to(precise))
        return y.to(x.dtype), S


def _scan_clip(
    i: int, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, seq_idx: Tensor | None, softplus: bool, dt_limit: tuple[float, float], reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y (1, L, H, P) and the final state (1, H, P, N) of clip i."""
    x, dt, B, C = (t[i : i + 1].clone() for t in (x, dt, B, C))
    z, initial_state, seq_idx = (None if t is None else t[i : i + 1].clone() for t in (z, initial_state, seq_idx))
    return ssd_eager(
        x, dt, A, B, C, D, z, dt_bias, softplus=softplus, dt_limit=dt_limit, initial_state=initial_state, seq_idx=seq_idx,
        reverse=reverse,
    )  # fmt: skip


def discretise(
    dt: Tensor, dt_bias: Tensor | None, softplus: bool, dt_limit: tuple[float, float], dtype: torch.dtype
) -> Float[Tensor, "B L H"]:
    """Return d = clamp(softplus(dt + dt_bias), *dt_limit) in `dtype`."""
    d = dt.to(dtype)
    d = d if dt_bias is None else d + dt_bias.to(dtype)
    d = F.softplus(d) if softplus else d
    return d.clamp(*dt_limit)


def chunk_length(clips: int, heads: int, length: int) -> int:
    """Return the tokens of a chunk: CHUNK, or fewer where the chunk's matrices would be large."""
    tokens = CHUNK
    while tokens > 8 and clips * heads * tokens * tokens > MAX_VALUES:
        tokens //= 2
    return max(1, min(tokens, length))


def _scan_chunk(
    x: Tensor, d: Tensor, B: Tensor, C: Tensor, A: Tensor, S: Tensor, ids: Tensor | None, before: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return y (B, q, H, P) of a chunk of q tokens, without D and z, and the state (B, H, P, N) after it.

    ids (B, q) are the segments of the tokens, `before` (B,) the segment that the state S belongs to.
    """
    if reverse:
        x, d, B, C = x.flip(1), d.flip(1), B.flip(1), C.flip(1)
        ids = None if ids is None else ids.flip(1)
    groups, tokens, dtype = B.shape[2], x.shape[1], d.dtype
    x, d = x.to(dtype).transpose(1, 2).unflatten(1, (groups, -1)), d.transpose(1, 2).unflatten(1, (groups, -1))
    B, C = (m.to(dtype).transpose(1, 2) for m in (B, C))  # (B, G, q, N); x (B, G, H/G, q, P), d (B, G, H/G, q)
    S = S.unflatten(1, (groups, -1))
    log_decay = d * A.unflatten(0, (groups, -1))[..., None]
    ones = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device)
    later = log_decay[..., None].expand(*log_decay.shape, tokens).masked_fill(~ones.tril(-1), 0)
    decay = torch.exp(later.cumsum(-2).masked_fill(~ones.tril(), -math.inf))
    from_state = torch.exp(log_decay.cumsum(-1))
    if ids is not None and before is not None:
        decay = decay.masked_fill((ids[:, :, None] != ids[:, None])[:, None, None], 0)
        from_state = from_state.masked_fill((ids != before[:, None])[:, None, None], 0)
    weights = (C @ B.transpose(2, 3)).unsqueeze(2) * decay * d[..., None, :]
    y = weights @ x + from_state[..., None] * (C.unsqueeze(2) @ S.transpose(3, 4))
    scaled = x * (d * decay[..., -1, :])[..., None]
    S = from_state[..., -1, None, None] * S + scaled.transpose(3, 4) @ B.unsqueeze(2)
    y = y.flatten(1, 2).transpose(1, 2)
    return y.flip(1) if reverse else y, S.flatten(1, 2)
