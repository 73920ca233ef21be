// Backward: gradients of every input. With g_t the gradient of s_t,
//
//     g_t = C_t dy_t + a_{t+1} g_{t+1}        w_t = g_t a_t s_{t-1}          a_t = exp(delta_t A)
//     dB_t = delta_t u_t g_t                  dC_t = dy_t s_t                (summed over channels)
//     du_t = delta_t sum_n g_t B_t + D dy_t   ddelta_t = u_t sum_n g_t B_t + sum_n w_t A        dA = sum_t delta_t w_t
//
// A block walks CHANNELS channels of one clip and direction, or one piece of it, from its end. States come again from `marks`, the state
// before every tile: first to every PIECE tokens, then PIECE tokens with a_t and a_t s_{t-1} kept in registers, then back.

#define CHANNELS (8 * BACKWARD_CHANNELS * BACKWARD_WARPS)
#define THREADS (32 * BACKWARD_WARPS)
#define K BACKWARD_CHANNELS
#define PIECES (TILE / PIECE)
#define WIDTH(E, N) (((E) * ((N) + 2) + 3) / 4 * 4)  // of a row of dA, dD and dbias, so that all rows are aligned
#define TOGETHER (4 / K)  // tokens whose sums over the quarters are made together
#define ROWS (TILE / K)
#define MIXED (THREADS / (STATES / 2))
#define MIXES ((TILE + MIXED - 1) / MIXED)
#define SHARED_STEP (TILE * (CHANNELS * 16 + 2 * STATES * 4))
#define SHARED_HELD ((PIECES - 1) * K * GROUPS * THREADS * 16)
#define SHARED_OUT (2 * TILE * CHANNELS * 4)
#define SHARED_SUMS (TILE * BACKWARD_WARPS * 2 * STATES * 4)
#define RAW (5 * K + MIXES)  // groups of four that a thread fetches: u, delta, dy, z and the ungated y, then B and C

// Where a thread reads and writes at token 0: everything that a tile needs, staged as {delta, delta u}, dy and u a token and
// channel and {B | C} a token; if not FULL only what the adjoint alone needs. The first direction also makes dz.
struct Inputs {
  const io *u, *delta, *z, *B, *C, *dout, *ungated;
  int u_t, d_t, z_t, B_t, C_t, dout_t, dz_t;
  io* dz;
};

