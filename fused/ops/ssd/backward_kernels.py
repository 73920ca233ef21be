"""Triton source of the SSD scan's backward; `launch_backward.py` states the equations and launches it.

Words and shapes are those of `kernels.py`. dy is the gradient of y before the gate. The gradient of a state is kept like the
state, transposed, (N, P), in float32. The gradient that `enters` a span or chunk comes from the tokens after it.
"""

# mypy: disable-error-code="assignment"
# (a tuple that grows in an unrolled loop has another type after every step)

import triton
import triton.language as tl

from fused.ops.ssd.kernels import LN2, LOG2E, LOWEST, dot, dot_split, load_ids, load_rows, softplus, state_weights, to_tokens


@triton.jit
def _from_state(prefix_ptr: tl.tensor, prefix_low_ptr: tl.tensor, base: tl.tensor, CHUNK: tl.constexpr):
    """Return the decays (CHUNK,) of the state that enters a chunk, up to each of its tokens, and of the whole chunk."""
    i = tl.arange(0, CHUNK)
    decays = tl.exp2(tl.load(prefix_ptr + base + i)) * tl.fma(tl.load(prefix_low_ptr + base + i), LN2, 1.0)
    total, total_low = tl.load(prefix_ptr + base + (CHUNK - 1)), tl.load(prefix_low_ptr + base + (CHUNK - 1))
    return decays, tl.exp2(total) * tl.fma(total_low, LN2, 1.0)


@triton.jit
def _to_end(prefix_ptr: tl.tensor, prefix_low_ptr: tl.tensor, base: tl.tensor, CHUNK: tl.constexpr):
    """Return the decays (CHUNK,) after each token up to the end of the chunk."""
    i = tl.arange(0, CHUNK)
    after = tl.load(prefix_ptr + base + (CHUNK - 1)) - tl.load(prefix_ptr + base + i)
    low = tl.load(prefix_low_ptr + base + (CHUNK - 1)) - tl.load(prefix_low_ptr + base + i)
    return tl.exp2(after + low)


@triton.jit
def _between(prefix_ptr: tl.tensor, prefix_low_ptr: tl.tensor, base: tl.tensor, TRANSPOSED: tl.constexpr, CHUNK: tl.constexpr):
    """Return the decay (CHUNK, CHUNK) from token j to token i, at [i, j], or TRANSPOSED at [j, i]; meaningless for i < j."""
    i = tl.arange(0, CHUNK)
    prefix, low = tl.load(prefix_ptr + base + i), tl.load(prefix_low_ptr + base + i)
    if TRANSPOSED:
        return tl.exp2((prefix[None, :] - prefix[:, None]) + (low[None, :] - low[:, None]))
    return tl.exp2((prefix[:, None] - prefix[None, :]) + (low[:, None] - low[None, :]))


