// The forward: y (one direction), or (y of direction 0 + y of direction 1), times silu(z) = z sigmoid(z) if there is z; the
// final states; and what the backward needs.
//
// Work distribution: a block scans CHANNELS channels of one clip, or one split of them. With two directions, half of its
// warps scan from the first token and half from the last, and they meet in the middle. The direction that comes to a token
// first stores its y in the output. The direction that comes second adds its own y and multiplies the sum by silu(z). One
// direction alone adds y_other_direction.
//
// A sequence that is split is scanned twice: first by state passes, which compute the final states of its splits only
// (COMPUTE_OUTPUTS false), then split by split from the state before each. Where state passes may exit (moments.cu), a split
// checks its state pass (CHECK_EXIT). That is code of its own, since a branch in the loop costs every other scan 7 %.
//
// Shared memory, for each direction:
//     smem_delta  [TILE][CHANNELS]               float2 {delta, delta u}
//     smem_BC     [TILE][B | C][PADDED_STATES]   float
//     smem_y      [TILE][Y_ROW]                  float: D u, then D u + sum_n C h

#define THREAD_CHANNELS FWD_CHANNELS_PER_THREAD
#define CHANNELS (8 * THREAD_CHANNELS * FWD_WARPS)  // of a block
#define THREADS (32 * FWD_WARPS)                    // of a direction
#define Y_ROW (CHANNELS + 8)                        // four rows lie in different banks
#define SMEM_Y_OFFSET (TILE * (CHANNELS * 8 + 2 * PADDED_STATES * 4))
#define SMEM_DIRECTION_BYTES (SMEM_Y_OFFSET + TILE * Y_ROW * 4)
// A direction of a single warp shares data with other warps only where the directions meet.
#define SYNC_DIRECTION(meet) \
    do { if (FWD_WARPS > 1 || (DIRECTIONS == 2 && (meet))) __syncthreads(); else __syncwarp(); } while (0)

