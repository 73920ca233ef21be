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
// only; dynamic shared memory by SHARED(name); inline assembly stands under #ifndef EMULATED (fused/kernels/device.cuh has
// the CUDA side of everything in the second half of this file). threadIdx is one-dimensional. Example:
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
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

// ---------------------------------------------------------------- fibers

#if defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
// A change of fiber is six registers and the stack pointer, 2 ns; swapcontext makes a system call each time.
using Fiber = void*;
extern "C" void emulation_switch(Fiber* from, Fiber* to);
asm(R"(
.pushsection .text
.hidden emulation_switch
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, . - emulation_switch
.popsection
)");
static void emulation_prepare(Fiber* fiber, char* stack, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + size) - 8;  // six registers, the entry, and no caller
  memset(top, 0, 8 * sizeof(void*));
  top[6] = reinterpret_cast<void*>(entry);
  *fiber = top;
}
#else
#include <ucontext.h>
using Fiber = ucontext_t;
static void emulation_switch(Fiber* from, Fiber* to) { swapcontext(from, to); }
static void emulation_prepare(Fiber* fiber, char* stack, size_t size, void (*entry)()) {
  getcontext(fiber);
  fiber->uc_stack.ss_sp = stack;
  fiber->uc_stack.ss_size = size;
  fiber->uc_link = nullptr;
  makecontext(fiber, entry, 0);
}
#endif

