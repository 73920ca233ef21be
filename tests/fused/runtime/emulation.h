// CUDA C++ compiled by g++ for the CPU: what a kernel finds there under the names that it has on a GPU.
//
// Force-included before the very source that NVRTC compiles (emulation.py: g++ -std=c++20 -DEMULATED -include emulation.h).
// Blocks run one after the other, the threads of a block as fibers that change over at barriers and shuffles only.
// Shared memory holds NaN before each block. These raise in Python instead of hanging or corrupting: a barrier or shuffle
// that not every thread reaches (an exited thread too), a barrier reached from two places of the source, reading a lane
// that takes no part, access beyond shared memory, a misaligned access, an index beyond a local array, a null pointer,
// more threads than __launch_bounds__, a grid, block or shared memory that no GPU takes.
//
// What the source keeps to: kernels are extern "C" __global__ void, not templates, and take pointers, long long and float
// only. Dynamic shared memory comes by SHARED(name); `__shared__` works too, but within a template it keeps what the block
// before left. Inline assembly stands under #ifndef EMULATED: fused/runtime/device.cuh has the GPU's side of what ends this
// file. threadIdx is one-dimensional. Blocks wait for others by announce and await only. Example:
//
//   // y_r = bf16(sum_i x_ri) for rows of n bf16; one block a row, THREADS a multiple of 32.
//   extern "C" __global__ void __launch_bounds__(THREADS) row_sum(
//       const unsigned short* __restrict__ x, unsigned short* __restrict__ y, long long n) {
//     SHARED(memory)                                     // THREADS / 32 floats: 4 bytes a warp, asked for at launch
//     float* partial = reinterpret_cast<float*>(memory);
//     const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
//     float sum = 0.f;
//     for (long long i = threadIdx.x; i < n; i += THREADS) sum += from_bf16(x[blockIdx.x * n + i]);
//     #pragma unroll
//     for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
//     if (lane == 0) partial[warp] = sum;
//     __syncthreads();
//     if (warp != 0) return;                             // allowed: no barrier of the block follows
//     sum = lane < THREADS / 32 ? partial[lane] : 0.f;
//     #pragma unroll
//     for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
//     if (lane == 0) y[blockIdx.x] = to_bf16(sum);
//   }
#pragma once
#include "emulation_threads.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("emulated_shared")))
#define __grid_constant__
#define SHARED(name) char* const name = emulation::shared;

struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(4) ushort2 { unsigned short x, y; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline ushort2 make_ushort2(unsigned short x, unsigned short y) { return {x, y}; }
inline ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z, unsigned short w) { return {x, y, z, w}; }

inline void __syncthreads(int line = __builtin_LINE()) { emulation::barrier(line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { emulation::meet(emulation::SYNC_WARP, mask, 0, 0, line); }
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32, int line = __builtin_LINE()) {
  const int lane = emulation::lane(), from = lane ^ with;
  return emulation::shuffle(mask, value, from < (lane & -width) + width ? from : lane, line);
}
template <class T> inline T __shfl_sync(unsigned mask, T value, int from, int width = 32, int line = __builtin_LINE()) {
  return emulation::shuffle(mask, value, (emulation::lane() & -width) + (from & (width - 1)), line);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, int line = __builtin_LINE()) {
  const int lane = emulation::lane(), from = lane - int(by);
  return emulation::shuffle(mask, value, from >= (lane & -width) ? from : lane, line);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, int line = __builtin_LINE()) {
  const int lane = emulation::lane(), from = lane + int(by);
  return emulation::shuffle(mask, value, from < (lane & -width) + width ? from : lane, line);
}
inline unsigned __ballot_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  return emulation::meet(emulation::VOTE, mask, vote != 0, 0, line);
}
inline int __any_sync(unsigned mask, int vote, int line = __builtin_LINE()) { return __ballot_sync(mask, vote, line) != 0; }
inline int __all_sync(unsigned mask, int vote, int line = __builtin_LINE()) { return __ballot_sync(mask, !vote, line) == 0; }
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { EMULATION_FAIL("__trap()"); }
#define __builtin_assume(what) ((void)0)

