// The CUDA functions and types that kernels use, for kernels that g++ compiles for the CPU.
//
// emulation.py includes this file before the source that NVRTC compiles for a GPU (g++ -std=c++20 -DEMULATED -include
// emulation.h). Blocks run one after the other. The threads of a block are fibers that switch at barriers and shuffles only.
// Shared memory holds NaN before each block. These errors raise in Python instead of hanging or corrupting memory: a barrier or
// shuffle that not every thread reaches (an exited thread included), a barrier reached from two places of the source, reading
// a lane that does not take part in a shuffle, access beyond shared memory, a misaligned access, an index beyond a local
// array, a null pointer, more threads than __launch_bounds__, a grid, block or shared memory that no GPU accepts.
//
// Rules for the source: kernels are extern "C" __global__ void, not templates, and take pointers, long long and float only.
// Dynamic shared memory is declared by SHARED(name). `__shared__` works too, but in a template it is not set to NaN.
// Inline assembly stands under #ifndef EMULATED: fused/runtime/device.cuh has the GPU's version of the functions at the end of
// this file. threadIdx is one-dimensional. Blocks wait for other blocks by announce and wait_until only. Other functions and
// types of CUDA are added here when a kernel needs them. Example:
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
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("emulated_shared")))
#define SHARED(name) char* const name = emulation::shared;

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline void __syncthreads(int line = __builtin_LINE()) { emulation::barrier(line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  emulation::exchange(emulation::SYNC_WARP, mask, 0, 0, line);
}
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
  return emulation::exchange(emulation::VOTE, mask, vote != 0, 0, line);
}
inline int __any_sync(unsigned mask, int vote, int line = __builtin_LINE()) { return __ballot_sync(mask, vote, line) != 0; }
inline int __all_sync(unsigned mask, int vote, int line = __builtin_LINE()) { return __ballot_sync(mask, !vote, line) == 0; }
[[noreturn]] inline void __trap() { EMULATION_FAIL("__trap()"); }

template <class T> inline T __ldg(const T* at) { return *at; }
inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; i++) y = y << 1 | (x >> i & 1);
  return y;
}
inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }

// ---------------------------------------------------------------- the functions of fused/runtime/device.cuh

inline float emulation_flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.f, x) : x; }
// Too small by as much as the results of an H200 on average.
inline float ex2(float x) {
  const double error = fabsf(x) < 0x1p-8f ? 6e-9 : 2.1e-8;
  return emulation_flush((float)(exp2((double)emulation_flush(x)) * (1 - error)));
}
inline float select_less(float x, float limit, float then, float otherwise) { return x < limit ? then : otherwise; }
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

inline int take_ticket(int* counter) { return (*counter)++; }
inline unsigned multiprocessor() { return blockIdx.x % 2; }
inline unsigned scheduler() { return blockIdx.x / 2 % 4; }
inline void announce(int* counter) { ++*counter; }
inline void wait_until(const int* counter, int count) {  // no other block runs meanwhile, so the counter will not change
  if (*counter != count) EMULATION_FAIL("a block waits for a counter to reach %d, and it is %d", count, *counter);
}

// The copy happens when the thread waits for it, the latest time at which a GPU may do it.
template <int BYTES> inline void copy_async(void* to, const void* from, bool valid = true) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  emulation::copy(to, from, BYTES, valid);
}
inline void copy_commit() { emulation::copies[emulation::current].group++; }
template <int PENDING = 0> inline void copy_wait() { emulation::await_copies(PENDING); }

// Matrix products of a warp. Sums are in float64, as exact as any order of the tensor cores.
inline void mma_bf16(float* d, const unsigned* a, unsigned b0, unsigned b1) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const unsigned b[2] = {b0, b1};
  unsigned a_row[4][4], b_column[2][2][4];
  for (int r = 0; r < 4; r++)
    for (int k = 0; k < 4; k++) a_row[r][k] = __shfl_sync(~0u, a[r], g * 4 + k);
  for (int c = 0; c < 2; c++)
    for (int r = 0; r < 2; r++)
      for (int k = 0; k < 4; k++) b_column[c][r][k] = __shfl_sync(~0u, b[r], (2 * q + c) * 4 + k);
  const auto half = [](unsigned pair, int i) { return (double)from_bf16((unsigned short)(i ? pair >> 16 : pair)); };
  for (int i = 0; i < 4; i++) {
    double sum = d[i];
    for (int k = 0; k < 16; k++)
      sum += half(a_row[k / 8 * 2 + i / 2][k % 8 / 2], k % 2) * half(b_column[i % 2][k / 8][k % 8 / 2], k % 2);
    d[i] = (float)sum;
  }
}
inline void load_matrices(unsigned* r, const void* row) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  if ((uintptr_t)row % 16) EMULATION_FAIL("load_matrices: an address that is no multiple of 16 bytes");
  __syncwarp();
  for (int m = 0; m < 4; m++) {
    const unsigned long long first = __shfl_sync(~0u, (unsigned long long)row, 8 * m + 2 * q);
    const unsigned long long second = __shfl_sync(~0u, (unsigned long long)row, 8 * m + 2 * q + 1);
    r[m] = ((const unsigned short*)first)[g] | unsigned(((const unsigned short*)second)[g]) << 16;
  }
  __syncwarp();
}
