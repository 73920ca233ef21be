// The selective scan: what its forward and its backward share. For every channel and every state n,
//
//     h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t        y_t = sum_n C_t h_t + D u_t
//
// Terms
//   sequence  The tokens of one clip for the channels of one block, and in the backward for one direction.
//   split     A part of a sequence that one block scans (split-L). A sequence that is not split is scanned by one block.
//   tile      TILE tokens, staged in shared memory. Tiles start at multiples of TILE tokens, in either direction.
//   row       A token of a tile, counted in the order of the scan. Only TileIterator knows whether that order is reversed.
//   subtile   SUBTILE tokens of a tile, whose intermediate values the backward keeps in registers.
//
// Threads
//   Four lanes scan a channel, each with a quarter of its states in registers. A warp scans eight channels at a time.
//
// Macros that the source is compiled with (kernel_source.py)
//   IO_DTYPE            dtype of u, delta, B, C, z, y and their gradients: 0 bfloat16, 1 float16, 2 float32
//   PADDED_STATES       N, rounded up to a multiple of 16; the states beyond N are zeros
//   VECTORIZED          1: four neighbouring channels of a token can be read and written at once
//   VECTORIZED_BC       1: four neighbouring states of B and C can be read at once
//   NO_PADDING          1: every block has all of its channels, and N == PADDED_STATES
//   DIRECTIONS          1 or 2
//   SOFTPLUS            SOFTPLUS_NONE, SOFTPLUS_IN_KERNEL or SOFTPLUS_BY_CALLER
//   HAS_Z               1: y is multiplied by silu(z)
//   STORE_TILE_STATES   1: the forward stores what the backward needs
//   QUERY_ROWS          1: y is wanted at some tokens only, the query rows (work.cu); z, y and their gradients have no others
//   SCHEDULER_COUNTERS  counters of WorkQueue for the schedulers of the multiprocessors
//   FWD_, BWD_          CHANNELS_PER_THREAD, WARPS (of one direction), MIN_BLOCKS_PER_SM
//   SUBTILE             tokens, a divisor of TILE

#ifdef EMULATED
#define KERNEL(name, threads, blocks) extern "C" __global__ void __launch_bounds__(threads) name
#else
#define KERNEL(name, threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks) name
#endif
#define DEVICE __device__ __forceinline__
typedef long long i64;
#ifndef QUERY_ROWS
#define QUERY_ROWS 0
#endif

#define TILE 16
#define STATES_PER_THREAD (PADDED_STATES / 4)
#define STATE_VECTORS (PADDED_STATES / 16)  // of four states; a thread's i-th state of vector v is n = 16 v + 4 quarter + i

// Values of SOFTPLUS.
#define SOFTPLUS_NONE 0
#define SOFTPLUS_IN_KERNEL 1
#define SOFTPLUS_BY_CALLER 2  // delta has been through softplus; ddelta is the gradient of the value before softplus

// Bits of `flags`, an argument of every kernel.
#define A_LOG 1        // A holds log(-A)
#define REVERSE 2      // the only direction scans from the last token to the first
#define STATES_ONLY 4  // the forward computes no y, but the state before every split and the final state
#define BY_MOMENTS 8   // the forward's state passes sum tiles by moments and may exit (moments.cu), where HAS_MOMENTS
#define HAS_MOMENTS \
    (IO_DTYPE == 0 && PADDED_STATES == 16 && NO_PADDING && SOFTPLUS == SOFTPLUS_BY_CALLER && !STORE_TILE_STATES && \
     FWD_WARPS == 1 && FWD_CHANNELS_PER_THREAD == 2)