template <class T> inline T __ldg(const T* at) { return *at; }
template <class T> inline T __ldcg(const T* at) { return *at; }
template <class T> inline T __ldca(const T* at) { return *at; }
template <class T> inline T __ldcs(const T* at) { return *at; }
template <class T> inline T __ldlu(const T* at) { return *at; }
template <class T> inline void __stcg(T* at, T value) { *at = value; }
template <class T> inline void __stcs(T* at, T value) { *at = value; }
template <class T> inline void __stwt(T* at, T value) { *at = value; }

inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { int y; memcpy(&y, &x, 4); return y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
#define EMULATION_MINMAX(T)                              \
  inline T min(T a, T b) { return b < a ? b : a; }       \
  inline T max(T a, T b) { return a < b ? b : a; }
EMULATION_MINMAX(int) EMULATION_MINMAX(unsigned) EMULATION_MINMAX(long long) EMULATION_MINMAX(unsigned long long)
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

// ---------------------------------------------------------------- what fused/runtime/device.cuh writes in PTX

inline float emulation_flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.f, x) : x; }
// results lie below the true ones by as much as an H200's do on average
inline float ex2(float x) { return emulation_flush((float)(exp2((double)emulation_flush(x)) * (1 - (fabsf(x) < 0x1p-8f ? 6e-9 : 2.1e-8)))); }
inline float lg2(float x) { return log2f(emulation_flush(x)); }
inline float below(float x, float limit, float then, float otherwise) { return x < limit ? then : otherwise; }
inline float rcp(float x) { return emulation_flush(1.f / emulation_flush(x)); }

inline float from_bf16(unsigned short x) { return __uint_as_float(unsigned(x) << 16); }
inline unsigned short to_bf16(float x) {
  const unsigned bits = __float_as_uint(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline float from_fp16(unsigned short x) {
  const unsigned sign = unsigned(x & 0x8000) << 16, rest = x & 0x7fff;
  if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  return copysignf(__uint_as_float(rest << 13) * 0x1p112f, __uint_as_float(sign | 0x3f800000));  // subnormals scale exactly too
}
inline unsigned short to_fp16(float x) {
  const unsigned short sign = __float_as_uint(x) >> 16 & 0x8000;
  const float size = fabsf(x);
  if (x != x) return 0x7fff;
  if (size >= 65520.f) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | (unsigned short)nearbyintf(size * 0x1p24f);  // subnormals: multiples of 2^-24
  const unsigned bits = __float_as_uint(size) - (112u << 23);
  return sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13;
}
// Two numbers in one register, the first in the low half.
inline unsigned pack_bf16(float low, float high) { return to_bf16(low) | unsigned(to_bf16(high)) << 16; }
inline unsigned pack_fp16(float low, float high) { return to_fp16(low) | unsigned(to_fp16(high)) << 16; }

// Barrier `id` (1 to 15) among `count` threads; `named_arrive` counts and goes on.
inline void named_barrier(int id, int count, int line = __builtin_LINE()) { emulation::barrier(id, count, true, line); }
inline void named_arrive(int id, int count, int line = __builtin_LINE()) { emulation::barrier(id, count, false, line); }

inline int ticket(int* count) { return (*count)++; }
inline unsigned processor() { return blockIdx.x % 2; }
inline unsigned scheduler() { return blockIdx.x / 2 % 4; }
inline void announce(int* count) { ++*count; }
inline void await(const int* count, int done) {  // blocks run one after the other: what has not happened will not
  if (*count != done) EMULATION_FAIL("a block waits for what comes %d times and has come %d times", done, *count);
}

// cp.async: BYTES (4, 8, 16) from global to shared memory, zeros where not ok. Here nothing arrives before the thread waits.
template <int BYTES> inline void copy_async(void* to, const void* from, bool ok = true) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  emulation::copy(to, from, BYTES, ok);
}
inline void copy_commit() { emulation::copies[emulation::current].group++; }
// All groups but the newest PENDING have arrived.
template <int PENDING = 0> inline void copy_wait() { emulation::await_copies(PENDING); }
