"""Triton source of the SSD scan's forward; `launch.py` states the equations and launches it.

A chunk is CHUNK consecutive tokens in the order of the scan. Positions count tokens in that order; `REVERSE` turns a position
into a token. In kernels states are transposed, (N, P). In names, `prefix` is the sum of the logarithms (base 2) of the decays
from the chunk's first token to the token in question, as two float32 whose sum is exact to float64.

EVEN says that P and N fill their blocks. COMPUTE is the dtype of matrix products: that of bfloat16 inputs, which are exact in
it, else float32, by three TF32 products.
"""

# mypy: disable-error-code="assignment"
# (a tuple that grows in an unrolled loop has another type after every step)

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-256.0)  # exp2 of it is 0 in float32


@triton.jit
def exp(x: tl.tensor):
    """Return exp(x) in float32 without the error of a rounded x log2(e)."""
    x = tl.where(x < -200.0, -200.0, tl.where(x > 200.0, 200.0, x))  # an infinite x would give NaN; a NaN stays
    t = x * 1.44269502162933349609375
    rest = tl.fma(x, 1.44269502162933349609375, -t) + x * 1.9259629911e-08
    return tl.exp2(t) * tl.fma(rest, 0.6931471805599453, 1.0)


@triton.jit
def _exp2_double(x: tl.tensor):
    """Return 2^x in float32, without the error of a rounded x, which is float64."""
    rounded = x.to(tl.float32)
    return tl.exp2(rounded) * tl.fma((x - rounded.to(tl.float64)).to(tl.float32), LN2, 1.0)


@triton.jit
def softplus(x: tl.tensor):
    """Return log(1 + exp(x)), to the last digits of small results too, and x above 20."""
    e = exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))
    return tl.where(x > 20.0, x, log1p)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, c: tl.tensor):
    """Return a b + c in float32; a and b are bfloat16, or float32 with almost its precision."""
    return tl.dot(a, b, c, input_precision="tf32x3")


@triton.jit
def to_tokens(position: tl.tensor, L: tl.tensor, REVERSE: tl.constexpr):
    """Return the tokens (int64) at positions of the scan; the last position's for those beyond it."""
    position = tl.minimum(position, L - 1)
    return (L - 1 - position if REVERSE else position).to(tl.int64)


@triton.jit
def load_rows(
    ptr: tl.tensor, tokens: tl.tensor, columns: tl.tensor, width: tl.tensor, stride: tl.tensor, COMPUTE: tl.constexpr,
    EVEN: tl.constexpr, inside: tl.tensor | None = None,
):  # fmt: skip
    """Return (tokens, columns) of rows of `width` that lie `stride` apart, in COMPUTE, zero beyond the width.

    EVEN says that all columns are within the width. With `inside` (tokens,), rows that are not inside are zero.
    """
    ptrs = ptr + tokens[:, None] * stride + columns[None, :]
    if inside is not None:
        mask = inside[:, None] & (columns < width)[None, :]
        return tl.load(ptrs, mask=mask, other=0.0).to(COMPUTE)
    elif EVEN:
        return tl.load(ptrs).to(COMPUTE)
    else:
        return tl.load(ptrs, mask=(columns < width)[None, :], other=0.0).to(COMPUTE)


