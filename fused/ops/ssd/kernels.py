"""Triton source of the SSD scan's forward; `launch.py` states the equations and launches it.

A chunk is CHUNK consecutive tokens in the order of the scan, a span is consecutive chunks. Positions count tokens in that
order; `REVERSE` turns a position into a token. A program has HEADS consecutive heads, which share B and C. States are kept
transposed, (N, P), in float32. In names, `prefix` is the sum of the logarithms (base 2) of the decays from the chunk's first
token to the token in question, as two float32 whose sum is exact to float64.

EVEN says that P and N fill their blocks. COMPUTE is the dtype of matrix products: that of bfloat16 inputs, which are exact in
it, else float32, by three TF32 products. What is not exact in bfloat16, where it decides about states, is split into TERMS
bfloat16 numbers.
"""

# mypy: disable-error-code="assignment"
# (a tuple that grows in an unrolled loop has another type after every step)

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-256.0)  # exp2 of it is 0 in float32


@triton.jit
def _exp(x: tl.tensor):
    """Return exp(x) in float32 without the error of a rounded x log2(e)."""
    t = x * 1.44269502162933349609375
    rest = tl.fma(x, 1.44269502162933349609375, -t) + x * 1.9259629911e-08
    return tl.exp2(t) * tl.fma(rest, 0.6931471805599453, 1.0)


@triton.jit
def softplus(x: tl.tensor):
    """Return log(1 + exp(x)), to the last digits of small results too, and x above 20."""
    e = _exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))
    return tl.where(x > 20.0, x, log1p)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, c: tl.tensor):
    """Return a b + c in float32; a and b are bfloat16, or float32 with almost its precision."""
    return tl.dot(a, b, c, input_precision="tf32x3")


