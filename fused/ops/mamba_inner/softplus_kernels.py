"""Softplus in Triton, for dt_proj's kernels."""

import triton
import triton.language as tl


@triton.jit
def _exp2(x: tl.tensor, NATIVE: tl.constexpr):
    if not NATIVE:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def softplus(x: tl.tensor, PRECISE: tl.constexpr, NATIVE: tl.constexpr):
    """Return softplus(x) = max(x, 0) + log1p(w) with w = exp(-|x|), in float32.

    PRECISE: log1p(w) = 2 artanh(w / (2 + w)) by a minimax polynomial, as in the scan. Otherwise log1p(w) is w times a minimax
    polynomial in w; this is within 1e-5 of softplus and needs one special function instead of two.
    """
    if PRECISE:
        w = tl.exp(-tl.abs(x))
        s = w / (2.0 + w)
        q = s * s
        p = tl.fma(q, tl.fma(q, tl.fma(q, tl.full(q.shape, 0.28024462, tl.float32), 0.27999142), 0.40021700), 0.66666412)
        return tl.maximum(x, 0.0) + tl.fma(s * q, p, 2.0 * s)
    w = _exp2(tl.abs(x) * -1.4426950408889634, NATIVE)
    p = tl.fma(w, tl.fma(w, tl.full(w.shape, -0.023869152, tl.float32), 0.10122228), -0.21004869)
    p = tl.fma(w, tl.fma(w, tl.fma(w, p, 0.32520668), -0.49936137), 0.99999160)
    return tl.fma(w, p, tl.maximum(x, 0.0))
