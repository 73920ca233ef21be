"""The SSD scan by kernels of this project, as the operator `videomamba::ssd`."""

import math

import torch
from torch import Tensor

from fused.ops.ssd import launch, launch_backward
from fused.runtime.checks import check_native_dtypes
from fused.runtime.library import register
from fused.runtime.modes import is_batch_invariant


def ssd_native(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, *, softplus: bool = True, dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None, seq_idx: Tensor | None = None, reverse: bool = False, final: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan as `fused.ssd` says. Without `final` the state is empty, which takes a third of the products for it.

    Raises ValueError for more than 128 channels a head or 256 states, and for a tensor in float64.
    """
    P, N = x.shape[3], B.shape[3]
    if P > launch.MAX_CHANNELS or N > launch.MAX_STATES:
        raise ValueError(
            f"ssd: backend 'native' has P of at most {launch.MAX_CHANNELS} and N of at most {launch.MAX_STATES}, got x of "
            f"shape {tuple(x.shape)} and B of shape {tuple(B.shape)}; use backend='torch'"
        )
    check_native_dtypes("ssd", x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state)
    options = softplus, *dt_limit, reverse, is_batch_invariant(), final
    return _ssd(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, *options)


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, seq_idx: Tensor | None, softplus: bool, low: float, high: float, reverse: bool,
    batch_invariant: bool, final: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y (B, L, H, P) and the final state (B, H, P, N)."""
    return launch.forward(
        x, dt, A, B, C, D, z, dt_bias, softplus, low, high, initial_state, seq_idx, reverse, final,
        batch_invariant=batch_invariant,
    )  # fmt: skip


def _forward_shapes(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, seq_idx: Tensor | None, softplus: bool, low: float, high: float, reverse: bool,
    batch_invariant: bool, final: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    state = (x.shape[0], *x.shape[2:], B.shape[3]) if final else (0,)
    return x.new_empty(x.shape), x.new_empty(state, dtype=torch.float32)


def _backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, seq_idx: Tensor | None, softplus: bool, low: float, high: float, reverse: bool,
    batch_invariant: bool, final: bool, dy: Tensor | None, dfinal: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients of the nine tensors before seq_idx in their dtypes, None for None."""
    dy, dfinal = torch.zeros_like(x) if dy is None else dy, dfinal if final else None
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    found = launch_backward.backward(
        dy, dfinal, x, dt, A, B, C, D, z, dt_bias, softplus, low, high, initial_state, seq_idx, reverse,
        batch_invariant=batch_invariant,
    )  # fmt: skip
    pairs = zip(inputs, found, strict=True)
    return tuple(None if t is None or g is None else g.to(t.dtype) for t, g in pairs)


def _backward_shapes(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, seq_idx: Tensor | None, softplus: bool, low: float, high: float, reverse: bool,
    batch_invariant: bool, final: bool, dy: Tensor | None, dfinal: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, dt, A, B, C, D, z, dt_bias, initial_state))


_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? seq_idx, bool softplus, float low, float high, bool reverse, bool batch_invariant, "
    "bool final"
)
_ssd_backward = register(
    f"ssd_backward({_INPUTS}, Tensor? dy, Tensor? dfinal) -> (Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, "
    "Tensor dD, Tensor dz, Tensor ddt_bias, Tensor dinitial_state)",
    _backward,
    _backward_shapes,
)
_ssd = register(
    f"ssd({_INPUTS}) -> (Tensor y, Tensor final_state)",
    _forward,
    _forward_shapes,
    _ssd_backward,
)
