"""Launches of the SSD scan's backward.

With the words of `launch.py`, G the gradient of the state that leaves a chunk, dy that of y without its gate, and
L_ij = a_(j+1) ... a_i for j <= i, a chunk that the state S enters gives

    dC_i = sum over j of L_ij d_j (dy_i . x_j) B_j + a_1 ... a_i S^T dy_i
    dB_j = d_j (sum over i of L_ij (dy_i . x_j) C_i + a_(j+1) ... a_Q G^T x_j)
    dx_j = d_j (sum over i of L_ij (C_i . B_j) dy_i + a_(j+1) ... a_Q G B_j) + D dy_j
    dS   = a_1 ... a_Q G + sum over i of a_1 ... a_i dy_i C_i^T

The gradient of log a_t is the sum of all terms of y . dy and of G . S' whose decays contain a_t. Every term is the product of a
token's output or the leaving state, and of a token's input or the entering state: those within a chunk are summed from the same
numbers by row and by column. Those that go through the chunk from state to state are a_1 ... a_Q G . S.

Kernels: `steps` again; `both_states`, the states that enter the chunks and the gradients of those that leave them, both ways at
a time; `state_gradient` twice, for the parts of dC and dB that these give, each summed over several heads;
`input_gradient` (dx, and the gradient of C B^T, summed over several heads, in a launch each); `steps_backward` (dt, A and
the bias, from numbers that the others have stored for every token); `reduce` (dB and dC). All sums are in a fixed order.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused.ops.ssd import launch
from fused.ops.ssd.backward_kernels import (
    input_gradient_kernel,
    reduce_kernel,
    state_gradient_kernel,
    steps_backward_kernel,
)
from fused.ops.ssd.launch import Config, new_states, prepare, rows
from fused.ops.ssd.state_kernels import both_states_kernel
from fused.runtime import triton_launch
from fused.runtime.triton_launch import FUSED_MULTIPLY_ADD, blocks

REDUCE_BLOCK = 64  # of N
STEPS = {"BLOCK_HEADS": 16, "num_warps": 8, **FUSED_MULTIPLY_ADD}


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
    config: Config | None = None, batch_invariant: bool = False,
) -> Gradients:  # fmt: skip
    """Return the gradients for dy (B, L, H, P) and the gradient of the final state (B, H, P, N) or None.

    Other arguments are those of `launch.forward`. With a gate, y is computed again without it, in float32.
    """
    dz = None
    if z is not None:
        dy, dz = _gate_backward(dy, z, launch.forward(
            x.float(), dt, A, B, C, D, None, dt_bias, softplus, low, high, initial_state, seq_idx, reverse, False,
            batch_invariant=batch_invariant,
        )[0])  # fmt: skip
        gradients = _backward(
            dy, dfinal, x.float(), dt, A, B, C, D, dt_bias, softplus, low, high, initial_state, seq_idx, reverse, None,
            batch_invariant,
        )  # fmt: skip
        return gradients._replace(x=gradients.x.to(x.dtype), z=dz)
    return _backward(
        dy, dfinal, x, dt, A, B, C, D, dt_bias, softplus, low, high, initial_state, seq_idx, reverse, config, batch_invariant
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
    config: Config | None, batch_invariant: bool,
) -> Gradients:  # fmt: skip
    x, dt, B, C, dy, D = (rows(t) for t in (x, dt, B, C, dy, D))
    clips, L, H, P = x.shape
    G, N = B.shape[2:]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    dx, ddt = empty(*x.shape, dtype=x.dtype), empty(*dt.shape, dtype=dt.dtype)
    dB, dC = empty(*B.shape, dtype=B.dtype), empty(*C.shape, dtype=C.dtype)
    dinitial = None if initial_state is None else empty(clips, H, P, N)
    if not dx.numel():
        if dinitial is not None:
            dinitial = dinitial.zero_() if dfinal is None else dinitial.copy_(dfinal)
        dD, dbias = (None if t is None else torch.zeros_like(t, dtype=torch.float32) for t in (D, dt_bias))
        return Gradients(dx, ddt, torch.zeros_like(A, dtype=torch.float32), dB, dC, dD, None, dbias, dinitial)
    call = prepare(x, dt, A, B, C, dt_bias, softplus, low, high, seq_idx, reverse, config, batch_invariant, True)
    config, steps, num_chunks, CHUNK = call.config, call.steps, call.num_chunks, call.config.CHUNK
    states, gradients = new_states(call, x), new_states(call, x)
    initial, dfinal = (None if t is None else t.contiguous().float() for t in (initial_state, dfinal))
    x_strides, B_strides, C_strides, dy_strides = (t.stride()[:3] for t in (x, B, C, dy))
    programs, *tiles = call.states_grid
    triton_launch.launch(
        both_states_kernel, x.device, (2 * programs, *tiles),
        x, B, steps.d, steps.to_end, dy, C, steps.from_state, steps.decay, initial, states, dfinal, gradients, dinitial,
        *call.shape, *x_strides, *B_strides, *dy_strides, *C_strides, TERMS=1 if dinitial is None else config.TERMS,
        **call.states_options,
    )  # fmt: skip
    grid, p_blocks, n_blocks = call.grid, call.grid[1], blocks(N, config.BLOCK_N)
    parts = p_blocks * call.head_blocks
    dB_parts, dC_parts = empty(2, parts, clips, num_chunks, G, CHUNK, N).unbind(0)
    pairs = empty(parts, clips, num_chunks, G, CHUNK, CHUNK)
    within, into, step = empty(3, p_blocks, clips, H, num_chunks * CHUNK).unbind(0)
    read = empty(p_blocks * n_blocks, clips, H, num_chunks * CHUNK)
    through = empty(p_blocks * n_blocks, clips, H, num_chunks)
    D_CHANNELS = D is not None and D.dim() == 2
    dD_shape = (clips, num_chunks, H, P) if D_CHANNELS else (p_blocks, clips, H, num_chunks * CHUNK)
    dD_parts = None if D is None else empty(*dD_shape)
    shape = (*call.shape, call.heads)
    triton_launch.launch(
        state_gradient_kernel, x.device, (*grid, n_blocks),
        C, dy, None, steps.from_state, steps.decay, states, gradients, dC_parts, read, through, *shape, *C_strides, *dy_strides,
        DIAGONAL=config.diagonal, **call.options, **config.state_gradient.launch(),
    )  # fmt: skip
    triton_launch.launch(
        state_gradient_kernel, x.device, (*grid, n_blocks),
        B, x, steps.d, steps.to_end, steps.decay, gradients, None, dB_parts, None, None, *shape, *B_strides, *x_strides,
        DIAGONAL=config.diagonal, **call.options, **config.input_gradient.launch(),
    )  # fmt: skip
    for dx_out, pairs_out in ((None, pairs), (dx, None)):
        triton_launch.launch(
            input_gradient_kernel, x.device, grid,
            x, B, C, dy, D, call.ids, steps.d, steps.prefix, steps.prefix_low, steps.to_end, gradients,
            dx_out, pairs_out, dD_parts, within, into, step, *shape, *x_strides, *B_strides, *C_strides, *dy_strides,
            TILES=n_blocks, EXACT=config.EXACT, D_CHANNELS=D_CHANNELS, **call.options,
            **(config.pairs if dx_out is None else config.input_gradient).launch(),
        )  # fmt: skip
    sums = empty(3, clips * num_chunks, H)
    bias = None if dt_bias is None else dt_bias.contiguous()
    triton_launch.launch(
        steps_backward_kernel, x.device, (clips * num_chunks, blocks(H, STEPS["BLOCK_HEADS"])),
        dt, A.contiguous(), bias, steps.d, read, through, within, into, step, None if D_CHANNELS else dD_parts, ddt,
        *sums.unbind(0), L, H, num_chunks, *dt.stride()[:2], low, high, READ_PARTS=p_blocks * n_blocks, PARTS=p_blocks,
        EXACT=config.EXACT, SOFTPLUS=softplus, REVERSE=reverse, CHUNK=CHUNK, **STEPS,
    )  # fmt: skip
    triton_launch.launch(
        reduce_kernel, x.device, (clips * num_chunks * G, blocks(N, REDUCE_BLOCK)),
        B, C, dB_parts, dC_parts, pairs, dB, dC, L, G, N, num_chunks, parts, *B_strides, *C_strides,
        REVERSE=reverse, CHUNK=CHUNK, BLOCK_N=REDUCE_BLOCK, COMPUTE=config.COMPUTE, EVEN=N % REDUCE_BLOCK == 0,
        num_warps=4, num_stages=1, **FUSED_MULTIPLY_ADD,
    )  # fmt: skip
    dA, dbias, dD = (parts_of.sum(0) for parts_of in sums)  # each by itself: results of an operator share no memory
    if D_CHANNELS and dD_parts is not None:
        dD = dD_parts.sum((0, 1))
    return Gradients(dx, ddt, dA, dB, dC, None if D is None else dD, None, None if dt_bias is None else dbias, dinitial)
