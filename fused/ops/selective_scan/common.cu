// What the kernels of the selective scan share. One recurrence per channel e and state n,
//
//     s_t = exp(delta_t A) s_{t-1} + delta_t u_t B_t        y_t = sum_n C_t s_t + D u_t
//
// walked by four lanes a channel, a quarter of its states in the registers of each, eight channels (or a multiple) a warp,
// TILE tokens at a time through shared memory. Rows of a tile are in the order of the walk: `reverse` is only where they lie
// in memory. Compiled with: IO (0 bfloat16, 1 float16, 2 float32), STATES (a multiple of 16, padded with zeros), VECTOR
// (streams can be read in groups of four), VECTOR_BC (B and C too), EXACT (every block has all of its channels, and N is STATES),
// DIRECTIONS (1 or 2), PLACES (of Turn), SOFTPLUS (0: delta has none, 1: delta comes before it, 2: behind it, and without a
// bias), GATED (z is there), KEEPS (the forward keeps what the backward wants), and for each kernel the channels of a thread, the
// warps of a direction and the blocks that a multiprocessor must hold at least: FORWARD_CHANNELS, FORWARD_WARPS, FORWARD_BLOCKS,
// BACKWARD_CHANNELS, BACKWARD_WARPS, BACKWARD_BLOCKS; PIECE tokens of the backward stay in registers.

#ifdef EMULATED
#define KERNEL(name, threads, blocks) extern "C" __global__ void __launch_bounds__(threads) name
#else
#define KERNEL(name, threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks) name
#endif
typedef long long i64;
#define DEVICE __device__ __forceinline__
#define TILE 16
#define GROUPS (STATES / 16)  // of four states in each of four lanes
#define MINE (STATES / 4)     // states of a thread: n = 16 group + 4 quarter + i
#define LOG2E 1.4426950408889634f
#define LOG2E_REST 1.9259629911e-8f
#define LN2 0.6931471805599453f
#define LOGARITHM 1  // A holds log(-A)
#define REVERSE 2    // of the only direction
#define STATES_ONLY 4  // of the forward: no y, but what enters every piece and what leaves the last
// where a thread's m-th group of B or C lies in a tile; with 48 states some threads of a round are left over, and repeat others
#define MIX_PLACE(m) (THREADS % (STATES / 2) ? (mixed + (m) * MIXED) * (STATES / 2) + tid % (STATES / 2) : tid + (m) * THREADS)
#define EXISTS(channel) (EXACT || (channel) < E)
#define LEFT(count, from) (EXACT ? 4 : min((count) - (from), 4))  // elements of a group of four

#if IO == 2
typedef float io;
struct alignas(16) Quad { float e[4]; };  // four neighbouring elements
DEVICE float value(const Quad& q, int i) { return q.e[i]; }
DEVICE Quad quad(const float* v) { return {v[0], v[1], v[2], v[3]}; }
DEVICE io rounded(float x) { return x; }
DEVICE Quad single(const io* p, int count) { return {count > 0 ? p[0] : 0.f, count > 1 ? p[1] : 0.f, count > 2 ? p[2] : 0.f, count > 3 ? p[3] : 0.f}; }
#else
typedef unsigned short io;
struct alignas(8) Quad { unsigned e[2]; };
DEVICE io rounded(float x) { return IO == 0 ? to_bf16(x) : to_fp16(x); }
DEVICE float value(const Quad& q, int i) {
  const unsigned pair = q.e[i / 2];
  if (IO == 1) return from_fp16((io)(i % 2 ? pair >> 16 : pair));
  return __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
}
DEVICE Quad quad(const float* v) { return {IO == 0 ? pack_bf16(v[0], v[1]) : pack_fp16(v[0], v[1]), IO == 0 ? pack_bf16(v[2], v[3]) : pack_fp16(v[2], v[3])}; }
DEVICE Quad single(const io* p, int count) {
  const unsigned a = count > 0 ? p[0] : 0, b = count > 1 ? p[1] : 0, c = count > 2 ? p[2] : 0, d = count > 3 ? p[3] : 0;
  return {a | b << 16, c | d << 16};
}
#endif

// the first `count` of four elements, the rest 0; ALIGNED: all or none
template <bool ALIGNED> DEVICE Quad load(const io* p, int count) {
  if (!ALIGNED) return single(p, count);
  Quad q = {};
  if (count > 0) q = *(const Quad*)p;
  return q;
}
// the same into a thread's own place in shared memory, ahead of time where whole groups can be copied
template <bool ALIGNED> DEVICE void fetch(Quad* to, const io* p, int count) {
  if (ALIGNED) copy_async<sizeof(Quad)>(to, p, count > 0);
  else *to = single(p, count);
}
DEVICE void store(io* p, const float* v, int count) {
  if (VECTOR) { if (count > 0) *(Quad*)p = quad(v); }
  else for (int i = 0; i < count && i < 4; i++) p[i] = rounded(v[i]);
}
DEVICE void take(float* v, float4 x) { v[0] = x.x; v[1] = x.y; v[2] = x.z; v[3] = x.w; }

