"""The short causal convolution in Triton: every direction of one x in one launch, forward and backward.

    s_t  = bias + sum_w W[w] x_{t-(K-1-w)}       ahead          s_t = bias + sum_w W[w] x_{t+(K-1-w)}       back
    y_t  = s_t sigmoid(s_t)                      or s_t
    g_t  = dy_t dy_t/ds_t
    dx_t = sum_w W[w] g_{t+(K-1-w)}              ahead          dx_t = sum_w W[w] g_{t-(K-1-w)}             back
    dW_w = sum_t g_t x_{t-(K-1-w)}                              dbias = sum_t g_t

A thread walks along a run of tokens with K-1 inputs in registers. At step t its window is x_t .. x_{t+K-1}: what `back`
needs for token t is what `ahead` needs for token t+K-1, so each input is read once for both. The walks of a program are
`RUNS` runs of `BE` channels. Nothing of y, dx and dstate depends on where a run begins; dW and dbias are summed run by
run, then program by program, in an order that depends on the shape alone.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import launching_on

MAX_WIDTH = 8
THREADS = 132 * 1024  # what keeps an H200 busy; a constant, for sums must not depend on whose GPU it is
AHEAD = {"RUNS": 8, "BE": 64, "UNROLL": 4, "num_warps": 4}  # 4 channels a thread
BACKWARD = {"RUNS": 4, "BE": 64, "UNROLL": 4, "num_warps": 4}  # 2 channels a thread: it keeps 58 numbers for each pair
REDUCE = {"ROWS": 64, "BE": 32, "num_warps": 4}

Optionals = Sequence[Tensor | None] | None


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
def _row(x, t, e, L, E, stride, BEFORE: tl.constexpr):
    """x[t, e] in float32, zero outside the sequence; t is (RUNS,) and can be negative only if BEFORE, e is (BE,)."""
    inside = ((t >= 0) & (t < L) if BEFORE else t < L)[:, None] & (e < E)[None, :]
    return tl.load(x + t.to(tl.int64)[:, None] * stride + e[None, :], mask=inside, other=0.0).to(tl.float32)


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
        dy = dy * gate * (1.0 + total * (1.0 - gate))
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
    x, wa, ba, sa, ya, wb, bb, sb, yb, L, E, x_clip, x_token, chunks, run,
    K: tl.constexpr, SILU: tl.constexpr, NATIVE: tl.constexpr, RUNS: tl.constexpr, BE: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Names ending in a are ahead's, in b back's; a direction that is not asked for is None throughout."""
    clip, _, runs, e = _place(chunks, E, BE, RUNS)
    start = runs * run - (K - 1)
    x += clip * x_clip
    if ya is not None:
        taps_a, bias_a = _taps(wa, ba, e, E, K)
        ya += clip * L * E
    if yb is not None:
        taps_b, bias_b = _taps(wb, bb, e, E, K)
        yb += clip * L * E
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
        for j in tl.static_range(K - 1):
            slopes_a = slopes_a + (zero,)
        for j in tl.static_range(K + 1):
            sums_a = sums_a + (zero,)
    if dyb is not None:
        taps_b, bias_b = _taps(wb, bb, e, E, K)
        dyb += clip * L * E
        for j in tl.static_range(K - 1):
            slopes_b = slopes_b + (zero,)
        for j in tl.static_range(K + 1):
            sums_b = sums_b + (zero,)
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


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Optionals,
    states: Optionals,
    reverses: Sequence[bool],
    activated: bool,
    want_states: bool = True,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Convolve x (B, L, E) in every direction: y (directions, B, L, E), and the states (B, E, K-1) that leave.

    weights are (E, K), biases (E,) or None, states (B, E, K-1) or None, each one for a direction; the directions are
    one of each kind at most. x may have any strides over clips and tokens; other channel strides than 1 cost a copy.
    """
    biases, states = _each(biases, weights), _each(states, weights)
    x = _unit(x)
    B, L, E = x.shape
    K = weights[0].shape[1]
    y = torch.empty((len(weights), B, L, E), dtype=x.dtype, device=x.device)
    if x.numel():
        run, chunks = _runs(B, L + K - 1 if True in reverses else L, E, AHEAD, lanes=4, halo=0)
        ahead, back = _sides(reverses, _contiguous(weights), _contiguous(biases), _as(states, x.dtype), y)
        with launching_on(x.device):
            forward_kernel[(B * chunks * triton.cdiv(E, AHEAD["BE"]),)](
                x, *ahead, *back, L, E, x.stride(0), x.stride(1), chunks, run,
                K=K, SILU=activated, NATIVE=not triton.knobs.runtime.interpret, **AHEAD,
            )  # fmt: skip
    if not want_states:
        return y, None
    return y, tuple(_leaving(x, s, K - 1, reverse) for s, reverse in zip(states, reverses, strict=True))


def backward(
    dy: Sequence[Tensor] | Tensor,
    dfinals: Optionals,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Optionals,
    states: Optionals,
    reverses: Sequence[bool],
    activated: bool,
    dx: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """(dx, dweights, dbiases, dstates) of `forward`: dx summed over the directions, the others one for each.

    dy is (directions, B, L, E) or one (B, L, E) for each direction; dfinals (B, E, K-1) or None for each. dx is written
    where given, through any strides over clips and tokens. dweights (E, K) and dbiases (E,) are float32, dstates have
    their state's dtype; a bias or state that is None has no gradient.
    """
    biases, states, dfinals = _each(biases, weights), _each(states, weights), _each(dfinals, weights)
    x = _unit(x)
    B, L, E = x.shape
    K = weights[0].shape[1]
    directions = len(weights)
    dx = torch.empty((B, L, E), dtype=x.dtype, device=x.device) if dx is None else dx
    if dx.shape != x.shape or dx.stride(2) != 1:
        raise ValueError(f"dx must be {tuple(x.shape)} with unit channel stride, got {tuple(dx.shape)}, {dx.stride()}")
    precise = {"dtype": torch.float32, "device": x.device}
    dstates = tuple(None if s is None else torch.empty((B, E, K - 1), dtype=s.dtype, device=x.device) for s in states)
    dbias = torch.empty((directions, E), **precise) if any(b is not None for b in biases) else None
    dweight = torch.empty((directions, E, K), **precise)
    if x.numel():
        run, chunks = _runs(B, L, E, BACKWARD, lanes=2, halo=K - 1)
        steps = run + (K - 1) * (1 if all(s is None for s in states) else 2)
        partial = torch.empty((directions, B * chunks, K + 1, E), **precise)
        ahead, back = _sides(
            reverses, _contiguous(weights), _contiguous(biases), _as(states, x.dtype),
            _contiguous(dy), _contiguous(dfinals), dstates, partial,
        )  # fmt: skip
        with launching_on(x.device):
            backward_kernel[(B * chunks * triton.cdiv(E, BACKWARD["BE"]),)](
                x, dx, *ahead, *back, L, E, x.stride(0), x.stride(1), dx.stride(0), dx.stride(1), chunks, run, steps,
                K=K, SILU=activated, NATIVE=not triton.knobs.runtime.interpret, **BACKWARD,
            )  # fmt: skip
            reduce_kernel[(triton.cdiv(E, REDUCE["BE"]), directions * (K + 1))](
                partial, dweight, dbias, E, B * chunks, K=K, **REDUCE
            )
    else:  # no token: what leaves is what entered
        dweight.zero_()
        dbias = None if dbias is None else dbias.zero_()
        for dstate, dfinal in zip(dstates, dfinals, strict=True):
            if dstate is not None:
                dstate.zero_() if dfinal is None else dstate.copy_(dfinal)
    dbiases = tuple(None if b is None else dbias[i] for i, b in enumerate(biases))
    return dx, dweight.unbind(0), dbiases, dstates


def _runs(clips: int, tokens: int, E: int, config: dict, lanes: int, halo: int) -> tuple[int, int]:
    """Tokens of a run, and chunks of a clip; with a run's halo a multiple of what a round takes."""
    wanted = max(clips * tokens * E // (lanes * THREADS), config["UNROLL"])
    chunks = triton.cdiv(tokens, wanted * config["RUNS"])
    run = triton.cdiv(tokens, chunks * config["RUNS"])
    return triton.cdiv(run + halo, config["UNROLL"]) * config["UNROLL"] - halo, chunks


def _sides(reverses: Sequence[bool], *per_direction: Sequence[Tensor | None] | Tensor) -> tuple[list, list]:
    """The arguments of ahead and those of back; None throughout for a direction that is not there."""
    if len(set(reverses)) != len(reverses):
        raise ValueError(f"reverses must name each direction once at most, got {tuple(reverses)}")
    at = {reverse: i for i, reverse in enumerate(reverses)}
    ahead, back = ([x[at[r]] if r in at else None for x in per_direction] for r in (False, True))
    return ahead, back


def _each(values: Optionals, like: Sequence) -> Sequence[Tensor | None]:
    return (None,) * len(like) if values is None else values


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _contiguous(tensors: Sequence[Tensor | None] | Tensor) -> Sequence[Tensor | None] | Tensor:
    return tensors.contiguous() if isinstance(tensors, Tensor) else [None if t is None else t.contiguous() for t in tensors]


def _as(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Sequence[Tensor | None]:
    return [None if t is None else t.to(dtype).contiguous() for t in tensors]


def _leaving(x: Tensor, state: Tensor | None, size: int, reverse: bool) -> Tensor:
    """The last (reverse: first) `size` raw inputs of the sequence and the state beyond its edge, (B, E, size), a copy."""
    length = x.shape[1]
    inside = (x[:, :size] if reverse else x[:, max(length - size, 0) :]).transpose(1, 2)
    if length >= size:
        return inside.clone(memory_format=torch.contiguous_format)
    edge = x.new_zeros((x.shape[0], x.shape[2], size)) if state is None else state.to(x.dtype)
    return torch.cat((inside, edge[..., : size - length]) if reverse else (edge[..., length:], inside), dim=2)
