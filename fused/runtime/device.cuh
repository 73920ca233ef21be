// What the kernels need of the GPU beyond CUDA C++ itself, in PTX. Stands in front of a kernel's source; the CPU has the same
// names in tests/fused/kernels/emulation.h.
#ifndef EMULATED
#define SHARED(name) extern __shared__ __align__(128) char name[];  // dynamic shared memory, in bytes

// 2^x, log2 x and 1/x of the special function unit: 2 ulp, subnormals are zero.
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What belongs to an x below the limit, or else; both are there, and no branch is made of it.
__device__ __forceinline__ float below(float x, float limit, float then, float otherwise) {
  float y;
  asm("{ .reg .pred p; setp.lt.f32 p, %1, %2; selp.f32 %0, %3, %4, p; }" : "=f"(y) : "f"(x), "f"(limit), "f"(then), "f"(otherwise));
  return y;
}

// 16-bit numbers travel as unsigned short. To them: round to nearest even; NaN becomes 0x7fff.
__device__ __forceinline__ float from_bf16(unsigned short x) { return __uint_as_float(unsigned(x) << 16); }
__device__ __forceinline__ unsigned short to_bf16(float x) {
  unsigned short y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float from_fp16(unsigned short x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
__device__ __forceinline__ unsigned short to_fp16(float x) {
  unsigned short y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
// Two numbers in one register, the first in the low half.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
  unsigned y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
__device__ __forceinline__ unsigned pack_fp16(float low, float high) {
  unsigned y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// Barrier `id` (1 to 15) among `count` threads, whole warps; `named_arrive` counts and goes on.
__device__ __forceinline__ void named_barrier(int id, int count) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int count) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// Among the blocks of a grid: who comes when, on which multiprocessor and for which of its four schedulers; that something is
// done, and waiting until it is `done` times. What the announcing thread saw written is seen by who waited, and behind a barrier
// by its block.
__device__ __forceinline__ int ticket(int* count) { return atomicAdd(count, 1); }
__device__ __forceinline__ unsigned processor() {
  unsigned x;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(x));
  return x;
}
__device__ __forceinline__ unsigned scheduler() {
  unsigned x;
  asm volatile("mov.u32 %0, %%warpid;" : "=r"(x));
  return x % 4;
}
__device__ __forceinline__ void announce(int* count) {
  __threadfence();
  atomicAdd(count, 1);
}
__device__ __forceinline__ void await(const int* count, int done) {
  for (int seen = -1; seen < done;) {
    if (seen >= 0) __nanosleep(100);
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(count) : "memory");
  }
}

// cp.async: BYTES (4, 8, 16) from global to shared memory, both aligned to BYTES; zeros where not ok, `from` is not read then.
template <int BYTES> __device__ __forceinline__ void copy_async(void* to, const void* from, bool ok = true) {
  const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (BYTES == 16)  // past L1, which only this width can
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(ok ? 16 : 0) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(place), "l"(from), "n"(BYTES), "r"(ok ? BYTES : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All groups but the newest PENDING have arrived, of this thread's; other threads' need a barrier behind it.
template <int PENDING = 0> __device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#endif