@triton.jit
def load_columns(
    ptr: tl.tensor, tokens: tl.tensor, columns: tl.tensor, width: tl.tensor, stride: tl.tensor, COMPUTE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Return what `load_rows` does, transposed, (columns, tokens): a first factor that a product takes from registers."""
    ptrs = ptr + columns[:, None] + tokens[None, :] * stride
    if EVEN:
        return tl.load(ptrs).to(COMPUTE)
    return tl.load(ptrs, mask=(columns < width)[:, None], other=0.0).to(COMPUTE)


@triton.jit
def load_tiles(
    ptr: tl.tensor, tokens: tl.tensor, N: tl.tensor, stride: tl.tensor, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    COMPUTE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Return rows of B or C as TILES tiles (CHUNK, BLOCK_N)."""
    tiles = ()
    for t in tl.static_range(TILES):
        tiles = tiles + (load_rows(ptr, tokens, t * BLOCK_N + tl.arange(0, BLOCK_N), N, stride, COMPUTE, EVEN),)
    return tiles


@triton.jit
def load_state(
    ptr: tl.tensor, n: tl.tensor, p: tl.tensor, N: tl.tensor, P: tl.tensor, COMPUTE: tl.constexpr, EVEN: tl.constexpr
):
    """Return a tile of the state (P, N) at `ptr`, transposed, in COMPUTE."""
    ptrs = ptr + p[:, None] * N + n[None, :]
    if EVEN:
        return tl.trans(tl.load(ptrs)).to(COMPUTE)
    return tl.trans(tl.load(ptrs, mask=(p < P)[:, None] & (n < N)[None, :], other=0.0)).to(COMPUTE)


@triton.jit
def chunk_and_heads(num_chunks: tl.tensor, H: tl.tensor, heads_per_group: tl.tensor, heads_per_program: tl.tensor):
    """Return (clip, chunk, group, first head, heads) of a program of the first axis; consecutive programs share a chunk."""
    blocks = tl.cdiv(heads_per_group, heads_per_program)
    groups = H // heads_per_group
    program = tl.program_id(0)
    block, group = program % blocks, (program // blocks) % groups
    chunk, clip = (program // blocks // groups) % num_chunks, (program // blocks // groups // num_chunks).to(tl.int64)
    first = block * heads_per_program
    count = tl.minimum(heads_per_program, heads_per_group - first)
    return clip, chunk, group, group * heads_per_group + first, count


@triton.jit
def load_ids(ids_ptr: tl.tensor, chunk: tl.tensor, L: tl.tensor, REVERSE: tl.constexpr, CHUNK: tl.constexpr):
    """Return the segments of a chunk's tokens, of the token before it (its own first for the first chunk), and of its last."""
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + to_tokens(position, L, REVERSE))
    before = tl.load(ids_ptr + to_tokens(tl.maximum(chunk * CHUNK - 1, 0), L, REVERSE))
    last = tl.load(ids_ptr + to_tokens(tl.minimum(chunk * CHUNK + CHUNK, L) - 1, L, REVERSE))
    return ids, before, last


@triton.jit(do_not_specialize=["L", "num_chunks"])
def steps_kernel(
    dt_ptr: tl.tensor, A_ptr: tl.tensor, bias_ptr: tl.tensor, ids_ptr: tl.tensor,
    d_ptr: tl.tensor, prefix_ptr: tl.tensor, prefix_low_ptr: tl.tensor, from_state_ptr: tl.tensor, to_end_ptr: tl.tensor,
    into_ptr: tl.tensor, column_ptr: tl.tensor, decay_ptr: tl.tensor,
    L: tl.tensor, H: tl.tensor, num_chunks: tl.tensor, dt_clip_stride: tl.tensor, dt_token_stride: tl.tensor,
    low: tl.tensor, high: tl.tensor,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """Compute what depends on dt and A only, (B, H, num_chunks CHUNK): the step d = clamp(softplus(dt + bias)), 0 beyond L; the
    prefix; the decays of a state from the chunk's begin to the token (`from_state`) and from the token to the chunk's end
    (`to_end`), 0 where a segment's edge lies between; `into`, to_end d; `column`, log2(d) - prefix; and `decay` (B, H,
    num_chunks), that of the whole chunk. All but the prefix, from_state and decay may be None.
    """
    clip = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    inside = (position < L)[:, None] & (heads < H)[None, :]
    ptrs = dt_ptr + clip * dt_clip_stride + to_tokens(position, L, REVERSE)[:, None] * dt_token_stride + heads[None, :]
    d = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        d += tl.load(bias_ptr + heads, mask=heads < H, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        d = softplus(d)
    d = tl.where(d < low, low, d)  # not minimum and maximum: a NaN must stay
    d = tl.where(inside, tl.where(d > high, high, d), 0.0)
    A = tl.load(A_ptr + heads, mask=heads < H, other=0.0).to(tl.float64) * LOG2E
    log_decay = d.to(tl.float64) * A[None, :]
    log_decay = tl.where(log_decay < LOWEST, LOWEST, log_decay)
    prefix = tl.cumsum(log_decay, axis=0)
    total = tl.sum(log_decay, axis=0)
    from_state, to_end, decay = _exp2_double(prefix), _exp2_double(total[None, :] - prefix), _exp2_double(total)
    if ids_ptr is not None:
        ids, before, last = load_ids(ids_ptr + clip * L, chunk, L, REVERSE, CHUNK)
        from_state = tl.where((ids == before)[:, None], from_state, 0.0)
        to_end = tl.where((ids == last)[:, None], to_end, 0.0)
        decay = tl.where(before == last, decay, 0.0)
    from_state = tl.where(inside, from_state, 0.0)  # rows beyond L are read as those of the last token
    offsets = (clip * H + heads)[None, :].to(tl.int64) * (num_chunks * CHUNK) + position[:, None]
    mask = (heads < H)[None, :] & (position < num_chunks * CHUNK)[:, None]
    rounded = prefix.to(tl.float32)
    tl.store(prefix_ptr + offsets, rounded, mask=mask)
    tl.store(from_state_ptr + offsets, from_state, mask=mask)
    if d_ptr is not None:
        tl.store(d_ptr + offsets, d, mask=mask)
    if prefix_low_ptr is not None:
        tl.store(prefix_low_ptr + offsets, (prefix - rounded.to(tl.float64)).to(tl.float32), mask=mask)
    if to_end_ptr is not None:
        tl.store(to_end_ptr + offsets, to_end, mask=mask)
    if into_ptr is not None:
        tl.store(into_ptr + offsets, to_end * d, mask=mask)
    if column_ptr is not None:
        tl.store(column_ptr + offsets, (tl.log2(d).to(tl.float64) - prefix).to(tl.float32), mask=mask)
    tl.store(decay_ptr + (clip * H + heads) * num_chunks + chunk, decay, mask=heads < H)


@triton.jit(do_not_specialize=["L", "num_chunks", "heads_per_program"])
def scan_kernel(
    x_ptr: tl.tensor, B_ptr: tl.tensor, C_ptr: tl.tensor, D_ptr: tl.tensor, z_ptr: tl.tensor, ids_ptr: tl.tensor,
    d_ptr: tl.tensor, prefix_ptr: tl.tensor, prefix_low_ptr: tl.tensor, from_state_ptr: tl.tensor, column_ptr: tl.tensor,
    states_ptr: tl.tensor, y_ptr: tl.tensor,
    L: tl.tensor, H: tl.tensor, P: tl.tensor, N: tl.tensor, heads_per_group: tl.tensor, num_chunks: tl.tensor,
    heads_per_program: tl.tensor,
    x_clip_stride: tl.tensor, x_token_stride: tl.tensor, x_head_stride: tl.tensor,
    B_clip_stride: tl.tensor, B_token_stride: tl.tensor, B_group_stride: tl.tensor,
    C_clip_stride: tl.tensor, C_token_stride: tl.tensor, C_group_stride: tl.tensor,
    z_clip_stride: tl.tensor, z_token_stride: tl.tensor, z_head_stride: tl.tensor,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    COMPUTE: tl.constexpr, D_CHANNELS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute y (B, L, H, P) of a chunk from the states that enter the chunks, (B, chunks, H, P, N), for several heads of a
    group in turn, which share C and C B^T. D, z and ids may be None.
    """
    clip, chunk, group, first_head, count = chunk_and_heads(num_chunks, H, heads_per_group, heads_per_program)
    p, i = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, CHUNK)
    position = chunk * CHUNK + i
    inside, tokens = position < L, to_tokens(position, L, REVERSE)
    x_ptr += clip * x_clip_stride + first_head.to(tl.int64) * x_head_stride
    B_ptr += clip * B_clip_stride + group.to(tl.int64) * B_group_stride
    C_ptr += clip * C_clip_stride + group.to(tl.int64) * C_group_stride
    y_ptr += (clip * L * H + first_head) * P
    row = (clip * H + first_head) * (num_chunks * CHUNK) + chunk * CHUNK
    head_tokens, state_size = (num_chunks * CHUNK).to(tl.int64), tl.cast(P, tl.int64) * N
    states_ptr += ((clip * num_chunks + chunk) * H + first_head) * P * N
    if z_ptr is not None:
        z_ptr += clip * z_clip_stride + first_head.to(tl.int64) * z_head_stride
    C_tiles = load_tiles(C_ptr, tokens, N, C_token_stride, BLOCK_N, TILES, COMPUTE, EVEN)
    B_tiles = load_tiles(B_ptr, tokens, N, B_token_stride, BLOCK_N, TILES, COMPUTE, EVEN)
    products = tl.zeros((CHUNK, CHUNK), tl.float32)
    used = i[:, None] >= i[None, :]
    for t in tl.static_range(TILES):
        products = dot(C_tiles[t], tl.trans(B_tiles[t]), products)
    if ids_ptr is not None:
        ids = tl.load(ids_ptr + clip * L + tokens)
        used = used & (ids[:, None] == ids[None, :])
    products = tl.where(used, products, 0.0)
    for k in tl.range(0, count, num_stages=STAGES):
        x = load_rows(x_ptr + k * x_head_stride, tokens, p, P, x_token_stride, COMPUTE, EVEN)
        # `base` is a number: offsets as a tensor of int64 take so many registers that some spill
        base = row + k * head_tokens
        y = tl.zeros((CHUNK, BLOCK_P), tl.float32)
        for t in tl.static_range(TILES):
            n = t * BLOCK_N + tl.arange(0, BLOCK_N)
            y = dot(C_tiles[t], load_state(states_ptr + k * state_size, n, p, N, P, COMPUTE, EVEN), y)
        y *= tl.load(from_state_ptr + base + i)[:, None]
        # pairs i < j have exponents without a bound, and products of 0: neither may make an infinity
        prefix = tl.load(prefix_ptr + base + i)
        if COMPUTE == tl.float32:
            prefix_low = tl.load(prefix_low_ptr + base + i)
            between = prefix[:, None] - prefix[None, :] + (prefix_low[:, None] - prefix_low[None, :])
            mixing = products * tl.exp2(tl.minimum(between, 126.0)) * tl.load(d_ptr + base + i)[None, :]
        else:
            mixing = products * tl.exp2(tl.minimum(prefix[:, None] + tl.load(column_ptr + base + i)[None, :], 126.0))
        y = dot(mixing.to(COMPUTE), x, y)
        if D_ptr is not None:
            if D_CHANNELS:
                D = tl.load(D_ptr + (first_head + k) * P + p, mask=p < P, other=0.0).to(tl.float32)
                y += x.to(tl.float32) * D[None, :]
            else:
                y += x.to(tl.float32) * tl.load(D_ptr + first_head + k).to(tl.float32)
        if z_ptr is not None:
            z = load_rows(z_ptr + k * z_head_stride, tokens, p, P, z_token_stride, tl.float32, EVEN)
            y *= z / (1.0 + tl.exp2(z * -LOG2E))
        y_ptrs = y_ptr + tokens[:, None] * (H * P) + (k * P + p)[None, :]
        mask = inside[:, None] if EVEN else inside[:, None] & (p < P)[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)
