"""The selective scan of Mamba: a linear recurrence whose coefficients depend on the token."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from reference.ops.dtypes import accumulation_dtype

BLOCK = 64  # tokens whose states the backward holds at once; no result depends on it


def selective_scan(
    u: Float[Tensor, "B L E"],
    delta: Float[Tensor, "B L E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "B L *G N"],
    C: Float[Tensor, "B L *G N"],
    D: Float[Tensor, " E"] | None = None,
    z: Float[Tensor, "B L E"] | None = None,
    delta_bias: Float[Tensor, " E"] | None = None,
    *,
    softplus: bool = True,
    initial_state: Float[Tensor, "B E N"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E N"]]:
    """Run the selective scan over the tokens of u, with a state h (B, E, N), h_{-1} being the initial state:

        d_t = softplus(delta_t + delta_bias)
        h_t = exp(d_t A) h_{t-1} + d_t B_t u_t
        y_t = (sum_n C_t h_t + D u_t) silu(z_t)

    Source: Mamba, arXiv 2312.00752, eq. 2a-b, with A discretised by zero-order hold and B by Euler's rule, as in mamba-ssm.

    B and C may have groups, (B, L, G, N): channel e reads group e // (E/G). `reverse=True` runs from token L-1 to token 0: the
    initial state enters after the last token, and the final state is that after token 0. The default initial state is zero.
    All arithmetic is in at least float32.

    Return y (B, L, E) in u's dtype and the final state (B, E, N) in at least float32. Gradients flow to every input and from
    both outputs.
    """
    precise = accumulation_dtype(u.dtype)
    G = B.shape[2] if B.dim() == 4 else 1
    with torch.autocast(u.device.type, enabled=False):
        x, d = u.to(precise), delta.to(precise)
        if delta_bias is not None:
            d = d + delta_bias.to(precise)
        if softplus:
            d = F.softplus(d)
        if initial_state is None:
            initial_state = A.new_zeros((u.shape[0], *A.shape))

        # Channels as (G, E/G), so that B and C (B, L, G, 1, N) broadcast over the channels of their group.
        Bg, Cg = ((t if t.dim() == 4 else t.unsqueeze(2)).to(precise).unsqueeze(3) for t in (B, C))
        xg, dg = x.unflatten(-1, (G, -1)), d.unflatten(-1, (G, -1))
        Ag, h0 = A.to(precise).unflatten(0, (G, -1)), initial_state.to(precise).unflatten(1, (G, -1))
        y, h = _scan_in_blocks(xg, dg, Ag, Bg, Cg, h0, reverse)
        y, h = y.flatten(2), h.flatten(1, 2)

        if D is not None:
            y = y + D.to(precise) * x
        if z is not None:
            y = y * F.silu(z.to(precise))
        return y.to(u.dtype), h


def _scan_in_blocks(
    x: Tensor, d: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Run the recurrence block by block: a block keeps no states, its backward computes them again. Shapes of `_scan_block`."""
    blocks = list(zip(x.split(BLOCK, 1), d.split(BLOCK, 1), B.split(BLOCK, 1), C.split(BLOCK, 1), strict=True))
    outputs = []
    for x, d, B, C in reversed(blocks) if reverse else blocks:
        if torch.is_grad_enabled():
            y, h = checkpoint(_scan_block, x, d, B, C, A, h, reverse, use_reentrant=False, preserve_rng_state=False)
        else:
            y, h = _scan_block(x, d, B, C, A, h, reverse)
        outputs.append(y)
    return torch.cat(outputs[::-1] if reverse else outputs, dim=1), h


def _scan_block(x: Tensor, d: Tensor, B: Tensor, C: Tensor, A: Tensor, h: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Run the recurrence token by token: h_t = exp(d_t A) h_{t-1} + d_t B_t x_t and y_t = sum_n C_t h_t.

    x, d, y (B, L, G, E/G); B, C (B, L, G, 1, N); A (G, E/G, N); h (B, G, E/G, N). Return y and the last h.
    """
    tokens = list(zip(x.unbind(1), d.unbind(1), B.unbind(1), C.unbind(1), strict=True))
    if not tokens:
        return torch.zeros_like(x), h
    outputs = []
    for x_t, d_t, B_t, C_t in reversed(tokens) if reverse else tokens:
        h = torch.exp(d_t[..., None] * A) * h + (d_t * x_t)[..., None] * B_t
        outputs.append((h * C_t).sum(-1))
    return torch.stack(outputs[::-1] if reverse else outputs, dim=1), h
