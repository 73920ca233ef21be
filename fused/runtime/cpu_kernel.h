// What the CPU kernels share: vectors of one cache line and functions of them, scratch memory, and the threads of PyTorch.
//
// The compiler's vector extension serves every instruction set. A value's bits do not depend on its lane, on the number of
// threads, or on what stands beside it: tails of rows are padded to whole vectors.

#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef __AVX512DQ__
#include <immintrin.h>
#endif

typedef int64_t Int;

constexpr Int VECTOR_BYTES = 64;

template <class T> struct VectorType;
template <> struct VectorType<float> {
    typedef float type __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t bits __attribute__((vector_size(VECTOR_BYTES)));
};
template <> struct VectorType<double> {
    typedef double type __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t bits __attribute__((vector_size(VECTOR_BYTES)));
};
template <class T> using Vector = typename VectorType<T>::type;
template <class T> using Bits = typename VectorType<T>::bits;
template <class T> constexpr Int LANES = VECTOR_BYTES / sizeof(T);

template <class T> inline Vector<T> load(const T* from) {
    Vector<T> x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

template <class T> inline void store(T* to, const Vector<T>& x) { std::memcpy(to, &x, sizeof x); }

// The first `count` values, with zeros behind them.
template <class T> inline Vector<T> load(const T* from, Int count) {
    if (count == LANES<T>) return load(from);
    Vector<T> x = {};
    std::memcpy(&x, from, count * sizeof(T));
    return x;
}

template <class T> inline void store(T* to, const Vector<T>& x, Int count) {
    if (count == LANES<T>) return store(to, x);
    std::memcpy(to, &x, count * sizeof(T));
}

template <class T> inline Vector<T> all(T x) { return Vector<T>{} + x; }

// x with zeros behind its first `count` lanes
template <class T> inline Vector<T> first_lanes(const Vector<T>& x, Int count) {
    T lanes[LANES<T>];
    std::memcpy(lanes, &x, sizeof lanes);
    return load(lanes, count);
}

#ifndef __clang__
// Of a and b, vectors of partial sums whose lanes differ in the bits below `width`: the sums of a's lanes over this bit in the
// lanes without it, those of b in the lanes with it.
template <class T> inline Vector<T> add_lanes(const Vector<T>& a, const Vector<T>& b, Int width) {
    Bits<T> low, high;
    for (Int i = 0; i < LANES<T>; ++i) {
        low[i] = i & width ? LANES<T> + (i & ~width) : i;
        high[i] = i & width ? LANES<T> + i : i | width;
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// The sums of the lanes of each of as many vectors as a vector has lanes, one vector; the vectors are overwritten.
template <class T> inline Vector<T> sums(Vector<T>* x) {
#pragma GCC unroll 4
    for (Int width = 1; width < LANES<T>; width *= 2)
#pragma GCC unroll 8
        for (Int i = 0; i < LANES<T> / width; i += 2) x[i / 2] = add_lanes<T>(x[i], x[i + 1], width);
    return x[0];
}
#else
template <class T> inline Vector<T> sums(Vector<T>* x) {
    for (Int width = 1; width < LANES<T>; width *= 2)
        for (Int i = 0; i < LANES<T> / width; i += 2) {
            Vector<T> y;
            for (Int lane = 0; lane < LANES<T>; ++lane) {
                const Vector<T>& from = x[lane & width ? i + 1 : i];
                y[lane] = from[lane & ~width] + from[lane | width];
            }
            x[i / 2] = y;
        }
    return x[0];
}
#endif

// Write the sum of the lanes of each of `count` vectors.
template <class T> inline void sum_rows(const Vector<T>* rows, Int count, T* out) {
    for (Int i = 0; i < count; i += LANES<T>) {
        Vector<T> x[LANES<T>] = {};
        const Int some = count - i < LANES<T> ? count - i : LANES<T>;
        for (Int j = 0; j < some; ++j) x[j] = rows[i + j];
        store(out + i, sums<T>(x), some);
    }
}

// The sum of the lanes, in the order of a tree
template <class T> inline T sum(const Vector<T>& x) {
    T lanes[LANES<T>];
    std::memcpy(lanes, &x, sizeof lanes);
    for (Int width = LANES<T> / 2; width; width /= 2)
        for (Int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

// x in [low, high], NaN where x is NaN
template <class V, class T> inline V clamp(V x, T low, T high) {
    x = x < low ? V{} + low : x;
    return x > high ? V{} + high : x;
}

// 2^n for integral n from -126 to 127, -1022 to 1023 in float64
inline Vector<float> power_of_two(const Bits<float>& n) {
    Bits<float> bits = (n + 127) << 23;
    Vector<float> x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline Vector<double> power_of_two(const Bits<double>& n) {
    Bits<double> bits = (n + 1023) << 52;
    Vector<double> x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// significand * 2^n for integral n, rounded once: below the least normal number in two steps, of which the first is exact
template <class T> inline Vector<T> scale(const Vector<T>& significand, const Vector<T>& n) {
    Bits<T> whole = __builtin_convertvector(n, Bits<T>), half = whole >> 1;
    return significand * power_of_two(half) * power_of_two(whole - half);
}

template <class T> inline Vector<T> nearest_integer(const Vector<T>& x) {  // for |x| < 2^21
    const T magic = sizeof(T) == 4 ? T(0x1.8p23) : T(0x1.8p52);
    return (x + magic) - magic;
}

// 2^f for |f| <= 1/2: 1 + f * polynomial, so that a decay near 1 has no error but its rounding. Minimax of degree 6 (2e-9).
inline Vector<float> exp2_of_fraction(const Vector<float>& f) {
    Vector<float> p = f * 0x1.41fbbcp-13f + 0x1.5f3e54p-10f;
    p = p * f + 0x1.3b2d4cp-7f;
    p = p * f + 0x1.c6aee8p-5f;
    p = p * f + 0x1.ebfbdcp-3f;
    p = p * f + 0x1.62e430p-1f;
    return p * f + 1.0f;
}

// e^f for |f| <= log(2) / 2: the Taylor series up to f^13 (4e-18)
inline Vector<double> exp_of_fraction(const Vector<double>& f) {
    Vector<double> p = f * (1 / 6227020800.0) + 1 / 479001600.0;
    p = p * f + 1 / 39916800.0;
    p = p * f + 1 / 3628800.0;
    p = p * f + 1 / 362880.0;
    p = p * f + 1 / 40320.0;
    p = p * f + 1 / 5040.0;
    p = p * f + 1 / 720.0;
    p = p * f + 1 / 120.0;
    p = p * f + 1 / 24.0;
    p = p * f + 1 / 6.0;
    p = p * f + 0.5;
    p = p * f + 1.0;
    return p * f + 1.0;
}

// e^f for |f| <= log(2) / 2: minimax of degree 6 (2e-9)
inline Vector<float> exp_of_fraction(const Vector<float>& f) {
    Vector<float> p = f * 0.0013843606797014421f + 0.0083741957284981f;
    p = p * f + 0.041668004730068695f;
    p = p * f + 0.166664307990784f;
    p = p * f + 0.4999999419160918f;
    p = p * f + 1.0000000322588976f;
    return p * f + 1.0f;
}

// 2^x, also where the result is subnormal
inline Vector<float> exp2(Vector<float> x) {
#ifdef __AVX512DQ__
    __m512 fraction = _mm512_reduce_ps((__m512)x, 8);  // x - nearest integer; 0 of an infinite x
    return (Vector<float>)_mm512_scalef_ps((__m512)exp2_of_fraction((Vector<float>)fraction), (__m512)x - fraction);
#else
    x = clamp(x, -152.0f, 130.0f);
    Vector<float> n = nearest_integer<float>(x);
    return scale<float>(exp2_of_fraction(x - n), n);
#endif
}

inline Vector<double> exp2(Vector<double> x) {
    x = clamp(x, -1080.0, 1030.0);
    Vector<double> n = nearest_integer<double>(x);
    return scale<double>(exp_of_fraction((x - n) * 0x1.62e42fefa39efp-1), n);
}

// e^x to the last digit also of large |x|, as log(2) is taken off in two parts
inline Vector<float> exp(Vector<float> x) {
    x = clamp(x, -105.0f, 90.0f);
    Vector<float> n = nearest_integer<float>(x * 0x1.715476p+0f);
    return scale<float>(exp_of_fraction((x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f), n);
}

inline Vector<double> exp(Vector<double> x) {
    x = clamp(x, -750.0, 715.0);
    Vector<double> n = nearest_integer<double>(x * 0x1.71547652b82fep+0);
    return scale<double>(exp_of_fraction((x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33), n);
}

// log(1 + x) of x from 0 to 1: log of the rounded sum, and the part of x that rounding lost
inline Vector<float> log1p(const Vector<float>& x) {
    Vector<float> s = x + 1.0f, lost = x - (s - 1.0f);
    auto upper = s > 1.41421356f;
    Vector<float> f = (upper ? s * 0.5f : s) - 1.0f, f2 = f * f;
    Vector<float> p = f * 7.0376836292e-2f - 1.1514610310e-1f;  // Cephes, logf
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    Vector<float> low = p * f2 * f + lost / s, zero = {};
    low = low + (upper ? zero - 2.12194440e-4f : zero) - 0.5f * f2;
    return low + f + (upper ? zero + 0.693359375f : zero);
}

inline Vector<double> log1p(Vector<double> x) {
    for (Int i = 0; i < LANES<double>; ++i) x[i] = std::log1p(x[i]);
    return x;
}

// 1 / (1 + e^-x), also where that is subnormal
template <class T> inline Vector<T> sigmoid(const Vector<T>& x) {
    const Vector<T> e = exp(x > 0 ? -x : x), one = all(T(1));
    return (x > 0 ? one : e) / (one + e);
}

// log(1 + e^x); x itself above 20, as PyTorch has it
template <class V> inline V softplus(const V& x) {
    V zero = {};
    V y = log1p(exp(x > 0 ? -x : x)) + (x > 0 ? x : zero);
    return x > 20 ? x : y;
}

// The derivative of softplus
template <class T> inline Vector<T> softplus_slope(const Vector<T>& x) {
    return x > 20 ? Vector<T>{} + T(1) : sigmoid<T>(x);
}

// The derivative of x * sigmoid(x), for s = sigmoid(x)
template <class T> inline Vector<T> silu_slope(const Vector<T>& x, const Vector<T>& s) { return s * (T(1) + x * (T(1) - s)); }

// Add vectors to sums over many tokens, in float64.
template <class T> inline void add_up(double* sums, const Vector<T>* x, Int count) {
    for (Int i = 0; i < count; ++i)
        for (Int lane = 0; lane < LANES<T>; ++lane) sums[i * LANES<T> + lane] += x[i][lane];
}

// Memory of one thread, handed out in pieces.
struct Scratch {
    char* next;
    template <class T> T* take(Int count) {
        T* piece = reinterpret_cast<T*>(next);
        next += (count * sizeof(T) + VECTOR_BYTES - 1) / VECTOR_BYTES * VECTOR_BYTES;
        return piece;
    }
};

typedef void (*ParallelRegion)(void (*)(void*), void*, unsigned, unsigned);
static ParallelRegion parallel_region = nullptr;  // GOMP_parallel of the OpenMP that PyTorch uses

extern "C" void set_parallel_region(ParallelRegion region) { parallel_region = region; }

// Call body(item, scratch) for every item from 0 on, each in one of up to `threads` threads, with `bytes` of scratch memory.
template <class Body> inline void for_each_item(Int items, Int threads, Int bytes, const Body& body) {
    struct Shared {
        const Body& body;
        Int items, bytes;
        std::atomic<Int> next;
        static void run(void* data) {
            Shared& shared = *static_cast<Shared*>(data);
            const Int whole = (shared.bytes / VECTOR_BYTES + 1) * VECTOR_BYTES;
            char* memory = static_cast<char*>(std::aligned_alloc(VECTOR_BYTES, whole));
            for (Int item; (item = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.items;)
                shared.body(item, Scratch{memory});
            std::free(memory);
        }
    } shared{body, items, bytes, {0}};
    threads = threads < items ? threads : items;
    if (threads > 1 && parallel_region)
        parallel_region(&Shared::run, &shared, unsigned(threads), 0);
    else if (items)
        Shared::run(&shared);
}
