// The backward: gradients of every input. With g_t the gradient of h_t, a_t = exp(delta_t A), and dy_t the gradient of y_t
// before the gate,
//
//     g_t = C_t dy_t + a_{t+1} g_{t+1}        w_t = g_t a_t h_{t-1}
//     dB_t = delta_t u_t g_t                  dC_t = dy_t h_t                (summed over channels)
//     du_t = delta_t sum_n g_t B_t + D dy_t   ddelta_t = u_t sum_n g_t B_t + sum_n w_t A        dA = sum_t delta_t w_t
//
// The variable `adjoint` is a_{t+1} g_{t+1}, the gradient that comes from later tokens.
//
// Work distribution: a block scans CHANNELS channels of one clip and direction, or one split of them, from the last tile to the
// first. It recomputes the states of a tile from tile_states, the state before every tile:
//     1. It scans the tile and stores the state before every subtile in shared memory.
//     2. For every subtile from the last to the first it scans the subtile again and keeps a_t and a_t h_{t-1} in registers.
//        Then it goes back through the tokens of the subtile.
// A sequence that is split is scanned twice, as in the forward: first by state passes, which compute the adjoint only
// (COMPUTE_GRADIENTS false), then split by split.
//
// Shared memory:
//     smem_delta           [TILE][CHANNELS]                                   float2 {delta, delta u}
//     smem_dy, smem_u      [TILE][CHANNELS]                                   float each
//     smem_BC              [TILE][B | C][PADDED_STATES]                       float
//     smem_subtile_states  [NUM_SUBTILES - 1][THREAD_CHANNELS][STATE_VECTORS][THREADS]
//                                                                         float4: the state before a subtile
//     smem_du_ddelta       [du | ddelta][TILE][CHANNELS]                      float
//     smem_dBC             [TILE][warp][dB | dC][PADDED_STATES]               float: sums over the channels of a warp
//     prefetch             [PREFETCH_VECTORS][THREADS]                        IoVec4: the next tile's streams
//     tile_state_prefetch  [THREAD_CHANNELS * STATE_VECTORS][THREADS]         float4: the state before the next tile

#define THREAD_CHANNELS BWD_CHANNELS_PER_THREAD
#define CHANNELS (8 * THREAD_CHANNELS * BWD_WARPS)  // of a block
#define THREADS (32 * BWD_WARPS)
#define NUM_SUBTILES (TILE / SUBTILE)
#define TOKENS_PER_REDUCTION (4 / THREAD_CHANNELS)  // tokens whose sums over a channel's lanes are made at a time
#define PREFETCH_VECTORS (5 * THREAD_CHANNELS + BC_LOADS)  // of a thread: u, delta, dy, z, y_pre_gate of its rows, then B and C
#define SMEM_STAGED_BYTES (TILE * (CHANNELS * 16 + 2 * PADDED_STATES * 4))
#define SMEM_SUBTILE_STATES_BYTES ((NUM_SUBTILES - 1) * THREAD_CHANNELS * STATE_VECTORS * THREADS * 16)
#define SMEM_DU_DDELTA_BYTES (2 * TILE * CHANNELS * 4)
#define SMEM_DBC_BYTES (TILE * BWD_WARPS * 2 * PADDED_STATES * 4)
// Elements of a row of param_grads_partial: dA (E, N), dD (E,) and ddelta_bias (E,), and padding so that rows are aligned to
// 16 bytes.
#define PARAM_GRADS_ROW(E, N) (((E) * ((N) + 2) + 3) / 4 * 4)

// The streams of one direction, at token 0 and at the thread's first channel. Only direction 0 writes dz.
struct BackwardStreams {
  const io_t *u, *delta, *z, *B, *C, *dy, *y_pre_gate;
  int u_stride_t, delta_stride_t, z_stride_t, B_stride_t, C_stride_t, dy_stride_t, dz_stride_t;
  io_t* dz;
};

