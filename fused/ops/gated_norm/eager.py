"""The gated norm of Mamba-2 in PyTorch operations, for any device."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fused.runtime.autocast import no_autocast
from fused.runtime.dtypes import accumulation_dtype


def gated_norm_eager(
    y: Float[Tensor, "*B E"],
    z: Float[Tensor, "*B E"],
    weight: Float[Tensor, " E"] | None,
    *,
    groups: int = 1,
    norm_before_gate: bool = False,
    eps: float = 1e-5,
) -> Float[Tensor, "*B E"]:
    """Return norm(y silu(z)), or norm(y) silu(z) with `norm_before_gate`, in y's dtype, computed in at least float32.

    The norm is v / sqrt(mean(v^2) + eps) * weight, with one mean for each of the `groups` of consecutive channels. Without a
    weight there is no norm: y silu(z).
    """
    dtype = accumulation_dtype(y.dtype)
    with no_autocast(y.device):
        v, gate = y.to(dtype), F.silu(z.to(dtype))
        if weight is None:
            return (v * gate).to(y.dtype)
        if not norm_before_gate:
            v = v * gate
        parts = v.unflatten(-1, (groups, -1))
        rstd = torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
        v = (parts * rstd).flatten(-2) * weight.to(dtype)
        return (v * gate if norm_before_gate else v).to(y.dtype)
