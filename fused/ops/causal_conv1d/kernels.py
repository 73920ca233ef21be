"""The Triton source of the causal convolution; `conv.py` says what it computes and launches it."""

# mypy: disable-error-code="assignment"
# (a tuple that grows in an unrolled loop has another type after every step)

import triton
import triton.language as tl


@triton.jit
def _sigmoid(s, NATIVE: tl.constexpr):
    if NATIVE:  # one ex2 and one rcp: what Triton makes of exp and of a division rescues ranges that do not occur
        return tl.inline_asm_elementwise(
            "{ .reg .f32 a; mul.f32 a, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 a, a;"
            " add.f32 a, a, 0f3F800000; rcp.approx.ftz.f32 $0, a; }",
            "=f,f",
            [s],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return 1.0 / (1.0 + tl.exp(-s))


@triton.jit
def _taps(weight, bias, e, E, K: tl.constexpr):
    """One direction's K taps and its bias, each (1, BE) in float32."""
    taps = ()
    for w in tl.static_range(K):
        taps = taps + (tl.load(weight + e * K + w, mask=e < E, other=0.0).to(tl.float32)[None, :],)
    if bias is not None:
        start = tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    else:
        start = tl.zeros((1, e.shape[0]), tl.float32)
    return taps, start


@triton.jit
def _repeat(value, times: tl.constexpr):
    values = ()
    for _ in tl.static_range(times):
        values = values + (value,)
    return values


@triton.jit
def _row(x, t, e, L, E, stride, BEFORE: tl.constexpr):
    """x[t, e] in float32, zero outside the sequence; t is (RUNS,) and can be negative only if BEFORE, e is (BE,). The cache
    keeps what is written, which is read next, rather than x."""
    inside = ((t >= 0) & (t < L) if BEFORE else t < L)[:, None] & (e < E)[None, :]
    at = x + t.to(tl.int64)[:, None] * stride + e[None, :]
    return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _edge(row, state, t, first, clip, e, E, K: tl.constexpr):
    """The row, or what the clip's (E, K-1) of the state holds for token t where its first entry is for token `first`."""
    if state is not None:
        beyond = ((t >= first) & (t < first + K - 1))[:, None] & (e < E)[None, :]
        held = tl.load(state + ((clip * E + e) * (K - 1))[None, :] + (t - first)[:, None], mask=beyond, other=0.0)
        row = tl.where(beyond, held.to(tl.float32), row)
    return row


@triton.jit
def _sum(rows, r: tl.constexpr, taps, bias, reverse: tl.constexpr, K: tl.constexpr):
    total = bias + tl.zeros_like(rows[r])
    for w in tl.static_range(K):
        total = tl.fma(rows[r + (K - 1 - w if reverse else w)], taps[w], total)
    return total


@triton.jit
def _activate(total, SILU: tl.constexpr, NATIVE: tl.constexpr):
    return total * _sigmoid(total, NATIVE) if SILU else total


@triton.jit
def _slope(dy, total, SILU: tl.constexpr, NATIVE: tl.constexpr):
    if SILU:
        gate = _sigmoid(total, NATIVE)
        dy = dy * gate * tl.fma(total, 1.0 - gate, 1.0)  # said, not left to the compiler: bits are promised
    return dy


@triton.jit
def _place(chunks, E, BE: tl.constexpr, RUNS: tl.constexpr):
    """Of this program: its clip, its chunk of runs, the numbers of its runs, its channels."""
    blocks = tl.cdiv(E, BE)
    program = tl.program_id(0)
    chunk = (program // blocks) % chunks
    clip = (program // blocks // chunks).to(tl.int64)
    return clip, chunk, chunk * RUNS + tl.arange(0, RUNS), (program % blocks) * BE + tl.arange(0, BE)


@triton.jit(do_not_specialize=["L", "chunks", "run"])
def forward_kernel(
    x, wa, ba, sa, ya, wb, bb, sb, yb, L, E, x_clip, x_token, y_clip, chunks, run,
    K: tl.constexpr, SILU: tl.constexpr, NATIVE: tl.constexpr, RUNS: tl.constexpr, BE: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Names ending in a are ahead's, in b back's; a direction that is not asked for is None throughout."""
    clip, _, runs, e = _place(chunks, E, BE, RUNS)
    start = runs * run - (K - 1)
    x += clip * x_clip
    if ya is not None:
        taps_a, bias_a = _taps(wa, ba, e, E, K)
        ya += clip * y_clip
    if yb is not None:
        taps_b, bias_b = _taps(wb, bb, e, E, K)
        yb += clip * y_clip
    window = ()
    for j in tl.static_range(K - 1):
        t = start + j
        row = _edge(_row(x, t, e, L, E, x_token, True), sa, t, 1 - K, clip, e, E, K)
        window = window + (_edge(row, sb, t, L, clip, e, E, K),)
    for i in range(0, run, UNROLL):
        rows = window
        for r in tl.static_range(UNROLL):
            t = start + (i + r + K - 1)
            rows = rows + (_edge(_row(x, t, e, L, E, x_token, False), sb, t, L, clip, e, E, K),)
        for r in tl.static_range(UNROLL):
            t = start + (i + r)
            if ya is not None:
                y = _activate(_sum(rows, r, taps_a, bias_a, False, K), SILU, NATIVE)
                n = t + (K - 1)
                at = n.to(tl.int64)[:, None] * E + e[None, :]
                tl.store(ya + at, y.to(ya.dtype.element_ty), mask=(n < L)[:, None] & (e < E)[None, :])
            if yb is not None:
                y = _activate(_sum(rows, r, taps_b, bias_b, True, K), SILU, NATIVE)
                at = t.to(tl.int64)[:, None] * E + e[None, :]
                tl.store(yb + at, y.to(yb.dtype.element_ty), mask=((t >= 0) & (t < L))[:, None] & (e < E)[None, :])
        window = rows[UNROLL:]


@triton.jit
def _gather(total, value, counted, rows, r: tl.constexpr, reverse: tl.constexpr, K: tl.constexpr):
    """Add one token's g to the sums of its taps and of the bias, where the token is this run's own."""
    value = tl.where(counted[:, None], value, 0.0)
    new = ()
    for w in tl.static_range(K):
        new = new + (tl.fma(value, rows[r + (K - 1 - w if reverse else w)], total[w]),)
    return new + (total[K] + value,)


@triton.jit
def _spread(total, slopes, taps, final, t, first_final, clip, e, E, reverse: tl.constexpr, K: tl.constexpr):
    """Add one direction's dx from the K slopes that its token reached, the earliest first, and from the final state."""
    for w in tl.static_range(K):
        total = tl.fma(slopes[w if reverse else K - 1 - w], taps[w], total)
    if final is not None:
        total += _edge(tl.zeros_like(total), final, t, first_final, clip, e, E, K)
    return total


@triton.jit
def _leave(dstate, total, t, own, first, clip, e, E, K: tl.constexpr):
    """Where t lies beyond the sequence, one direction's dx is the gradient of its initial state."""
    beyond = (own & (t >= first) & (t < first + K - 1))[:, None] & (e < E)[None, :]
    at = ((clip * E + e) * (K - 1))[None, :] + (t - first)[:, None]
    tl.store(dstate + at, total.to(dstate.dtype.element_ty), mask=beyond)


@triton.jit
def _keep(partial, total, number, e, E, K: tl.constexpr):
    """Store the sums of this program's runs, (K+1, BE)."""
    partial += number * (K + 1) * E
    for w in tl.static_range(K + 1):
        tl.store(partial + w * E + e, tl.sum(total[w], axis=0), mask=e < E)


@triton.jit(do_not_specialize=["L", "chunks", "run", "steps"])
def backward_kernel(
    x, dx, wa, ba, sa, dya, dfa, dsa, pa, wb, bb, sb, dyb, dfb, dsb, pb,
    L, E, x_clip, x_token, dx_clip, dx_token, chunks, run, steps,
    K: tl.constexpr, SILU: tl.constexpr, NATIVE: tl.constexpr, RUNS: tl.constexpr, BE: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """A run's own tokens are [first, last); K-1 steps before them fill the windows of x and of both slopes."""
    clip, chunk, runs, e = _place(chunks, E, BE, RUNS)
    first = runs * run
    last = tl.minimum(first + run, L)
    start = first - (K - 1)
    x += clip * x_clip
    dx += clip * dx_clip
    zero = tl.zeros((RUNS, BE), tl.float32)
    slopes_a, slopes_b, sums_a, sums_b = (), (), (), ()
    if dya is not None:
        taps_a, bias_a = _taps(wa, ba, e, E, K)
        dya += clip * L * E
        slopes_a, sums_a = _repeat(zero, K - 1), _repeat(zero, K + 1)
    if dyb is not None:
        taps_b, bias_b = _taps(wb, bb, e, E, K)
        dyb += clip * L * E
        slopes_b, sums_b = _repeat(zero, K - 1), _repeat(zero, K + 1)
    window = ()
    for j in tl.static_range(K - 1):
        t = start + j
        row = _edge(_row(x, t, e, L, E, x_token, True), sa, t, 1 - K, clip, e, E, K)
        window = window + (_edge(row, sb, t, L, clip, e, E, K),)
    for i in range(0, steps, UNROLL):
        rows, grads_a, grads_b = window, (), ()
        for r in tl.static_range(UNROLL):  # all loads of the round before its arithmetic
            t = start + (i + r)
            rows = rows + (_edge(_row(x, t + (K - 1), e, L, E, x_token, False), sb, t + (K - 1), L, clip, e, E, K),)
            if dya is not None:
                grads_a = grads_a + (_row(dya, t + (K - 1), e, L, E, E, False),)
            if dyb is not None:
                grads_b = grads_b + (_row(dyb, t, e, L, E, E, True),)
        for r in tl.static_range(UNROLL):
            t = start + (i + r)
            total = zero
            if dya is not None:
                slope = _slope(grads_a[r], _sum(rows, r, taps_a, bias_a, False, K), SILU, NATIVE)
                sums_a = _gather(sums_a, slope, t + (K - 1) < last, rows, r, False, K)
                slopes_a = slopes_a + (slope,)
                total = _spread(total, slopes_a, taps_a, dfa, t, L - (K - 1), clip, e, E, False, K)
                if dsa is not None:
                    _leave(dsa, total, t, first == 0, 1 - K, clip, e, E, K)
                slopes_a = slopes_a[1:]
            if dyb is not None:
                slope = _slope(grads_b[r], _sum(rows, r, taps_b, bias_b, True, K), SILU, NATIVE)
                sums_b = _gather(sums_b, slope, (t >= first) & (t < last), rows, r, True, K)
                slopes_b = slopes_b + (slope,)
                if dsb is not None:
                    part = _spread(zero, slopes_b, taps_b, dfb, t, 0, clip, e, E, True, K)
                    _leave(dsb, part, t, (first < L) & (last == L), L, clip, e, E, K)
                total = _spread(total, slopes_b, taps_b, dfb, t, 0, clip, e, E, True, K)
                slopes_b = slopes_b[1:]
            own = ((t >= first) & (t < last))[:, None] & (e < E)[None, :]
            at = t.to(tl.int64)[:, None] * dx_token + e[None, :]
            tl.store(dx + at, total.to(dx.dtype.element_ty), mask=own)
        window = rows[UNROLL:]
    number = clip * chunks + chunk
    if dya is not None:
        _keep(pa, sums_a, number, e, E, K)
    if dyb is not None:
        _keep(pb, sums_b, number, e, E, K)


@triton.jit(do_not_specialize=["programs"])
def reduce_kernel(partial, dweight, dbias, E, programs, K: tl.constexpr, ROWS: tl.constexpr, BE: tl.constexpr):
    """partial (directions, programs, K+1, E) -> dweight (directions, E, K), dbias (directions, E)."""
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    w = tl.program_id(1) % (K + 1)
    direction = tl.program_id(1) // (K + 1)
    partial += (direction.to(tl.int64) * programs * (K + 1) + w) * E
    total = tl.zeros((ROWS, BE), tl.float32)
    for i in range(0, programs, ROWS):
        rows = i + tl.arange(0, ROWS)
        inside = (rows < programs)[:, None] & (e < E)[None, :]
        total += tl.load(partial + rows.to(tl.int64)[:, None] * ((K + 1) * E) + e[None, :], mask=inside, other=0.0)
    result = tl.sum(total, axis=0)
    if w < K:
        tl.store(dweight + (direction * E + e) * K + w, result, mask=e < E)
    elif dbias is not None:
        tl.store(dbias + direction * E + e, result, mask=e < E)
