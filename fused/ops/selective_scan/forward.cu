// Forward: y, final states, and what the backward wants. A block walks CHANNELS channels of one clip, or one piece of it; with
// two directions half of its warps come from either end. They meet in the middle: who comes to a token first leaves its y in
// the output, who comes second adds its own, and only then is the sum gated. One direction alone adds what is `beside` it.
// Chains that are cut are walked twice: once for the states that leave their pieces (not FULL), then piece by piece from what
// enters them.

#define CHANNELS (8 * FORWARD_CHANNELS * FORWARD_WARPS)
#define THREADS (32 * FORWARD_WARPS)
#define K FORWARD_CHANNELS
#define ROW (CHANNELS + 8)                                            // of y, so that four rows lie in different banks
#define ROWS (TILE / K)                                               // a thread stages every ROWS-th token's u and delta,
#define MIXED (THREADS / (STATES / 2))                                // and B or C of every MIXED-th,
#define MIXES ((TILE + MIXED - 1) / MIXED)                            // MIXES in all
// a warp that is a direction's only one shares nothing with others, but where the directions meet
#define SETTLE(meet) do { if (FORWARD_WARPS > 1 || (DIRECTIONS == 2 && (meet))) __syncthreads(); else __syncwarp(); } while (0)
#define SHARED_FORWARD (TILE * (CHANNELS * 8 + 2 * STATES * 4 + ROW * 4))  // bytes of one direction

