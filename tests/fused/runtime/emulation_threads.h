// The machinery of emulation.h: threads of a block as fibers, barriers, shuffles, shared memory, launches.
#pragma once
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS  // C's own headers: a kernel compiles in half the time without C++'s
#include <dlfcn.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

// ---------------------------------------------------------------- fibers

#if defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
// Six registers and the stack pointer, a few ns; swapcontext makes a system call each time.
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

constexpr int MAX_THREADS = 1024;
constexpr size_t PAGE = 4096, FENCE = 1 << 20, STACK = 128 << 10, MAX_SHARED = 227 << 10;
constexpr size_t ROOM = (MAX_SHARED + PAGE - 1) / PAGE * PAGE;  // for shared memory, between fences nobody may touch
constexpr uint64_t POISON = 0xffc1ffc1ffc1ffc1ull;              // NaN as bfloat16, as float16 and as float32

enum Kind { BLOCK, SYNC_WARP, SHUFFLE, VOTE };
constexpr const char* KINDS[] = {"__syncthreads()", "__syncwarp()", "a shuffle", "a vote"};
enum Order { FORWARD, REVERSE, RANDOM };

struct Wait { Kind kind; int line; };
struct Copy { char* to; const char* from; int bytes; bool valid; int group; };
struct Copies {
  Copy* list;
  int count, capacity, group;
};
struct Warp {
  unsigned waiting, mask[32], source[32];
  uint64_t in[32], out[32];
};

inline Fiber fiber[MAX_THREADS], outside;
inline bool returned[MAX_THREADS];
inline Wait wait[MAX_THREADS];
inline Copies copies[MAX_THREADS];
inline Warp warp[MAX_THREADS / 32];
inline int threads, current, alive, arrived, line_of_barrier;
inline uint16_t queue[MAX_THREADS];  // a ring of the threads that are ready to run
inline unsigned head, tail;
inline Order order;
inline uint64_t seed;
inline char *shared, *lowest, *shared_area, *stacks;
inline size_t shared_bytes;
inline void (*body)(const void*);
inline const void* arguments;
inline char message[1024];
inline bool failed;
inline thread_local bool inside;
inline sigjmp_buf escape;

// ---------------------------------------------------------------- threads

[[gnu::format(printf, 1, 2)]] inline void complain(const char* format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(message, sizeof message, format, list);
  va_end(list);
  failed = true;
}

[[noreturn]] inline void leave_grid() {  // from a thread that failed; the others stay where they are
  Fiber dead;
  emulation_switch(&dead, &outside);
  abort();
}
#define EMULATION_FAIL(...) (emulation::complain(__VA_ARGS__), emulation::leave_grid())

inline unsigned random_below(unsigned n) {  // xorshift64*
  seed ^= seed >> 12, seed ^= seed << 25, seed ^= seed >> 27;
  return (seed * 0x2545f4914f6cdd1dull >> 32) % n;
}

// Make `count` threads ready to run, in the order of the launch. They run before all others, so that a warp runs up to the next
// barrier of the block before another warp starts. A missing barrier then shows as NaN, or as another result in another order.
template <class Number> inline void release(int count, Number number) {
  unsigned first = tail;
  if (order == RANDOM && random_below(2)) tail += count;
  else first = head -= count;
  for (int i = 0; i < count; i++) queue[(first + i) % MAX_THREADS] = number(order == REVERSE ? count - 1 - i : i);
  if (order == RANDOM)
    for (int i = count - 1; i > 0; i--) {
      uint16_t &one = queue[(first + i) % MAX_THREADS], &other = queue[(first + random_below(i + 1)) % MAX_THREADS], kept = one;
      one = other, other = kept;
    }
}

[[noreturn, gnu::noinline]] inline void deadlock() {
  int gone = 0, same = 0, shown = -1;
  for (int t = 0; t < threads; t++) {
    if (returned[t]) gone++;
    else if (shown < 0) shown = t;
  }
  const Wait& w = wait[shown];
  for (int t = 0; t < threads; t++) same += !returned[t] && wait[t].kind == w.kind && wait[t].line == w.line;
  EMULATION_FAIL("deadlock: %d of %d threads wait at %s in line %d, %d at another place, %d have returned (thread %d waits)",
                 same, threads, KINDS[w.kind], w.line, threads - gone - same, gone, shown);
}

