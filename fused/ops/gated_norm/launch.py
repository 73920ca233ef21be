"""Launches of the gated norm's Triton kernels: a program a row and group forward, a range of rows backward."""

import torch
from torch import Tensor

from fused.ops.gated_norm.kernels import backward_kernel, forward_kernel
from fused.runtime import triton_launch
from fused.runtime.triton_launch import FUSED_MULTIPLY_ADD, blocks, power_of_2

PROGRAMS = 4 * 132  # of the backward, a constant, because it decides the order of sums


def forward(y: Tensor, z: Tensor, weight: Tensor, groups: int, norm_before_gate: bool, eps: float) -> Tensor:
    """Return out (..., E) in y's dtype for y and z (..., E) and weight (E,)."""
    E = y.shape[-1]
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    y, z = rows(y), rows(z)
    if out.numel():
        triton_launch.launch(
            forward_kernel, y.device, (len(y), groups),
            y, z, weight.contiguous(), out, len(y), E, E // groups, y.stride(0), z.stride(0), eps,
            NORM_BEFORE_GATE=norm_before_gate, **_options(E // groups),
        )  # fmt: skip
    return out


def backward(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, groups: int, norm_before_gate: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dy and dz (..., E) in the dtypes of y and z, and dweight (E,) in float32."""
    E = y.shape[-1]
    dy, dz = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (y, z))
    y, z, dout = rows(y), rows(z), rows(dout)
    if not dy.numel():
        return dy, dz, torch.zeros_like(weight, dtype=torch.float32)
    rows_per_program = blocks(len(y), PROGRAMS)
    programs = blocks(len(y), rows_per_program)
    partial = torch.empty((programs, E), dtype=torch.float32, device=y.device)
    triton_launch.launch(
        backward_kernel, y.device, (programs, groups),
        dout, y, z, weight.contiguous(), dy, dz, partial, len(y), E, E // groups,
        dout.stride(0), y.stride(0), z.stride(0), eps, rows_per_program,
        NORM_BEFORE_GATE=norm_before_gate, **_options(E // groups),
    )  # fmt: skip
    return dy, dz, partial.sum(0)


def rows(t: Tensor) -> Tensor:
    """Return t (..., E) as (rows, E) with contiguous columns, without a copy where its rows lie evenly apart."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _options(width: int) -> dict[str, int | bool]:
    block = power_of_2(width)
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512)), **FUSED_MULTIPLY_ADD}