// log(1 + exp(x)) = max(x, 0) + log1p(w), w = exp(-|x|), to a few roundings of float32: states are float32 whatever the
// streams are. The exponent's rounding is made good, and log1p(w) = 2 artanh(s), s = w / (2 + w), which is at most 1/3:
// 2 s + s^3 times a minimax polynomial in s^2, together within 5e-9 of it.
DEVICE float softplus(float x) {
  const float a = fabsf(x), t = -a * LOG2E, rest = fmaf(-a, LOG2E_REST, fmaf(-a, LOG2E, -t));
  float w = ex2(t);
  w = fmaf(w * rest, LN2, w);
  const float s = w * rcp(2.f + w), q = s * s;
  const float p = fmaf(q, fmaf(q, fmaf(q, 0.28024462f, 0.27999142f), 0.40021700f), 0.66666412f);
  return fmaxf(x, 0.f) + fmaf(s * q, p, 2.f * s);
}
DEVICE float step_of(float raw) { return SOFTPLUS == 1 ? softplus(raw) : raw; }  // where it does not come behind softplus
// 1 - exp(-x), the slope of softplus where x is its value, without cancellation
DEVICE float slope(float x) {
  float p = fmaf(x, -1.f / 40320.f, 1.f / 5040.f);
  p = fmaf(x, p, -1.f / 720.f), p = fmaf(x, p, 1.f / 120.f), p = fmaf(x, p, -1.f / 24.f);
  p = fmaf(x, p, 1.f / 6.f), p = fmaf(x, p, -1.f / 2.f), p = fmaf(x, p, 1.f);
  return below(x, 0.5f, x * p, 1.f - ex2(-x * LOG2E));
}
// exp(step * A), rate = A / ln 2. The special function unit's results lie below the true ones, by 5e-9 on average near 1 and by
// 2e-8 to 2.7e-8 elsewhere (measured on an H200): over a long memory that adds up, where roundings cancel. The nudge halves it,
// is lost in rounding at a step of 0, and is free in the fused multiply-add.
#define NUDGE 1.5e-8f
DEVICE float decay_of(float step, float rate) { return ex2(fmaf(step, rate, NUDGE)); }
DEVICE float sigmoid(float x) { return rcp(1.f + ex2(-x * LOG2E)); }

// One step of a sum over lanes that also shares it out: of COUNT values each of the two lanes keeps the sums of half.
template <int COUNT> DEVICE void halve(float* v, int mask, bool upper) {
  #pragma unroll
  for (int i = 0; i < COUNT / 2; i++) {
    float send = upper ? v[i] : v[i + COUNT / 2], keep = upper ? v[i + COUNT / 2] : v[i];
    v[i] = keep + __shfl_xor_sync(0xffffffffu, send, mask);
  }
}

// A lane's place in its warp: channel slot 0-7 and quarter of the states. Lanes i and i^1 read the same B and C, lanes i and
// i^2 the same channel, so that a 16-byte load from shared memory takes two passes and not four.
struct Place {
  int channel, quarter;
  bool low, high;  // bits of the quarter
  DEVICE Place(int lane) : channel((lane >> 3) | ((lane & 1) << 2)), quarter((lane >> 1) & 3), low(quarter & 1), high(quarter & 2) {}
};
#define LOW 2    // masks of lanes that differ in one bit of the quarter
#define HIGH 4

// A thread's rows of a (E, N) matrix of float32: MINE states of one channel; 0 beyond E or N.
DEVICE void load_states(float* v, const float* p, int channel, int E, int N, int quarter) {
  const bool here = p && EXISTS(channel);
  #pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    const int n = g * 16 + quarter * 4;
    float4 x = {};
    if (EXACT || N % 4 == 0) { if (here && (EXACT || n < N)) x = *(const float4*)(p + (i64)channel * N + n); }
    else if (here) {
      const float* at = p + (i64)channel * N + n;
      x = make_float4(n < N ? at[0] : 0.f, n + 1 < N ? at[1] : 0.f, n + 2 < N ? at[2] : 0.f, n + 3 < N ? at[3] : 0.f);
    }
    take(v + 4 * g, x);
  }
}
DEVICE void store_states(float* p, const float* v, int channel, int E, int N, int quarter) {
  if (!EXISTS(channel)) return;
  #pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    int n = g * 16 + quarter * 4;
    if (EXACT || N % 4 == 0) { if (EXACT || n < N) *(float4*)(p + (i64)channel * N + n) = make_float4(v[4 * g], v[4 * g + 1], v[4 * g + 2], v[4 * g + 3]); }
    else for (int i = 0; i < 4; i++) if (n + i < N) p[(i64)channel * N + n + i] = v[4 * g + i];
  }
}
// decay rates of a thread's states, times log2(e): exp(delta A) = 2^(delta rate)
DEVICE void load_rates(float* v, const float* A, int channel, int E, int N, int quarter, i64 flags) {
  load_states(v, A, channel, E, N, quarter);
  #pragma unroll
  for (int i = 0; i < MINE; i++) {
    int n = (i / 4) * 16 + quarter * 4 + i % 4;
    if (flags & LOGARITHM) v[i] = EXISTS(channel) && (EXACT || n < N) ? -expf(v[i]) : 0.f;
    v[i] *= LOG2E;
  }
}

