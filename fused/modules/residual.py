"""The residual stream and its norms: one rule for every layer and for the final norm.

With `fused_add_norm` the sum and the norm are one operator, and the norm sees the sum before it is rounded. Without it, as in
upstream's unfused path, the sum is rounded to its dtype first, and the norm's input is cast to the dtype of the norm's weight.
All tensors are (B, L, D).
"""

from torch import Tensor

from fused.modules.norm import DropPath, Norm
from fused.modules.wrapped import is_untouched, weight_of
from fused.runtime.dtypes import accumulation_dtype


def pre_norm(
    norm: Norm, hidden: Tensor, residual: Tensor | None, *, fused_add_norm: bool, residual_in_fp32: bool, backend: str,
    drop_path: DropPath | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (norm(residual + hidden), residual + hidden): a mixer's input and the new residual stream.

    hidden goes through `drop_path` first, by the native norm in the same kernel. `residual` is None for the first layer. With
    `residual_in_fp32` the new stream is at least float32.
    """
    if residual is not None and drop_path is not None:
        drops = drop_path.rate > 0 and drop_path.training
        if drops and fused_add_norm and backend in ("native", "native_kept") and is_untouched(drop_path, DropPath):
            kept, scale = drop_path.draw(hidden)
            return norm(hidden, backend, residual, prenorm=True, residual_in_fp32=residual_in_fp32, kept=kept, scale=scale)
        hidden = drop_path(hidden)
    if fused_add_norm:
        return norm(hidden, backend, residual, prenorm=True, residual_in_fp32=residual_in_fp32)
    residual = hidden if residual is None else residual + hidden
    normed = norm_stream(norm, residual, backend)
    return normed, residual.to(accumulation_dtype(residual.dtype)) if residual_in_fp32 else residual


def final_norm(norm: Norm, hidden: Tensor, residual: Tensor, *, fused_add_norm: bool, backend: str) -> Tensor:
    """Return norm(residual + hidden), the output of a stack of layers; the sum is not stored with `fused_add_norm`."""
    if fused_add_norm:
        return norm(hidden, backend, residual)
    return norm_stream(norm, residual + hidden, backend)


def norm_stream(norm: Norm, residual: Tensor, backend: str) -> Tensor:
    """Return norm(residual), in the dtype of the norm's weight."""
    return norm(residual.to(weight_of(norm).dtype), backend)
