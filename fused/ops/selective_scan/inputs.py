"""The inputs of a scan, and the form in which its kernels read them: macros, strides, flags."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused.ops.selective_scan.kernel_source import (
    A_LOG,
    REVERSE,
    SOFTPLUS_BY_CALLER,
    SOFTPLUS_IN_KERNEL,
    defines,
    source,
)
from fused.ops.selective_scan.schedule import ScanSchedule
from fused.runtime import nvrtc


class ScanInputs(NamedTuple):
    """The inputs of a scan, one entry a direction.

    u, delta, z (B, L, E) and B, C (B, L, N) have one dtype and unit stride along the last axis, and the two of a pair have the
    same strides. A (E, N), D and delta_bias (E,) are float32 and contiguous.
    """

    reverses: tuple[bool, ...]  # (False,), (True,) or (False, True)
    u: Sequence[Tensor]
    delta: Sequence[Tensor]
    A: Sequence[Tensor]
    B: Sequence[Tensor]
    C: Sequence[Tensor]
    D: Sequence[Tensor | None]
    delta_bias: Sequence[Tensor | None]
    z: Tensor | None
    softplus: int = SOFTPLUS_IN_KERNEL  # of delta; SOFTPLUS_BY_CALLER: the gradient is that of softplus's input
    A_is_log: bool = False  # A holds log(-A)
    tile_queries: Tensor | None = None  # of `query_rows`: z, y and their gradients are then (B, num_queries, E), and the
    num_queries: int = 0  # gradient of C is zero at other rows

    @property
    def y_shape(self) -> tuple[int, int, int]:
        """Return the shape of y."""
        B, L, E = self.u[0].shape
        return B, L if self.tile_queries is None else self.num_queries, E

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Return (B, L, E, N)."""
        return (*self.u[0].shape, self.A[0].shape[1])

    @property
    def forward_direction(self) -> "ScanInputs":
        """Return the inputs of the first direction alone, without the gate."""
        pairs = (self.reverses, self.u, self.delta, self.A, self.B, self.C, self.D, self.delta_bias)
        one: Any = [pair[:1] for pair in pairs]
        settings: Any = (None, self.softplus, self.A_is_log)
        return ScanInputs(*one, *settings)


def aligned_or_none(x: Tensor | None) -> Tensor | None:
    """Return x contiguous and at an address where four float32 can be read at once; None for None."""
    if x is None:
        return None
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def flags_of(s: ScanInputs) -> int:
    """Return the bits of the kernels' argument `flags`."""
    return A_LOG * s.A_is_log + REVERSE * s.reverses[0]


def query_arguments(s: ScanInputs) -> tuple[Any, ...]:
    """Return the arguments of QUERY_PARAMS in common.cu."""
    return () if s.tile_queries is None else (s.tile_queries, s.num_queries)


def input_arguments(s: ScanInputs) -> tuple[Any, ...]:
    """Return the kernels' first arguments, in the order of STREAM_PARAMS in common.cu."""
    u, delta, B, C, z = s.u, s.delta, s.B, s.C, s.z
    return (
        u[0], u[-1], u[0].stride(0), u[0].stride(1), delta[0], delta[-1], delta[0].stride(0), delta[0].stride(1),
        *((None, 0, 0) if z is None else (z, z.stride(0), z.stride(1))),
        B[0], B[-1], B[0].stride(0), B[0].stride(1), C[0], C[-1], C[0].stride(0), C[0].stride(1),
        s.A[0], s.A[-1], s.D[0], s.D[-1], s.delta_bias[0], s.delta_bias[-1],
    )  # fmt: skip


def compiled_module(name: str, s: ScanInputs, plan: ScanSchedule, keep: bool, *others: Tensor | None) -> Any:
    """Return the compiled kernels of `source(name)` for these inputs; `others` (B, L, E) are also read or written."""
    E, N = s.u[0].shape[2], s.A[0].shape[1]
    vectorized = E % 4 == 0 and _readable(4, (*s.u, *s.delta, s.z, *others))
    vectorized_bc = N % 4 == 0 and _readable(4, (*s.B, *s.C))
    no_padding = vectorized and vectorized_bc and N == plan.padded_states and E % plan.widest_block == 0
    macros = defines(
        io_dtype=s.u[0].dtype, schedule=plan, directions=len(s.reverses),
        vectorized=vectorized, vectorized_bc=vectorized_bc, no_padding=no_padding,
        softplus=int(s.softplus), has_z=s.z is not None, store_tile_states=keep,
        query_rows=s.tile_queries is not None,
    )  # fmt: skip
    return nvrtc.module(source(name), macros, s.u[0].device)


def _readable(count: int, tensors: tuple[Tensor | None, ...]) -> bool:
    """Return whether groups of `count` elements can be read at once from each of the tensors (B, L, ...)."""
    for x in tensors:
        if x is not None and (x.stride(0) % count or x.stride(1) % count or x.data_ptr() % (count * x.element_size())):
            return False
    return True


def has_moments(s: ScanInputs, plan: ScanSchedule) -> bool:
    """Return whether the schedule and the forward's program for these inputs have state passes by moments (HAS_MOMENTS)."""
    E, N, config, splits = s.u[0].shape[2], s.A[0].shape[1], plan.fwd_config, plan.moments_schedule
    if splits is None or splits.num_splits == 1 or 0 in s.u[0].shape:
        return False
    fits = N == 16 and E % plan.widest_block == 0 and config.warps == 1 and config.channels_per_thread == 2
    if not fits or s.u[0].dtype != torch.bfloat16 or s.softplus != SOFTPLUS_BY_CALLER:
        return False
    return _readable(4, (s.z, *s.C)) and _readable(8, (*s.u, *s.delta, *s.B))
