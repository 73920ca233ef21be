// PTX instructions as functions. This text stands before the source of every kernel. The CPU emulation has functions of the
// same names in tests/fused/runtime/emulation.h.
#ifndef EMULATED
#define SHARED(name) extern __shared__ __align__(128) char name[];  // dynamic shared memory, in bytes

// 2^x and 1/x of the special function unit: error of 2 ulp, subnormals are flushed to zero.
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x < limit ? then : otherwise, both evaluated and without a branch.
__device__ __forceinline__ float select_less(float x, float limit, float then, float otherwise) {
  float y;
  asm("{ .reg .pred p; setp.lt.f32 p, %1, %2; selp.f32 %0, %3, %4, p; }"
      : "=f"(y) : "f"(x), "f"(limit), "f"(then), "f"(otherwise));
  return y;
}

// 16-bit floats are passed as unsigned short. Conversions to them round to nearest even; NaN becomes 0x7fff.
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

// Add 1 to a counter in global memory and return its old value.
__device__ __forceinline__ int take_ticket(int* counter) { return atomicAdd(counter, 1); }
// The multiprocessor that the calling thread runs on, and which of its four schedulers (0 to 3) issues its warp.
__device__ __forceinline__ unsigned multiprocessor() {
  unsigned x;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(x));
  return x;
}
__device__ __forceinline__ unsigned scheduler() {
  unsigned x;
  asm volatile("mov.u32 %0, %%warpid;" : "=r"(x));
  return x % 4;
}
// Signals between blocks. announce adds 1 to a counter (release). wait_until waits until the counter has reached `count`
// (acquire). Afterwards the waiting thread sees all that the announcing threads saw written. Its block does so after a
// barrier.
__device__ __forceinline__ void announce(int* counter) {
  __threadfence();
  atomicAdd(counter, 1);
}
__device__ __forceinline__ void wait_until(const int* counter, int count) {
  for (int seen = -1; seen < count;) {
    if (seen >= 0) __nanosleep(100);
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  }
}

// Matrix products of a warp in bfloat16, lane (g, q) = (lane / 4, lane % 4).
// d (16, 8) += a (16, 16) b (16, 8), in float32. A register of a or b has two neighbours along the sum:
//     a[0] (g, 2 q)   a[1] (g + 8, 2 q)   a[2] (g, 2 q + 8)   a[3] (g + 8, 2 q + 8)      b0 (2 q, g)   b1 (2 q + 8, g)
//     d[0] (g, 2 q)   d[1] (g, 2 q + 1)   d[2] (g + 8, 2 q)   d[3] (g + 8, 2 q + 1)
__device__ __forceinline__ void mma_bf16(float* d, const unsigned* a, unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Load four matrices (8, 8) of 16 bits from shared memory, transposed. Lane i gives the address of row i % 8 of matrix i / 8, and
// gets from each matrix the elements (2 q, g) and (2 q + 1, g).
__device__ __forceinline__ void load_matrices(unsigned* r, const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// cp.async: copy BYTES (4, 8, 16) from global to shared memory, both aligned to BYTES. If not `valid`, write zeros and read
// nothing.
template <int BYTES> __device__ __forceinline__ void copy_async(void* to, const void* from, bool valid = true) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (BYTES == 16)  // .cg bypasses L1; only this width has it
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(BYTES), "r"(valid ? BYTES : 0)
                 : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait for all groups of copies of this thread but the newest PENDING. Copies of other threads need a barrier as well.
template <int PENDING = 0> __device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#endif