template <bool FULL> DEVICE void forward_walk(
    char* memory, const io* u_, i64 u_b, int u_t, const io* delta_, i64 d_b, int d_t, const io* z, i64 z_b, int z_t,
    const io* B_, i64 B_b, int B_t, const io* C_, i64 C_b, int C_t, const float* A, const float* D, const float* bias,
    const float* initial, float* enter, float* local, float* sums, float* last, float* marks, io* out, io* ungated,
    const io* beside, int clips, int L, int E, int N, int cuts, int flags, Unit unit, int direction, bool back) {
  char* mine = memory + direction * SHARED_FORWARD;
  float2* step = (float2*)mine;                                        // [TILE][CHANNELS] delta, delta u
  float* mix = (float*)(mine + TILE * CHANNELS * 8);                   // [TILE][B | C][STATES]
  float* y = mix + TILE * 2 * STATES;                                  // [TILE][ROW]
  const int tid = threadIdx.x % THREADS, warp = tid / 32;
  const Place place(tid % 32);
  const int blocks = (E + CHANNELS - 1) / CHANNELS, clip = unit.chain / blocks, edge = unit.chain % blocks * CHANNELS;
  const Walk walk(unit, back);
  const i64 both = (i64)direction * clips + clip, one = both * cuts + unit.split;
  const float* start = !FULL ? 0 : unit.cut && !local ? enter + one * E * N : initial ? initial + both * E * N : 0;
  // A thread stages four channels of every ROWS-th token, and four states of every MIXED-th: pointers hop from one to the next.
  const int column = tid % (CHANNELS / 4) * 4, count = LEFT(E, edge + column), row = tid / (CHANNELS / 4);
  const int hop = back ? -ROWS : ROWS, token = walk.token(0, row);
  const io* u = u_ + clip * u_b + edge + column + (i64)token * u_t;
  const io* delta = delta_ + clip * d_b + edge + column + (i64)token * d_t;
  const io* gates = z + clip * z_b + edge + column + (i64)token * z_t;
  const int state = tid % (STATES / 4) * 4, mixed = tid / (STATES / 2), mixes = EXACT ? 4 : N - state;
  const bool is_C = tid % (STATES / 2) >= STATES / 4;
  const int mix_t = is_C ? C_t : B_t, mix_hop = (back ? -1 : 1) * mix_t;
  const io* blend = (is_C ? C_ + clip * C_b : B_ + clip * B_b) + state + (i64)walk.token(0, mixed) * mix_t;
  i64 at = ((i64)clip * L + token) * E + edge + column;
  io* parks = KEEPS && GATED ? ungated : out;

  float rate[K][MINE], h[K][MINE], total[K];
  int slot[K];
  #pragma unroll
  for (int k = 0; k < K; k++) {
    slot[k] = warp * 8 * K + 8 * k + place.channel, total[k] = 0.f;
    load_rates(rate[k], A, edge + slot[k], E, N, place.quarter, flags);
    load_states(h[k], start, edge + slot[k], E, N, place.quarter);
  }
  if (FULL && unit.cut && local) {
    const int to = back && flags & STATES_ONLY ? unit.split - 1 : unit.split;
    combine<K>(h, rate, slot, local + both * cuts * E * N, sums + both * cuts * E, back ? cuts - 1 : 0, to, edge, E, N, place.quarter);
    float* kept = to >= 0 && to < cuts ? enter + (both * cuts + to) * E * N : last + both * E * N;
    #pragma unroll
    for (int k = 0; k < K; k++) store_states(kept, h[k], edge + slot[k], E, N, place.quarter);
    if (flags & STATES_ONLY) return;
  }
  float shift[4], skip[4];
  #pragma unroll
  for (int i = 0; i < 4; i++) {
    shift[i] = bias && i < count ? bias[edge + column + i] : 0.f;
    skip[i] = FULL && D && i < count ? D[edge + column + i] : 0.f;
  }

  Quad next_u[K], next_delta[K], next_mix[MIXES];
  auto fetch = [&](int left) {
    #pragma unroll
    for (int k = 0; k < K; k++) {
      const int n = walk.has(row + k * ROWS, left) ? count : 0;
      next_u[k] = load<VECTOR>(u, n), next_delta[k] = load<VECTOR>(delta, n);
      u += (i64)hop * u_t, delta += (i64)hop * d_t;
    }
    #pragma unroll
    for (int m = 0; m < MIXES; m++) {
      const int r = mixed + m * MIXED;
      next_mix[m] = load<VECTOR_BC>(blend + (i64)(m * MIXED) * mix_hop, (FULL || !is_C) && r < TILE && walk.has(r, left) ? mixes : 0);
    }
    blend += (i64)TILE * mix_hop;
  };

  // Where only states are wanted, the two directions of a block walk different pieces, of which one may be shorter.
  const int tiles = FULL ? walk.tiles() : unit.span;
  auto tokens = [&](int tile) { return FULL || tile < walk.tiles() ? L - walk.tile(tile) * TILE : 0; };
  fetch(tokens(0));
  for (int tile = 0; tile < tiles; tile++) {
    const int left = tokens(tile), other = tiles - 1 - tile;  // when the other direction comes here
    const bool done = DIRECTIONS == 1 || other <= tile;
    #pragma unroll
    for (int k = 0; k < K; k++) {
      const int r = row + k * ROWS;
      float x[4], d[4];
      #pragma unroll
      for (int i = 0; i < 4; i++) {
        const float raw = value(next_delta[k], i);
        x[i] = value(next_u[k], i), d[i] = SOFTPLUS == 2 ? raw : walk.has(r, left) ? step_of(raw + shift[i]) : 0.f;
      }
      float4* to = (float4*)(step + r * CHANNELS + column);
      to[0] = make_float4(d[0], d[0] * x[0], d[1], d[1] * x[1]), to[1] = make_float4(d[2], d[2] * x[2], d[3], d[3] * x[3]);
      if (FULL) *(float4*)(y + r * ROW + column) = make_float4(skip[0] * x[0], skip[1] * x[1], skip[2] * x[2], skip[3] * x[3]);
    }
    #pragma unroll
    for (int m = 0; m < MIXES; m++) {
      const Quad q = next_mix[m];
      if (TILE % MIXED == 0 || mixed + m * MIXED < TILE)
        ((float4*)mix)[MIX_PLACE(m)] = make_float4(value(q, 0), value(q, 1), value(q, 2), value(q, 3));
    }
    SETTLE(FULL && other == tile - 1);
    if (tile + 1 < tiles) fetch(tokens(tile + 1));
    // a token that the other direction has reached before, or reaches now, is finished here
    Quad gate[K], parked[K];
    if (FULL) {
      #pragma unroll
      for (int k = 0; k < K; k++) {
        const int n = done && walk.has(row + k * ROWS, left) ? count : 0;
        if (GATED) gate[k] = load<VECTOR>(gates, n), gates += (i64)hop * z_t;
        const io* from = DIRECTIONS == 2 ? parks : beside;
        parked[k] = load<VECTOR>(from + at + (i64)(k * hop) * E, (DIRECTIONS == 2 ? other < tile : beside != 0) ? n : 0);
      }
    }
    if (FULL && KEEPS) {
      float* mark = marks + (both * ((L + TILE - 1) / TILE) + walk.tile(tile)) * E * N;
      #pragma unroll
      for (int k = 0; k < K; k++) store_states(mark, h[k], edge + slot[k], E, N, place.quarter);
    }

    float held[TILE / 4][K];  // nothing is written to shared memory in between, so that reads can be moved ahead
    #pragma unroll
    for (int t0 = 0; t0 < TILE; t0 += 4) {
      float part[4 * K];
      #pragma unroll
      for (int t = 0; t < 4; t++) {
        float b[MINE], c[MINE];
        #pragma unroll
        for (int g = 0; g < GROUPS; g++) {
          const float4* at = (const float4*)mix + (t0 + t) * (STATES / 2) + g * 4 + place.quarter;
          take(b + 4 * g, at[0]);
          if (FULL) take(c + 4 * g, at[STATES / 4]);
        }
        #pragma unroll
        for (int k = 0; k < K; k++) {
          const float2 d = step[(t0 + t) * CHANNELS + slot[k]];
          float sum = 0.f;
          if (!FULL) total[k] += d.x;
          #pragma unroll
          for (int i = 0; i < MINE; i++) {
            h[k][i] = fmaf(decay_of(d.x, rate[k][i]), h[k][i], d.y * b[i]);
            if (FULL) sum = fmaf(h[k][i], c[i], sum);
          }
          part[t * K + k] = sum;
        }
      }
      if (FULL) {
        halve<4 * K>(part, HIGH, place.high);
        halve<2 * K>(part, LOW, place.low);
        #pragma unroll
        for (int k = 0; k < K; k++) held[t0 / 4][k] = part[k];
      }
    }
    if (FULL) {
      #pragma unroll
      for (int i = 0; i < TILE / 4 * K; i++) y[(i / K * 4 + 2 * place.high + place.low) * ROW + slot[i % K]] += held[i / K][i % K];
    }
    SETTLE(FULL && other == tile);
    if (!FULL) continue;

    #pragma unroll
    for (int k = 0; k < K; k++, at += (i64)hop * E) {
      const int r = row + k * ROWS;
      if (!walk.has(r, left) || (DIRECTIONS == 2 && other == tile && direction == 1)) continue;
      const float* met = (const float*)(memory + SHARED_FORWARD + TILE * (CHANNELS * 8 + 2 * STATES * 4)) + (TILE - 1 - r) * ROW;
      float v[4];
      take(v, *(const float4*)(y + r * ROW + column));
      if (done) {
        #pragma unroll
        for (int i = 0; i < 4; i++) v[i] += DIRECTIONS == 2 && other == tile ? met[column + i] : value(parked[k], i);
      }
      if ((KEEPS && GATED) || !done) store(parks + at, v, count);
      if (!done) continue;
      #pragma unroll
      for (int i = 0; i < 4; i++) if (GATED) { const float g = value(gate[k], i); v[i] *= g * sigmoid(g); }
      store(out + at, v, count);
    }
    if (DIRECTIONS == 2 && other == tile) __syncthreads();  // the other's y has been read: only now may it be overwritten
  }

  #pragma unroll
  for (int k = 0; k < K; k++) {
    const int channel = edge + slot[k];
    if (!FULL) store_states(local + one * E * N, h[k], channel, E, N, place.quarter);
    if (!FULL && place.quarter == 0 && EXISTS(channel)) sums[one * E + channel] = total[k];
    if (FULL && last && (back ? unit.from == 0 : unit.to * TILE >= L))
      store_states(last + both * E * N, h[k], channel, E, N, place.quarter);
  }
}