template <bool COMPUTE_GRADIENTS> DEVICE void scan_backward_item(
    char* smem, BackwardStreams in, const float* A, const float* D, const float* delta_bias, const float* tile_states,
    const float* dfinal_state, float* split_adjoints, float* delta_sums, io_t* du, io_t* ddelta, float* dBC_partial,
    float* param_grads_partial, float* dinitial_state, const TileQueries* tile_queries, int num_queries, int clips, int L, int E,
    int N, int num_splits, int flags, WorkItem item, int direction, int clip, int first_channel, bool reverse) {
  float2* smem_delta = (float2*)smem;
  float* smem_dy = (float*)(smem_delta + TILE * CHANNELS);
  float* smem_u = smem_dy + TILE * CHANNELS;
  float* smem_BC = (float*)(smem + TILE * CHANNELS * 16);
  float4* smem_subtile_states = (float4*)(smem + SMEM_STAGED_BYTES);
  float* smem_du_ddelta = (float*)(smem + SMEM_STAGED_BYTES + SMEM_SUBTILE_STATES_BYTES);
  float* smem_dBC = smem_du_ddelta + 2 * TILE * CHANNELS;
  const int thread = threadIdx.x, warp = thread / 32;
  const LanePosition lane(thread % 32);
  const int channel_blocks = (E + CHANNELS - 1) / CHANNELS, tiles_of_clip = (L + TILE - 1) / TILE;
  const i64 direction_clip = (i64)direction * clips + clip, direction_clip_split = direction_clip * num_splits + item.split;
  const TileIterator tiles(item, reverse);

  // What a thread stages (see STAGE_ROW_STRIDE), the last row first. Pointers advance from the last token to the first.
  const int column = thread % (CHANNELS / 4) * 4, valid_channels = VALID_OF_FOUR(E, first_channel + column);
  const int row = thread / (CHANNELS / 4);
  const int steps = tiles.num_tiles(), row_step = reverse ? STAGE_ROW_STRIDE : -STAGE_ROW_STRIDE;
  const int last_token = tiles.token(steps - 1, (THREAD_CHANNELS - 1) * STAGE_ROW_STRIDE + row);
  const io_t *u_ptr = in.u + (i64)last_token * in.u_stride_t, *delta_ptr = in.delta + (i64)last_token * in.delta_stride_t;
  const io_t *z_ptr = in.z + (i64)last_token * in.z_stride_t, *dy_ptr = in.dy + (i64)last_token * in.dy_stride_t;
  io_t* dz_ptr = in.dz + (i64)last_token * in.dz_stride_t;
  const int state = thread % (PADDED_STATES / 4) * 4, BC_row = thread / BC_ROW_VECTORS;
  const int valid_states = NO_PADDING ? 4 : N - state;
  const bool is_C = thread % BC_ROW_VECTORS >= PADDED_STATES / 4;
  const int BC_stride_t = is_C ? in.C_stride_t : in.B_stride_t, BC_step = (reverse ? -1 : 1) * BC_stride_t;
  const io_t* BC_ptr = (is_C ? in.C : in.B) + state + (i64)tiles.token(steps - 1, BC_row) * BC_stride_t;
  i64 read_offset = (i64)last_token * E, write_offset = read_offset;  // in the contiguous (L, E)

  // With QUERY_ROWS, z, y and their gradients have no rows but those of queries, so that their addresses depend on the tile.

  float A_log2e[THREAD_CHANNELS][STATES_PER_THREAD], adjoint[THREAD_CHANNELS][STATES_PER_THREAD];
  float dA[THREAD_CHANNELS][STATES_PER_THREAD], delta_sum[THREAD_CHANNELS], dD = 0.f, ddelta_bias = 0.f;
  int slot[THREAD_CHANNELS];  // channels of this lane, counted in the block
  #pragma unroll
  for (int k = 0; k < THREAD_CHANNELS; k++) {
    slot[k] = warp * 8 * THREAD_CHANNELS + 8 * k + lane.channel, delta_sum[k] = 0.f;
    load_A_log2e(A_log2e[k], A, first_channel + slot[k], E, N, lane.quarter, flags);
    load_states(
        adjoint[k], COMPUTE_GRADIENTS && dfinal_state ? dfinal_state + direction_clip * E * N : 0, first_channel + slot[k],
        E, N, lane.quarter);
    #pragma unroll
    for (int i = 0; i < STATES_PER_THREAD; i++) dA[k][i] = 0.f;
  }
  if (COMPUTE_GRADIENTS && item.is_split)
    combine_splits<THREAD_CHANNELS>(
        adjoint, A_log2e, slot, split_adjoints + direction_clip * num_splits * E * N,
        delta_sums + direction_clip * num_splits * E, reverse ? 0 : num_splits - 1, item.split, first_channel, E, N,
        lane.quarter);
  // After a reduction over the lanes of a channel a lane has the sums of one token and one channel: own_token and own_slot.
  const int own_token = THREAD_CHANNELS == 1 ? 2 * lane.quarter_bit1 + lane.quarter_bit0 : lane.quarter_bit1;
  const int own_slot = slot[THREAD_CHANNELS == 1 ? 0 : lane.quarter_bit0];
  const float own_D = D && CHANNEL_EXISTS(first_channel + own_slot) ? D[first_channel + own_slot] : 0.f;
  const bool writes_dz = COMPUTE_GRADIENTS && HAS_Z && direction == 0;

  // Start the asynchronous loads of a tile. A thread loads only what itself will read.
  IoVec4* prefetch =
      (IoVec4*)(smem + SMEM_STAGED_BYTES + SMEM_SUBTILE_STATES_BYTES + SMEM_DU_DDELTA_BYTES + SMEM_DBC_BYTES) + thread;
  float4* tile_state_prefetch = (float4*)(prefetch - thread + PREFETCH_VECTORS * THREADS) + thread;
  auto prefetch_tile = [&](int step) {
    const TileQueries queries = TileQueries::of(tile_queries, tiles, step);
    const int tokens_left = L - tiles.tile(step) * TILE;
    IoVec4* to = prefetch;
    #pragma unroll
    for (int k = THREAD_CHANNELS - 1; k >= 0; k--, to += 5 * THREADS) {
      const int count = tiles.row_exists(row + k * STAGE_ROW_STRIDE, tokens_left) ? valid_channels : 0;
      if (COMPUTE_GRADIENTS) load_vec4_async<VECTORIZED>(to, u_ptr, count);
      int y_count = count;
      if (QUERY_ROWS) {
        const i64 query = queries.query(tiles, row + k * STAGE_ROW_STRIDE);
        if (!queries.has(tiles, row + k * STAGE_ROW_STRIDE)) y_count = 0;
        dy_ptr = in.dy + query * in.dy_stride_t, z_ptr = in.z + query * in.z_stride_t, read_offset = query * E;
      }
      load_vec4_async<VECTORIZED>(to + THREADS, delta_ptr, count), load_vec4_async<VECTORIZED>(to + 2 * THREADS, dy_ptr, y_count);
      if (HAS_Z) load_vec4_async<VECTORIZED>(to + 3 * THREADS, z_ptr, y_count);
      if (writes_dz) load_vec4_async<VECTORIZED>(to + 4 * THREADS, in.y_pre_gate + read_offset, y_count);
      u_ptr += (i64)row_step * in.u_stride_t, delta_ptr += (i64)row_step * in.delta_stride_t;
      dy_ptr += (i64)row_step * in.dy_stride_t, z_ptr += (i64)row_step * in.z_stride_t;
      read_offset += (i64)row_step * E;
    }
    #pragma unroll
    for (int m = 0; m < BC_LOADS; m++) {
      const int r = BC_row + m * BC_ROW_STRIDE;
      load_vec4_async<VECTORIZED_BC>(
          to + m * THREADS, BC_ptr + (i64)(m * BC_ROW_STRIDE) * BC_step,
          (COMPUTE_GRADIENTS || is_C) && r < TILE && tiles.row_exists(r, tokens_left) &&
                  (!QUERY_ROWS || !is_C || queries.has(tiles, r))
              ? valid_states
              : 0);
    }
    BC_ptr -= (i64)TILE * BC_step;
    if (COMPUTE_GRADIENTS && (NO_PADDING || N % 4 == 0)) {
      const float* tile_state = tile_states + (direction_clip * tiles_of_clip + tiles.tile(step)) * E * N;
      #pragma unroll
      for (int i = 0; i < THREAD_CHANNELS * STATE_VECTORS; i++) {
        const int channel = first_channel + slot[i / STATE_VECTORS], n = i % STATE_VECTORS * 16 + lane.quarter * 4;
        const bool exists = NO_PADDING || (channel < E && n < N);
        copy_async<16>(tile_state_prefetch + i * THREADS, tile_state + (exists ? (i64)channel * N + n : 0), exists);
      }
    }
    copy_commit();
  };
  prefetch_tile(steps - 1);
  for (int step = steps - 1; step >= 0; step--) {
    const int tokens_left = L - tiles.tile(step) * TILE;
    const TileQueries queries = TileQueries::of(tile_queries, tiles, step);

    // Stage the tile.
    copy_wait<0>();
    const IoVec4* from = prefetch;
    float bias[4];  // loaded again for every tile, which saves four registers
    #pragma unroll
    for (int i = 0; i < 4; i++)
      bias[i] = delta_bias && i < valid_channels ? __ldg(delta_bias + first_channel + column + i) : 0.f;
    #pragma unroll
    for (int k = THREAD_CHANNELS - 1; k >= 0; k--) {
      const int r = row + k * STAGE_ROW_STRIDE, count = tiles.row_exists(r, tokens_left) ? valid_channels : 0;
      const IoVec4 u_vec = from[0], delta_vec = from[THREADS], dy_vec = from[2 * THREADS], z_vec = from[3 * THREADS];
      const IoVec4 y_pre_gate_vec = from[4 * THREADS];
      float delta[4], u[4], dy[4], dz[4];
      from += 5 * THREADS;
      #pragma unroll
      for (int i = 0; i < 4; i++) {
        const float x = to_float(delta_vec, i), dout = to_float(dy_vec, i), z = to_float(z_vec, i);
        const float sigmoid_z = sigmoid(z), y = to_float(y_pre_gate_vec, i);
        delta[i] = SOFTPLUS == SOFTPLUS_BY_CALLER ? x : tiles.row_exists(r, tokens_left) ? activate_delta(x + bias[i]) : 0.f;
        u[i] = to_float(u_vec, i), dy[i] = HAS_Z ? dout * z * sigmoid_z : dout;
        dz[i] = dout * y * sigmoid_z * (1.f + z * (1.f - sigmoid_z));
      }
      float4* to = (float4*)(smem_delta + r * CHANNELS + column);
      to[0] = make_float4(delta[0], delta[0] * u[0], delta[1], delta[1] * u[1]);
      to[1] = make_float4(delta[2], delta[2] * u[2], delta[3], delta[3] * u[3]);
      *(float4*)(smem_dy + r * CHANNELS + column) = pack(dy);
      if (COMPUTE_GRADIENTS) *(float4*)(smem_u + r * CHANNELS + column) = pack(u);
      if (QUERY_ROWS) dz_ptr = in.dz + (i64)queries.query(tiles, r) * in.dz_stride_t;
      if (writes_dz) store_vec4(dz_ptr, dz, !QUERY_ROWS || queries.has(tiles, r) ? count : 0);
      dz_ptr += (i64)row_step * in.dz_stride_t;
    }
    #pragma unroll
    for (int m = 0; m < BC_LOADS; m++) {
      const IoVec4 BC = from[m * THREADS];
      if (TILE % BC_ROW_STRIDE == 0 || BC_row + m * BC_ROW_STRIDE < TILE)
        ((float4*)smem_BC)[BC_VECTOR_INDEX(m, BC_row, thread)] =
            make_float4(to_float(BC, 0), to_float(BC, 1), to_float(BC, 2), to_float(BC, 3));
    }
    float h[THREAD_CHANNELS][STATES_PER_THREAD];
    if (COMPUTE_GRADIENTS) {
      #pragma unroll
      for (int k = 0; k < THREAD_CHANNELS; k++) {
        if (!NO_PADDING && N % 4) {
          load_states(
              h[k], tile_states + (direction_clip * tiles_of_clip + tiles.tile(step)) * E * N, first_channel + slot[k], E, N,
              lane.quarter);
        } else {
          for (int g = 0; g < STATE_VECTORS; g++)
            unpack(h[k] + 4 * g, tile_state_prefetch[(k * STATE_VECTORS + g) * THREADS]);
        }
      }
    }
    __syncthreads();
    if (step > 0) prefetch_tile(step - 1);

    auto read_B_or_C = [&](float* v, int t, bool is_C) {
      #pragma unroll
      for (int g = 0; g < STATE_VECTORS; g++)
        unpack(v + 4 * g, ((const float4*)smem_BC)[t * BC_ROW_VECTORS + is_C * (PADDED_STATES / 4) + g * 4 + lane.quarter]);
    };

    // A state pass: only the adjoint.
    if (!COMPUTE_GRADIENTS) {
      #pragma unroll 4
      for (int t = TILE - 1; t >= 0; t--) {
        float C[STATES_PER_THREAD];
        read_B_or_C(C, t, true);
        #pragma unroll
        for (int k = 0; k < THREAD_CHANNELS; k++) {
          const float delta = smem_delta[t * CHANNELS + slot[k]].x;
          const float dy = smem_dy[t * CHANNELS + slot[k]];
          delta_sum[k] += delta;
          #pragma unroll
          for (int i = 0; i < STATES_PER_THREAD; i++)
            adjoint[k][i] = exp_delta_A(delta, A_log2e[k][i]) * fmaf(C[i], dy, adjoint[k][i]);
        }
      }
      __syncthreads();
      continue;
    }

    // 1. Scan all subtiles but the last one and store the state before each.
    #pragma unroll 1
    for (int subtile = 0; subtile < NUM_SUBTILES - 1; subtile++) {
      #pragma unroll
      for (int k = 0; k < THREAD_CHANNELS; k++)
        #pragma unroll
        for (int g = 0; g < STATE_VECTORS; g++)
          smem_subtile_states[((subtile * THREAD_CHANNELS + k) * STATE_VECTORS + g) * THREADS + thread] = pack(h[k] + 4 * g);
      #pragma unroll
      for (int t = subtile * SUBTILE; t < (subtile + 1) * SUBTILE; t++) {
        float B[STATES_PER_THREAD];
        read_B_or_C(B, t, false);
        #pragma unroll
        for (int k = 0; k < THREAD_CHANNELS; k++) {
          const auto [delta, delta_u] = smem_delta[t * CHANNELS + slot[k]];
          #pragma unroll
          for (int i = 0; i < STATES_PER_THREAD; i++)
            h[k][i] = fmaf(exp_delta_A(delta, A_log2e[k][i]), h[k][i], delta_u * B[i]);
        }
      }
    }

    // 2. Gradients, from the last subtile to the first.
    #pragma unroll 1
    for (int subtile = NUM_SUBTILES - 1; subtile >= 0; subtile--) {
      const int t0 = subtile * SUBTILE;
      if (subtile < NUM_SUBTILES - 1) {
        #pragma unroll
        for (int k = 0; k < THREAD_CHANNELS; k++)
          #pragma unroll
          for (int g = 0; g < STATE_VECTORS; g++)
            unpack(h[k] + 4 * g, smem_subtile_states[((subtile * THREAD_CHANNELS + k) * STATE_VECTORS + g) * THREADS + thread]);
      }
      float a[SUBTILE][THREAD_CHANNELS][STATES_PER_THREAD];    // a_t
      float a_h[SUBTILE][THREAD_CHANNELS][STATES_PER_THREAD];  // a_t h_{t-1}
      // Sum dB or dC of the tokens t and t + 1 over the channels of the warp: eight values over eight lanes.
      auto store_dB_or_dC = [&](float* v, int t, int is_C) {
        #pragma unroll
        for (int g = 0; g < STATE_VECTORS; g++) {
          float sums[8];
          #pragma unroll
          for (int i = 0; i < 4; i++) sums[i] = v[4 * g + i], sums[4 + i] = v[STATES_PER_THREAD + 4 * g + i];
          reduce_scatter<8>(sums, 1, lane.channel & 4);
          reduce_scatter<4>(sums, 16, lane.channel & 2);
          reduce_scatter<2>(sums, 8, lane.channel & 1);
          const int token = t + ((lane.channel & 4) != 0), n = g * 16 + lane.quarter * 4 + (lane.channel & 3);
          smem_dBC[((token * BWD_WARPS + warp) * 2 + is_C) * PADDED_STATES + n] = sums[0];
        }
      };
      float two_tokens[2 * STATES_PER_THREAD];  // dB or dC of two tokens
      #pragma unroll
      for (int t = 0; t < SUBTILE; t++) {
        float B[STATES_PER_THREAD], *dC = two_tokens + t % 2 * STATES_PER_THREAD;
        read_B_or_C(B, t0 + t, false);
        #pragma unroll
        for (int k = 0; k < THREAD_CHANNELS; k++) {
          const auto [delta, delta_u] = smem_delta[(t0 + t) * CHANNELS + slot[k]];
          const float dy = smem_dy[(t0 + t) * CHANNELS + slot[k]];
          #pragma unroll
          for (int i = 0; i < STATES_PER_THREAD; i++) {
            a[t][k][i] = exp_delta_A(delta, A_log2e[k][i]), a_h[t][k][i] = a[t][k][i] * h[k][i];
            h[k][i] = fmaf(delta_u, B[i], a_h[t][k][i]);
            dC[i] = k ? fmaf(dy, h[k][i], dC[i]) : dy * h[k][i];
          }
        }
        if (t % 2) store_dB_or_dC(two_tokens, t0 + t - 1, 1);
      }
      float sums_gB[4], sums_wA[4];  // of a lane's states, for TOKENS_PER_REDUCTION tokens and THREAD_CHANNELS channels
      #pragma unroll
      for (int t = SUBTILE - 1; t >= 0; t--) {
        float B[STATES_PER_THREAD], C[STATES_PER_THREAD], *dB = two_tokens + t % 2 * STATES_PER_THREAD;
        read_B_or_C(B, t0 + t, false), read_B_or_C(C, t0 + t, true);
        #pragma unroll
        for (int k = 0; k < THREAD_CHANNELS; k++) {
          const auto [delta, delta_u] = smem_delta[(t0 + t) * CHANNELS + slot[k]];
          const float dy = smem_dy[(t0 + t) * CHANNELS + slot[k]];
          float sum_gB = 0.f, sum_wA = 0.f;
          #pragma unroll
          for (int i = 0; i < STATES_PER_THREAD; i++) {
            const float g = fmaf(C[i], dy, adjoint[k][i]), w = g * a_h[t][k][i];
            sum_gB = fmaf(g, B[i], sum_gB), sum_wA = fmaf(w, A_log2e[k][i], sum_wA);
            dA[k][i] = fmaf(w, delta, dA[k][i]), adjoint[k][i] = g * a[t][k][i];
            dB[i] = k ? fmaf(delta_u, g, dB[i]) : delta_u * g;
          }
          sums_gB[t % TOKENS_PER_REDUCTION * THREAD_CHANNELS + k] = sum_gB;
          sums_wA[t % TOKENS_PER_REDUCTION * THREAD_CHANNELS + k] = sum_wA;
        }
        if (t % 2 == 0) store_dB_or_dC(two_tokens, t0 + t, 0);
        if (t % TOKENS_PER_REDUCTION) continue;
        reduce_scatter<4>(sums_gB, LANE_QUARTER_BIT1, lane.quarter_bit1);
        reduce_scatter<2>(sums_gB, LANE_QUARTER_BIT0, lane.quarter_bit0);
        reduce_scatter<4>(sums_wA, LANE_QUARTER_BIT1, lane.quarter_bit1);
        reduce_scatter<2>(sums_wA, LANE_QUARTER_BIT0, lane.quarter_bit0);
        const int r = t0 + t + own_token, own = r * CHANNELS + own_slot;
        const float delta = smem_delta[own].x, dy = smem_dy[own], u = smem_u[own];
        const float ddelta_own =
            fmaf(u, sums_gB[0], sums_wA[0] * LN2) * (SOFTPLUS != SOFTPLUS_NONE ? softplus_derivative(delta) : 1.f);
        dD = fmaf(dy, u, dD);
        ddelta_bias += SOFTPLUS != SOFTPLUS_NONE || tiles.row_exists(r, tokens_left) ? ddelta_own : 0.f;
        smem_du_ddelta[own] = fmaf(delta, sums_gB[0], own_D * dy);
        smem_du_ddelta[TILE * CHANNELS + own] = ddelta_own;
      }
    }
    __syncthreads();

    // Store the gradients of the tile.
    #pragma unroll
    for (int k = THREAD_CHANNELS - 1; k >= 0; k--) {
      const int r = row + k * STAGE_ROW_STRIDE, count = tiles.row_exists(r, tokens_left) ? valid_channels : 0;
      store_vec4(du + write_offset, smem_du_ddelta + r * CHANNELS + column, count);
      store_vec4(ddelta + write_offset, smem_du_ddelta + (TILE + r) * CHANNELS + column, count);
      write_offset += (i64)row_step * E;
    }
    for (int i = thread; i < TILE * BC_ROW_VECTORS; i += THREADS) {
      const int r = i / BC_ROW_VECTORS;
      if (!tiles.row_exists(r, tokens_left)) continue;
      float4 sum = {};
      #pragma unroll
      for (int w = 0; w < BWD_WARPS; w++) {
        const float4 x = ((const float4*)smem_dBC)[(r * BWD_WARPS + w) * BC_ROW_VECTORS + i % BC_ROW_VECTORS];
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
      }
      ((float4*)dBC_partial)[(i64)tiles.token(step, r) * channel_blocks * BC_ROW_VECTORS + i % BC_ROW_VECTORS] = sum;
    }
  }

  #pragma unroll
  for (int k = 0; k < THREAD_CHANNELS; k++) {
    const int channel = first_channel + slot[k];
    if (!COMPUTE_GRADIENTS)
      store_states(split_adjoints + direction_clip_split * E * N, adjoint[k], channel, E, N, lane.quarter);
    else if (dinitial_state && (reverse ? item.end_tile == tiles_of_clip : item.first_tile == 0))
      store_states(dinitial_state + direction_clip * E * N, adjoint[k], channel, E, N, lane.quarter);
    if (!COMPUTE_GRADIENTS) {
      if (lane.quarter == 0 && CHANNEL_EXISTS(channel)) delta_sums[direction_clip_split * E + channel] = delta_sum[k];
      continue;
    }
    store_states(param_grads_partial + direction_clip_split * PARAM_GRADS_ROW(E, N), dA[k], channel, E, N, lane.quarter);
  }
  if (!COMPUTE_GRADIENTS) return;
  dD += __shfl_xor_sync(0xffffffffu, dD, LANE_QUARTER_BIT1);
  ddelta_bias += __shfl_xor_sync(0xffffffffu, ddelta_bias, LANE_QUARTER_BIT1);
  if (THREAD_CHANNELS == 1) {
    dD += __shfl_xor_sync(0xffffffffu, dD, LANE_QUARTER_BIT0);
    ddelta_bias += __shfl_xor_sync(0xffffffffu, ddelta_bias, LANE_QUARTER_BIT0);
  }
  if (!lane.quarter_bit1 && (THREAD_CHANNELS == 2 || !lane.quarter_bit0) && CHANNEL_EXISTS(first_channel + own_slot)) {
    float* row = param_grads_partial + direction_clip_split * PARAM_GRADS_ROW(E, N) + E * N + first_channel + own_slot;
    row[0] = dD, row[E] = ddelta_bias;
  }
}

