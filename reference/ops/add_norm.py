"""Residual addition and normalisation: the step between two mixers."""

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

    x and residual have one shape, (..., D); weight and bias are (D,). y is computed from the sum before the sum is rounded for
    storage, as in mamba-ssm's `rms_norm_fn` and `layer_norm_fn`.

    Return y in x's dtype. With `prenorm` also return v, the new residual: in the residual's dtype if one was given, else in at
    least float32 when `residual_in_fp32`, else in x's dtype. Raise ValueError for an unknown kind.
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
    residual_dtype = residual.dtype if residual is not None else precise if residual_in_fp32 else x.dtype
    return y.to(x.dtype), v.to(residual_dtype)