[[gnu::noinline]] inline void run_next() {
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
  run_next();
}

[[gnu::noinline]] inline void barrier(int line) {
  if (arrived++ == 0) line_of_barrier = line;
  else if (line != line_of_barrier)
    EMULATION_FAIL("divergent barrier: __syncthreads() in line %d, where other threads are at the one in line %d", line,
                   line_of_barrier);
  wait[current] = {BLOCK, line};
  if (arrived == threads) {
    arrived = 0;
    release(threads, [](int i) { return i; });
  }
  run_next();
}

// The lanes of `mask` exchange values: each gives one and returns that of lane `source`, or the votes of all.
[[gnu::noinline]] inline uint64_t exchange(Kind kind, unsigned mask, uint64_t value, int source, int line) {
  const int lane = current & 31, first = current & ~31, lanes = threads - first;
  if (lanes < 32) mask &= (1u << lanes) - 1;
  Warp& w = warp[current >> 5];
  if (!(mask >> lane & 1)) EMULATION_FAIL("%s in line %d: the thread is not in its own mask %08x", KINDS[kind], line, mask);
  w.mask[lane] = mask, w.in[lane] = value, w.source[lane] = source, w.waiting |= 1u << lane;
  wait[current] = {kind, line};
  if ((w.waiting & mask) == mask) {
    int count = 0;
    uint16_t list[32];
    unsigned votes = 0;
    for (unsigned rest = mask; rest; rest &= rest - 1) {
      const int i = __builtin_ctz(rest);
      const Wait& other = wait[first + i];
      if (w.mask[i] != mask || other.kind != kind || other.line != line)
        EMULATION_FAIL("divergent warp: %s in line %d with mask %08x, where thread %d is at %s in line %d with mask %08x",
                       KINDS[kind], line, mask, first + i, KINDS[other.kind], other.line, w.mask[i]);
      if (kind == SHUFFLE && !(mask >> w.source[i] & 1))
        EMULATION_FAIL("a shuffle in line %d: thread %d reads lane %u, which takes no part", line, first + i, w.source[i]);
      w.out[i] = w.in[w.source[i]];
      votes |= unsigned(w.in[i] != 0) << i;
      list[count++] = first + i;
    }
    if (kind == VOTE)
      for (int i = 0; i < count; i++) w.out[list[i] - first] = votes;
    w.waiting &= ~mask;
    release(count, [&](int i) { return list[i]; });
  }
  run_next();
  return w.out[lane];
}

template <class T> inline T shuffle(unsigned mask, T value, int source, int line) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(SHUFFLE, mask, bits, source, line);
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline int lane() { return current & 31; }

// ---------------------------------------------------------------- memory

inline void poison(char* from, const char* to) {
  for (; to - from >= 8; from += 8) memcpy(from, &POISON, 8);
  memcpy(from, &POISON, to - from);
}

inline void check_poison(const char* from, const char* to) {
  while (to - from >= 8 && !memcmp(from, &POISON, 8)) from += 8;
  for (; from < to && !failed; from += 2)
    if (memcmp(from, &POISON, 2)) complain("shared memory: written at byte %ld of %zu", long(from - shared), shared_bytes);
}

// An asynchronous copy happens when its thread waits for it, the latest time at which a GPU may do it. Until then there is NaN.
inline void copy(void* to, const void* from, int bytes, bool valid) {
  if (uintptr_t(to) % bytes || (valid && uintptr_t(from) % bytes)) EMULATION_FAIL("copy_async<%d>: misaligned", bytes);
  poison(static_cast<char*>(to), static_cast<char*>(to) + bytes);
  Copies& c = copies[current];
  if (c.count == c.capacity) {
    c.capacity = 2 * c.capacity + 16;
    c.list = static_cast<Copy*>(realloc(c.list, c.capacity * sizeof(Copy)));
  }
  c.list[c.count++] = {static_cast<char*>(to), static_cast<const char*>(from), bytes, valid, c.group};
}