template <bool FULL> DEVICE void backward_walk(
    char* memory, Inputs in, const float* A, const float* D, const float* bias, const float* marks, const float* dfinal,
    float* leave, float* sums, io* du, io* ddelta, float* parts, float* rows, float* dinitial,
    int clips, int L, int E, int N, int cuts, int flags, Unit unit, int direction, int clip, int edge, bool back) {
  float2* step = (float2*)memory;                                  // [TILE][CHANNELS] delta, delta u
  float* dys = (float*)(step + TILE * CHANNELS);                   // [TILE][CHANNELS]
  float* us = dys + TILE * CHANNELS;                               // [TILE][CHANNELS]
  float* mix = (float*)(memory + TILE * CHANNELS * 16);            // [TILE][B | C][STATES]
  float4* held = (float4*)(memory + SHARED_STEP);                  // [PIECES - 1][K][GROUPS][THREADS]
  float* result = (float*)(memory + SHARED_STEP + SHARED_HELD);    // [du | ddelta][TILE][CHANNELS]
  float* stash = result + 2 * TILE * CHANNELS;                     // [TILE][warp][dB | dC][STATES]
  const int tid = threadIdx.x, warp = tid / 32;
  const Place place(tid % 32);
  const int blocks = (E + CHANNELS - 1) / CHANNELS, all = (L + TILE - 1) / TILE;
  const i64 both = (i64)direction * clips + clip, one = both * cuts + unit.split;
  const Walk walk(unit, back);
  // As in the forward a thread stages every ROWS-th token, the last one first.
  const int column = tid % (CHANNELS / 4) * 4, count = LEFT(E, edge + column), row = tid / (CHANNELS / 4);
  const int tiles = walk.tiles(), hop = back ? ROWS : -ROWS, token = walk.token(tiles - 1, (K - 1) * ROWS + row);
  const io *u = in.u + (i64)token * in.u_t, *delta = in.delta + (i64)token * in.d_t, *z = in.z + (i64)token * in.z_t;
  const io* dout = in.dout + (i64)token * in.dout_t;
  io* dz = in.dz + (i64)token * in.dz_t;
  const int state = tid % (STATES / 4) * 4, mixed = tid / (STATES / 2), mixes = EXACT ? 4 : N - state;
  const bool is_C = tid % (STATES / 2) >= STATES / 4;
  const int mix_t = is_C ? in.C_t : in.B_t, mix_hop = (back ? -1 : 1) * mix_t;
  const io* blend = (is_C ? in.C : in.B) + state + (i64)walk.token(tiles - 1, mixed) * mix_t;
  i64 staged = (i64)token * E, written = staged;  // of the contiguous streams

  float rate[K][MINE], adjoint[K][MINE], dA[K][MINE], total[K], dD = 0.f, dbias = 0.f;
  int slot[K];
  #pragma unroll
  for (int k = 0; k < K; k++) {
    slot[k] = warp * 8 * K + 8 * k + place.channel, total[k] = 0.f;
    load_rates(rate[k], A, edge + slot[k], E, N, place.quarter, flags);
    load_states(adjoint[k], FULL && dfinal ? dfinal + both * E * N : 0, edge + slot[k], E, N, place.quarter);
    #pragma unroll
    for (int i = 0; i < MINE; i++) dA[k][i] = 0.f;
  }
  if (FULL && unit.cut)
    combine<K>(adjoint, rate, slot, leave + both * cuts * E * N, sums + both * cuts * E, back ? 0 : cuts - 1, unit.split, edge, E, N, place.quarter);
  // after sums over the quarters, each of four lanes has one token and channel of TOGETHER tokens and K channels
  const int own_token = K == 1 ? 2 * place.high + place.low : place.high, own = slot[K == 1 ? 0 : place.low];
  const float skip = D && EXISTS(edge + own) ? D[edge + own] : 0.f;
  const bool gates = FULL && GATED && direction == 0;
  // what the next tile needs is on its way while this one is worked on, into places that only this thread reads
  Quad* raw = (Quad*)(memory + SHARED_STEP + SHARED_HELD + SHARED_OUT + SHARED_SUMS) + tid;
  float4* begun = (float4*)(raw - tid + RAW * THREADS) + tid;
  auto ahead = [&](int tile) {
    const int left = L - walk.tile(tile) * TILE;
    Quad* to = raw;
    #pragma unroll
    for (int k = K - 1; k >= 0; k--, to += 5 * THREADS) {
      const int n = walk.has(row + k * ROWS, left) ? count : 0;
      if (FULL) fetch<VECTOR>(to, u, n);
      fetch<VECTOR>(to + THREADS, delta, n), fetch<VECTOR>(to + 2 * THREADS, dout, n);
      if (GATED) fetch<VECTOR>(to + 3 * THREADS, z, n);
      if (gates) fetch<VECTOR>(to + 4 * THREADS, in.ungated + staged, n);
      u += (i64)hop * in.u_t, delta += (i64)hop * in.d_t, dout += (i64)hop * in.dout_t, z += (i64)hop * in.z_t;
      staged += (i64)hop * E;
    }
    #pragma unroll
    for (int m = 0; m < MIXES; m++) {
      const int r = mixed + m * MIXED;
      fetch<VECTOR_BC>(to + m * THREADS, blend + (i64)(m * MIXED) * mix_hop, (FULL || is_C) && r < TILE && walk.has(r, left) ? mixes : 0);
    }
    blend -= (i64)TILE * mix_hop;
    if (FULL && (EXACT || N % 4 == 0)) {
      #pragma unroll
      for (int i = 0; i < K * GROUPS; i++) {
        const int channel = edge + slot[i / GROUPS], n = i % GROUPS * 16 + place.quarter * 4;
        const bool here = EXACT || (channel < E && n < N);
        copy_async<16>(begun + i * THREADS, marks + (both * all + walk.tile(tile)) * E * N + (here ? (i64)channel * N + n : 0), here);
      }
    }
    copy_commit();
  };
  ahead(tiles - 1);
  for (int tile = tiles - 1; tile >= 0; tile--) {
    const int left = L - walk.tile(tile) * TILE;
    copy_wait<0>();
    const Quad* from = raw;
    float shift[4];  // read again for every tile: four registers less
    #pragma unroll
    for (int i = 0; i < 4; i++) shift[i] = bias && i < count ? __ldg(bias + edge + column + i) : 0.f;
    #pragma unroll
    for (int k = K - 1; k >= 0; k--) {
      const int r = row + k * ROWS, n = walk.has(r, left) ? count : 0;
      const Quad qu = from[0], qd = from[THREADS], qg = from[2 * THREADS], qz = from[3 * THREADS], qy = from[4 * THREADS];
      float d[4], x[4], dy[4], made[4];
      from += 5 * THREADS;
      #pragma unroll
      for (int i = 0; i < 4; i++) {
        const float raw = value(qd, i), g = value(qg, i), v = value(qz, i);
        const float s = sigmoid(v), y = value(qy, i);
        d[i] = SOFTPLUS == 2 ? raw : walk.has(r, left) ? step_of(raw + shift[i]) : 0.f, x[i] = value(qu, i), dy[i] = GATED ? g * v * s : g;
        made[i] = g * y * s * (1.f + v * (1.f - s));
      }
      float4* to = (float4*)(step + r * CHANNELS + column);
      to[0] = make_float4(d[0], d[0] * x[0], d[1], d[1] * x[1]), to[1] = make_float4(d[2], d[2] * x[2], d[3], d[3] * x[3]);
      *(float4*)(dys + r * CHANNELS + column) = make_float4(dy[0], dy[1], dy[2], dy[3]);
      if (FULL) *(float4*)(us + r * CHANNELS + column) = make_float4(x[0], x[1], x[2], x[3]);
      if (gates) store(dz, made, n);
      dz += (i64)hop * in.dz_t;
    }
    #pragma unroll
    for (int m = 0; m < MIXES; m++) {
      const Quad q = from[m * THREADS];
      if (TILE % MIXED == 0 || mixed + m * MIXED < TILE)
        ((float4*)mix)[MIX_PLACE(m)] = make_float4(value(q, 0), value(q, 1), value(q, 2), value(q, 3));
    }
    float h[K][MINE];
    if (FULL) {
      #pragma unroll
      for (int k = 0; k < K; k++) {
        if (!EXACT && N % 4) load_states(h[k], marks + (both * all + walk.tile(tile)) * E * N, edge + slot[k], E, N, place.quarter);
        else for (int g = 0; g < GROUPS; g++) take(h[k] + 4 * g, begun[(k * GROUPS + g) * THREADS]);
      }
    }
    __syncthreads();
    if (tile > 0) ahead(tile - 1);

    auto mixing = [&](float* v, int t, bool is_C) {
      #pragma unroll
      for (int g = 0; g < GROUPS; g++) take(v + 4 * g, ((const float4*)mix)[t * (STATES / 2) + is_C * (STATES / 4) + g * 4 + place.quarter]);
    };
    if (!FULL) {
      #pragma unroll 4
      for (int t = TILE - 1; t >= 0; t--) {
        float c[MINE];
        mixing(c, t, true);
        #pragma unroll
        for (int k = 0; k < K; k++) {
          const float2 d = step[t * CHANNELS + slot[k]];
          const float dy = dys[t * CHANNELS + slot[k]];
          total[k] += d.x;
          #pragma unroll
          for (int i = 0; i < MINE; i++) adjoint[k][i] = decay_of(d.x, rate[k][i]) * fmaf(c[i], dy, adjoint[k][i]);
        }
      }
      __syncthreads();
      continue;
    }

    #pragma unroll 1
    for (int piece = 0; piece < PIECES - 1; piece++) {
      #pragma unroll
      for (int k = 0; k < K; k++)
        #pragma unroll
        for (int g = 0; g < GROUPS; g++)
          held[((piece * K + k) * GROUPS + g) * THREADS + tid] = make_float4(h[k][4 * g], h[k][4 * g + 1], h[k][4 * g + 2], h[k][4 * g + 3]);
      #pragma unroll
      for (int t = piece * PIECE; t < (piece + 1) * PIECE; t++) {
        float b[MINE];
        mixing(b, t, false);
        #pragma unroll
        for (int k = 0; k < K; k++) {
          const float2 d = step[t * CHANNELS + slot[k]];
          #pragma unroll
          for (int i = 0; i < MINE; i++) h[k][i] = fmaf(decay_of(d.x, rate[k][i]), h[k][i], d.y * b[i]);
        }
      }
    }
    #pragma unroll 1
    for (int piece = PIECES - 1; piece >= 0; piece--) {
      const int t0 = piece * PIECE;
      if (piece < PIECES - 1) {
        #pragma unroll
        for (int k = 0; k < K; k++)
          #pragma unroll
          for (int g = 0; g < GROUPS; g++) take(h[k] + 4 * g, held[((piece * K + k) * GROUPS + g) * THREADS + tid]);
      }
      float decay[PIECE][K][MINE], kept[PIECE][K][MINE];
      // the sums over channels of two tokens at a time: eight values over eight lanes
      auto gather = [&](float* v, int t, int what) {
        #pragma unroll
        for (int g = 0; g < GROUPS; g++) {
          float pair[8];
          #pragma unroll
          for (int i = 0; i < 4; i++) pair[i] = v[4 * g + i], pair[4 + i] = v[MINE + 4 * g + i];
          halve<8>(pair, 1, place.channel & 4);
          halve<4>(pair, 16, place.channel & 2);
          halve<2>(pair, 8, place.channel & 1);
          const int token = t + ((place.channel & 4) != 0), n = g * 16 + place.quarter * 4 + (place.channel & 3);
          stash[((token * BACKWARD_WARPS + warp) * 2 + what) * STATES + n] = pair[0];
        }
      };
      float both[2 * MINE];
      #pragma unroll
      for (int t = 0; t < PIECE; t++) {
        float b[MINE], *dC = both + t % 2 * MINE;
        mixing(b, t0 + t, false);
        #pragma unroll
        for (int k = 0; k < K; k++) {
          const float2 d = step[(t0 + t) * CHANNELS + slot[k]];
          const float dy = dys[(t0 + t) * CHANNELS + slot[k]];
          #pragma unroll
          for (int i = 0; i < MINE; i++) {
            decay[t][k][i] = decay_of(d.x, rate[k][i]), kept[t][k][i] = decay[t][k][i] * h[k][i];
            h[k][i] = fmaf(d.y, b[i], kept[t][k][i]);
            dC[i] = k ? fmaf(dy, h[k][i], dC[i]) : dy * h[k][i];
          }
        }
        if (t % 2) gather(both, t0 + t - 1, 1);
      }
      float along_B[4], along_A[4];
      #pragma unroll
      for (int t = PIECE - 1; t >= 0; t--) {
        float b[MINE], c[MINE], *dB = both + t % 2 * MINE;
        mixing(b, t0 + t, false), mixing(c, t0 + t, true);
        #pragma unroll
        for (int k = 0; k < K; k++) {
          const float2 d = step[(t0 + t) * CHANNELS + slot[k]];
          const float dy = dys[(t0 + t) * CHANNELS + slot[k]];
          float sum_B = 0.f, sum_A = 0.f;
          #pragma unroll
          for (int i = 0; i < MINE; i++) {
            const float g = fmaf(c[i], dy, adjoint[k][i]), w = g * kept[t][k][i];
            sum_B = fmaf(g, b[i], sum_B), sum_A = fmaf(w, rate[k][i], sum_A);
            dA[k][i] = fmaf(w, d.x, dA[k][i]), adjoint[k][i] = g * decay[t][k][i];
            dB[i] = k ? fmaf(d.y, g, dB[i]) : d.y * g;
          }
          along_B[t % TOGETHER * K + k] = sum_B, along_A[t % TOGETHER * K + k] = sum_A;
        }
        if (t % 2 == 0) gather(both, t0 + t, 0);
        if (t % TOGETHER) continue;
        halve<4>(along_B, HIGH, place.high), halve<2>(along_B, LOW, place.low);
        halve<4>(along_A, HIGH, place.high), halve<2>(along_A, LOW, place.low);
        const int row = t0 + t + own_token;
        const float d = step[row * CHANNELS + own].x, dy = dys[row * CHANNELS + own], x = us[row * CHANNELS + own];
        const float dd = fmaf(x, along_B[0], along_A[0] * LN2) * (SOFTPLUS ? slope(d) : 1.f);
        dD = fmaf(dy, x, dD), dbias += SOFTPLUS || walk.has(row, left) ? dd : 0.f;
        result[row * CHANNELS + own] = fmaf(d, along_B[0], skip * dy), result[(TILE + row) * CHANNELS + own] = dd;
      }
    }
    __syncthreads();
    #pragma unroll
    for (int k = K - 1; k >= 0; k--) {
      const int r = row + k * ROWS, n = walk.has(r, left) ? count : 0;
      store(du + written, result + r * CHANNELS + column, n);
      store(ddelta + written, result + (TILE + r) * CHANNELS + column, n);
      written += (i64)hop * E;
    }
    for (int i = tid; i < TILE * STATES / 2; i += THREADS) {
      const int r = i / (STATES / 2);
      if (!walk.has(r, left)) continue;
      float4 sum = {};
      #pragma unroll
      for (int w = 0; w < BACKWARD_WARPS; w++) {
        const float4 x = ((const float4*)stash)[(r * BACKWARD_WARPS + w) * (STATES / 2) + i % (STATES / 2)];
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
      }
      ((float4*)parts)[(i64)walk.token(tile, r) * blocks * (STATES / 2) + i % (STATES / 2)] = sum;
    }
  }

  #pragma unroll
  for (int k = 0; k < K; k++) {
    const int channel = edge + slot[k];
    if (!FULL) store_states(leave + one * E * N, adjoint[k], channel, E, N, place.quarter);
    else if (dinitial && (back ? unit.to == all : unit.from == 0)) store_states(dinitial + both * E * N, adjoint[k], channel, E, N, place.quarter);
    if (!FULL) { if (place.quarter == 0 && EXISTS(channel)) sums[one * E + channel] = total[k]; continue; }
    store_states(rows + one * WIDTH(E, N), dA[k], channel, E, N, place.quarter);
  }
  if (!FULL) return;
  dD += __shfl_xor_sync(0xffffffffu, dD, HIGH), dbias += __shfl_xor_sync(0xffffffffu, dbias, HIGH);
  if (K == 1) dD += __shfl_xor_sync(0xffffffffu, dD, LOW), dbias += __shfl_xor_sync(0xffffffffu, dbias, LOW);
  if (!place.high && (K == 2 || !place.low) && EXISTS(edge + own)) {
    float* row = rows + one * WIDTH(E, N) + E * N + edge + own;  // dA, dD, dbias of this walk
    row[0] = dD, row[E] = dbias;
  }
}

