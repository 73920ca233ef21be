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
    program: tl.tensor, first_chunk: tl.tensor, last_chunk: tl.tensor,
    x_ptr: tl.tensor, B_ptr: tl.tensor, d_ptr: tl.tensor, weight_ptr: tl.tensor, decay_ptr: tl.tensor,
    initial_ptr: tl.tensor, states_ptr: tl.tensor, final_ptr: tl.tensor,
    L: tl.tensor, H: tl.tensor, P: tl.tensor, N: tl.tensor, heads_per_group: tl.tensor, num_chunks: tl.tensor,
    x_clip_stride: tl.tensor, x_token_stride: tl.tensor, x_head_stride: tl.tensor,
    B_clip_stride: tl.tensor, B_token_stride: tl.tensor, B_group_stride: tl.tensor,
    REVERSE: tl.constexpr, BACKWARD: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr, TERMS: tl.constexpr, APART: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Go through chunks of a sequence, first_chunk to last_chunk - 1, in steps of TILE tokens, with a tile of the state of one
    head in registers, in float32, from the initial state (B, H, P, N) or zeros on: store the state that enters each chunk, (B,
    chunks, H, P, N), and the final state (B, H, P, N), unless None.

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
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if initial_ptr is not None:
        begins = last_chunk == num_chunks if BACKWARD else first_chunk == 0
        state = tl.load(initial_ptr + whole, mask=in_state & begins, other=0.0).to(tl.float32)
    STEPS: tl.constexpr = CHUNK // TILE  # of a chunk
    for k in tl.range(0, (last_chunk - first_chunk) * STEPS, num_stages=STAGES):
        step = last_chunk * STEPS - 1 - k if BACKWARD else first_chunk * STEPS + k
        chunk, enters = step // STEPS, k % STEPS == 0
        position = step * TILE + tl.arange(0, TILE)
        tokens = to_tokens(position, L, REVERSE)
        B = load_rows(B_ptr, tokens, n, N, B_token_stride, COMPUTE, EVEN)
        x = load_columns(x_ptr, tokens, p, P, x_token_stride, COMPUTE, EVEN)
        weight = tl.load(weight_ptr + row + position)
        if d_ptr is not None:
            weight *= tl.load(d_ptr + row + position)
        decay = tl.load(decay_ptr + chunk)
        place = (clip * num_chunks + chunk) * H + head
        ptrs = states_ptr + place * P * N + p[:, None] * N + n[None, :]
        if STEPS == 1:
            tl.store(ptrs, state.to(states_ptr.dtype.element_ty), mask=None if EVEN else in_state)
        else:
            if enters:
                tl.store(ptrs, state.to(states_ptr.dtype.element_ty), mask=None if EVEN else in_state)
            decay = tl.where(enters, decay, 1.0)
        scaled = x.to(tl.float32) * weight[None, :]
        if APART:  # the hardware cuts off what of a product is small beside the sum that it is added to
            own = dot_split(scaled, B, tl.zeros((BLOCK_P, BLOCK_N), tl.float32), COMPUTE, TERMS)
            state = state * decay + own
        else:
            state = dot_split(scaled, B, state * decay, COMPUTE, TERMS)
    if final_ptr is not None:
        tl.store(final_ptr + whole, state, mask=in_state)