// A thread stages four channels of the rows r, r + STAGE_ROW_STRIDE, ... of a tile, and four states of B or C of the rows r,
// r + BC_ROW_STRIDE, ... With 48 states THREADS is no multiple of BC_ROW_VECTORS. The threads that are left over then write
// the same values as others. Each kernel defines THREADS and THREAD_CHANNELS.
#define STAGE_ROW_STRIDE (TILE / THREAD_CHANNELS)
#define BC_ROW_VECTORS (PADDED_STATES / 2)  // of four floats: B, then C
#define BC_ROW_STRIDE (THREADS / BC_ROW_VECTORS)
#define BC_LOADS ((TILE + BC_ROW_STRIDE - 1) / BC_ROW_STRIDE)  // of a thread
#define BC_VECTOR_INDEX(load, row, thread) \
    (THREADS % BC_ROW_VECTORS ? ((row) + (load) * BC_ROW_STRIDE) * BC_ROW_VECTORS + (thread) % BC_ROW_VECTORS \
                              : (thread) + (load) * THREADS)
#define CHANNEL_EXISTS(channel) (NO_PADDING || (channel) < E)
#define VALID_OF_FOUR(size, start) (NO_PADDING ? 4 : min((size) - (start), 4))  // may be negative

// ---------------------------------------------------------------- four elements of a stream at once

#if IO_DTYPE == 2
typedef float io_t;
struct alignas(16) IoVec4 { float e[4]; };
DEVICE float to_float(const IoVec4& vec, int i) { return vec.e[i]; }
DEVICE io_t to_io(float x) { return x; }
DEVICE IoVec4 to_io_vec4(const float* v) { return {v[0], v[1], v[2], v[3]}; }
DEVICE IoVec4 load_elementwise(const io_t* p, int count) {
  return {count > 0 ? p[0] : 0.f, count > 1 ? p[1] : 0.f, count > 2 ? p[2] : 0.f, count > 3 ? p[3] : 0.f};
}
#else
typedef unsigned short io_t;
struct alignas(8) IoVec4 { unsigned e[2]; };
DEVICE float to_float(const IoVec4& vec, int i) {
  const unsigned pair = vec.e[i / 2];
  if (IO_DTYPE == 1) return from_fp16((io_t)(i % 2 ? pair >> 16 : pair));
  return __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
}
DEVICE io_t to_io(float x) { return IO_DTYPE == 0 ? to_bf16(x) : to_fp16(x); }
DEVICE IoVec4 to_io_vec4(const float* v) {
  return {IO_DTYPE == 0 ? pack_bf16(v[0], v[1]) : pack_fp16(v[0], v[1]),
          IO_DTYPE == 0 ? pack_bf16(v[2], v[3]) : pack_fp16(v[2], v[3])};
}
DEVICE IoVec4 load_elementwise(const io_t* p, int count) {
  const unsigned a = count > 0 ? p[0] : 0, b = count > 1 ? p[1] : 0, c = count > 2 ? p[2] : 0, d = count > 3 ? p[3] : 0;
  return {a | b << 16, c | d << 16};
}
#endif

// Load the first `count` of four elements and set the others to 0. With VECTOR, count is 4 or at most 0.
template <bool VECTOR> DEVICE IoVec4 load_vec4(const io_t* p, int count) {
  if (!VECTOR) return load_elementwise(p, count);
  IoVec4 vec = {};
  if (count > 0) vec = *(const IoVec4*)p;
  return vec;
}
// The same into shared memory, asynchronously with VECTOR (copy_commit and copy_wait follow).
template <bool VECTOR> DEVICE void load_vec4_async(IoVec4* smem, const io_t* p, int count) {
  if (VECTOR) copy_async<sizeof(IoVec4)>(smem, p, count > 0);
  else *smem = load_elementwise(p, count);
}
DEVICE void store_vec4(io_t* p, const float* v, int count) {
  if (VECTORIZED) { if (count > 0) *(IoVec4*)p = to_io_vec4(v); }
  else for (int i = 0; i < count && i < 4; i++) p[i] = to_io(v[i]);
}
DEVICE void unpack(float* v, float4 x) { v[0] = x.x; v[1] = x.y; v[2] = x.z; v[3] = x.w; }
DEVICE float4 pack(const float* v) { return make_float4(v[0], v[1], v[2], v[3]); }