#define BACKWARD(FULL) \
    backward_walk<FULL>(memory, in, d ? A1 : A0, d ? D1 : D0, d ? bias1 : bias0, marks, dfinal, leave, sums, \
                        (d ? du1 : du0) + clip * L * E + corner, (d ? ddelta1 : ddelta0) + clip * L * E + corner, \
                        parts + ((d * clips + clip) * L * blocks + block) * 2 * STATES, rows, dinitial, (int)clips, (int)L, (int)E, \
                        (int)N, (int)cuts, (int)flags, unit, d, (int)clip, block * CHANNELS, back)

// du, ddelta (clip, L, E) of either direction; dz; `parts` (direction, clip, L, block of channels, dB | dC)
// and `rows` (direction, clip, piece, dA | dD | dbias), to be summed; `dinitial` (direction, clip, E, N) the adjoint of what
// entered a chain. `dfinal` likewise is that of what left it, or 0. Passes leave in `leave` (direction, clip, piece, E, N) the
// adjoint of what enters every piece but a chain's first when nothing leaves it, and `sums` of delta (direction, clip, piece, E).
KERNEL(scan_backward, THREADS, BACKWARD_BLOCKS)(
    STREAMS, const io *dout, i64 dout_b, i64 dout_t, const io *ungated, const float *marks, const float *dfinal, float *leave,
    float *sums, io *du0, io *du1, io *ddelta0, io *ddelta1, io *dz, i64 dz_b, i64 dz_t, float *parts, float *rows,
    float *dinitial, int *counts, i64 passes, i64 even, SIZES) {
  SHARED(memory);
  const Turn turn(memory, counts, (int)whole, (int)passes, (int)even);
  Unit unit(turn.place, (int)whole, (int)cuts - turn.pass, (int)span, (int)L);
  const int d = unit.chain % DIRECTIONS, blocks = ((int)E + CHANNELS - 1) / CHANNELS, block = unit.chain / DIRECTIONS % blocks;
  const bool back = DIRECTIONS == 2 ? d : flags & REVERSE;
  const i64 clip = unit.chain / DIRECTIONS / blocks, corner = block * CHANNELS + threadIdx.x % (CHANNELS / 4) * 4;
  const Inputs in = {
    (d ? u1 : u0) + clip * u_b + corner, (d ? delta1 : delta0) + clip * d_b + corner, z ? z + clip * z_b + corner : 0,
    (d ? B1 : B0) + clip * B_b, (d ? C1 : C0) + clip * C_b, dout + clip * dout_b + corner,
    ungated ? ungated + clip * L * E + corner : 0,
    (int)u_t, (int)d_t, (int)z_t, (int)B_t, (int)C_t, (int)dout_t, (int)dz_t,
    dz ? dz + clip * dz_b + corner : 0};
  if (turn.pass) {
    if (!back) unit.next((int)L);
    BACKWARD(false);
    turn.passed(counts, unit, (int)whole);
    return;
  }
  if (unit.cut) turn.wait(counts, unit, (int)whole, (int)cuts);
  BACKWARD(true);
}

