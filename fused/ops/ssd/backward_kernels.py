"""Triton source of the SSD scan's backward; `launch_backward.py` states the equations and launches it.

Words and shapes are those of `kernels.py`. dy is the gradient of y before the gate. The gradient of a state is kept like the
state, transposed, (N, P). A program takes several heads of a group in turn, and a block of P. Numbers by token that several
blocks contribute to are stored block by block, (blocks, B, H, tokens), and added up in `steps_backward_kernel`.
"""

# mypy: disable-error-code="assignment"
# (a tuple that grows in an unrolled loop has another type after every step)

import triton
import triton.language as tl

from fused.ops.ssd.kernels import (
    LOG2E,
    LOWEST,
    chunk_and_heads,
    dot,
    exp,
    load_ids,
    load_rows,
    load_state,
    load_tiles,
    softplus,
    to_tokens,
)


@triton.jit(do_not_specialize=["L", "num_chunks", "heads_per_program"])
def state_gradient_kernel(
    B_ptr: tl.tensor, x_ptr: tl.tensor, d_ptr: tl.tensor, weight_ptr: tl.tensor, decay_ptr: tl.tensor,
    gradients_ptr: tl.tensor, states_ptr: tl.tensor, dB_ptr: tl.tensor, sum_ptr: tl.tensor, through_ptr: tl.tensor,
    L: tl.tensor, H: tl.tensor, P: tl.tensor, N: tl.tensor, heads_per_group: tl.tensor, num_chunks: tl.tensor,
    heads_per_program: tl.tensor,
    B_clip_stride: tl.tensor, B_token_stride: tl.tensor, B_group_stride: tl.tensor,
    x_clip_stride: tl.tensor, x_token_stride: tl.tensor, x_head_stride: tl.tensor,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr,
    DIAGONAL: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the part of dB that comes from the gradients of the states that leave the chunks, summed over the program's
    heads, (blocks of P, head blocks, B, chunks, G, tokens, N). For dC, B is C, x is dy, `weight` is `from_state`, d is None,
    and `gradients` are the states that enter. The blocks of N are the third axis of programs.

    Further, for the gradients of decays, unless they are None: by token (blocks, B, H, tokens) <weighted x, gradients B>, what
    it has to do with the state; by chunk (blocks, B, H, chunks) <state that enters, gradient that leaves> times its decay.
    """
    clip, chunk, group, first_head, count = chunk_and_heads(num_chunks, H, heads_per_group, heads_per_program)
    p, i = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, CHUNK)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    position = chunk * CHUNK + i
    tokens = to_tokens(position, L, REVERSE)
    B_ptr += clip * B_clip_stride + group.to(tl.int64) * B_group_stride
    x_ptr += clip * x_clip_stride + first_head.to(tl.int64) * x_head_stride
    groups, head_blocks = H // heads_per_group, tl.cdiv(heads_per_group, heads_per_program)
    chunks = tl.num_programs(0) // head_blocks // groups  # of all clips
    block = (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)).to(tl.int64)
    first_row = clip * H + first_head
    row = first_row * (num_chunks * CHUNK) + position
    head_tokens, state_size = (num_chunks * CHUNK).to(tl.int64), tl.cast(P, tl.int64) * N
    place = ((clip * num_chunks + chunk) * H + first_head) * P * N
    B = load_rows(B_ptr, tokens, n, N, B_token_stride, COMPUTE, EVEN)
    dB = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    for j in tl.range(0, count, num_stages=STAGES):
        x = load_rows(x_ptr + j * x_head_stride, tokens, p, P, x_token_stride, COMPUTE, EVEN)
        gradient = load_state(gradients_ptr + place + j * state_size, n, p, N, P, COMPUTE, EVEN)
        weight = tl.load(weight_ptr + row + j * head_tokens)
        if d_ptr is not None:
            weight *= tl.load(d_ptr + row + j * head_tokens)
        scaled = x.to(tl.float32) * weight[:, None]
        if sum_ptr is not None:
            total = tl.sum(dot(B, gradient, tl.zeros((CHUNK, BLOCK_P), tl.float32)) * scaled, axis=1)
            tl.store(sum_ptr + block * chunks * H * CHUNK + row + j * head_tokens, total)
        dB = dot(scaled.to(COMPUTE), tl.trans(gradient), dB)
        if through_ptr is not None:
            state = load_state(states_ptr + place + j * state_size, n, p, N, P, COMPUTE, EVEN)
            if DIAGONAL:  # of a product of matrices, which takes fewer instructions than products of numbers
                matrix = dot(tl.trans(state), gradient, tl.zeros((BLOCK_P, BLOCK_P), tl.float32))
                matrix = tl.where(p[:, None] == p[None, :], matrix, 0.0)
            else:
                matrix = state.to(tl.float32) * gradient.to(tl.float32)
            through = tl.sum(tl.sum(matrix, axis=1), axis=0)
            chunk_row = (first_row + j) * num_chunks + chunk
            tl.store(through_ptr + block * chunks * H + chunk_row, through * tl.load(decay_ptr + chunk_row))
    part = (tl.program_id(1) * head_blocks + tl.program_id(0) % head_blocks).to(tl.int64)
    rows = (((part * (chunks // num_chunks) + clip) * num_chunks + chunk) * groups + group) * CHUNK + i
    tl.store(dB_ptr + rows[:, None] * N + n[None, :], dB, mask=None if EVEN else (n < N)[None, :])


@triton.jit(do_not_specialize=["L", "num_chunks", "heads_per_program"])
def input_gradient_kernel(
    x_ptr: tl.tensor, B_ptr: tl.tensor, C_ptr: tl.tensor, dy_ptr: tl.tensor, D_ptr: tl.tensor, ids_ptr: tl.tensor,
    d_ptr: tl.tensor, prefix_ptr: tl.tensor, prefix_low_ptr: tl.tensor, to_end_ptr: tl.tensor, gradients_ptr: tl.tensor,
    dx_ptr: tl.tensor, pairs_ptr: tl.tensor, dD_ptr: tl.tensor,
    within_ptr: tl.tensor, into_ptr: tl.tensor, step_ptr: tl.tensor,
    L: tl.tensor, H: tl.tensor, P: tl.tensor, N: tl.tensor, heads_per_group: tl.tensor, num_chunks: tl.tensor,
    heads_per_program: tl.tensor,
    x_clip_stride: tl.tensor, x_token_stride: tl.tensor, x_head_stride: tl.tensor,
    B_clip_stride: tl.tensor, B_token_stride: tl.tensor, B_group_stride: tl.tensor,
    C_clip_stride: tl.tensor, C_token_stride: tl.tensor, C_group_stride: tl.tensor,
    dy_clip_stride: tl.tensor, dy_token_stride: tl.tensor, dy_head_stride: tl.tensor,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    COMPUTE: tl.constexpr, EXACT: tl.constexpr, D_CHANNELS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dx; summed over the program's heads, the gradient of B C^T, (blocks of P, head blocks, B, chunks, G, tokens,
    tokens); and dD by token, or, with D_CHANNELS, that of the chunk by channel, (B, chunks, H, P).

    Further, for the gradients of steps and decays, by token: `into`, <what it puts into the state that leaves, gradient>;
    `step`, the gradient of its step as a factor of x; `within`, what it reads of tokens of the chunk less what they read of it;
    their sum from t on is the sum of all pairs between which the decay of t lies. That loses digits: with EXACT `within` is the
    latter sum.
    """
    clip, chunk, group, first_head, count = chunk_and_heads(num_chunks, H, heads_per_group, heads_per_program)
    p, i = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, CHUNK)
    position = chunk * CHUNK + i
    inside, tokens = position < L, to_tokens(position, L, REVERSE)
    x_ptr += clip * x_clip_stride + first_head.to(tl.int64) * x_head_stride
    dy_ptr += clip * dy_clip_stride + first_head.to(tl.int64) * dy_head_stride
    B_ptr += clip * B_clip_stride + group.to(tl.int64) * B_group_stride
    C_ptr += clip * C_clip_stride + group.to(tl.int64) * C_group_stride
    if dx_ptr is not None:
        dx_ptr += (clip * L * H + first_head) * P
    groups = H // heads_per_group
    blocks = tl.cdiv(heads_per_group, heads_per_program)
    chunks = tl.num_programs(0) // blocks // groups  # of all clips
    row = (clip * H + first_head) * (num_chunks * CHUNK) + position
    block_row = tl.program_id(1).to(tl.int64) * chunks * H * CHUNK + row
    head_tokens, state_size = (num_chunks * CHUNK).to(tl.int64), tl.cast(P, tl.int64) * N
    place = (clip * num_chunks + chunk) * H + first_head
    gradients_ptr += place * P * N
    if D_CHANNELS:
        dD_ptr += place * P
    B_tiles = load_tiles(B_ptr, tokens, N, B_token_stride, BLOCK_N, TILES, COMPUTE, EVEN)
    C_tiles = load_tiles(C_ptr, tokens, N, C_token_stride, BLOCK_N, TILES, COMPUTE, EVEN)
    products = tl.zeros((CHUNK, CHUNK), tl.float32)  # at [j, i]: of the input of token j and the output of token i
    for t in tl.static_range(TILES):
        products = dot(B_tiles[t], tl.trans(C_tiles[t]), products)
    used = i[:, None] <= i[None, :]
    if ids_ptr is not None:
        ids, _, _ = load_ids(ids_ptr + clip * L, chunk, L, REVERSE, CHUNK)
        used = used & (ids[:, None] == ids[None, :])
    products = tl.where(used, products, 0.0)
    all_pairs = tl.zeros((CHUNK, CHUNK), tl.float32)
    for k in tl.range(0, count, num_stages=STAGES):
        x = load_rows(x_ptr + k * x_head_stride, tokens, p, P, x_token_stride, COMPUTE, EVEN)
        dy = load_rows(dy_ptr + k * dy_head_stride, tokens, p, P, dy_token_stride, COMPUTE, EVEN, inside)
        base = row + k * head_tokens
        block_base = block_row + k * head_tokens
        prefix, d = tl.load(prefix_ptr + base), tl.load(d_ptr + base)
        between = prefix[None, :] - prefix[:, None]
        if COMPUTE == tl.float32:
            prefix_low = tl.load(prefix_low_ptr + base)
            between += prefix_low[None, :] - prefix_low[:, None]
        if pairs_ptr is not None:
            decays = tl.exp2(tl.where(i[:, None] <= i[None, :], between, LOWEST))
            pairs = dot(x, tl.trans(dy), tl.zeros((CHUNK, CHUNK), tl.float32)) * decays * d[:, None]
            all_pairs += pairs
            terms = pairs * products
            if EXACT:
                # at [j, t]: of all i >= t
                terms = tl.cumsum(tl.where(i[:, None] < i[None, :], terms, 0.0), axis=1, reverse=True)
                within = tl.sum(tl.where(i[:, None] < i[None, :], terms, 0.0), axis=0)
                tl.store(within_ptr + block_base, within)
            else:
                tl.store(within_ptr + block_base, tl.sum(terms, axis=0) - tl.sum(terms, axis=1))
        if dx_ptr is not None:
            mixing = (products * tl.exp2(tl.minimum(between, 126.0))).to(COMPUTE)  # 0 beyond the diagonal: 0 times a number
            if D_ptr is not None:
                if not D_CHANNELS:  # here, where the fewest registers are in use
                    tl.store(dD_ptr + block_base, tl.sum(dy.to(tl.float32) * x.to(tl.float32), axis=1))
            to_end = tl.load(to_end_ptr + base)
            dx = tl.zeros((CHUNK, BLOCK_P), tl.float32)
            for t in tl.static_range(TILES):
                n = t * BLOCK_N + tl.arange(0, BLOCK_N)
                dx = dot(B_tiles[t], load_state(gradients_ptr + k * state_size, n, p, N, P, COMPUTE, EVEN), dx)
            dx *= to_end[:, None]
            tl.store(into_ptr + block_base, tl.sum(dx * x.to(tl.float32), axis=1) * d)
            dx = dot(mixing, dy, dx)
            tl.store(step_ptr + block_base, tl.sum(dx * x.to(tl.float32), axis=1))
            dx *= d[:, None]
            if D_ptr is not None:
                if D_CHANNELS:
                    D = tl.load(D_ptr + (first_head + k) * P + p, mask=p < P, other=0.0).to(tl.float32)
                    dx += dy.to(tl.float32) * D[None, :]
                    dD = tl.sum(dy.to(tl.float32) * x.to(tl.float32), axis=0)
                    tl.store(dD_ptr + k * P + p, dD, mask=None if EVEN else p < P)
                else:
                    dx += dy.to(tl.float32) * tl.load(D_ptr + first_head + k).to(tl.float32)
            dx_ptrs = dx_ptr + tokens[:, None] * (H * P) + (k * P + p)[None, :]
            mask = inside[:, None] if EVEN else inside[:, None] & (p < P)[None, :]
            tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if pairs_ptr is not None:
        part = (tl.program_id(1) * blocks + tl.program_id(0) % blocks).to(tl.int64)
        rows = (((part * (chunks // num_chunks) + clip) * num_chunks + chunk) * groups + group) * CHUNK + i
        tl.store(pairs_ptr + rows[:, None] * CHUNK + i[None, :], tl.where(used, all_pairs, 0.0))


@triton.jit(do_not_specialize=["L", "num_chunks", "parts"])
def reduce_kernel(
    B_ptr: tl.tensor, C_ptr: tl.tensor, dB_part_ptr: tl.tensor, dC_part_ptr: tl.tensor, pairs_ptr: tl.tensor,
    dB_ptr: tl.tensor, dC_ptr: tl.tensor,
    L: tl.tensor, G: tl.tensor, N: tl.tensor, num_chunks: tl.tensor, parts: tl.tensor,
    B_clip_stride: tl.tensor, B_token_stride: tl.tensor, B_group_stride: tl.tensor,
    C_clip_stride: tl.tensor, C_token_stride: tl.tensor, C_group_stride: tl.tensor,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Compute dB and dC (B, L, G, N) of a chunk and a group: the sums of their parts, in order, and the products of the
    gradient of C B^T, (parts, B, chunks, G, tokens, tokens), with C and B.
    """
    group, chunk = tl.program_id(0) % G, (tl.program_id(0) // G) % num_chunks
    clip = (tl.program_id(0) // G // num_chunks).to(tl.int64)
    n, i = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, CHUNK)
    position = chunk * CHUNK + i
    inside, tokens = position < L, to_tokens(position, L, REVERSE)
    rows = tl.program_id(0).to(tl.int64) * CHUNK + i
    part_rows = tl.num_programs(0).to(tl.int64) * CHUNK
    in_N = (i >= 0)[:, None] & (n < N)[None, :]
    pairs = tl.zeros((CHUNK, CHUNK), tl.float32)
    dB, dC = tl.zeros((CHUNK, BLOCK_N), tl.float32), tl.zeros((CHUNK, BLOCK_N), tl.float32)
    for part in range(0, parts):
        part_row = part * part_rows + rows
        pairs += tl.load(pairs_ptr + part_row[:, None] * CHUNK + i[None, :])
        dB += tl.load(dB_part_ptr + part_row[:, None] * N + n[None, :], mask=in_N, other=0.0)
        dC += tl.load(dC_part_ptr + part_row[:, None] * N + n[None, :], mask=in_N, other=0.0)
    B_ptr += clip * B_clip_stride + group.to(tl.int64) * B_group_stride
    C_ptr += clip * C_clip_stride + group.to(tl.int64) * C_group_stride
    B = load_rows(B_ptr, tokens, n, N, B_token_stride, COMPUTE, EVEN)
    C = load_rows(C_ptr, tokens, n, N, C_token_stride, COMPUTE, EVEN)
    pairs = pairs.to(COMPUTE)
    dB = dot(pairs, C, dB)
    dC = dot(tl.trans(pairs), B, dC)
    offsets = ((clip * L + tokens) * G + group)[:, None] * N + n[None, :]
    tl.store(dB_ptr + offsets, dB.to(dB_ptr.dtype.element_ty), mask=in_N & inside[:, None])
    tl.store(dC_ptr + offsets, dC.to(dC_ptr.dtype.element_ty), mask=in_N & inside[:, None])


@triton.jit(do_not_specialize=["L", "num_chunks"])
def steps_backward_kernel(
    dt_ptr: tl.tensor, A_ptr: tl.tensor, bias_ptr: tl.tensor, d_ptr: tl.tensor,
    read_ptr: tl.tensor, through_ptr: tl.tensor, within_ptr: tl.tensor, into_ptr: tl.tensor, step_ptr: tl.tensor,
    dots_ptr: tl.tensor, ddt_ptr: tl.tensor, dA_ptr: tl.tensor, dbias_ptr: tl.tensor, dD_ptr: tl.tensor,
    L: tl.tensor, H: tl.tensor, num_chunks: tl.tensor, dt_clip_stride: tl.tensor, dt_token_stride: tl.tensor,
    low: tl.tensor, high: tl.tensor,
    READ_PARTS: tl.constexpr, PARTS: tl.constexpr, EXACT: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """Compute ddt (B, L, H) and the chunks' sums for dA and ddt_bias, (B, chunks, H).

    The first two tensors of numbers by token or chunk have READ_PARTS blocks that are added up, the others PARTS. `into` is
    read from the token before: a token's own `into` does not contain its decay, and subtracted from a sum it would lose digits.
    """
    clip = (tl.program_id(0) // num_chunks).to(tl.int64)
    clips = tl.num_programs(0) // num_chunks
    chunk = tl.program_id(0) % num_chunks
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    of_head = (heads < H)[None, :] & (position < num_chunks * CHUNK)[:, None]
    offsets = (clip * H + heads)[None, :].to(tl.int64) * (num_chunks * CHUNK) + position[:, None]
    part_stride = clips.to(tl.int64) * H * num_chunks
    read, through = tl.zeros((CHUNK, BLOCK_HEADS), tl.float32), tl.zeros((BLOCK_HEADS,), tl.float32)
    for part in tl.static_range(READ_PARTS):
        read += tl.load(read_ptr + part * part_stride * CHUNK + offsets, mask=of_head, other=0.0)
        ptrs = through_ptr + part * part_stride + (clip * H + heads) * num_chunks + chunk
        through += tl.load(ptrs, mask=heads < H, other=0.0)
    within, into, step = tl.zeros_like(read), tl.zeros_like(read), tl.zeros_like(read)
    for part in tl.static_range(PARTS):
        within += tl.load(within_ptr + part * part_stride * CHUNK + offsets, mask=of_head, other=0.0)
        before = into_ptr + part * part_stride * CHUNK + offsets - 1
        into += tl.load(before, mask=of_head & (tl.arange(0, CHUNK) > 0)[:, None], other=0.0)
        step += tl.load(step_ptr + part * part_stride * CHUNK + offsets, mask=of_head, other=0.0)
    if EXACT:
        dlog = within + tl.cumsum(read, axis=0, reverse=True)
    else:
        dlog = tl.cumsum(read + within, axis=0, reverse=True)
    dlog += tl.cumsum(into, axis=0) + through[None, :]
    inside = (position < L)[:, None] & (heads < H)[None, :]
    A = tl.load(A_ptr + heads, mask=heads < H, other=0.0).to(tl.float32)
    d = tl.load(d_ptr + offsets, mask=of_head, other=0.0)
    # a decay that underflows has no gradient: its exponent was cut at LOWEST
    dlog = tl.where(inside & ~(d * A[None, :] * LOG2E < LOWEST), dlog, 0.0)
    chunk_offsets = (clip * num_chunks + chunk) * H + heads
    tl.store(dA_ptr + chunk_offsets, tl.sum(d * dlog, axis=0), mask=heads < H)
    dd = step + dlog * A[None, :]
    tokens = to_tokens(position, L, REVERSE)
    raw = tl.load(dt_ptr + clip * dt_clip_stride + tokens[:, None] * dt_token_stride + heads[None, :], mask=inside, other=0.0)
    raw = raw.to(tl.float32)
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + heads, mask=heads < H, other=0.0).to(tl.float32)[None, :]
    value = raw
    if SOFTPLUS:
        value = softplus(raw)
        dd *= 1.0 / (1.0 + exp(-raw))
    dd = tl.where(inside & (value >= low) & (value <= high), dd, 0.0)
    ddt_ptrs = ddt_ptr + (clip * L + tokens)[:, None] * H + heads[None, :]
    tl.store(ddt_ptrs, dd.to(ddt_ptr.dtype.element_ty), mask=inside)
    tl.store(dbias_ptr + chunk_offsets, tl.sum(dd, axis=0), mask=heads < H)
    if dots_ptr is not None:
        dots = tl.zeros_like(dd)
        for part in tl.static_range(PARTS):
            dots += tl.load(dots_ptr + part * part_stride * CHUNK + offsets, mask=of_head, other=0.0)
        tl.store(dD_ptr + chunk_offsets, tl.sum(dots, axis=0), mask=heads < H)