inline void await_copies(int pending) {
  Copies& c = copies[current];
  int kept = 0;
  for (int i = 0; i < c.count; i++) {
    const Copy one = c.list[i];
    if (one.group >= c.group - pending) c.list[kept++] = one;
    else if (one.valid) memcpy(one.to, one.from, one.bytes);
    else memset(one.to, 0, one.bytes);
  }
  c.count = kept;
}

// All libraries of the process share `*memory`, which holds the stacks and the shared memory: each fence is a mapping, and a
// process may have 65530 of them.
inline void reserve(char** memory) {
  if (!*memory) {
    const size_t bytes = MAX_THREADS * (STACK + PAGE) + ROOM + 2 * FENCE;
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) abort();
    *memory = static_cast<char*>(at);
    for (int t = 0; t < MAX_THREADS; t++) mprotect(*memory + t * (STACK + PAGE), PAGE, PROT_NONE);
    mprotect(*memory + MAX_THREADS * (STACK + PAGE), FENCE, PROT_NONE);
    mprotect(*memory + MAX_THREADS * (STACK + PAGE) + FENCE + ROOM, FENCE, PROT_NONE);
  }
  stacks = *memory;
  shared_area = *memory + MAX_THREADS * (STACK + PAGE) + FENCE;
}

// The last byte lies at the fence, or up to 127 bytes before it. Writes to these bytes and to the rest of the first page are
// found after each block. Access before the first page faults.
inline void place_shared_memory(size_t bytes) {
  shared_bytes = bytes;
  shared = shared_area + ROOM - (bytes + 127) / 128 * 128;
  lowest = shared_area + (shared - shared_area) / PAGE * PAGE;
  mprotect(shared_area, lowest - shared_area, PROT_NONE);
  mprotect(lowest, shared_area + ROOM - lowest, PROT_READ | PROT_WRITE);
}

// ---------------------------------------------------------------- a fault in a kernel becomes a message

inline void handler(int number, siginfo_t* info, void* state) {
  if (!inside) {  // a fault of another thread: with the default action it faults again at once
    signal(number, SIG_DFL);
    return;
  }
  const char* at = static_cast<char*>(info->si_addr);
  if (number == SIGILL || number == SIGTRAP) complain("a misaligned access, or an index beyond a local array");
  else if (at >= shared_area - FENCE && at < shared_area + ROOM + FENCE)
    complain("shared memory: access at byte %ld of %zu", long(at - shared), shared_bytes);
  else if (at >= stacks && at < stacks + MAX_THREADS * (STACK + PAGE)) complain("local memory: more than %zu bytes", STACK);
  else complain("access to memory that is not there, at address %p", at);
  const mcontext_t& machine = static_cast<ucontext_t*>(state)->uc_mcontext;
#if defined(__x86_64__)
  const char* pc = reinterpret_cast<char*>(machine.gregs[REG_RIP]);
#elif defined(__aarch64__)
  const char* pc = reinterpret_cast<char*>(machine.pc);
#else
  const char* pc = nullptr;
#endif
  Dl_info here, there;  // an address in this library; emulation.py finds its line in the source
  if (dladdr(&shared_area, &here) && dladdr(pc, &there) && here.dli_fbase == there.dli_fbase) {
    const size_t end = strlen(message);
    snprintf(message + end, sizeof message - end, " [pc %#lx]", long(pc - static_cast<char*>(here.dli_fbase)));
  }
  siglongjmp(escape, 1);
}

struct Signals {  // our signal handlers while a grid runs, Python's before and after
  static constexpr int NUMBERS[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  struct sigaction before[4];
  stack_t stack_before;
  char stack[64 << 10];
  Signals() {
    stack_t ours = {};
    ours.ss_sp = stack, ours.ss_size = sizeof stack;
    sigaltstack(&ours, &stack_before);
    struct sigaction action = {};
    action.sa_sigaction = handler, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 4; i++) sigaction(NUMBERS[i], &action, &before[i]);
    inside = true;
  }
  ~Signals() {
    inside = false;
    for (int i = 0; i < 4; i++) sigaction(NUMBERS[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
  }
};

// ---------------------------------------------------------------- a grid

extern "C" char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));  // variables declared __shared__
extern "C" char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));