@triton.jit(do_not_specialize=["L", "num_chunks", "num_spans", "chunks_per_span"])
def span_gradient_kernel(
    dy_ptr: tl.tensor, C_ptr: tl.tensor, ids_ptr: tl.tensor, prefix_ptr: tl.tensor, prefix_low_ptr: tl.tensor,
    gradient_ptr: tl.tensor, decay_ptr: tl.tensor,
    L: tl.tensor, H: tl.tensor, P: tl.tensor, N: tl.tensor, heads_per_group: tl.tensor,
    num_chunks: tl.tensor, num_spans: tl.tensor, chunks_per_span: tl.tensor,
    dy_clip_stride: tl.tensor, dy_token_stride: tl.tensor, dy_head_stride: tl.tensor,
    C_clip_stride: tl.tensor, C_token_stride: tl.tensor, C_group_stride: tl.tensor,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    COMPUTE: tl.constexpr, TERMS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Compute the gradient (B, spans, H, P, N) of the state before each span, by it alone, and its decay."""
    head_blocks = H // HEADS
    first_head = (tl.program_id(0) % head_blocks) * HEADS
    span = (tl.program_id(0) // head_blocks) % num_spans
    clip = (tl.program_id(0) // head_blocks // num_spans).to(tl.int64)
    p, n = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    dy_ptr += clip * dy_clip_stride + first_head.to(tl.int64) * dy_head_stride
    C_ptr += clip * C_clip_stride + (first_head // heads_per_group).to(tl.int64) * C_group_stride
    row = (clip * H + first_head) * (num_chunks * CHUNK)
    if ids_ptr is not None:
        ids_ptr += clip * L
    gradients, decays = (), ()
    for _ in tl.static_range(HEADS):
        gradients = gradients + (tl.zeros((BLOCK_N, BLOCK_P), tl.float32),)
        decays = decays + (1.0,)
    first = span * chunks_per_span
    end = tl.minimum(first + chunks_per_span, num_chunks)
    for k in range(0, end - first):
        chunk = end - 1 - k
        position = chunk * CHUNK + tl.arange(0, CHUNK)
        inside, tokens = position < L, to_tokens(position, L, REVERSE)
        C = load_rows(C_ptr, tokens, n, inside, N, C_token_stride, COMPUTE, EVEN)
        if ids_ptr is not None:
            ids, before, last = load_ids(ids_ptr, chunk, L, REVERSE, CHUNK)
        new_gradients, new_decays = (), ()
        for j in tl.static_range(HEADS):
            dy = load_rows(dy_ptr + j * dy_head_stride, tokens, p, inside, P, dy_token_stride, COMPUTE, EVEN)
            base = row + j * (num_chunks * CHUNK).to(tl.int64) + chunk * CHUNK
            weights, decay = _from_state(prefix_ptr, prefix_low_ptr, base, CHUNK)
            if ids_ptr is not None:
                weights = tl.where(ids == before, weights, 0.0)
                decay = tl.where(before == last, decay, 0.0)
            scaled = dy.to(tl.float32) * weights[:, None]
            new_gradients = new_gradients + (dot_split(tl.trans(C), scaled, gradients[j] * decay, COMPUTE, TERMS),)
            new_decays = new_decays + (decays[j] * decay,)
        gradients, decays = new_gradients, new_decays
    for j in tl.static_range(HEADS):
        place = (clip * num_spans + span) * H + first_head + j
        inside = (n < N)[:, None] & (p < P)[None, :]
        tl.store(gradient_ptr + place * P * N + p[None, :] * N + n[:, None], gradients[j], mask=inside)
        tl.store(decay_ptr + place, decays[j])


@triton.jit
def _load_state(
    state_ptr: tl.tensor, place: tl.tensor, p: tl.tensor, P: tl.tensor, N: tl.tensor, BLOCK_N: tl.constexpr, TILES: tl.constexpr
):
    """Return the state (P, N) number `place` as TILES transposed tiles (BLOCK_N, BLOCK_P) in float32; zeros of None."""
    tiles = ()
    for t in tl.static_range(TILES):
        if state_ptr is not None:
            n = t * BLOCK_N + tl.arange(0, BLOCK_N)
            ptrs = state_ptr + place * P * N + p[None, :] * N + n[:, None]
            tiles = tiles + (tl.load(ptrs, mask=(n < N)[:, None] & (p < P)[None, :], other=0.0).to(tl.float32),)
        else:
            tiles = tiles + (tl.zeros((BLOCK_N, p.shape[0]), tl.float32),)
    return tiles


@triton.jit
def _store_state(
    state_ptr: tl.tensor, tiles: tl.tuple, place: tl.tensor, p: tl.tensor, P: tl.tensor, N: tl.tensor, BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Store the tiles of a state (P, N) to number `place`."""
    for t in tl.static_range(TILES):
        n = t * BLOCK_N + tl.arange(0, BLOCK_N)
        ptrs = state_ptr + place * P * N + p[None, :] * N + n[:, None]
        tl.store(ptrs, tiles[t], mask=(n < N)[:, None] & (p < P)[None, :])


@triton.jit
def _load_tiles(
    ptr: tl.tensor, tokens: tl.tensor, inside: tl.tensor, N: tl.tensor, stride: tl.tensor, BLOCK_N: tl.constexpr,
    TILES: tl.constexpr, COMPUTE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Return rows of B or C as TILES tiles (CHUNK, BLOCK_N)."""
    tiles = ()
    for t in tl.static_range(TILES):
        tiles = tiles + (load_rows(ptr, tokens, t * BLOCK_N + tl.arange(0, BLOCK_N), inside, N, stride, COMPUTE, EVEN),)
    return tiles


@triton.jit(do_not_specialize=["L", "num_chunks", "num_spans", "chunks_per_span"])
def gradient_forward_kernel(
    x_ptr: tl.tensor, B_ptr: tl.tensor, C_ptr: tl.tensor, dy_ptr: tl.tensor, ids_ptr: tl.tensor,
    d_ptr: tl.tensor, prefix_ptr: tl.tensor, prefix_low_ptr: tl.tensor,
    entering_ptr: tl.tensor, final_ptr: tl.tensor, chunk_states_ptr: tl.tensor,
    dC_ptr: tl.tensor, within_ptr: tl.tensor, output_ptr: tl.tensor, output_sum_ptr: tl.tensor,
    L: tl.tensor, H: tl.tensor, P: tl.tensor, N: tl.tensor, heads_per_group: tl.tensor,
    num_chunks: tl.tensor, num_spans: tl.tensor, chunks_per_span: tl.tensor,
    x_clip_stride: tl.tensor, x_token_stride: tl.tensor, x_head_stride: tl.tensor,
    B_clip_stride: tl.tensor, B_token_stride: tl.tensor, B_group_stride: tl.tensor,
    C_clip_stride: tl.tensor, C_token_stride: tl.tensor, C_group_stride: tl.tensor,
    dy_clip_stride: tl.tensor, dy_token_stride: tl.tensor, dy_head_stride: tl.tensor,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    COMPUTE: tl.constexpr, TERMS: tl.constexpr, READ_TERMS: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Go through a span of one head forwards, with its state: its part of dC, (P blocks, H, B, L, N), and, unless they are
    None, the final state of a single span and the states that enter the chunks, (B, chunks, H, P, N).

    Further, for the gradients of decays, by token (P blocks, B, H, tokens): what it reads from the state that enters the chunk
    (`output`), with its sum by chunk (P blocks, B, H, chunks), and the products of pairs of tokens of the chunk between which
    its decay lies (`within`). Without EXACT `output` has all that the token reads of earlier ones, and `within` what later
    ones of the chunk read of it: their difference loses some digits.
    """
    head = tl.program_id(0) % H
    span = (tl.program_id(0) // H) % num_spans
    clip = (tl.program_id(0) // H // num_spans).to(tl.int64)
    clips = tl.num_programs(0) // H // num_spans
    p, i = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, CHUNK)
    group = (head // heads_per_group).to(tl.int64)
    x_ptr += clip * x_clip_stride + head.to(tl.int64) * x_head_stride
    dy_ptr += clip * dy_clip_stride + head.to(tl.int64) * dy_head_stride
    B_ptr += clip * B_clip_stride + group * B_group_stride
    C_ptr += clip * C_clip_stride + group * C_group_stride
    dC_ptr += ((tl.program_id(1).to(tl.int64) * H + head) * clips + clip) * L * N
    row = (clip * H + head) * (num_chunks * CHUNK)
    within_ptr += tl.program_id(1).to(tl.int64) * clips * H * (num_chunks * CHUNK) + row
    output_ptr += tl.program_id(1).to(tl.int64) * clips * H * (num_chunks * CHUNK) + row
    output_sum_ptr += (tl.program_id(1).to(tl.int64) * clips * H + clip * H + head) * num_chunks
    if ids_ptr is not None:
        ids_ptr += clip * L
    states = _load_state(entering_ptr, (clip * num_spans + span) * H + head, p, P, N, BLOCK_N, TILES)
    end = tl.minimum(span * chunks_per_span + chunks_per_span, num_chunks)
    for chunk in range(span * chunks_per_span, end):
        position = chunk * CHUNK + i
        inside, tokens = position < L, to_tokens(position, L, REVERSE)
        base = row + chunk * CHUNK
        from_state, decay = _from_state(prefix_ptr, prefix_low_ptr, base, CHUNK)
        weights, _ = state_weights(d_ptr, prefix_ptr, prefix_low_ptr, base, CHUNK)
        used = i[:, None] >= i[None, :]
        if ids_ptr is not None:
            ids, before, last = load_ids(ids_ptr, chunk, L, REVERSE, CHUNK)
            used = used & (ids[:, None] == ids[None, :])
            from_state = tl.where(ids == before, from_state, 0.0)
            weights = tl.where(ids == last, weights, 0.0)
            decay = tl.where(before == last, decay, 0.0)
        x = load_rows(x_ptr, tokens, p, inside, P, x_token_stride, COMPUTE, EVEN)
        dy = load_rows(dy_ptr, tokens, p, inside, P, dy_token_stride, COMPUTE, EVEN)
        B_tiles = _load_tiles(B_ptr, tokens, inside, N, B_token_stride, BLOCK_N, TILES, COMPUTE, EVEN)
        C_tiles = _load_tiles(C_ptr, tokens, inside, N, C_token_stride, BLOCK_N, TILES, COMPUTE, EVEN)
        if chunk_states_ptr is not None:
            _store_state(chunk_states_ptr, states, (clip * num_chunks + chunk) * H + head, p, P, N, BLOCK_N, TILES)
        pairs = dot(dy, tl.trans(x), tl.zeros((CHUNK, CHUNK), tl.float32)) * tl.load(d_ptr + base + i)[None, :]
        pairs *= _between(prefix_ptr, prefix_low_ptr, base, False, CHUNK)
        pairs = tl.where(used, pairs, 0.0)
        products = tl.zeros((CHUNK, CHUNK), tl.float32)
        for t in tl.static_range(TILES):
            products = dot(C_tiles[t], tl.trans(B_tiles[t]), products)
        terms = tl.where(i[:, None] > i[None, :], pairs * products, 0.0)
        if EXACT:
            spanning = tl.cumsum(terms, axis=0, reverse=True)  # at [t, j]: of all i >= t
            tl.store(within_ptr + chunk * CHUNK + i, tl.sum(tl.where(i[:, None] > i[None, :], spanning, 0.0), axis=1))
        else:
            tl.store(within_ptr + chunk * CHUNK + i, tl.sum(terms, axis=0))
        pairs = pairs.to(COMPUTE)
        scaled = x.to(tl.float32) * weights[:, None]
        read = tl.zeros((CHUNK,), tl.float32) if EXACT else tl.sum(terms, axis=1)
        from_entering = tl.zeros((CHUNK,), tl.float32)
        new_states = ()
        for t in tl.static_range(TILES):
            n = t * BLOCK_N + tl.arange(0, BLOCK_N)
            dC = dot_split(dy, tl.trans(states[t]), tl.zeros((CHUNK, BLOCK_N), tl.float32), COMPUTE, READ_TERMS)
            dC *= from_state[:, None]
            from_entering += tl.sum(dC * C_tiles[t].to(tl.float32), axis=1)
            dC = dot(pairs, B_tiles[t], dC)
            dC_ptrs = dC_ptr + tokens[:, None] * N + n[None, :]
            mask = inside[:, None] if EVEN else inside[:, None] & (n < N)[None, :]
            tl.store(dC_ptrs, dC.to(dC_ptr.dtype.element_ty), mask=mask)
            new_states = new_states + (dot_split(tl.trans(B_tiles[t]), scaled, states[t] * decay, COMPUTE, TERMS),)
        states = new_states
        tl.store(output_ptr + chunk * CHUNK + i, read + from_entering)
        tl.store(output_sum_ptr + chunk, tl.sum(from_entering, axis=0))
    if final_ptr is not None:
        _store_state(final_ptr, states, clip * H + head, p, P, N, BLOCK_N, TILES)


@triton.jit(do_not_specialize=["L", "num_chunks", "num_spans", "chunks_per_span"])
def gradient_reverse_kernel(
    x_ptr: tl.tensor, B_ptr: tl.tensor, C_ptr: tl.tensor, dy_ptr: tl.tensor, D_ptr: tl.tensor, ids_ptr: tl.tensor,
    d_ptr: tl.tensor, prefix_ptr: tl.tensor, prefix_low_ptr: tl.tensor,
    leaving_ptr: tl.tensor, final_ptr: tl.tensor, chunk_states_ptr: tl.tensor, entering_ptr: tl.tensor,
    output_sum_ptr: tl.tensor,
    dx_ptr: tl.tensor, dB_ptr: tl.tensor, dD_ptr: tl.tensor, dinitial_ptr: tl.tensor,
    input_ptr: tl.tensor, step_ptr: tl.tensor, through_ptr: tl.tensor,
    L: tl.tensor, H: tl.tensor, P: tl.tensor, N: tl.tensor, heads_per_group: tl.tensor,
    num_chunks: tl.tensor, num_spans: tl.tensor, chunks_per_span: tl.tensor,
    x_clip_stride: tl.tensor, x_token_stride: tl.tensor, x_head_stride: tl.tensor,
    B_clip_stride: tl.tensor, B_token_stride: tl.tensor, B_group_stride: tl.tensor,
    C_clip_stride: tl.tensor, C_token_stride: tl.tensor, C_group_stride: tl.tensor,
    dy_clip_stride: tl.tensor, dy_token_stride: tl.tensor, dy_head_stride: tl.tensor,
    D_head_stride: tl.tensor, D_channel_stride: tl.tensor,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    COMPUTE: tl.constexpr, TERMS: tl.constexpr, READ_TERMS: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Go through a span of one head backwards, with the gradient of its state: dx, its part of dB, dD of the span, and, unless
    that is None, the gradient of the initial state of a single span.

    Further, for the gradients of steps and decays, by token (P blocks, B, H, tokens): what it puts into the state that leaves
    the chunk (`input`), and the gradient of its step as a factor of x (`step`); by chunk (P blocks, B, H, chunks): <gradient,
    state> of what goes through it from state to state (`through`). With EXACT the latter is computed from `chunk_states`, else
    from <gradient, state> at the end of the span, less what tokens put into the state, plus what they read of it: that loses
    some digits.
    """
    head = tl.program_id(0) % H
    span = (tl.program_id(0) // H) % num_spans
    clip = (tl.program_id(0) // H // num_spans).to(tl.int64)
    clips = tl.num_programs(0) // H // num_spans
    p, i = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, CHUNK)
    group = (head // heads_per_group).to(tl.int64)
    x_ptr += clip * x_clip_stride + head.to(tl.int64) * x_head_stride
    dy_ptr += clip * dy_clip_stride + head.to(tl.int64) * dy_head_stride
    B_ptr += clip * B_clip_stride + group * B_group_stride
    C_ptr += clip * C_clip_stride + group * C_group_stride
    dx_ptr += (clip * L * H + head) * P
    dB_ptr += ((tl.program_id(1).to(tl.int64) * H + head) * clips + clip) * L * N
    row = (clip * H + head) * (num_chunks * CHUNK)
    block_row = tl.program_id(1).to(tl.int64) * clips * H * (num_chunks * CHUNK) + row
    input_ptr += block_row
    step_ptr += block_row
    chunk_row = (tl.program_id(1).to(tl.int64) * clips * H + clip * H + head) * num_chunks
    output_sum_ptr += chunk_row
    through_ptr += chunk_row
    if ids_ptr is not None:
        ids_ptr += clip * L
    place = (clip * num_spans + span) * H + head
    gradients = _load_state(entering_ptr, place, p, P, N, BLOCK_N, TILES)
    inner = 0.0
    if entering_ptr is not None:
        if not EXACT:
            if span < num_spans - 1:
                state = _load_state(leaving_ptr, place + H, p, P, N, BLOCK_N, TILES)
            else:
                state = _load_state(final_ptr, clip * H + head, p, P, N, BLOCK_N, TILES)
            for t in tl.static_range(TILES):
                inner += tl.sum(tl.sum(gradients[t] * state[t], axis=1), axis=0)
    dD = tl.zeros((BLOCK_P,), tl.float32)
    first = span * chunks_per_span
    end = tl.minimum(first + chunks_per_span, num_chunks)
    for k in range(0, end - first):
        chunk = end - 1 - k
        position = chunk * CHUNK + i
        inside, tokens = position < L, to_tokens(position, L, REVERSE)
        base = row + chunk * CHUNK
        d = tl.load(d_ptr + base + i)
        from_state, decay = _from_state(prefix_ptr, prefix_low_ptr, base, CHUNK)
        to_end = _to_end(prefix_ptr, prefix_low_ptr, base, CHUNK)
        used = i[:, None] <= i[None, :]  # at [j, i]
        if ids_ptr is not None:
            ids, before, last = load_ids(ids_ptr, chunk, L, REVERSE, CHUNK)
            used = used & (ids[:, None] == ids[None, :])
            from_state = tl.where(ids == before, from_state, 0.0)
            to_end = tl.where(ids == last, to_end, 0.0)
            decay = tl.where(before == last, decay, 0.0)
        x = load_rows(x_ptr, tokens, p, inside, P, x_token_stride, COMPUTE, EVEN)
        dy = load_rows(dy_ptr, tokens, p, inside, P, dy_token_stride, COMPUTE, EVEN)
        B_tiles = _load_tiles(B_ptr, tokens, inside, N, B_token_stride, BLOCK_N, TILES, COMPUTE, EVEN)
        C_tiles = _load_tiles(C_ptr, tokens, inside, N, C_token_stride, BLOCK_N, TILES, COMPUTE, EVEN)
        decays = tl.where(used, _between(prefix_ptr, prefix_low_ptr, base, True, CHUNK), 0.0)
        pairs = dot(x, tl.trans(dy), tl.zeros((CHUNK, CHUNK), tl.float32)) * decays * d[:, None]
        pairs = pairs.to(COMPUTE)
        into_state = tl.zeros((CHUNK,), tl.float32)
        for t in tl.static_range(TILES):
            n = t * BLOCK_N + tl.arange(0, BLOCK_N)
            dB = dot_split(x, tl.trans(gradients[t]), tl.zeros((CHUNK, BLOCK_N), tl.float32), COMPUTE, READ_TERMS)
            dB *= (to_end * d)[:, None]
            into_state += tl.sum(dB * B_tiles[t].to(tl.float32), axis=1)
            dB = dot(pairs, C_tiles[t], dB)
            dB_ptrs = dB_ptr + tokens[:, None] * N + n[None, :]
            mask = inside[:, None] if EVEN else inside[:, None] & (n < N)[None, :]
            tl.store(dB_ptrs, dB.to(dB_ptr.dtype.element_ty), mask=mask)
        tl.store(input_ptr + chunk * CHUNK + i, into_state)
        dx = tl.zeros((CHUNK, BLOCK_P), tl.float32)
        for t in tl.static_range(TILES):
            dx = dot(B_tiles[t], gradients[t].to(COMPUTE), dx)
        dx *= to_end[:, None]
        products = tl.zeros((CHUNK, CHUNK), tl.float32)
        for t in tl.static_range(TILES):
            products = dot(B_tiles[t], tl.trans(C_tiles[t]), products)
        dx = dot((products * decays).to(COMPUTE), dy, dx)
        tl.store(step_ptr + chunk * CHUNK + i, tl.sum(dx * x.to(tl.float32), axis=1))
        dx *= d[:, None]
        if D_ptr is not None:
            D = tl.load(D_ptr + head * D_head_stride + p * D_channel_stride, mask=p < P, other=0.0).to(tl.float32)
            dx += dy.to(tl.float32) * D[None, :]
        dx_ptrs = dx_ptr + tokens[:, None] * (H * P) + p[None, :]
        mask = inside[:, None] if EVEN else inside[:, None] & (p < P)[None, :]
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dD += tl.sum(dy.to(tl.float32) * x.to(tl.float32), axis=0)
        if EXACT:
            state = _load_state(chunk_states_ptr, (clip * num_chunks + chunk) * H + head, p, P, N, BLOCK_N, TILES)
            through = 0.0
            for t in tl.static_range(TILES):
                through += tl.sum(tl.sum(gradients[t] * state[t], axis=1), axis=0)
            through *= decay
        else:
            through = inner - tl.sum(into_state, axis=0)
            inner = through + tl.load(output_sum_ptr + chunk)
        tl.store(through_ptr + chunk, through)
        scaled = dy.to(tl.float32) * from_state[:, None]
        new_gradients = ()
        for t in tl.static_range(TILES):
            new_gradients = new_gradients + (
                dot_split(tl.trans(C_tiles[t]), scaled, gradients[t] * decay, COMPUTE, TERMS),
            )
        gradients = new_gradients
    tl.store(dD_ptr + place * P + p, dD, mask=p < P)
    if dinitial_ptr is not None:
        _store_state(dinitial_ptr, gradients, clip * H + head, p, P, N, BLOCK_N, TILES)


@triton.jit(do_not_specialize=["L", "num_chunks"])
def steps_backward_kernel(
    dt_ptr: tl.tensor, A_ptr: tl.tensor, bias_ptr: tl.tensor, d_ptr: tl.tensor,
    output_ptr: tl.tensor, within_ptr: tl.tensor, input_ptr: tl.tensor, step_ptr: tl.tensor, through_ptr: tl.tensor,
    ddt_ptr: tl.tensor, dA_ptr: tl.tensor, dbias_ptr: tl.tensor,
    L: tl.tensor, H: tl.tensor, num_chunks: tl.tensor, dt_clip_stride: tl.tensor, dt_token_stride: tl.tensor,
    part_stride: tl.tensor, chunk_part_stride: tl.tensor, low: tl.tensor, high: tl.tensor,
    PARTS: tl.constexpr, EXACT: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """Compute ddt (B, L, H) and the chunks' sums for dA and ddt_bias, (B, chunks, H).

    PARTS are the blocks of P, whose numbers are added up.
    """
    clip = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    of_head = (heads < H)[None, :] & (position < num_chunks * CHUNK)[:, None]
    offsets = (clip * H + heads)[None, :].to(tl.int64) * (num_chunks * CHUNK) + position[:, None]
    zeros = tl.zeros((CHUNK, BLOCK_HEADS), tl.float32)
    read, within, into, step = zeros, zeros, zeros, zeros
    through = tl.zeros((BLOCK_HEADS,), tl.float32)
    for part in tl.static_range(PARTS):
        read += tl.load(output_ptr + part * part_stride + offsets, mask=of_head, other=0.0)
        within += tl.load(within_ptr + part * part_stride + offsets, mask=of_head, other=0.0)
        into += tl.load(input_ptr + part * part_stride + offsets, mask=of_head, other=0.0)
        step += tl.load(step_ptr + part * part_stride + offsets, mask=of_head, other=0.0)
        ptrs = through_ptr + part * chunk_part_stride + (clip * H + heads) * num_chunks + chunk
        through += tl.load(ptrs, mask=heads < H, other=0.0)
    if EXACT:
        dlog = within + tl.cumsum(read, axis=0, reverse=True)
    else:
        dlog = tl.cumsum(read - within, axis=0, reverse=True)
    dlog += (tl.cumsum(into, axis=0) - into) + through[None, :]
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
        dd *= 1.0 / (1.0 + tl.exp2(raw * -LOG2E))
    dd = tl.where(inside & (value >= low) & (value <= high), dd, 0.0)
    ddt_ptrs = ddt_ptr + (clip * L + tokens)[:, None] * H + heads[None, :]
    tl.store(ddt_ptrs, dd.to(ddt_ptr.dtype.element_ty), mask=inside)
    tl.store(dbias_ptr + chunk_offsets, tl.sum(dd, axis=0), mask=heads < H)


@triton.jit
def reduce_kernel(
    part_ptr: tl.tensor, out_ptr: tl.tensor, size: tl.tensor, G: tl.tensor, N: tl.tensor, H: tl.tensor,
    P_BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum parts (P blocks, H, size) over the heads of every group, to (size / N, G, N); size is B L N."""
    group = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    each = H // G
    for part in range(0, P_BLOCKS * each):
        block = (part // each) * H + group * each + part % each
        total += tl.load(part_ptr + block.to(tl.int64) * size + i, mask=i < size, other=0.0).to(tl.float32)
    out = out_ptr + (i // N) * (G * N) + group * N + i % N
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=i < size)