// ---------------------------------------------------------------- functions of numbers

#define LOG2E 1.4426950408889634f
#define LOG2E_REST 1.9259629911e-8f  // log2(e) - LOG2E
#define LN2 0.6931471805599453f

// log(1 + exp(x)) to a few roundings of float32, since states are float32 whatever IO_DTYPE is:
//     log(1 + exp(x)) = max(x, 0) + log1p(w)         w = exp(-|x|), with the rounding of the exponent compensated
//     log1p(w) = 2 artanh(r) = 2 r + r^3 P(r^2)      r = w / (2 + w) <= 1/3
// P is a minimax polynomial, by which log1p(w) is off by at most 5e-9.
DEVICE float softplus(float x) {
  const float a = fabsf(x), t = -a * LOG2E, rest = fmaf(-a, LOG2E_REST, fmaf(-a, LOG2E, -t));
  float w = ex2(t);
  w = fmaf(w * rest, LN2, w);
  const float r = w * rcp(2.f + w), q = r * r;
  const float p = fmaf(q, fmaf(q, fmaf(q, 0.28024462f, 0.27999142f), 0.40021700f), 0.66666412f);
  return fmaxf(x, 0.f) + fmaf(r * q, p, 2.f * r);
}
DEVICE float activate_delta(float x) { return SOFTPLUS == SOFTPLUS_IN_KERNEL ? softplus(x) : x; }
// The derivative of softplus where its value is y: 1 - exp(-y), by its Taylor series for small y to avoid cancellation.
DEVICE float softplus_derivative(float y) {
  float p = fmaf(y, -1.f / 40320.f, 1.f / 5040.f);
  p = fmaf(y, p, -1.f / 720.f), p = fmaf(y, p, 1.f / 120.f), p = fmaf(y, p, -1.f / 24.f);
  p = fmaf(y, p, 1.f / 6.f), p = fmaf(y, p, -1.f / 2.f), p = fmaf(y, p, 1.f);
  return select_less(y, 0.5f, y * p, 1.f - ex2(-y * LOG2E));
}
// exp(delta A), given A log2(e). The special function unit returns less than 2^x, by 5e-9 on average near 1 and by 2e-8 to
// 2.7e-8 elsewhere (measured on an H200). Over a long memory such a bias adds up, while roundings cancel. EX2_CORRECTION halves
// the bias. It is lost in rounding at delta = 0, and it is free in the fused multiply-add.
#define EX2_CORRECTION 1.5e-8f
DEVICE float exp_delta_A(float delta, float A_log2e) { return ex2(fmaf(delta, A_log2e, EX2_CORRECTION)); }
DEVICE float sigmoid(float x) { return rcp(1.f + ex2(-x * LOG2E)); }

// One step of a reduce-scatter over the lanes of a warp. Two lanes that differ in `lane_mask` have COUNT values each.
// Afterwards the lower one has the sums of the lower half in v[0] to v[COUNT / 2 - 1], and the upper one there those of the
// upper half.
template <int COUNT> DEVICE void reduce_scatter(float* v, int lane_mask, bool upper) {
  #pragma unroll
  for (int i = 0; i < COUNT / 2; i++) {
    float send = upper ? v[i] : v[i + COUNT / 2], keep = upper ? v[i + COUNT / 2] : v[i];
    v[i] = keep + __shfl_xor_sync(0xffffffffu, send, lane_mask);
  }
}

// ---------------------------------------------------------------- states of a thread

// Which channel (of eight) and which quarter of its states a lane has. Lanes i and i ^ 1 read the same B and C, and lanes i and
// i ^ 2 the same channel; so a 16-byte load from shared memory takes two wavefronts instead of four.
struct LanePosition {
  int channel, quarter;
  bool quarter_bit0, quarter_bit1;
  DEVICE LanePosition(int lane)
      : channel((lane >> 3) | ((lane & 1) << 2)), quarter((lane >> 1) & 3),
        quarter_bit0(quarter & 1), quarter_bit1(quarter & 2) {}
};
#define LANE_QUARTER_BIT0 2  // the bit of a lane's number that is bit 0 of its quarter
#define LANE_QUARTER_BIT1 4

