"""Add and normalise: the step between two mixers, on the residual stream."""

import torch
from jaxtyping import Float
from torch import Tensor

from reference.ops.dtypes import accumulation_dtype


def add_norm(
    x: Float[Tensor, "*B D"],
    weight: Float[Tensor, " D"],
    bias: Float[Tensor, " D"] | None = None,
    *,
    residual: Float[Tensor, "*B D"] | None = None,
    eps: float = 1e-5,
    kind: str = "rms",
    prenorm: bool = True,
    residual_in_fp32: bool = True,
) -> Float[Tensor, "*B D"] | tuple[Float[Tensor, "*B D"], Float[Tensor, "*B D"]]:
    """Add x to the residual stream and normalise the sum over its last dimension, in at least float32:

        v = x + residual
        y = v / sqrt(mean(v^2) + eps) * weight + bias                          kind "rms"
        y = (v - mean(v)) / sqrt(mean((v - mean(v))^2) + eps) * weight + bias    kind "layer"

    y comes from the sum before it is rounded for storage (mamba-ssm's `rms_norm_fn` and `layer_norm_fn`).

    Returns y in x's dtype; with `prenorm` also v, the new residual: in the residual's dtype if one came, else in at least
    float32 when `residual_in_fp32`, else in x's dtype. Raises ValueError for an unknown kind.
    """
    if kind not in ("rms", "layer"):
        raise ValueError(f"kind is {kind!r}; allowed are 'rms' and 'layer'")
    precise = accumulation_dtype(x.dtype)
    v = x.to(precise) if residual is None else x.to(precise) + residual.to(precise)

    centred = v if kind == "rms" else v - v.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(precise)
    if bias is not None:
        y = y + bias.to(precise)
    if not prenorm:
        return y.to(x.dtype)
    stored = residual.dtype if residual is not None else precise if residual_in_fp32 else x.dtype
    return y.to(x.dtype), v.to(stored)