// Addresses are 64-bit products of 32-bit numbers, one instruction each: L, E and strides over tokens are below 2^31.

// A chain is what must be walked one token after another: a block's channels of one clip (backward: in one direction). The
// first `whole` chains are walked by one block each, the others are cut into `cuts` pieces of `span` tiles, a block each. Tiles
// lie at multiples of TILE tokens, whoever walks them; rows of a tile beyond the last token change nothing.
#define SIZES i64 clips, i64 L, i64 E, i64 N, i64 span, i64 cuts, i64 whole, i64 flags
struct Unit {
  int chain, split, span, from, to;
  bool cut;
  // `pieces` of every chain have a block: all, or all but one, which is the first if `next` is called and else the last.
  DEVICE Unit(int unit, int whole, int pieces, int span, int L) : span(span) {
    cut = unit >= whole;
    chain = cut ? whole + (unit - whole) / pieces : unit, split = cut ? (unit - whole) % pieces : 0;
    place(L);
  }
  DEVICE void next(int L) { split++, place(L); }
  DEVICE void place(int L) {
    const int tiles = (L + TILE - 1) / TILE;
    from = cut ? split * span : 0, to = cut ? min(tiles, from + span) : tiles;
  }
};
struct Walk {
  int from, to, turn; bool back;
  DEVICE Walk(const Unit& u, bool back) : from(u.from), to(u.to), turn(back ? TILE - 1 : 0), back(back) {}
  DEVICE int tiles() const { return to - from; }
  DEVICE int tile(int j) const { return back ? to - 1 - j : from + j; }
  DEVICE int token(int j, int row) const { return tile(j) * TILE + (row ^ turn); }
  DEVICE bool has(int row, int left) const { return (row ^ turn) < left; }  // `left` tokens from the start of the tile
};

// What enters piece `to` of a chain that is cut, from what entered the piece `from` of its walk (in `x`) and from what leaves
// every piece when nothing enters it: x <- exp(A sum(delta)) x + local, piece by piece. The adjoint goes the other way.
template <int K> DEVICE void combine(
    float (*x)[MINE], const float (*rate)[MINE], const int* slot, const float* local, const float* sums, int from, int to,
    int edge, int E, int N, int quarter) {
  #pragma unroll 1
  for (int piece = from; piece != to; piece += from < to ? 1 : -1) {
    #pragma unroll
    for (int k = 0; k < K; k++) {
      const int channel = edge + slot[k];
      const float sum = EXISTS(channel) ? sums[(i64)piece * E + channel] : 0.f;
      float left[MINE];
      load_states(left, local + (i64)piece * E * N, channel, E, N, quarter);
      #pragma unroll
      for (int i = 0; i < MINE; i++) x[k][i] = fmaf(decay_of(sum, rate[k][i]), x[k][i], left[i]);
    }
  }
}

// One launch walks whole chains, then what leaves the pieces of the others (`passes`; 0 where it is known what enters them), then
// those pieces, each of which waits for the passes of its chain. As many blocks as there is work of all kinds claim one of it
// each, in the order in which they start, whatever order that is: beside the same schedulers of a multiprocessor the first `even`
// whole chains, so that these are spread evenly, then passes, then pieces, then what is left. So whom a block waits for runs or
// has run. `counts` are zeros: claims of passes, pieces and whole chains, blocks begun at each of PLACES, and passes done of every
// chain that is cut; without them a block's work is its own.
struct Turn {
  int place;  // of a chain or a piece; for a pass, of the chain's passes
  bool pass;
  DEVICE Turn(char* memory, int* counts, int whole, int passes, int even) : place(blockIdx.x), pass(false) {
    if (!counts) return;
    if (threadIdx.x == 0) {
      int* mine = (int*)memory, *begun = counts + 3 + (processor() * 4 + scheduler() / (blockDim.x / 32)) % PLACES, k;
      const int pieces = gridDim.x - whole - passes;
      mine[1] = 0;
      if (ticket(begun) < even && (k = ticket(counts + 2)) < whole) mine[0] = k;
      else if ((k = ticket(counts)) < passes) mine[0] = whole + k, mine[1] = 1;
      else if ((k = ticket(counts + 1)) < pieces) mine[0] = whole + k;
      else mine[0] = ticket(counts + 2);
    }
    __syncthreads();
    place = ((int*)memory)[0], pass = ((int*)memory)[1];
    __syncthreads();
  }
  DEVICE static int* done(int* counts, const Unit& unit, int whole) { return counts + 3 + PLACES + unit.chain - whole; }
  DEVICE void passed(int* counts, const Unit& unit, int whole) const {
    __syncthreads();
    if (threadIdx.x == 0) announce(done(counts, unit, whole));
  }
  DEVICE void wait(int* counts, const Unit& unit, int whole, int cuts) const {
    if (threadIdx.x == 0) await(done(counts, unit, whole), cuts - 1);
    __syncthreads();
  }
};