inline void run_block() {
  poison(lowest, shared_area + ROOM);
  poison(__start_emulated_shared, __stop_emulated_shared);
  memset(warp, 0, sizeof warp);
  head = tail = arrived = 0, alive = threads;
  for (int t = 0; t < threads; t++) {
    const size_t color = t % 16 * 256;  // stacks that all begin at the same offset in a page share a few lines of the cache
    emulation_prepare(&fiber[t], stacks + t * (STACK + PAGE) + PAGE, STACK - color, thread);
    returned[t] = false, copies[t].count = copies[t].group = 0;
  }
  release(threads, [](int i) { return i; });
  current = queue[head++ % MAX_THREADS];
  threadIdx = {unsigned(current), 0, 0};
  emulation_switch(&outside, &fiber[current]);
  if (failed) return;
  check_poison(lowest, shared);
  check_poison(shared + (shared_bytes + 1) / 2 * 2, shared_area + ROOM);
}

inline void run_grid() {
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
        run_block();
        if (failed) return;
      }
}

// Run a grid. Return 0, or 1 and a message in `message_out`. emulation.py calls it from one thread at a time.
inline int run(void (*kernel)(const void*), int bound, const unsigned* grid, int block, size_t bytes, const void* words,
               int launch_order, uint64_t launch_seed, char** memory, char* message_out, size_t message_size) {
  reserve(memory);
  body = kernel, arguments = words, threads = block, order = Order(launch_order), seed = launch_seed * 2 + 1, failed = false;
  gridDim = {grid[0], grid[1], grid[2]}, blockDim = {unsigned(block), 1, 1}, blockIdx = threadIdx = {0, 0, 0};
  if (block < 1 || block > MAX_THREADS || block > bound)
    complain("%d threads, where the kernel allows 1 to %d", block, bound);
  else if (bytes > MAX_SHARED)
    complain("%zu bytes of shared memory, where a block has %zu", bytes, MAX_SHARED);
  else if (!grid[0] || grid[0] > 0x7fffffffu || !grid[1] || grid[1] > 65535 || !grid[2] || grid[2] > 65535)
    complain("a grid that no GPU accepts");
  else {
    place_shared_memory(bytes);
    Signals signals;
    if (!sigsetjmp(escape, 1)) run_grid();
  }
  if (failed)
    snprintf(message_out, message_size, "block (%u, %u, %u), thread %u: %s", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x,
             message);
  return failed;
}

// ---------------------------------------------------------------- parameters of a kernel, eight bytes each

template <class P> constexpr char letter = 0;
template <class T> constexpr char letter<T*> = 'p';
template <class T> constexpr char letter<T* __restrict__> = 'p';
template <> inline constexpr char letter<long long> = 'i';
template <> inline constexpr char letter<float> = 'f';

template <class P> inline P word(const void* words, size_t i) {
  P value;
  memcpy(&value, static_cast<const char*>(words) + 8 * i, sizeof value);
  return value;
}

template <auto kernel> struct Shim;
template <class... P, void (*kernel)(P...)> struct Shim<kernel> {
  static_assert(((letter<P> != 0) && ...), "a kernel takes pointers, long long and float only");
  static constexpr char parameters[] = {letter<P>..., 0};
  struct Call {
    Call(P... p) { kernel(p...); }
  };
  static void run(const void* words) {
    size_t i = 0;
    Call{word<P>(words, i++)...};  // braces: from left to right
  }
};
template <class... Rest> constexpr int first(int threads, Rest...) { return threads; }

}  // namespace emulation

// emulation.py appends one of these for each kernel to the source, with the kernel's launch bounds.
#define EMULATION_EXPORT(kernel, ...)                                                                                  \
  extern "C" __attribute__((visibility("default"))) const char* emulation_parameters_##kernel() {                      \
    return emulation::Shim<kernel>::parameters;                                                                        \
  }                                                                                                                    \
  extern "C" __attribute__((visibility("default"))) int emulation_run_##kernel(                                        \
      const unsigned* grid, int block, size_t bytes, const void* words, int order, uint64_t seed, char** memory,       \
      char* message_out, size_t message_size) {                                                                        \
    constexpr int bound = emulation::first(__VA_ARGS__);                                                               \
    return emulation::run(emulation::Shim<kernel>::run, bound, grid, block, bytes, words, order, seed, memory, message_out,\
                          message_size);                                                                               \
  }