#undef K
#define STREAMS \
    const io *u0, const io *u1, i64 u_b, i64 u_t, const io *delta0, const io *delta1, i64 d_b, i64 d_t, \
    const io *z, i64 z_b, i64 z_t, const io *B0, const io *B1, i64 B_b, i64 B_t, const io *C0, const io *C1, i64 C_b, i64 C_t, \
    const float *A0, const float *A1, const float *D0, const float *D1, const float *bias0, const float *bias1
#define STREAMS_OF(d) \
    d ? u1 : u0, u_b, (int)u_t, d ? delta1 : delta0, d_b, (int)d_t, z, z_b, (int)z_t, \
    d ? B1 : B0, B_b, (int)B_t, d ? C1 : C0, C_b, (int)C_t, \
    d ? A1 : A0, d ? D1 : D0, d ? bias1 : bias0
#define FORWARD(FULL) \
    forward_walk<FULL>(memory, STREAMS_OF(d), initial, enter, local, sums, last, marks, out, ungated, beside, (int)clips, (int)L, (int)E, \
                       (int)N, (int)cuts, (int)flags, unit, d, back)

// y, and as asked: `last` (direction, clip, E, N) the final states; `marks` (direction, clip, tile, E, N) the state before every
// tile; `ungated` the sum of both directions before the gate. `beside` is the other direction's y, where this one runs alone.
// `initial` (direction, clip, E, N) enters a chain, or 0; `enter` (direction, clip, piece, E, N) the pieces of one that is cut.
// With passes `enter` is made, from `local` (as `enter`), what leaves every piece but a chain's last when nothing enters it, and
// `sums` (direction, clip, piece, E), that of its delta. With STATES_ONLY no piece is walked but in passes, of which a chain's last
// piece has one too, and what would enter a piece behind it is `last`.
KERNEL(scan_forward, DIRECTIONS * THREADS, FORWARD_BLOCKS)(
    STREAMS, const float *initial, float *enter, float *local, float *sums, float *last, float *marks, io *out, io *ungated,
    const io *beside, int *counts, i64 passes, i64 even, SIZES) {
  SHARED(memory);
  const int d = DIRECTIONS == 2 && threadIdx.x >= THREADS;
  const bool back = DIRECTIONS == 2 ? d : flags & REVERSE;
  const Turn turn(memory, counts, (int)whole, (int)passes, (int)even);
  const int pieces = (int)cuts + (flags & STATES_ONLY ? 1 : 0);  // of a chain, with one pass fewer
  Unit unit(turn.place, (int)whole, pieces - turn.pass, (int)span, (int)L);
  if (turn.pass) {
    if (back && pieces == cuts) unit.next((int)L);
    FORWARD(false);
    turn.passed(counts, unit, (int)whole);
    return;
  }
  if (passes && unit.cut) turn.wait(counts, unit, (int)whole, pieces);
  FORWARD(true);
}
#undef THREADS
#undef CHANNELS
#undef ROWS
#undef MIXES
#undef MIXED