@triton.jit
def dot_split(a: tl.tensor, b: tl.tensor, c: tl.tensor, COMPUTE: tl.constexpr, TERMS: tl.constexpr):
    """Return a b + c, where b is float32 and a in COMPUTE."""
    if COMPUTE == tl.float32:
        return dot(a, b, c)
    for _ in tl.static_range(TERMS - 1):  # cut off, not rounded: a conversion back takes four times as long
        part = (b.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        c = dot(a, part.to(COMPUTE), c)
        b = b - part
    return dot(a, b.to(COMPUTE), c)


@triton.jit
def to_tokens(position: tl.tensor, L: tl.tensor, REVERSE: tl.constexpr):
    """Return the tokens (int64) at positions of the scan."""
    return (L - 1 - position if REVERSE else position).to(tl.int64)


@triton.jit
def load_rows(
    ptr: tl.tensor, tokens: tl.tensor, columns: tl.tensor, inside: tl.tensor, width: tl.tensor, stride: tl.tensor,
    COMPUTE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Return (tokens, columns) of rows of `width` that lie `stride` apart, zero where not `inside`, in COMPUTE.

    EVEN says that all columns are within the width.
    """
    ptrs = ptr + tokens[:, None] * stride + columns[None, :]
    mask = inside[:, None] if EVEN else inside[:, None] & (columns < width)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0).to(COMPUTE)


@triton.jit(do_not_specialize=["L", "num_chunks"])
def steps_kernel(
    dt_ptr: tl.tensor, A_ptr: tl.tensor, bias_ptr: tl.tensor,
    d_ptr: tl.tensor, prefix_ptr: tl.tensor, prefix_low_ptr: tl.tensor,
    L: tl.tensor, H: tl.tensor, num_chunks: tl.tensor, dt_clip_stride: tl.tensor, dt_token_stride: tl.tensor,
    low: tl.tensor, high: tl.tensor,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """Compute d = clamp(softplus(dt + bias)) and the prefixes of a chunk, (B, H, num_chunks CHUNK). Beyond L, d is 0."""
    clip = (tl.program_id(0) // num_chunks).to(tl.int64)
    position = (tl.program_id(0) % num_chunks) * CHUNK + tl.arange(0, CHUNK)
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
    rounded = prefix.to(tl.float32)
    offsets = (clip * H + heads)[None, :].to(tl.int64) * (num_chunks * CHUNK) + position[:, None]
    mask = (heads < H)[None, :] & (position < num_chunks * CHUNK)[:, None]
    tl.store(d_ptr + offsets, d, mask=mask)
    tl.store(prefix_ptr + offsets, rounded, mask=mask)
    tl.store(prefix_low_ptr + offsets, (prefix - rounded.to(tl.float64)).to(tl.float32), mask=mask)


@triton.jit
def load_ids(ids_ptr: tl.tensor, chunk: tl.tensor, L: tl.tensor, REVERSE: tl.constexpr, CHUNK: tl.constexpr):
    """Return the segments of a chunk's tokens, of the token before it (its own first for the first chunk), and of its last."""
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + to_tokens(tl.minimum(position, L - 1), L, REVERSE))
    before = tl.load(ids_ptr + to_tokens(tl.maximum(chunk * CHUNK - 1, 0), L, REVERSE))
    last = tl.load(ids_ptr + to_tokens(tl.minimum(chunk * CHUNK + CHUNK, L) - 1, L, REVERSE))
    return ids, before, last


@triton.jit
def state_weights(
    d_ptr: tl.tensor, prefix_ptr: tl.tensor, prefix_low_ptr: tl.tensor, base: tl.tensor, CHUNK: tl.constexpr
):
    """Return d exp2(sum of log decays after the token) (CHUNK,) and the decay of the whole chunk, of the chunk at `base`."""
    i = tl.arange(0, CHUNK)
    total = tl.load(prefix_ptr + base + (CHUNK - 1))
    total_low = tl.load(prefix_low_ptr + base + (CHUNK - 1))
    after = (total - tl.load(prefix_ptr + base + i)) + (total_low - tl.load(prefix_low_ptr + base + i))
    return tl.load(d_ptr + base + i) * tl.exp2(after), tl.exp2(total) * tl.fma(total_low, LN2, 1.0)


@triton.jit(do_not_specialize=["L", "num_chunks", "num_spans", "chunks_per_span"])
def span_state_kernel(
    x_ptr: tl.tensor, B_ptr: tl.tensor, ids_ptr: tl.tensor, d_ptr: tl.tensor, prefix_ptr: tl.tensor, prefix_low_ptr: tl.tensor,
    state_ptr: tl.tensor, decay_ptr: tl.tensor,
    L: tl.tensor, H: tl.tensor, P: tl.tensor, N: tl.tensor, heads_per_group: tl.tensor,
    num_chunks: tl.tensor, num_spans: tl.tensor, chunks_per_span: tl.tensor,
    x_clip_stride: tl.tensor, x_token_stride: tl.tensor, x_head_stride: tl.tensor,
    B_clip_stride: tl.tensor, B_token_stride: tl.tensor, B_group_stride: tl.tensor,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    COMPUTE: tl.constexpr, TERMS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Compute the state (B, spans, H, P, N) that each span leaves, from zero, and its decay (B, spans, H).

    The decay of a span is 0 where it does not end in the segment in which the span before it ended.
    """
    head_blocks = H // HEADS
    first_head = (tl.program_id(0) % head_blocks) * HEADS
    span = (tl.program_id(0) // head_blocks) % num_spans
    clip = (tl.program_id(0) // head_blocks // num_spans).to(tl.int64)
    p, n = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    x_ptr += clip * x_clip_stride + first_head.to(tl.int64) * x_head_stride
    B_ptr += clip * B_clip_stride + (first_head // heads_per_group).to(tl.int64) * B_group_stride
    row = (clip * H + first_head) * (num_chunks * CHUNK)
    if ids_ptr is not None:
        ids_ptr += clip * L
    states, decays = (), ()
    for _ in tl.static_range(HEADS):
        states = states + (tl.zeros((BLOCK_N, BLOCK_P), tl.float32),)
        decays = decays + (1.0,)
    end = tl.minimum(span * chunks_per_span + chunks_per_span, num_chunks)
    for chunk in range(span * chunks_per_span, end):
        position = chunk * CHUNK + tl.arange(0, CHUNK)
        inside, tokens = position < L, to_tokens(position, L, REVERSE)
        B = load_rows(B_ptr, tokens, n, inside, N, B_token_stride, COMPUTE, EVEN)
        if ids_ptr is not None:
            ids, before, last = load_ids(ids_ptr, chunk, L, REVERSE, CHUNK)
        new_states, new_decays = (), ()
        for j in tl.static_range(HEADS):
            x = load_rows(x_ptr + j * x_head_stride, tokens, p, inside, P, x_token_stride, COMPUTE, EVEN)
            base = row + j * (num_chunks * CHUNK).to(tl.int64) + chunk * CHUNK
            weights, decay = state_weights(d_ptr, prefix_ptr, prefix_low_ptr, base, CHUNK)
            if ids_ptr is not None:
                weights = tl.where(ids == last, weights, 0.0)
                decay = tl.where(before == last, decay, 0.0)
            scaled = x.to(tl.float32) * weights[:, None]
            new_states = new_states + (dot_split(tl.trans(B), scaled, states[j] * decay, COMPUTE, TERMS),)
            new_decays = new_decays + (decays[j] * decay,)
        states, decays = new_states, new_decays
    for j in tl.static_range(HEADS):
        place = (clip * num_spans + span) * H + first_head + j
        inside = (n < N)[:, None] & (p < P)[None, :]
        tl.store(state_ptr + place * P * N + p[None, :] * N + n[:, None], states[j], mask=inside)
        tl.store(decay_ptr + place, decays[j])


@triton.jit(do_not_specialize=["num_spans"])
def pass_kernel(
    state_ptr: tl.tensor, decay_ptr: tl.tensor, initial_ptr: tl.tensor, final_ptr: tl.tensor,
    H: tl.tensor, size: tl.tensor, num_spans: tl.tensor,
    BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replace the state that each span leaves by the one that enters it, in order, and store the last one; `size` is P N.

    BACKWARD goes from the last span to the first, for gradients.
    """
    clip, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if initial_ptr is not None:
        state = tl.load(initial_ptr + (clip * H + head) * size + i, mask=i < size, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BLOCK,), tl.float32)
    for k in range(num_spans):
        place = (clip * num_spans + (num_spans - 1 - k if BACKWARD else k)) * H + head
        own = tl.load(state_ptr + place * size + i, mask=i < size, other=0.0)
        decay = tl.load(decay_ptr + place)
        tl.store(state_ptr + place * size + i, state, mask=i < size)
        state = state * decay + own
    if final_ptr is not None:
        tl.store(final_ptr + (clip * H + head) * size + i, state, mask=i < size)


@triton.jit(do_not_specialize=["L", "num_chunks", "num_spans", "chunks_per_span"])
def scan_kernel(
    x_ptr: tl.tensor, B_ptr: tl.tensor, C_ptr: tl.tensor, D_ptr: tl.tensor, z_ptr: tl.tensor, ids_ptr: tl.tensor,
    d_ptr: tl.tensor, prefix_ptr: tl.tensor, prefix_low_ptr: tl.tensor,
    entering_ptr: tl.tensor, y_ptr: tl.tensor, final_ptr: tl.tensor,
    L: tl.tensor, H: tl.tensor, P: tl.tensor, N: tl.tensor, heads_per_group: tl.tensor,
    num_chunks: tl.tensor, num_spans: tl.tensor, chunks_per_span: tl.tensor,
    x_clip_stride: tl.tensor, x_token_stride: tl.tensor, x_head_stride: tl.tensor,
    B_clip_stride: tl.tensor, B_token_stride: tl.tensor, B_group_stride: tl.tensor,
    C_clip_stride: tl.tensor, C_token_stride: tl.tensor, C_group_stride: tl.tensor,
    z_clip_stride: tl.tensor, z_token_stride: tl.tensor, z_head_stride: tl.tensor,
    D_head_stride: tl.tensor, D_channel_stride: tl.tensor,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    COMPUTE: tl.constexpr, TERMS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Compute y (B, L, H, P) of a span from the state that enters it, (B, spans, H, P, N), and the final state (B, H, P, N).

    entering may be None for zeros, final where it is known. D, z and ids may be None.
    """
    head_blocks = H // HEADS
    first_head = (tl.program_id(0) % head_blocks) * HEADS
    span = (tl.program_id(0) // head_blocks) % num_spans
    clip = (tl.program_id(0) // head_blocks // num_spans).to(tl.int64)
    p, n, i = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, CHUNK)
    group = (first_head // heads_per_group).to(tl.int64)
    x_ptr += clip * x_clip_stride + first_head.to(tl.int64) * x_head_stride
    B_ptr += clip * B_clip_stride + group * B_group_stride
    C_ptr += clip * C_clip_stride + group * C_group_stride
    y_ptr += (clip * L * H + first_head) * P
    row = (clip * H + first_head) * (num_chunks * CHUNK)
    if z_ptr is not None:
        z_ptr += clip * z_clip_stride + first_head.to(tl.int64) * z_head_stride
    if ids_ptr is not None:
        ids_ptr += clip * L
    in_state = (n < N)[:, None] & (p < P)[None, :]
    states = ()
    for j in tl.static_range(HEADS):
        if entering_ptr is not None:
            place = (clip * num_spans + span) * H + first_head + j
            entering = tl.load(entering_ptr + place * P * N + p[None, :] * N + n[:, None], mask=in_state, other=0.0)
            states = states + (entering.to(tl.float32),)
        else:
            states = states + (tl.zeros((BLOCK_N, BLOCK_P), tl.float32),)
    causal = i[:, None] >= i[None, :]
    end = tl.minimum(span * chunks_per_span + chunks_per_span, num_chunks)
    for chunk in range(span * chunks_per_span, end):
        position = chunk * CHUNK + i
        inside, tokens = position < L, to_tokens(position, L, REVERSE)
        B = load_rows(B_ptr, tokens, n, inside, N, B_token_stride, COMPUTE, EVEN)
        C = load_rows(C_ptr, tokens, n, inside, N, C_token_stride, COMPUTE, EVEN)
        products = dot(C, tl.trans(B), tl.zeros((CHUNK, CHUNK), tl.float32))
        used = causal
        if ids_ptr is not None:
            ids, before, last = load_ids(ids_ptr, chunk, L, REVERSE, CHUNK)
            used = used & (ids[:, None] == ids[None, :])
        new_states = ()
        for j in tl.static_range(HEADS):
            x = load_rows(x_ptr + j * x_head_stride, tokens, p, inside, P, x_token_stride, COMPUTE, EVEN)
            base = row + j * (num_chunks * CHUNK).to(tl.int64) + chunk * CHUNK
            prefix = tl.load(prefix_ptr + base + i)
            from_state = tl.exp2(prefix)
            between = prefix[:, None] - prefix[None, :]
            if COMPUTE == tl.float32:
                prefix_low = tl.load(prefix_low_ptr + base + i)
                from_state *= tl.fma(prefix_low, LN2, 1.0)
                between += prefix_low[:, None] - prefix_low[None, :]
            if ids_ptr is not None:
                from_state = tl.where(ids == before, from_state, 0.0)
            d = tl.load(d_ptr + base + i)
            y = dot(C, states[j].to(COMPUTE), tl.zeros((CHUNK, BLOCK_P), tl.float32)) * from_state[:, None]
            mixing = tl.where(used, products * tl.exp2(between) * d[None, :], 0.0)
            y = dot(mixing.to(COMPUTE), x, y)
            if D_ptr is not None:
                D_ptrs = D_ptr + (first_head + j) * D_head_stride + p * D_channel_stride
                y += x.to(tl.float32) * tl.load(D_ptrs, mask=p < P, other=0.0).to(tl.float32)[None, :]
            if z_ptr is not None:
                z = load_rows(z_ptr + j * z_head_stride, tokens, p, inside, P, z_token_stride, tl.float32, EVEN)
                y *= z / (1.0 + tl.exp2(z * -LOG2E))
            y_ptrs = y_ptr + tokens[:, None] * (H * P) + (j * P + p)[None, :]
            mask = inside[:, None] if EVEN else inside[:, None] & (p < P)[None, :]
            tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)
            weights, decay = state_weights(d_ptr, prefix_ptr, prefix_low_ptr, base, CHUNK)
            if ids_ptr is not None:
                weights = tl.where(ids == last, weights, 0.0)
                decay = tl.where(before == last, decay, 0.0)
            scaled = x.to(tl.float32) * weights[:, None]
            new_states = new_states + (dot_split(tl.trans(B), scaled, states[j] * decay, COMPUTE, TERMS),)
        states = new_states
    if final_ptr is not None:
        for j in tl.static_range(HEADS):
            place = clip * H + first_head + j
            tl.store(final_ptr + place * P * N + p[None, :] * N + n[:, None], states[j], mask=in_state)
