"""Triton source of the kernels that go through sequences from chunk to chunk, forward and backward, with a state in registers.

Words and shapes are those of `kernels.py`. With COMPUTE bfloat16, what is not exact in it is split into TERMS bfloat16 numbers:
three where a state is returned in float32.
"""

import triton
import triton.language as tl

from fused.ops.ssd.kernels import dot, load_columns, load_rows, to_tokens


@triton.jit
def dot_split(a: tl.tensor, b: tl.tensor, c: tl.tensor, COMPUTE: tl.constexpr, TERMS: tl.constexpr):
    """Return a b + c, where a is float32 and b in COMPUTE."""
    if COMPUTE == tl.float32:
        return dot(a, b, c)
    for _ in tl.static_range(TERMS - 1):  # cut off, not rounded: a conversion back takes four times as long
        part = (a.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        c = dot(part.to(COMPUTE), b, c)
        a = a - part
    return dot(a.to(COMPUTE), b, c)


@triton.jit
def go_through_chunks(
    program: tl.tensor,
    x_ptr: tl.tensor, B_ptr: tl.tensor, d_ptr: tl.tensor, weight_ptr: tl.tensor, decay_ptr: tl.tensor,
    initial_ptr: tl.tensor, states_ptr: tl.tensor, final_ptr: tl.tensor,
    L: tl.tensor, H: tl.tensor, P: tl.tensor, N: tl.tensor, heads_per_group: tl.tensor, num_chunks: tl.tensor,
    x_clip_stride: tl.tensor, x_token_stride: tl.tensor, x_head_stride: tl.tensor,
    B_clip_stride: tl.tensor, B_token_stride: tl.tensor, B_group_stride: tl.tensor,
    REVERSE: tl.constexpr, BACKWARD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    COMPUTE: tl.constexpr, TERMS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Go through a sequence with a tile of the state of one head in registers, in float32, from the initial state (B, H, P, N)
    or zeros on: store the state that enters each chunk, (B, chunks, H, P, N), and the final state (B, H, P, N), unless None.

    BACKWARD goes through it from the last chunk on, for gradients of states: x is dy, B is C, `weight` is `from_state`; what is
    stored for a chunk is the gradient of the state that leaves it. Forward, `weight` is `to_end`, to be multiplied by d
    unless d is None.
    """
    head, clip = program % H, (program // H).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += clip * x_clip_stride + head.to(tl.int64) * x_head_stride
    B_ptr += clip * B_clip_stride + (head // heads_per_group).to(tl.int64) * B_group_stride
    row = (clip * H + head) * (num_chunks * CHUNK)
    decay_ptr += (clip * H + head) * num_chunks
    in_state = (p < P)[:, None] & (n < N)[None, :]
    whole = (clip * H + head) * P * N + p[:, None] * N + n[None, :]
    if initial_ptr is not None:
        state = tl.load(initial_ptr + whole, mask=in_state, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for k in tl.range(0, num_chunks, num_stages=STAGES):
        chunk = num_chunks - 1 - k if BACKWARD else k
        position = chunk * CHUNK + tl.arange(0, CHUNK)
        tokens = to_tokens(position, L, REVERSE)
        B = load_rows(B_ptr, tokens, n, N, B_token_stride, COMPUTE, EVEN)
        x = load_columns(x_ptr, tokens, p, P, x_token_stride, COMPUTE, EVEN)
        weight = tl.load(weight_ptr + row + position)
        if d_ptr is not None:
            weight *= tl.load(d_ptr + row + position)
        decay = tl.load(decay_ptr + chunk)
        place = (clip * num_chunks + chunk) * H + head
        ptrs = states_ptr + place * P * N + p[:, None] * N + n[None, :]
        tl.store(ptrs, state.to(states_ptr.dtype.element_ty), mask=None if EVEN else in_state)
        scaled = x.to(tl.float32) * weight[None, :]
        state = dot_split(scaled, B, state * decay, COMPUTE, TERMS)
    if final_ptr is not None:
        tl.store(final_ptr + whole, state, mask=in_state)


@triton.jit(do_not_specialize=["L", "num_chunks"])
def states_kernel(
    x_ptr: tl.tensor, B_ptr: tl.tensor, d_ptr: tl.tensor, weight_ptr: tl.tensor, decay_ptr: tl.tensor,
    initial_ptr: tl.tensor, states_ptr: tl.tensor, final_ptr: tl.tensor,
    L: tl.tensor, H: tl.tensor, P: tl.tensor, N: tl.tensor, heads_per_group: tl.tensor, num_chunks: tl.tensor,
    x_clip_stride: tl.tensor, x_token_stride: tl.tensor, x_head_stride: tl.tensor,
    B_clip_stride: tl.tensor, B_token_stride: tl.tensor, B_group_stride: tl.tensor,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    COMPUTE: tl.constexpr, TERMS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Go through sequences from the first chunk on; see `go_through_chunks`."""
    go_through_chunks(
        tl.program_id(0), x_ptr, B_ptr, d_ptr, weight_ptr, decay_ptr, initial_ptr, states_ptr, final_ptr,
        L, H, P, N, heads_per_group, num_chunks, x_clip_stride, x_token_stride, x_head_stride,
        B_clip_stride, B_token_stride, B_group_stride,
        REVERSE, False, CHUNK, BLOCK_P, BLOCK_N, COMPUTE, TERMS, EVEN, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["L", "num_chunks"])
def both_states_kernel(
    x_ptr: tl.tensor, B_ptr: tl.tensor, d_ptr: tl.tensor, to_end_ptr: tl.tensor, dy_ptr: tl.tensor, C_ptr: tl.tensor,
    from_state_ptr: tl.tensor, decay_ptr: tl.tensor, initial_ptr: tl.tensor, states_ptr: tl.tensor, dfinal_ptr: tl.tensor,
    gradients_ptr: tl.tensor, dinitial_ptr: tl.tensor,
    L: tl.tensor, H: tl.tensor, P: tl.tensor, N: tl.tensor, heads_per_group: tl.tensor, num_chunks: tl.tensor,
    x_clip_stride: tl.tensor, x_token_stride: tl.tensor, x_head_stride: tl.tensor,
    B_clip_stride: tl.tensor, B_token_stride: tl.tensor, B_group_stride: tl.tensor,
    dy_clip_stride: tl.tensor, dy_token_stride: tl.tensor, dy_head_stride: tl.tensor,
    C_clip_stride: tl.tensor, C_token_stride: tl.tensor, C_group_stride: tl.tensor,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    COMPUTE: tl.constexpr, TERMS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the states that enter the chunks, and, in the second half of the programs, the gradients of the states that leave
    them, from the last chunk on; see `go_through_chunks`. TERMS is for the gradients: that of the initial state is returned.
    """
    programs = tl.num_programs(0) // 2
    if tl.program_id(0) < programs:
        go_through_chunks(
            tl.program_id(0), x_ptr, B_ptr, d_ptr, to_end_ptr, decay_ptr, initial_ptr, states_ptr, None,
            L, H, P, N, heads_per_group, num_chunks, x_clip_stride, x_token_stride, x_head_stride,
            B_clip_stride, B_token_stride, B_group_stride,
            REVERSE, False, CHUNK, BLOCK_P, BLOCK_N, COMPUTE, 1, EVEN, STAGES,
        )  # fmt: skip
    else:
        go_through_chunks(
            tl.program_id(0) - programs, dy_ptr, C_ptr, None, from_state_ptr, decay_ptr,
            dfinal_ptr, gradients_ptr, dinitial_ptr,
            L, H, P, N, heads_per_group, num_chunks, dy_clip_stride, dy_token_stride, dy_head_stride,
            C_clip_stride, C_token_stride, C_group_stride,
            REVERSE, True, CHUNK, BLOCK_P, BLOCK_N, COMPUTE, TERMS, EVEN, STAGES,
        )  # fmt: skip
