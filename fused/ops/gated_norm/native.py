"""The gated norm by kernels of this project, as the operator `videomamba::gated_norm`."""

from jaxtyping import Float
from torch import Tensor

from fused.ops.gated_norm import MAX_WIDTH, launch
from fused.runtime.checks import check_native_dtypes
from fused.runtime.library import register


def gated_norm_native(
    y: Float[Tensor, "*B E"],
    z: Float[Tensor, "*B E"],
    weight: Float[Tensor, " E"],
    *,
    groups: int = 1,
    norm_before_gate: bool = False,
    eps: float = 1e-5,
) -> Float[Tensor, "*B E"]:
    """Gate and normalise as `gated_norm_eager` does, in one kernel each way; the backward computes gate and norm again.

    Raises ValueError for groups of more than 8192 channels, and for a tensor in float64.
    """
    if y.shape[-1] // groups > MAX_WIDTH:
        raise ValueError(
            f"gated_norm: backend 'native' has groups of at most {MAX_WIDTH} channels, got y of shape {tuple(y.shape)} "
            f"in {groups} groups; use backend='torch'"
        )
    check_native_dtypes("gated_norm", y=y, z=z, weight=weight)
    return _gated_norm(y, z, weight, groups, norm_before_gate, eps)


def _forward_shapes(y: Tensor, z: Tensor, weight: Tensor, groups: int, norm_before_gate: bool, eps: float) -> Tensor:
    return y.new_empty(y.shape)


def _backward(
    y: Tensor, z: Tensor, weight: Tensor, groups: int, norm_before_gate: bool, eps: float, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dy, dz (..., E) and dweight (E,)."""
    dy, dz, dweight = launch.backward(dout, y, z, weight, groups, norm_before_gate, eps)
    return dy, dz, dweight.to(weight.dtype)


def _backward_shapes(
    y: Tensor, z: Tensor, weight: Tensor, groups: int, norm_before_gate: bool, eps: float, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)


_INPUTS = "Tensor y, Tensor z, Tensor weight, int groups, bool norm_before_gate, float eps"
_gated_norm_backward = register(
    f"gated_norm_backward({_INPUTS}, Tensor dout) -> (Tensor dy, Tensor dz, Tensor dweight)", _backward, _backward_shapes
)
_gated_norm = register(f"gated_norm({_INPUTS}) -> Tensor", launch.forward, _forward_shapes, _gated_norm_backward)