struct uint3 { unsigned x, y, z; };
using dim3 = uint3;
extern uint3 threadIdx, blockIdx;  // visible outside, so that no compiler keeps one of them across a change of fiber
extern dim3 blockDim, gridDim;
uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulation {

constexpr int MAX_THREADS = 1024, MAX_BARRIERS = 16;
constexpr size_t PAGE = 4096, STACK = 128 << 10, MAX_SHARED = 227 << 10;
constexpr size_t ROOM = (MAX_SHARED + PAGE - 1) / PAGE * PAGE;  // between two pages that nobody may touch
constexpr uint64_t POISON = 0xffc1ffc1ffc1ffc1ull;              // NaN as bfloat16, as float16 and, twice, as float32

enum Kind { BLOCK, NAMED, SYNC_WARP, SHUFFLE, VOTE };
constexpr const char* KINDS[] = {"__syncthreads()", "named_barrier()", "__syncwarp()", "a shuffle", "a vote"};
enum Order { FORWARD, REVERSE, RANDOM };

struct Wait { Kind kind; int line, id; };
struct Copy { char* to; const char* from; int bytes; bool ok; int group; };
struct Warp {
  unsigned waiting, mask[32], source[32];
  uint64_t in[32], out[32];
};
struct Barrier { int arrived, waiters; uint16_t waiter[MAX_THREADS]; };

inline Fiber fiber[MAX_THREADS], outside;
inline bool returned[MAX_THREADS];
inline Wait wait[MAX_THREADS];
inline std::vector<Copy> copies[MAX_THREADS];
inline int groups[MAX_THREADS];
inline Warp warp[MAX_THREADS / 32];
inline Barrier named[MAX_BARRIERS];
inline int threads, current, arrived, line_of_barrier, alive;
inline uint16_t queue[MAX_THREADS];  // a ring: who may run, next first
inline unsigned head, tail;
inline Order order;
inline uint64_t seed;
inline char *shared, *lowest, *room, *stacks;
inline size_t shared_bytes;
inline const void* arguments;
inline void (*body)(const void*);
inline char message[1024];
inline bool failed;
inline thread_local bool inside;
inline sigjmp_buf escape;

[[noreturn, gnu::noinline, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(message, sizeof message, format, list);
  va_end(list);
  failed = true;
  Fiber dead;
  emulation_switch(&dead, &outside);
  abort();
}

inline unsigned below(unsigned n) {  // xorshift64*
  seed ^= seed >> 12, seed ^= seed << 25, seed ^= seed >> 27;
  return (seed * 0x2545f4914f6cdd1dull >> 32) % n;
}

// Let these threads run, in the order asked for. They go before all others, so that a warp runs up to the block's next
// barrier before another warp starts: a missing barrier then shows as NaN, or as another result in another order.
template <class Number> inline void release(int count, Number number) {
  unsigned first = tail;
  if (order == RANDOM && below(2)) tail += count;
  else first = head -= count;
  for (int i = 0; i < count; i++) queue[(first + i) % MAX_THREADS] = number(order == REVERSE ? count - 1 - i : i);
  if (order == RANDOM)
    for (int i = count - 1; i > 0; i--)
      std::swap(queue[(first + i) % MAX_THREADS], queue[(first + below(i + 1)) % MAX_THREADS]);
}

[[noreturn, gnu::noinline]] inline void deadlock() {
  int gone = 0, same = 0, shown = -1;
  for (int t = 0; t < threads; t++) {
    if (returned[t]) gone++;
    else if (shown < 0) shown = t;
  }
  for (int t = 0; t < threads; t++) same += !returned[t] && wait[t].kind == wait[shown].kind && wait[t].line == wait[shown].line;
  fail("deadlock: %d of %d threads wait at %s in line %d, %d at another place, %d have returned (thread %d waits)", same,
       threads, KINDS[wait[shown].kind], wait[shown].line, threads - gone - same, gone, shown);
}

[[gnu::noinline]] inline void next() {
  if (head == tail) deadlock();
  const int from = current;
  current = queue[head++ % MAX_THREADS];
  threadIdx = {unsigned(current), 0, 0};
  if (current != from) emulation_switch(&fiber[from], &fiber[current]);
}

inline void thread() {
  body(arguments);
  returned[current] = true;
  if (--alive == 0) emulation_switch(&fiber[current], &outside);
  next();
}

[[gnu::noinline]] inline void barrier(int line) {
  if (arrived++ == 0) line_of_barrier = line;
  else if (line != line_of_barrier)
    fail("divergent barrier: thread %d is at __syncthreads() in line %d, others at the one in line %d", current, line, line_of_barrier);
  wait[current] = {BLOCK, line, 0};
  if (arrived == threads) {
    arrived = 0;
    release(threads, [](int i) { return i; });
  }
  next();
}

[[gnu::noinline]] inline void barrier(int id, int count, bool stay, int line) {
  if (id < 0 || id >= MAX_BARRIERS || count <= 0 || count % 32 || count > threads)
    fail("named barrier %d of %d threads in line %d: 16 barriers, of a multiple of 32 threads of the block", id, count, line);
  Barrier& b = named[id];
  b.arrived++;
  if (stay) b.waiter[b.waiters++] = current, wait[current] = {NAMED, line, id};
  if (b.arrived == count) {
    release(b.waiters, [&](int i) { return b.waiter[i]; });
    b.arrived = b.waiters = 0;
  }
  if (stay) next();
}

// All lanes of `mask` meet; each gives a value and takes the one of lane `source`.
[[gnu::noinline]] inline uint64_t meet(Kind kind, unsigned mask, uint64_t value, int source, int line) {
  const int lane = current & 31, first = current & ~31, lanes = threads - first < 32 ? threads - first : 32;
  if (lanes < 32) mask &= (1u << lanes) - 1;
  Warp& w = warp[current >> 5];
  if (!(mask >> lane & 1)) fail("%s in line %d: thread %d is not in its own mask %08x", KINDS[kind], line, current, mask);
  w.mask[lane] = mask, w.in[lane] = value, w.source[lane] = source, w.waiting |= 1u << lane;
  wait[current] = {kind, line, 0};
  if ((w.waiting & mask) == mask) {
    int lanes_in = 0, list[32];
    unsigned votes = 0;
    for (int i = 0; i < lanes; i++) {
      if (!(mask >> i & 1)) continue;
      const Wait& other = wait[first + i];
      if (w.mask[i] != mask || other.kind != kind || other.line != line)
        fail("divergent warp: thread %d is at %s in line %d with mask %08x, thread %d at %s in line %d with mask %08x", current,
             KINDS[kind], line, mask, first + i, KINDS[other.kind], other.line, w.mask[i]);
      if (kind == SHUFFLE && !(mask >> w.source[i] & 1))
        fail("a shuffle in line %d: thread %d reads lane %u, which takes no part", line, first + i, w.source[i]);
      w.out[i] = w.in[w.source[i]];
      votes |= unsigned(w.in[i] != 0) << i;
      list[lanes_in++] = first + i;
    }
    if (kind == VOTE) for (int i = 0; i < lanes_in; i++) w.out[list[i] - first] = votes;
    w.waiting &= ~mask;
    release(lanes_in, [&](int i) { return list[i]; });
  }
  next();
  return w.out[lane];
}

template <class T> inline T shuffle(unsigned mask, T value, int source, int line) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = meet(SHUFFLE, mask, bits, source, line);
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline int lane() { return current & 31; }

// ---------------------------------------------------------------- running a grid

inline void handler(int number, siginfo_t* info, void*) {
  if (!inside) {  // another thread's fault: as if we were not here, it strikes again at once
    signal(number, SIG_DFL);
    return;
  }
  const char* at = static_cast<char*>(info->si_addr);
  const char* where = number == SIGILL ? "a misaligned access, or an index beyond a local array" : "an access to memory that is not there";
  if (room && number != SIGILL && at >= room - PAGE && at < room + ROOM + PAGE)
    snprintf(message, sizeof message, "shared memory: access at byte %ld of %zu", long(at - shared), shared_bytes);
  else if (number != SIGILL && stacks && at >= stacks && at < stacks + MAX_THREADS * (STACK + PAGE))
    snprintf(message, sizeof message, "local memory: more than %zu bytes of it", STACK);
  else
    snprintf(message, sizeof message, "%s (address %p)", where, number == SIGILL ? nullptr : at);
  siglongjmp(escape, 1);
}

inline void poison(char* from, const char* to) {
  for (; to - from >= 8; from += 8) memcpy(from, &POISON, 8);
  memcpy(from, &POISON, to - from);
}

inline void check_canary(const char* from, const char* to) {
  for (; to - from >= 8 && !memcmp(from, &POISON, 8);) from += 8;
  for (; from < to && !failed; from += 2)
    if (memcmp(from, &POISON, 2))
      snprintf(message, sizeof message, "shared memory: written at byte %ld of %zu", long(from - shared), shared_bytes), failed = true;
}

extern "C" char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));

