"""The scan of Mamba-2 (SSD): a linear recurrence with one decay for all states of a head."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from reference.ops.dtypes import accumulation_dtype

BLOCK = 64  # tokens whose states the backward holds at once; no result depends on it


def ssd(
    x: Float[Tensor, "B L H P"],
    dt: Float[Tensor, "B L H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "B L G N"],
    C: Float[Tensor, "B L G N"],
    D: Float[Tensor, " H"] | Float[Tensor, "H P"] | None = None,
    z: Float[Tensor, "B L H P"] | None = None,
    dt_bias: Float[Tensor, " H"] | None = None,
    *,
    softplus: bool = True,
    dt_limit: Sequence[float | int] = (0.0, math.inf),
    initial_state: Float[Tensor, "B H P N"] | None = None,
    seq_idx: Int[Tensor, "B L"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Tensor, "B L H P"], Float[Tensor, "B H P N"]]:
    """Run the scan of Mamba-2 over the tokens of x, with a state S (B, H, P, N), S_{-1} being the initial state:

        d_t = clamp(softplus(dt_t + dt_bias), *dt_limit)
        S_t = exp(d_t A) S_{t-1} + d_t x_t B_t^T
        y_t = (S_t C_t + D x_t) silu(z_t)

    Source: Mamba-2, arXiv 2405.21060, and mamba-ssm's `mamba_chunk_scan_combined`. Head h reads group h // (H/G) of B and C. D
    is one number a head or one a channel.

    `seq_idx` numbers the segments of each row: where it changes, the state starts from zero. The initial state continues the
    first segment of each row, whatever its number is; upstream drops it unless that number is 0. The final state is that of the
    last segment. `reverse=True` runs from token L-1 to token 0: the initial state then continues the last segment, and the
    final state is that after token 0. The default initial state is zero. All arithmetic is in at least float32.

    Return y (B, L, H, P) in x's dtype and the final state (B, H, P, N) in at least float32. Gradients flow to every input and
    from both outputs.
    """
    precise = accumulation_dtype(x.dtype)
    G = B.shape[2]
    with torch.autocast(x.device.type, enabled=False):
        u, d = x.to(precise), dt.to(precise)
        if dt_bias is not None:
            d = d + dt_bias.to(precise)
        if softplus:
            d = F.softplus(d)
        d = d.clamp(*dt_limit)
        if initial_state is None:
            initial_state = u.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])

        # Heads as (G, H/G), so that B and C (B, L, G, 1, 1, N) broadcast over heads and channels of their group.
        Bg, Cg = (t.to(precise)[:, :, :, None, None] for t in (B, C))
        ug, dg = u.unflatten(2, (G, -1)), d.unflatten(2, (G, -1))
        Ag, S = A.to(precise).unflatten(0, (G, -1)), initial_state.to(precise).unflatten(1, (G, -1))
        y, S = _scan_in_blocks(ug, dg, Ag, Bg, Cg, S, _segment_starts(seq_idx, x, reverse), reverse)
        y, S = y.flatten(2, 3), S.flatten(1, 2)

        if D is not None:
            y = y + (D if D.dim() == 2 else D[:, None]).to(precise) * u
        if z is not None:
            y = y * F.silu(z.to(precise))
        return y.to(x.dtype), S


def _segment_starts(seq_idx: Tensor | None, x: Tensor, reverse: bool) -> Tensor:
    """Return (B, L), True at tokens whose predecessor in the order of the scan is of another segment."""
    starts = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    if seq_idx is not None:
        change = seq_idx[:, 1:] != seq_idx[:, :-1]
        (starts[:, :-1] if reverse else starts[:, 1:]).copy_(change)
    return starts


def _scan_in_blocks(
    x: Tensor, d: Tensor, A: Tensor, B: Tensor, C: Tensor, S: Tensor, starts: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Run the recurrence block by block: a block keeps no states, its backward computes them again. Shapes of `_scan_block`."""
    blocks = list(zip(*(t.split(BLOCK, 1) for t in (x, d, B, C, starts)), strict=True))
    outputs = []
    for x, d, B, C, starts in reversed(blocks) if reverse else blocks:
        if torch.is_grad_enabled():
            y, S = checkpoint(_scan_block, x, d, B, C, starts, A, S, reverse, use_reentrant=False, preserve_rng_state=False)
        else:
            y, S = _scan_block(x, d, B, C, starts, A, S, reverse)
        outputs.append(y)
    return torch.cat(outputs[::-1] if reverse else outputs, dim=1), S


def _scan_block(
    x: Tensor, d: Tensor, B: Tensor, C: Tensor, starts: Tensor, A: Tensor, S: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Run the recurrence token by token: S_t = exp(d_t A) S_{t-1} + d_t x_t B_t^T and y_t = S_t C_t.

    x, y (B, L, G, H/G, P); d (B, L, G, H/G); B, C (B, L, G, 1, 1, N); starts (B, L); A (G, H/G); S (B, G, H/G, P, N). Return y
    and the last S.
    """
    tokens = list(zip(*(t.unbind(1) for t in (x, d, B, C, starts)), strict=True))
    if not tokens:
        return torch.zeros_like(x), S
    outputs = []
    for x_t, d_t, B_t, C_t, start in reversed(tokens) if reverse else tokens:
        S = torch.where(start[:, None, None, None, None], 0, S)
        S = torch.exp(d_t * A)[..., None, None] * S + (d_t[..., None] * x_t)[..., None] * B_t
        outputs.append((S * C_t).sum(-1))
    return torch.stack(outputs[::-1] if reverse else outputs, dim=1), S