#define SCAN_BACKWARD_ITEM(COMPUTE_GRADIENTS) \
    scan_backward_item<COMPUTE_GRADIENTS>( \
        smem, in, d ? A1 : A0, d ? D1 : D0, d ? delta_bias1 : delta_bias0, tile_states, dfinal_state, split_adjoints, \
        delta_sums, (d ? du1 : du0) + clip * L * E + column, (d ? ddelta1 : ddelta0) + clip * L * E + column, \
        dBC_partial + ((d * clips + clip) * L * channel_blocks + channel_block) * 2 * PADDED_STATES, param_grads_partial, \
        dinitial_state, QUERY_ARGUMENTS (int)clips, (int)L, (int)E, (int)N, (int)num_splits, (int)flags, item, d, (int)clip, \
        channel_block * CHANNELS, reverse)

// Inputs beside the streams
//   dy                    (clip, L, E) the gradient of the forward's output
//   y_pre_gate            (clip, L, E), if HAS_Z
//   tile_states           (direction, clip, tile, E, N)
//   dfinal_state          (direction, clip, E, N) the gradient of final_state, or null for zeros
//   tile_queries          (tile) and num_queries, if QUERY_ROWS; z, dy, y_pre_gate and dz are then (clip, num_queries, E)
// Outputs
//   du, ddelta            (clip, L, E) of direction 0 and 1
//   dz                    (clip, L, E), if HAS_Z
//   dinitial_state        (direction, clip, E, N) the gradient of initial_state, or null
//   dBC_partial           (direction, clip, L, block of channels, dB | dC, PADDED_STATES), for scan_backward_reduce to sum
//   param_grads_partial   (direction, clip, split, PARAM_GRADS_ROW), for scan_backward_reduce to sum
// Split-L, null if no sequence is split
//   split_adjoints        (direction, clip, split, E, N) the adjoint that every split but the first one of a sequence hands to
//                         the split before it, if it gets zero from the split after it
//   delta_sums            (direction, clip, split, E) the sum of delta over the same splits
KERNEL(scan_backward, THREADS, BWD_MIN_BLOCKS_PER_SM)(
    STREAM_PARAMS, const io_t *dy, i64 dy_stride_b, i64 dy_stride_t, const io_t *y_pre_gate, const float *tile_states,
    const float *dfinal_state, float *split_adjoints, float *delta_sums, io_t *du0, io_t *du1, io_t *ddelta0, io_t *ddelta1,
    io_t *dz, i64 dz_stride_b, i64 dz_stride_t, float *dBC_partial, float *param_grads_partial, float *dinitial_state,
    int *work_counters, i64 num_state_passes, i64 unsplit_per_scheduler, QUERY_PARAMS SIZE_PARAMS) {
  SHARED(smem);
  const WorkQueue work(smem, work_counters, (int)num_unsplit, (int)num_state_passes, (int)unsplit_per_scheduler);
  WorkItem item(work.index, (int)num_unsplit, (int)num_splits - work.is_state_pass, (int)tiles_per_split, (int)L);
  const int d = item.sequence % DIRECTIONS, channel_blocks = ((int)E + CHANNELS - 1) / CHANNELS;
  const int channel_block = item.sequence / DIRECTIONS % channel_blocks;
  const bool reverse = DIRECTIONS == 2 ? d : flags & REVERSE;
  const i64 clip = item.sequence / DIRECTIONS / channel_blocks;
  const i64 column = channel_block * CHANNELS + threadIdx.x % (CHANNELS / 4) * 4;  // the first of four that the thread stages
  const BackwardStreams in = {
    (d ? u1 : u0) + clip * u_stride_b + column, (d ? delta1 : delta0) + clip * delta_stride_b + column,
    z ? z + clip * z_stride_b + column : 0, (d ? B1 : B0) + clip * B_stride_b, (d ? C1 : C0) + clip * C_stride_b,
    dy + clip * dy_stride_b + column, y_pre_gate ? y_pre_gate + clip * Y_ROWS * E + column : 0,
    (int)u_stride_t, (int)delta_stride_t, (int)z_stride_t, (int)B_stride_t, (int)C_stride_t, (int)dy_stride_t, (int)dz_stride_t,
    dz ? dz + clip * dz_stride_b + column : 0};
  if (work.is_state_pass) {
    if (!reverse) item.next_split((int)L);
    SCAN_BACKWARD_ITEM(false);
    work.finish_state_pass(work_counters, item, (int)num_unsplit);
    return;
  }
  if (item.is_split) work.wait_for_state_passes(work_counters, item, (int)num_unsplit, (int)num_splits);
  SCAN_BACKWARD_ITEM(true);
}