inline void run_block() {
  poison(lowest, room + ROOM);
  poison(__start_emulated_shared, __stop_emulated_shared);
  memset(warp, 0, sizeof warp);
  for (Barrier& b : named) b.arrived = b.waiters = 0;
  head = tail = arrived = 0, alive = threads;
  for (int t = 0; t < threads; t++) {
    const size_t color = t % 16 * 256;  // stacks that all begin at the same offset in a page share a few lines of the cache
    emulation_prepare(&fiber[t], stacks + t * (STACK + PAGE) + PAGE, STACK - color, thread);
    returned[t] = false, groups[t] = 0, copies[t].clear();
  }
  release(threads, [](int i) { return i; });
  current = queue[head++ % MAX_THREADS];
  threadIdx = {unsigned(current), 0, 0};
  emulation_switch(&outside, &fiber[current]);
  if (failed) return;
  check_canary(lowest, shared);
  check_canary(shared + (shared_bytes + 1) / 2 * 2, room + ROOM);
}

inline void reserve() {
  constexpr auto map = [](size_t bytes) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) abort();
    return static_cast<char*>(at);
  };
  stacks = map(MAX_THREADS * (STACK + PAGE));
  for (int t = 0; t < MAX_THREADS; t++) mprotect(stacks + t * (STACK + PAGE), PAGE, PROT_NONE);
  room = map(ROOM + 2 * PAGE) + PAGE;
  mprotect(room - PAGE, PAGE, PROT_NONE);
  mprotect(room + ROOM, PAGE, PROT_NONE);
}

struct Signals {  // ours while a grid runs, Python's own before and after
  static constexpr int NUMBERS[] = {SIGSEGV, SIGBUS, SIGILL};
  struct sigaction before[3];
  stack_t stack_before;
  char stack[64 << 10];
  Signals() {
    stack_t ours = {};
    ours.ss_sp = stack, ours.ss_size = sizeof stack;
    sigaltstack(&ours, &stack_before);
    struct sigaction action = {};
    action.sa_sigaction = handler, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 3; i++) sigaction(NUMBERS[i], &action, &before[i]);
    inside = true;
  }
  ~Signals() {
    inside = false;
    for (int i = 0; i < 3; i++) sigaction(NUMBERS[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
  }
};

// 0, or 1 with a message for Python.
inline int run(void (*kernel)(const void*), int bound, const unsigned* grid, int block, size_t bytes, const void* words,
               int in_order, uint64_t with_seed, char* said, size_t room_to_say) {
  static std::mutex one;
  std::lock_guard<std::mutex> lock(one);
  if (!room) reserve();
  body = kernel, arguments = words, threads = block, order = Order(in_order), seed = with_seed * 2 + 1, failed = false;
  gridDim = {grid[0], grid[1], grid[2]}, blockDim = {unsigned(block), 1, 1}, blockIdx = threadIdx = {0, 0, 0};
  shared_bytes = bytes;
  if (block < 1 || block > MAX_THREADS || block > bound)
    snprintf(message, sizeof message, "%d threads, where the kernel allows 1 to %d", block, bound), failed = true;
  else if (bytes > MAX_SHARED)
    snprintf(message, sizeof message, "%zu bytes of shared memory, where a block has %zu", bytes, MAX_SHARED), failed = true;
  else if (!grid[0] || grid[0] > 0x7fffffffu || !grid[1] || grid[1] > 65535 || !grid[2] || grid[2] > 65535)
    snprintf(message, sizeof message, "a grid no GPU takes"), failed = true;
  else {
    // The last byte lies at the guard page, or up to 127 bytes before it; what is left of the pages is looked at after each block.
    shared = room + ROOM - (bytes + 127) / 128 * 128;
    lowest = room + (shared - room) / PAGE * PAGE;
    mprotect(room, lowest - room, PROT_NONE);
    mprotect(lowest, room + ROOM - lowest, PROT_READ | PROT_WRITE);
    Signals signals;
    if (sigsetjmp(escape, 1)) failed = true;
    else
      for (blockIdx.z = 0; blockIdx.z < grid[2] && !failed; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid[1] && !failed; blockIdx.y++)
          for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++) {
            run_block();
            if (failed) goto out;
          }
  out:;
  }
  if (failed)
    snprintf(said, room_to_say, "block (%u, %u, %u), thread %u: %s", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, message);
  return failed;
}

