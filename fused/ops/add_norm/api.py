"""Residual addition and normalisation, which come between two mixers.

    v = x + residual
    y = v / sqrt(mean(v^2) + eps) * weight + bias                             kind "rms"
    y = (v - mean(v)) / sqrt(mean((v - mean(v))^2) + eps) * weight + bias     kind "layer"

The means are over the last dimension, and y comes from v before v is rounded for storage.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from fused import backends
from fused.backends import CPU, NATIVE, TORCH, Abilities
from fused.ops import mamba_ssm
from fused.ops.add_norm.cpu import add_norm_cpu
from fused.ops.add_norm.eager import add_norm_eager
from fused.ops.shapes import Rows
from fused.runtime.checks import check_choice, check_tensor
from fused.runtime.dtypes import KERNEL_DTYPES

KINDS = ("rms", "layer")


BACKENDS = {
    "native": NATIVE,
    "cpu": CPU,
    "mamba_ssm": Abilities(False, False, False, False, KERNEL_DTYPES, ("cuda",)),
    "torch": TORCH,
}
"""Abilities of the backends that have this operator."""


def add_norm(
    x: Rows,
    weight: Float[Tensor, " D"],
    bias: Float[Tensor, " D"] | None = None,
    *,
    residual: Rows | None = None,
    eps: float = 1e-5,
    kind: str = "rms",
    prenorm: bool = True,
    residual_in_fp32: bool = True,
    backend: str = "auto",
) -> Rows | tuple[Rows, Rows]:
    """Return y (..., D) in x's dtype, or (y, residual_out), both (..., D), if `prenorm`.

    Computes in at least float32. residual_out is v in the residual's dtype if one came, else in at least float32 when
    `residual_in_fp32`, else in x's dtype. Gradients reach every tensor and flow from both results.

    Raises TypeError or ValueError for an argument that does not fit, ValueError for a dtype that the backend does not
    have, BackendError for a backend that cannot run here.

        >>> y, residual = add_norm(torch.randn(2, 63, 8), torch.ones(8))
    """
    _check(x, weight, bias, residual, kind)
    backends.check_abilities("add_norm", BACKENDS, backend, x.dtype, {})
    run = implementation(backends.choose(backend, x.device))
    return run(
        x,
        weight,
        bias,
        residual=residual,
        eps=eps,
        kind=kind,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
    )


def implementation(backend: str) -> Callable[..., Any]:
    """Return the operator of a concrete backend, without argument checks; its arguments are those above but for `backend`."""
    operator_backend = backends.operators_of(backend)
    if operator_backend == "native":
        from fused.ops.add_norm.native import add_norm_native  # Triton is imported where it is used

        return add_norm_native
    if operator_backend == "cpu":
        return add_norm_cpu
    return mamba_ssm.add_norm if operator_backend == "mamba_ssm" else add_norm_eager


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, kind: str) -> None:
    op = "add_norm"
    if isinstance(x, Tensor) and x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    letters = " ".join(["B"] * (x.dim() - 1) + ["D"]) if isinstance(x, Tensor) else "B D"
    check_tensor(op, "x", x, letters, {}, None)
    sizes = {"D": x.shape[-1]}
    check_tensor(op, "weight", weight, "D", sizes, x.device)
    if bias is not None:
        check_tensor(op, "bias", bias, "D", sizes, x.device)
    if residual is not None:
        check_tensor(op, "residual", residual, letters, sizes, x.device)
        if residual.shape != x.shape:
            raise ValueError(f"{op}: residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    check_choice(op, "kind", kind, KINDS)