@triton.jit(do_not_specialize=["L", "num_chunks", "chunks_per_span"])
def states_kernel(
    x_ptr: tl.tensor, B_ptr: tl.tensor, d_ptr: tl.tensor, weight_ptr: tl.tensor, decay_ptr: tl.tensor,
    initial_ptr: tl.tensor, states_ptr: tl.tensor, final_ptr: tl.tensor,
    L: tl.tensor, H: tl.tensor, P: tl.tensor, N: tl.tensor, heads_per_group: tl.tensor, num_chunks: tl.tensor,
    x_clip_stride: tl.tensor, x_token_stride: tl.tensor, x_head_stride: tl.tensor,
    B_clip_stride: tl.tensor, B_token_stride: tl.tensor, B_group_stride: tl.tensor, chunks_per_span: tl.tensor,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    COMPUTE: tl.constexpr, TERMS: tl.constexpr, APART: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Go through spans of `chunks_per_span` chunks, each a program; see `go_through_chunks`. All but the first of a sequence
    begin with zeros. `final` is (spans, B, H, P, N), the states with which they end.
    """
    spans = tl.cdiv(num_chunks, chunks_per_span)
    span, program = tl.program_id(0) % spans, tl.program_id(0) // spans
    first_chunk = span * chunks_per_span
    final_ptr += (span * (tl.num_programs(0) // spans)).to(tl.int64) * P * N
    go_through_chunks(
        program, first_chunk, tl.minimum(first_chunk + chunks_per_span, num_chunks),
        x_ptr, B_ptr, d_ptr, weight_ptr, decay_ptr, initial_ptr, states_ptr, final_ptr,
        L, H, P, N, heads_per_group, num_chunks, x_clip_stride, x_token_stride, x_head_stride,
        B_clip_stride, B_token_stride, B_group_stride,
        REVERSE, False, CHUNK, TILE, BLOCK_P, BLOCK_N, COMPUTE, TERMS, APART, EVEN, STAGES,
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
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    COMPUTE: tl.constexpr, TERMS: tl.constexpr, APART: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the states that enter the chunks, and, in the second half of the programs, the gradients of the states that leave
    them, from the last chunk on; see `go_through_chunks`. TERMS is for the gradients: that of the initial state is returned.
    """
    programs = tl.num_programs(0) // 2
    if tl.program_id(0) < programs:
        go_through_chunks(
            tl.program_id(0), 0, num_chunks, x_ptr, B_ptr, d_ptr, to_end_ptr, decay_ptr, initial_ptr, states_ptr, None,
            L, H, P, N, heads_per_group, num_chunks, x_clip_stride, x_token_stride, x_head_stride,
            B_clip_stride, B_token_stride, B_group_stride,
            REVERSE, False, CHUNK, TILE, BLOCK_P, BLOCK_N, COMPUTE, 1, APART, EVEN, STAGES,
        )  # fmt: skip
    else:
        go_through_chunks(
            tl.program_id(0) - programs, 0, num_chunks, dy_ptr, C_ptr, None, from_state_ptr, decay_ptr,
            dfinal_ptr, gradients_ptr, dinitial_ptr,
            L, H, P, N, heads_per_group, num_chunks, dy_clip_stride, dy_token_stride, dy_head_stride,
            C_clip_stride, C_token_stride, C_group_stride,
            REVERSE, True, CHUNK, TILE, BLOCK_P, BLOCK_N, COMPUTE, TERMS, APART, EVEN, STAGES,
        )  # fmt: skip


@triton.jit
def _multiply(a: tl.tensor, b: tl.tensor):
    return a * b


@triton.jit(do_not_specialize=["num_chunks", "chunks_per_span", "pieces"])
def carry_kernel(
    ends_ptr: tl.tensor, decay_ptr: tl.tensor, states_ptr: tl.tensor, final_ptr: tl.tensor,
    H: tl.tensor, P: tl.tensor, N: tl.tensor, num_chunks: tl.tensor, chunks_per_span: tl.tensor, pieces: tl.tensor,
    PIECE: tl.constexpr, MOST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Add to the states of all spans but the first what is left of the state that entered the span, and compute the final state
    (B, H, P, N). `ends` (spans, B, H, P, N) are the states with which spans end that began with zeros.

    A program takes PIECE chunks of a span, of at most MOST, of one head. What has decayed to nothing is not touched.
    """
    spans = tl.cdiv(num_chunks, chunks_per_span)
    program = tl.program_id(0)
    piece, span = program % pieces, (program // pieces) % (spans - 1) + 1
    row = (program // pieces // (spans - 1)).to(tl.int64)  # of (B, H)
    rows = tl.num_programs(0) // pieces // (spans - 1)
    p, n = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (p < P)[:, None] & (n < N)[None, :]
    tile = p[:, None] * N + n[None, :]
    decay_ptr += row * num_chunks
    i = tl.arange(0, MOST)
    first = span * chunks_per_span
    begin, end = first + piece * PIECE, tl.minimum(first + chunks_per_span, num_chunks)
    decays = tl.load(decay_ptr + first + i, mask=first + i < tl.minimum(begin, end), other=1.0)
    decay = tl.reduce(decays, 0, _multiply)
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for s in range(0, span):
        chunk = s * chunks_per_span + i
        decays = tl.load(decay_ptr + chunk, mask=i < chunks_per_span, other=1.0)
        state *= tl.reduce(decays, 0, _multiply)
        state += tl.load(ends_ptr + (s * rows + row) * P * N + tile, mask=inside, other=0.0)
    bad = tl.sum(tl.sum(state * 0.0, axis=1), axis=0)  # a NaN remains one
    clip, head = row // H, row % H
    for k in range(begin, tl.minimum(begin + PIECE, end)):
        if decay + bad != 0.0:
            ptrs = states_ptr + ((clip * num_chunks + k) * H + head) * P * N + tile
            entering = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32) + state * decay
            tl.store(ptrs, entering.to(states_ptr.dtype.element_ty), mask=inside)
        decay *= tl.load(decay_ptr + k)
    if (begin < end) & (begin + PIECE >= num_chunks):
        last = tl.load(ends_ptr + (span * rows + row) * P * N + tile, mask=inside, other=0.0)
        tl.store(final_ptr + row * P * N + tile, last + state * decay, mask=inside)
