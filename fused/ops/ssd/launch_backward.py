"""Launches of the SSD scan's backward.

With the words of `launch.py`, G the gradient of the state that leaves a chunk, dy that of y without its gate, and
L_ij = a_(j+1) ... a_i for j <= i, a chunk that the state S enters gives

    dC_i = sum over j of L_ij d_j (dy_i . x_j) B_j + a_1 ... a_i S^T dy_i
    dB_j = d_j (sum over i of L_ij (dy_i . x_j) C_i + a_(j+1) ... a_Q G^T x_j)
    dx_j = d_j (sum over i of L_ij (C_i . B_j) dy_i + a_(j+1) ... a_Q G B_j) + D dy_j
    dS   = a_1 ... a_Q G + sum over i of a_1 ... a_i dy_i C_i^T

The gradient of log a_t is the sum of all terms of y . dy and of G . S' whose decays contain a_t. Every term is the product of a
token's output or the leaving state, and of a token's input or the entering state: those within a chunk are summed from the same
numbers by row and by column. Those that go through the chunk from state to state are a_1 ... a_Q G . S: in float32 the states
that enter the chunks are stored for it; in bfloat16 it is G . S' at the end of the span, less the chunk's own terms.

Kernels: those before `scan` again, for the states that enter the spans; the same for the gradients, from the last span on; then
each span forwards with its state (dC) and backwards with the gradient of its state (dB, dx); then dt, A and the bias from what
these two have stored for every token; then the sums of dB and dC over the heads of a group. All sums are in a fixed order.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused.ops.ssd import launch
from fused.ops.ssd.backward_kernels import (
    gradient_forward_kernel,
    gradient_reverse_kernel,
    reduce_kernel,
    span_gradient_kernel,
    steps_backward_kernel,
)
from fused.ops.ssd.launch import STEPS, Config, empty_span_states, head_strides, pass_states, prepare, rows
from fused.runtime import triton_launch
from fused.runtime.triton_launch import FUSED_MULTIPLY_ADD, blocks

REDUCE = {"BLOCK": 1024, "num_warps": 4, **FUSED_MULTIPLY_ADD}


class Gradients(NamedTuple):
    """The gradients of a scan, of the shapes of its inputs; None for what was None."""

    x: Tensor
    dt: Tensor
    A: Tensor  # float32
    B: Tensor
    C: Tensor
    D: Tensor | None  # float32
    z: Tensor | None
    dt_bias: Tensor | None  # float32
    initial_state: Tensor | None  # float32


def backward(
    dy: Tensor, dfinal: Tensor | None,
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    softplus: bool, low: float, high: float, initial_state: Tensor | None, seq_idx: Tensor | None, reverse: bool,
    config: Config | None = None,
) -> Gradients:  # fmt: skip
    """Return the gradients for dy (B, L, H, P) and the gradient of the final state (B, H, P, N) or None.

    Other arguments are those of `launch.forward`. With a gate, y is computed again without it, in float32.
    """
    dz = None
    if z is not None:
        dy, dz = _gate_backward(dy, z, launch.forward(
            x.float(), dt, A, B, C, D, None, dt_bias, softplus, low, high, initial_state, seq_idx, reverse
        )[0])  # fmt: skip
        gradients = _backward(
            dy, dfinal, x.float(), dt, A, B, C, D, dt_bias, softplus, low, high, initial_state, seq_idx, reverse, None
        )
        return gradients._replace(x=gradients.x.to(x.dtype), z=dz)
    return _backward(
        dy, dfinal, x, dt, A, B, C, D, dt_bias, softplus, low, high, initial_state, seq_idx, reverse, config
    )


def _gate_backward(dy: Tensor, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of y before the gate, in float32, and of z."""
    gate = z.float()
    dz = torch.ops.aten.silu_backward(dy.float() * y, gate)
    return dy.float() * F.silu(gate), dz.to(z.dtype)