// Load a thread's states of one channel from a float32 matrix (E, N); 0 where p is null, and beyond E and N.
DEVICE void load_states(float* v, const float* p, int channel, int E, int N, int quarter) {
  const bool exists = p && CHANNEL_EXISTS(channel);
  #pragma unroll
  for (int g = 0; g < STATE_VECTORS; g++) {
    const int n = g * 16 + quarter * 4;
    float4 x = {};
    if (NO_PADDING || N % 4 == 0) {
      if (exists && (NO_PADDING || n < N)) x = *(const float4*)(p + (i64)channel * N + n);
    } else if (exists) {
      const float* from = p + (i64)channel * N + n;
      x = make_float4(n < N ? from[0] : 0.f, n + 1 < N ? from[1] : 0.f, n + 2 < N ? from[2] : 0.f, n + 3 < N ? from[3] : 0.f);
    }
    unpack(v + 4 * g, x);
  }
}
DEVICE void store_states(float* p, const float* v, int channel, int E, int N, int quarter) {
  if (!CHANNEL_EXISTS(channel)) return;
  #pragma unroll
  for (int g = 0; g < STATE_VECTORS; g++) {
    int n = g * 16 + quarter * 4;
    if (NO_PADDING || N % 4 == 0) {
      if (NO_PADDING || n < N) *(float4*)(p + (i64)channel * N + n) = pack(v + 4 * g);
    } else {
      for (int i = 0; i < 4; i++) if (n + i < N) p[(i64)channel * N + n + i] = v[4 * g + i];
    }
  }
}
// Load A of a thread's states, times log2(e).
DEVICE void load_A_log2e(float* v, const float* A, int channel, int E, int N, int quarter, i64 flags) {
  load_states(v, A, channel, E, N, quarter);
  #pragma unroll
  for (int i = 0; i < STATES_PER_THREAD; i++) {
    int n = (i / 4) * 16 + quarter * 4 + i % 4;
    if (flags & A_LOG) v[i] = CHANNEL_EXISTS(channel) && (NO_PADDING || n < N) ? -expf(v[i]) : 0.f;
    v[i] *= LOG2E;
  }
}

// ---------------------------------------------------------------- inputs of both kernels

// u, delta, z (clip, L, E; with QUERY_ROWS z is (clip, num_queries, E)), B, C (clip, L, N), A (E, N), D and delta_bias (E,) of direction 0 and 1, which share z. Strides
// over clips (_b) and tokens (_t) are in elements and the same in both directions. The last axis has unit stride.

#define STREAM_PARAMS \
    const io_t *u0, const io_t *u1, i64 u_stride_b, i64 u_stride_t, \
    const io_t *delta0, const io_t *delta1, i64 delta_stride_b, i64 delta_stride_t, \
    const io_t *z, i64 z_stride_b, i64 z_stride_t, \
    const io_t *B0, const io_t *B1, i64 B_stride_b, i64 B_stride_t, \
    const io_t *C0, const io_t *C1, i64 C_stride_b, i64 C_stride_t, \
    const float *A0, const float *A1, const float *D0, const float *D1, const float *delta_bias0, const float *delta_bias1
// Addresses are 64-bit products of 32-bit numbers, one instruction each: L, E and the strides over tokens are below 2^31.
#if QUERY_ROWS
#define QUERY_PARAMS const TileQueries *tile_queries, i64 num_queries,
#define QUERY_ARGUMENTS tile_queries, (int)num_queries,
#define Y_ROWS num_queries  // tokens of a clip in z, y and their gradients
#else
#define QUERY_PARAMS
#define QUERY_ARGUMENTS 0, 0,
#define Y_ROWS L
#endif
#define SIZE_PARAMS i64 clips, i64 L, i64 E, i64 N, i64 tiles_per_split, i64 num_splits, i64 num_unsplit, i64 flags