template <bool COMPUTE_OUTPUTS, bool CHECK_EXIT> DEVICE void scan_forward_item(
    char* smem, const io_t* u_base, i64 u_stride_b, int u_stride_t,
    const io_t* delta_base, i64 delta_stride_b, int delta_stride_t, const io_t* z_base, i64 z_stride_b, int z_stride_t,
    const io_t* B_base, i64 B_stride_b, int B_stride_t, const io_t* C_base, i64 C_stride_b, int C_stride_t,
    const float* A, const float* D, const float* delta_bias, const float* initial_state, float* split_initial_states,
    float* split_final_states, float* delta_sums, int* unvisited_tiles, float* exit_states, float* final_state,
    float* tile_states, io_t* y_out, io_t* y_pre_gate, const io_t* y_other_direction, const TileQueries* tile_queries,
    int num_queries, int clips, int L, int E, int N, int num_splits, int flags, WorkItem item, int direction, bool reverse,
    bool& exit_is_right) {
  char* smem_direction = smem + direction * SMEM_DIRECTION_BYTES;
  float2* smem_delta = (float2*)smem_direction;
  float* smem_BC = (float*)(smem_direction + TILE * CHANNELS * 8);
  float* smem_y = smem_BC + TILE * 2 * PADDED_STATES;
  const int thread = threadIdx.x % THREADS, warp = thread / 32;
  const LanePosition lane(thread % 32);
  const int channel_blocks = (E + CHANNELS - 1) / CHANNELS;
  const int clip = item.sequence / channel_blocks, first_channel = item.sequence % channel_blocks * CHANNELS;
  const TileIterator tiles(item, reverse);
  const i64 direction_clip = (i64)direction * clips + clip, direction_clip_split = direction_clip * num_splits + item.split;
  const int* unvisited = unvisited_tiles + direction_clip * num_splits * channel_blocks + item.sequence % channel_blocks;
  const float* state_before = !COMPUTE_OUTPUTS                      ? 0
                              : item.is_split && !split_final_states ? split_initial_states + direction_clip_split * E * N
                              : initial_state                        ? initial_state + direction_clip * E * N
                                                                     : 0;

  // What a thread stages (see STAGE_ROW_STRIDE). Pointers advance from each of its rows to the next, in the order of the scan.
  const int column = thread % (CHANNELS / 4) * 4, valid_channels = VALID_OF_FOUR(E, first_channel + column);
  const int row = thread / (CHANNELS / 4);
  const int row_step = reverse ? -STAGE_ROW_STRIDE : STAGE_ROW_STRIDE, first_token = tiles.token(0, row);
  const io_t* u_ptr = u_base + clip * u_stride_b + first_channel + column + (i64)first_token * u_stride_t;
  const io_t* delta_ptr = delta_base + clip * delta_stride_b + first_channel + column + (i64)first_token * delta_stride_t;
  const io_t* z_ptr = z_base + clip * z_stride_b + first_channel + column + (i64)first_token * z_stride_t;
  const int state = thread % (PADDED_STATES / 4) * 4, BC_row = thread / BC_ROW_VECTORS;
  const int valid_states = NO_PADDING ? 4 : N - state;
  const bool is_C = thread % BC_ROW_VECTORS >= PADDED_STATES / 4;
  const int BC_stride_t = is_C ? C_stride_t : B_stride_t, BC_step = (reverse ? -1 : 1) * BC_stride_t;
  const io_t* BC_ptr = (is_C ? C_base + clip * C_stride_b : B_base + clip * B_stride_b) + state +
                       (i64)tiles.token(0, BC_row) * BC_stride_t;
  i64 y_offset = ((i64)clip * L + first_token) * E + first_channel + column;  // in the contiguous (clip, L, E)
  // With QUERY_ROWS, z and y have no rows but those of queries, so that their addresses depend on the tile.
  const io_t* z_of_clip = z_base + clip * z_stride_b + first_channel + column;
  const i64 y_of_clip = (i64)clip * num_queries * E + first_channel + column;
  io_t* y_partial = STORE_TILE_STATES && HAS_Z ? y_pre_gate : y_out;

  float A_log2e[THREAD_CHANNELS][STATES_PER_THREAD], h[THREAD_CHANNELS][STATES_PER_THREAD], delta_sum[THREAD_CHANNELS];
  int slot[THREAD_CHANNELS];  // channels of this lane, counted in the block
  #pragma unroll
  for (int k = 0; k < THREAD_CHANNELS; k++) {
    slot[k] = warp * 8 * THREAD_CHANNELS + 8 * k + lane.channel, delta_sum[k] = 0.f;
    load_A_log2e(A_log2e[k], A, first_channel + slot[k], E, N, lane.quarter, flags);
    load_states(h[k], state_before, first_channel + slot[k], E, N, lane.quarter);
  }
  if (COMPUTE_OUTPUTS && item.is_split && split_final_states) {
    const int to = reverse && flags & STATES_ONLY ? item.split - 1 : item.split;
    combine_splits<THREAD_CHANNELS>(
        h, A_log2e, slot, split_final_states + direction_clip * num_splits * E * N,
        delta_sums + direction_clip * num_splits * E, reverse ? num_splits - 1 : 0, to, first_channel, E, N, lane.quarter,
        CHECK_EXIT ? unvisited : 0, channel_blocks);
    float* combined = to >= 0 && to < num_splits ? split_initial_states + (direction_clip * num_splits + to) * E * N
                                                 : final_state + direction_clip * E * N;
    #pragma unroll
    for (int k = 0; k < THREAD_CHANNELS; k++) store_states(combined, h[k], first_channel + slot[k], E, N, lane.quarter);
    if (flags & STATES_ONLY) return;
  }
  float bias[4], D_column[4];
  #pragma unroll
  for (int i = 0; i < 4; i++) {
    bias[i] = delta_bias && i < valid_channels ? delta_bias[first_channel + column + i] : 0.f;
    D_column[i] = COMPUTE_OUTPUTS && D && i < valid_channels ? D[first_channel + column + i] : 0.f;
  }

  IoVec4 next_u[THREAD_CHANNELS], next_delta[THREAD_CHANNELS], next_BC[BC_LOADS];
  auto load_next_tile = [&](int step, int tokens_left) {
    #pragma unroll
    for (int k = 0; k < THREAD_CHANNELS; k++) {
      const int count = tiles.row_exists(row + k * STAGE_ROW_STRIDE, tokens_left) ? valid_channels : 0;
      next_u[k] = load_vec4<VECTORIZED>(u_ptr, count), next_delta[k] = load_vec4<VECTORIZED>(delta_ptr, count);
      u_ptr += (i64)row_step * u_stride_t, delta_ptr += (i64)row_step * delta_stride_t;
    }
    #pragma unroll
    for (int m = 0; m < BC_LOADS; m++) {
      const int r = BC_row + m * BC_ROW_STRIDE;
      next_BC[m] = load_vec4<VECTORIZED_BC>(
          BC_ptr + (i64)(m * BC_ROW_STRIDE) * BC_step,
          (COMPUTE_OUTPUTS || !is_C) && r < TILE && tiles.row_exists(r, tokens_left) ? valid_states : 0);
    }
    BC_ptr += (i64)TILE * BC_step;
  };

  // In a state pass the two directions of a block scan different splits. One of them may be shorter; it then runs empty steps.
  const int steps = COMPUTE_OUTPUTS ? tiles.num_tiles() : item.tiles_per_split;
  auto tokens_left_at = [&](int step) {
    return COMPUTE_OUTPUTS || step < tiles.num_tiles() ? L - tiles.tile(step) * TILE : 0;
  };
  // The state before this step is stored: where the state pass of the split has stopped, or in a rescan before every split.
  int save_step = item.is_rescan ? 0 : -1;
  if (CHECK_EXIT && item.is_split && item.split != (reverse ? 0 : num_splits - 1)) {
    const int left_out = unvisited[item.split * channel_blocks];
    if (left_out) save_step = left_out;
  }
  TileQueries next_queries = TileQueries::of(tile_queries, tiles, 0);
  load_next_tile(0, tokens_left_at(0));
  for (int step = 0; step < steps; step++) {
    const int tokens_left = tokens_left_at(step);
    const int other_step = steps - 1 - step;  // at which the other direction comes to this tile
    const TileQueries queries = next_queries;
    next_queries = TileQueries::of(tile_queries, tiles, step + 1);
    auto is_output = [&](int r) { return !QUERY_ROWS || queries.has(tiles, r); };
    const bool completes_y = DIRECTIONS == 1 || other_step <= step;

    // Stage the tile.
    #pragma unroll
    for (int k = 0; k < THREAD_CHANNELS; k++) {
      const int r = row + k * STAGE_ROW_STRIDE;
      float u[4], delta[4];
      #pragma unroll
      for (int i = 0; i < 4; i++) {
        const float x = to_float(next_delta[k], i);
        u[i] = to_float(next_u[k], i);
        delta[i] = SOFTPLUS == SOFTPLUS_BY_CALLER ? x : tiles.row_exists(r, tokens_left) ? activate_delta(x + bias[i]) : 0.f;
      }
      float4* to = (float4*)(smem_delta + r * CHANNELS + column);
      to[0] = make_float4(delta[0], delta[0] * u[0], delta[1], delta[1] * u[1]);
      to[1] = make_float4(delta[2], delta[2] * u[2], delta[3], delta[3] * u[3]);
      if (COMPUTE_OUTPUTS)
        *(float4*)(smem_y + r * Y_ROW + column) =
            make_float4(D_column[0] * u[0], D_column[1] * u[1], D_column[2] * u[2], D_column[3] * u[3]);
    }
    #pragma unroll
    for (int m = 0; m < BC_LOADS; m++) {
      const IoVec4 BC = next_BC[m];
      if (TILE % BC_ROW_STRIDE == 0 || BC_row + m * BC_ROW_STRIDE < TILE)
        ((float4*)smem_BC)[BC_VECTOR_INDEX(m, BC_row, thread)] =
            make_float4(to_float(BC, 0), to_float(BC, 1), to_float(BC, 2), to_float(BC, 3));
    }
    SYNC_DIRECTION(COMPUTE_OUTPUTS && other_step == step - 1);

    // Load what the next tile and the output of this one need, while this one is scanned.
    if (step + 1 < steps) load_next_tile(step + 1, tokens_left_at(step + 1));
    IoVec4 z[THREAD_CHANNELS], y_other[THREAD_CHANNELS];  // y_other: y of the direction that came to the token before
    if (COMPUTE_OUTPUTS) {
      #pragma unroll
      for (int k = 0; k < THREAD_CHANNELS; k++) {
        const int r = row + k * STAGE_ROW_STRIDE;
        const int count = completes_y && tiles.row_exists(r, tokens_left) && is_output(r) ? valid_channels : 0;
        if (QUERY_ROWS) z_ptr = z_of_clip + (i64)queries.query(tiles, r) * z_stride_t;
        if (HAS_Z) z[k] = load_vec4<VECTORIZED>(z_ptr, count), z_ptr += (i64)row_step * z_stride_t;
        const io_t* from = DIRECTIONS == 2 ? y_partial : y_other_direction;
        const bool load = DIRECTIONS == 2 ? other_step < step : y_other_direction != 0;
        y_other[k] = load_vec4<VECTORIZED>(
            QUERY_ROWS ? from + y_of_clip + (i64)queries.query(tiles, r) * E : from + y_offset + (i64)(k * row_step) * E,
            load ? count : 0);
      }
    }
    if (CHECK_EXIT && step == save_step) {
      const int split = tiles.tile(step) / item.tiles_per_split;
      float* to = item.is_rescan ? split_initial_states : exit_states;
      #pragma unroll
      for (int k = 0; k < THREAD_CHANNELS; k++)
        store_states(to + (direction_clip * num_splits + split) * E * N, h[k], first_channel + slot[k], E, N, lane.quarter);
      if (item.is_rescan) save_step += min(item.tiles_per_split, steps - split * item.tiles_per_split);
    }
    if (COMPUTE_OUTPUTS && STORE_TILE_STATES) {
      float* tile_state = tile_states + (direction_clip * ((L + TILE - 1) / TILE) + tiles.tile(step)) * E * N;
      #pragma unroll
      for (int k = 0; k < THREAD_CHANNELS; k++) store_states(tile_state, h[k], first_channel + slot[k], E, N, lane.quarter);
    }

    // Scan the tile. The four lanes of a channel reduce their sums over states for four tokens at a time. Afterwards each of
    // them has the sums of one token. These stay in registers until the end of the tile: without writes to shared memory in
    // between, the compiler can move reads forward.
    float y_sums[TILE / 4][THREAD_CHANNELS];
    #pragma unroll
    for (int t0 = 0; t0 < TILE; t0 += 4) {
      float lane_sums[4 * THREAD_CHANNELS];
      #pragma unroll
      for (int t = 0; t < 4; t++) {
        float B[STATES_PER_THREAD], C[STATES_PER_THREAD];
        #pragma unroll
        for (int g = 0; g < STATE_VECTORS; g++) {
          const float4* from = (const float4*)smem_BC + (t0 + t) * BC_ROW_VECTORS + g * 4 + lane.quarter;
          unpack(B + 4 * g, from[0]);
          if (COMPUTE_OUTPUTS) unpack(C + 4 * g, from[PADDED_STATES / 4]);
        }
        #pragma unroll
        for (int k = 0; k < THREAD_CHANNELS; k++) {
          const auto [delta, delta_u] = smem_delta[(t0 + t) * CHANNELS + slot[k]];
          float sum = 0.f;
          if (!COMPUTE_OUTPUTS) delta_sum[k] += delta;
          #pragma unroll
          for (int i = 0; i < STATES_PER_THREAD; i++) {
            h[k][i] = fmaf(exp_delta_A(delta, A_log2e[k][i]), h[k][i], delta_u * B[i]);
            if (COMPUTE_OUTPUTS) sum = fmaf(h[k][i], C[i], sum);
          }
          lane_sums[t * THREAD_CHANNELS + k] = sum;
        }
      }
      if (COMPUTE_OUTPUTS) {
        reduce_scatter<4 * THREAD_CHANNELS>(lane_sums, LANE_QUARTER_BIT1, lane.quarter_bit1);
        reduce_scatter<2 * THREAD_CHANNELS>(lane_sums, LANE_QUARTER_BIT0, lane.quarter_bit0);
        #pragma unroll
        for (int k = 0; k < THREAD_CHANNELS; k++) y_sums[t0 / 4][k] = lane_sums[k];
      }
    }
    if (COMPUTE_OUTPUTS) {
      #pragma unroll
      for (int i = 0; i < TILE / 4 * THREAD_CHANNELS; i++) {
        const int t0 = i / THREAD_CHANNELS * 4, k = i % THREAD_CHANNELS;
        smem_y[(t0 + 2 * lane.quarter_bit1 + lane.quarter_bit0) * Y_ROW + slot[k]] += y_sums[i / THREAD_CHANNELS][k];
      }
    }
    SYNC_DIRECTION(COMPUTE_OUTPUTS && other_step == step);
    if (!COMPUTE_OUTPUTS) continue;

    // Store y. Where the directions meet in one tile, direction 0 reads the y of direction 1 from shared memory.
    #pragma unroll
    for (int k = 0; k < THREAD_CHANNELS; k++, y_offset += (i64)row_step * E) {
      const int r = row + k * STAGE_ROW_STRIDE;
      const bool skip = !is_output(r) || (DIRECTIONS == 2 && other_step == step && direction == 1);
      if (!tiles.row_exists(r, tokens_left) || skip) continue;
      const float* smem_y_other = (const float*)(smem + SMEM_DIRECTION_BYTES + SMEM_Y_OFFSET) + (TILE - 1 - r) * Y_ROW;
      if (QUERY_ROWS) y_offset = y_of_clip + (i64)queries.query(tiles, r) * E;
      float y[4];
      unpack(y, *(const float4*)(smem_y + r * Y_ROW + column));
      if (completes_y) {
        #pragma unroll
        for (int i = 0; i < 4; i++)
          y[i] += DIRECTIONS == 2 && other_step == step ? smem_y_other[column + i] : to_float(y_other[k], i);
      }
      if ((STORE_TILE_STATES && HAS_Z) || !completes_y) store_vec4(y_partial + y_offset, y, valid_channels);
      if (!completes_y) continue;
      #pragma unroll
      for (int i = 0; i < 4; i++) {
        if (HAS_Z) {
          const float x = to_float(z[k], i);
          y[i] *= x * sigmoid(x);
        }
      }
      store_vec4(y_out + y_offset, y, valid_channels);
    }
    if (DIRECTIONS == 2 && other_step == step) __syncthreads();  // direction 1 may overwrite its y from here on
  }

  if (CHECK_EXIT && item.is_split && save_step >= 0)
    exit_is_right = exit_was_right<THREAD_CHANNELS>(
        exit_states + direction_clip_split * E * N, split_final_states + direction_clip_split * E * N,
        delta_sums + direction_clip_split * E, A_log2e, slot, first_channel, E, N, lane.quarter);
  #pragma unroll
  for (int k = 0; k < THREAD_CHANNELS; k++) {
    const int channel = first_channel + slot[k];
    if (!COMPUTE_OUTPUTS) store_states(split_final_states + direction_clip_split * E * N, h[k], channel, E, N, lane.quarter);
    if (!COMPUTE_OUTPUTS && lane.quarter == 0 && CHANNEL_EXISTS(channel))
      delta_sums[direction_clip_split * E + channel] = delta_sum[k];
    if (COMPUTE_OUTPUTS && final_state && (reverse ? item.first_tile == 0 : item.end_tile * TILE >= L))
      store_states(final_state + direction_clip * E * N, h[k], channel, E, N, lane.quarter);
  }
}