// What blocks have left, summed one after another, a number a thread: over blocks of channels `parts`, which make dB and dC, and
// over clips and their pieces `rows`, which make dA (of log(-A) with LOGARITHM), dD and dbias.
KERNEL(scan_sums, 256, 1)(
    const float *parts, io *dB0, io *dB1, i64 dB_b, i64 dB_t, io *dC0, io *dC1, i64 dC_b, i64 dC_t, const float *rows, i64 width,
    const float *A0, const float *A1, float *dA0, float *dA1, float *dD0, float *dD1, float *dbias0, float *dbias1, SIZES) {
  const int each = (int)((L * 2 * STATES + 255) / 256);  // blocks of a clip; a grid has room for many clips only along x
  const i64 d = blockIdx.y, blocks = (E + CHANNELS - 1) / CHANNELS;
  float sum = 0.f;
  if (blockIdx.x < each * clips) {
    const i64 clip = blockIdx.x / each, i = (i64)(blockIdx.x % each) * 256 + threadIdx.x, token = i / (2 * STATES);
    const int n = i % STATES, is_C = i / STATES % 2;
    if (token >= L || n >= N) return;
    const float* p = parts + ((d * clips + clip) * L + token) * blocks * 2 * STATES + i % (2 * STATES);
    #pragma unroll 8
    for (i64 k = 0; k < blocks; k++) sum += p[k * 2 * STATES];
    if (is_C) (d ? dC1 : dC0)[clip * dC_b + token * dC_t + n] = rounded(sum);
    else (d ? dB1 : dB0)[clip * dB_b + token * dB_t + n] = rounded(sum);
    return;
  }
  const i64 i = (blockIdx.x - each * clips) * 256 + threadIdx.x, beyond = i - E * N;
  if (beyond >= 2 * E) return;
  const i64 block = (beyond < 0 ? i / N : beyond % E) / CHANNELS;
  for (i64 clip = 0; clip < clips; clip++) {
    const i64 pieces = (clip * blocks + block) * DIRECTIONS + d < whole ? 1 : cuts;
    #pragma unroll 4
    for (i64 k = 0; k < pieces; k++) sum += rows[((d * clips + clip) * cuts + k) * width + i];
  }
  if (beyond < 0) (d ? dA1 : dA0)[i] = flags & LOGARITHM ? sum * -expf((d ? A1 : A0)[i]) : sum;
  else if (beyond < E) (d ? dD1 : dD0)[beyond] = sum;
  else (d ? dbias1 : dbias0)[beyond - E] = sum;
}