def _backward(
    dy: Tensor, dfinal: Tensor | None,
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    softplus: bool, low: float, high: float, initial_state: Tensor | None, seq_idx: Tensor | None, reverse: bool,
    config: Config | None,
) -> Gradients:  # fmt: skip
    x, dt, B, C, dy = (rows(t) for t in (x, dt, B, C, dy))
    clips, L, H, P = x.shape
    G, N = B.shape[2:]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    dx, ddt = empty(*x.shape, dtype=x.dtype), empty(*dt.shape, dtype=dt.dtype)
    dB, dC = empty(*B.shape, dtype=B.dtype), empty(*C.shape, dtype=C.dtype)
    dinitial = None if initial_state is None else empty(clips, H, P, N)
    if not dx.numel():
        dD, dbias = (None if t is None else torch.zeros_like(t, dtype=torch.float32) for t in (D, dt_bias))
        return Gradients(dx, ddt, torch.zeros_like(A, dtype=torch.float32), dB, dC, dD, None, dbias, dinitial)
    call = prepare(x, dt, A, B, C, dt_bias, softplus, low, high, initial_state, seq_idx, reverse, config, True)
    config, shape, ids, (d, prefix, prefix_low) = call.config, call.shape, call.ids, call.steps
    num_chunks, num_spans = shape[5:7]
    p_blocks = blocks(P, config.BLOCK_P)
    grid = (clips * num_spans * H, p_blocks)
    options = {
        "REVERSE": reverse, "CHUNK": config.CHUNK, "BLOCK_P": config.BLOCK_P, "BLOCK_N": config.TILE_N,
        "TILES": blocks(N, config.TILE_N), "COMPUTE": config.COMPUTE, "READ_TERMS": config.READ_TERMS,
        "TERMS": config.TERMS if call.final is None else config.READ_TERMS, "EXACT": config.EXACT,
        "EVEN": P % config.BLOCK_P == 0 and N % config.TILE_N == 0,
        "num_warps": config.gradient_warps, "num_stages": config.gradient_stages,
        **FUSED_MULTIPLY_ADD,
    }  # fmt: skip
    entering = None if dfinal is None else dfinal.float().contiguous()
    if num_spans > 1:
        gradients, decays = empty_span_states(call, x.device)
        triton_launch.launch(
            span_gradient_kernel, x.device, call.grid,
            dy, C, ids, prefix, prefix_low, gradients, decays, *shape, *dy.stride()[:3], *C.stride()[:3], **call.options,
            num_warps=config.state_warps, num_stages=config.state_stages,
        )  # fmt: skip
        pass_states(call, gradients, decays, entering, dinitial, backward=True)
        entering = gradients
    strides = (*x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *dy.stride()[:3])
    dB_parts, dC_parts = empty(2, p_blocks, H, clips, L, N, dtype=launch.product_dtype(x, B, C)).unbind(0)
    read, within, into, step = empty(4, p_blocks, clips, H, num_chunks * config.CHUNK).unbind(0)
    output_sum, through = empty(2, p_blocks, clips, H, num_chunks).unbind(0)
    chunk_states = empty(clips, num_chunks, H, P, N) if config.EXACT else None
    final = call.final if call.final is not None else empty(clips, H, P, N)
    dD_parts = empty(clips, num_spans, H, P)
    triton_launch.launch(
        gradient_forward_kernel, x.device, grid,
        x, B, C, dy, ids, d, prefix, prefix_low, call.entering, final if call.final is None else None, chunk_states,
        dC_parts, within, read, output_sum, *shape, *strides,
        **options,
    )  # fmt: skip
    triton_launch.launch(
        gradient_reverse_kernel, x.device, grid,
        x, B, C, dy, D, ids, d, prefix, prefix_low, call.entering, final, chunk_states, entering,
        output_sum, dx, dB_parts, dD_parts, dinitial if call.final is None else None, into, step, through,
        *shape, *strides, *head_strides(D), **options,
    )  # fmt: skip
    dA_parts, dbias_parts = empty(2, clips * num_chunks, H).unbind(0)
    bias = None if dt_bias is None else dt_bias.contiguous()
    triton_launch.launch(
        steps_backward_kernel, x.device, (clips * num_chunks, blocks(H, STEPS["BLOCK_HEADS"])),
        dt, A.contiguous(), bias, d, read, within, into, step, through, ddt, dA_parts, dbias_parts,
        L, H, num_chunks, *dt.stride()[:2],
        read.stride(0), through.stride(0), low, high,
        PARTS=p_blocks, EXACT=config.EXACT, SOFTPLUS=softplus, REVERSE=reverse, CHUNK=config.CHUNK, **STEPS,
    )  # fmt: skip
    for parts, out in ((dB_parts, dB), (dC_parts, dC)):
        triton_launch.launch(
            reduce_kernel, x.device, (blocks(clips * L * N, REDUCE["BLOCK"]), G),
            parts, out, clips * L * N, G, N, H, P_BLOCKS=p_blocks, **REDUCE
        )
    dD = None if D is None else dD_parts.sum((0, 1, 3) if D.dim() == 1 else (0, 1))
    dbias = None if dt_bias is None else dbias_parts.sum(0)
    return Gradients(dx, ddt, dA_parts.sum(0), dB, dC, dD, None, dbias, dinitial)