// ---------------------------------------------------------------- from Python's words to a kernel's parameters

template <class P> constexpr char kind_of() {
  static_assert(std::is_pointer_v<P> || std::is_same_v<P, long long> || std::is_same_v<P, float>,
                "a kernel takes pointers, long long and float only");
  return std::is_pointer_v<P> ? 'p' : std::is_same_v<P, float> ? 'f' : 'i';
}
template <class P> inline P word(const void* words, size_t i) {
  P value;
  memcpy(&value, static_cast<const char*>(words) + 8 * i, sizeof value);
  return value;
}
template <auto kernel> struct Shim;
template <class... P, void (*kernel)(P...)> struct Shim<kernel> {
  static constexpr char parameters[] = {kind_of<P>()..., 0};
  template <size_t... i> static void call(const void* words, std::index_sequence<i...>) { kernel(word<P>(words, i)...); }
  static void run(const void* words) { call(words, std::index_sequence_for<P...>()); }
};
template <class... Rest> constexpr int first(int threads, Rest...) { return threads; }

}  // namespace emulation

// One line of these for each kernel, which emulation.py writes behind the source.
#define EMULATION_EXPORT(kernel, ...)                                                                                  \
  extern "C" __attribute__((visibility("default"))) const char* emulation_parameters_##kernel() {                      \
    return emulation::Shim<kernel>::parameters;                                                                        \
  }                                                                                                                    \
  extern "C" __attribute__((visibility("default"))) int emulation_run_##kernel(                                        \
      const unsigned* grid, int block, size_t bytes, const void* words, int order, uint64_t seed, char* said, size_t n) { \
    return emulation::run(emulation::Shim<kernel>::run, emulation::first(__VA_ARGS__), grid, block, bytes, words, order, seed, said, n); \
  }

// ---------------------------------------------------------------- the language

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
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

// ---------------------------------------------------------------- what fused/kernels/device.cuh writes in PTX

inline float emulation_flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.f, x) : x; }
inline float ex2(float x) { return emulation_flush(exp2f(emulation_flush(x))); }
inline float lg2(float x) { return log2f(emulation_flush(x)); }
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

// cp.async: BYTES (4, 8, 16) from global to shared memory, zeros where not ok. Here nothing arrives before the thread waits
// for it, the latest that a GPU may do; until then the place holds NaN.
template <int BYTES> inline void copy_async(void* to, const void* from, bool ok = true) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  if (uintptr_t(to) % BYTES || (ok && uintptr_t(from) % BYTES)) emulation::fail("copy_async<%d>: misaligned", BYTES);
  emulation::poison(static_cast<char*>(to), static_cast<char*>(to) + BYTES);
  const int t = emulation::current;
  emulation::copies[t].push_back({static_cast<char*>(to), static_cast<const char*>(from), BYTES, ok, emulation::groups[t]});
}
inline void copy_commit() { emulation::groups[emulation::current]++; }
// All groups but the newest PENDING have arrived.
template <int PENDING = 0> inline void copy_wait() {
  auto& list = emulation::copies[emulation::current];
  size_t kept = 0;
  for (const auto& c : list) {
    if (c.group >= emulation::groups[emulation::current] - PENDING) list[kept++] = c;
    else if (c.ok) memcpy(c.to, c.from, c.bytes);
    else memset(c.to, 0, c.bytes);
  }
  list.resize(kept);
}
