// Work distribution of the scan: which tiles of which sequence a block scans, and how splits hand states on (split-L).

// The part of a sequence that a block scans: tiles first_tile to end_tile - 1. The first num_unsplit sequences are not split.
// Each of the others has num_splits splits of tiles_per_split tiles.
struct WorkItem {
  int sequence, split, tiles_per_split, first_tile, end_tile;
  bool is_split, is_rescan;
  // blocks_per_sequence: blocks of each sequence that is split. Split i gets block i, or block i - 1 if next_split() is called.
  DEVICE WorkItem(int index, int num_unsplit, int blocks_per_sequence, int tiles_per_split, int L)
      : tiles_per_split(tiles_per_split), is_rescan(false) {
    is_split = index >= num_unsplit;
    sequence = is_split ? num_unsplit + (index - num_unsplit) / blocks_per_sequence : index;
    split = is_split ? (index - num_unsplit) % blocks_per_sequence : 0;
    set_tiles(L);
  }
  DEVICE void next_split(int L) { split++, set_tiles(L); }
  // Take the whole sequence, as if it were not split.
  DEVICE void rescan(int L) { split = 0, is_split = false, is_rescan = true, set_tiles(L); }
  DEVICE void set_tiles(int L) {
    const int tiles = (L + TILE - 1) / TILE;
    first_tile = is_split ? split * tiles_per_split : 0, end_tile = is_split ? min(tiles, first_tile + tiles_per_split) : tiles;
  }
};

// The tiles of a work item in the order of the scan, and the tokens of a tile.
struct TileIterator {
  int first_tile, end_tile, row_xor;
  bool reverse;
  DEVICE TileIterator(const WorkItem& item, bool reverse)
      : first_tile(item.first_tile), end_tile(item.end_tile), row_xor(reverse ? TILE - 1 : 0), reverse(reverse) {}
  DEVICE int num_tiles() const { return end_tile - first_tile; }
  DEVICE int tile(int step) const { return reverse ? end_tile - 1 - step : first_tile + step; }
  DEVICE int token(int step, int row) const { return tile(step) * TILE + (row ^ row_xor); }
  // `tokens_left`: tokens from the start of the tile to the end of the clip. Rows that do not exist leave the states unchanged.
  DEVICE bool row_exists(int row, int tokens_left) const { return (row ^ row_xor) < tokens_left; }
};

// The query rows of a tile, if y is wanted at these only. Queries of a clip are counted in the order of its tokens.
struct alignas(8) TileQueries {
  int first;      // queries before the tile
  unsigned mask;  // bit i: token i of the tile is a query row
  DEVICE bool has(const TileIterator& tiles, int row) const { return mask >> (row ^ tiles.row_xor) & 1; }
  DEVICE int query(const TileIterator& tiles, int row) const {
    return first + __popc(mask & ((1u << (row ^ tiles.row_xor)) - 1));
  }
  // Those of the tile of a step; where the step does not exist, none.
  DEVICE static TileQueries of(const TileQueries* tile_queries, const TileIterator& tiles, int step) {
    const bool exists = QUERY_ROWS && step >= 0 && step < tiles.num_tiles();
    return exists ? tile_queries[tiles.tile(step)] : TileQueries{0, 0};
  }
};

// Advance `h` from the state before split `from` to the state before split `to`, in the order of the scan:
//     h <- exp(A delta_sum) h + split_final_state
// split_final_states (split, E, N) are the final states of splits that start from zero. delta_sums (split, E) are their sums of
// delta. The backward advances the adjoint in the same way. Where unvisited_tiles (split, block of channels) is not 0, the
// state pass of the split has exited, and the exponential is taken as 0.
template <int CHANNELS_PER_THREAD> DEVICE void combine_splits(
    float (*h)[STATES_PER_THREAD], const float (*A_log2e)[STATES_PER_THREAD], const int* slot, const float* split_final_states,
    const float* delta_sums, int from, int to, int first_channel, int E, int N, int quarter, const int* unvisited_tiles = 0,
    int channel_blocks = 0) {
  #pragma unroll 1
  for (int split = from; split != to; split += from < to ? 1 : -1) {
    #pragma unroll
    for (int k = 0; k < CHANNELS_PER_THREAD; k++) {
      const int channel = first_channel + slot[k];
      float delta_sum = CHANNEL_EXISTS(channel) ? delta_sums[(i64)split * E + channel] : 0.f;
      if (unvisited_tiles && unvisited_tiles[split * channel_blocks]) delta_sum = 3.4e38f;
      float final_state[STATES_PER_THREAD];
      load_states(final_state, split_final_states + (i64)split * E * N, channel, E, N, quarter);
      #pragma unroll
      for (int i = 0; i < STATES_PER_THREAD; i++)
        h[k][i] = fmaf(exp_delta_A(delta_sum, A_log2e[k][i]), h[k][i], final_state[i]);
    }
  }
}

// Whether the exit of a split's state pass was right: what it has left out is below a rounding of its result. All are of that
// split: exit_states (E, N) the true states where the state pass stopped, results (E, N) and delta_sums (E,) what it stored.
template <int CHANNELS_PER_THREAD> DEVICE bool exit_was_right(
    const float* exit_states, const float* results, const float* delta_sums, const float (*A_log2e)[STATES_PER_THREAD],
    const int* slot, int first_channel, int E, int N, int quarter) {
  bool right = true;
  #pragma unroll
  for (int k = 0; k < CHANNELS_PER_THREAD; k++) {
    const int channel = first_channel + slot[k];
    float h[STATES_PER_THREAD], result[STATES_PER_THREAD];
    load_states(h, exit_states, channel, E, N, quarter), load_states(result, results, channel, E, N, quarter);
    #pragma unroll
    for (int i = 0; i < STATES_PER_THREAD; i++) {
      const float left_out = exp_delta_A(delta_sums[channel], A_log2e[k][i]) * fabsf(h[i]);
      right &= left_out <= fmaxf(0x1p-25f * fabsf(result[i]), 0x1p-126f);
    }
  }
  return right;
}

// Which work a block does. A launch has up to four kinds of work, one block each:
//   1. an unsplit sequence
//   2. a state pass: the final state of one split that starts from zero (num_state_passes of them, 0 if the states before all
//      splits are known)
//   3. a split, which waits for the state passes of its sequence
//   4. where state passes may exit, a rescan of every sequence that is split: it waits for the splits, and if no exit was wrong
//      it has nothing to do
// Blocks claim work with tickets, in the order in which they start, since the hardware promises no order. Each scheduler of
// each multiprocessor first gets up to unsplit_per_scheduler unsplit sequences, so that these are spread evenly. Then come
// state passes, then splits, then the other unsplit sequences, then rescans. So a block waits only for blocks that run or have
// run.
//
// `counters` are zeros at the launch:
//   [0]                            state passes claimed
//   [1]                            splits claimed
//   [2]                            unsplit sequences claimed
//   [3 ... ]                       SCHEDULER_COUNTERS counts of the blocks that have started on a scheduler
//   [3 + SCHEDULER_COUNTERS ... ]  state passes finished, of each sequence that is split. Where state passes may exit there
//                                  follow, of each such sequence, splits finished, then wrong exits; then rescans claimed
// Without counters the work of a block is given by its index in the grid.
struct WorkQueue {
  int index;  // as WorkItem takes it
  bool is_state_pass, is_rescan;
  int num_rescans;  // as many as sequences that are split, or 0
  DEVICE WorkQueue(
      char* smem, int* counters, int num_unsplit, int num_state_passes, int unsplit_per_scheduler, int num_rescans = 0)
      : index(blockIdx.x), is_state_pass(false), is_rescan(false), num_rescans(num_rescans) {
    if (!counters) return;
    if (threadIdx.x == 0) {
      int* claim = (int*)smem;  // index, and which kind of work: 1 a state pass, 2 a rescan
      int* started = counters + 3 + (multiprocessor() * 4 + scheduler() / (blockDim.x / 32)) % SCHEDULER_COUNTERS, k;
      const int splits = gridDim.x - num_unsplit - num_state_passes - num_rescans;
      claim[1] = 0;
      if (take_ticket(started) < unsplit_per_scheduler && (k = take_ticket(counters + 2)) < num_unsplit) claim[0] = k;
      else if ((k = take_ticket(counters)) < num_state_passes) claim[0] = num_unsplit + k, claim[1] = 1;
      else if ((k = take_ticket(counters + 1)) < splits) claim[0] = num_unsplit + k;
      else if ((k = take_ticket(counters + 2)) < num_unsplit || !num_rescans) claim[0] = k;
      else claim[0] = num_unsplit + take_ticket(counters + 3 + SCHEDULER_COUNTERS + 3 * num_rescans), claim[1] = 2;
    }
    __syncthreads();
    index = ((int*)smem)[0], is_state_pass = ((int*)smem)[1] == 1, is_rescan = ((int*)smem)[1] == 2;
    __syncthreads();
  }
  DEVICE static int* finished(int* counters, const WorkItem& item, int num_unsplit) {
    return counters + 3 + SCHEDULER_COUNTERS + item.sequence - num_unsplit;
  }
  DEVICE void finish_state_pass(int* counters, const WorkItem& item, int num_unsplit) const {
    __syncthreads();
    if (threadIdx.x == 0) announce(finished(counters, item, num_unsplit));
  }
  // A sequence has one state pass fewer than the blocks that scan its splits.
  DEVICE void wait_for_state_passes(int* counters, const WorkItem& item, int num_unsplit, int blocks_per_sequence) const {
    if (threadIdx.x == 0) wait_until(finished(counters, item, num_unsplit), blocks_per_sequence - 1);
    __syncthreads();
  }
  // A split is scanned, and its state pass has or has not exited rightly.
  DEVICE void finish_split(int* counters, const WorkItem& item, int num_unsplit, bool right) const {
    int* splits_finished = finished(counters, item, num_unsplit) + num_rescans;
    if (!right) take_ticket(splits_finished + num_rescans);
    __syncthreads();
    if (threadIdx.x == 0) announce(splits_finished);
  }
  // Wait for all splits of the sequence, and return whether an exit of one was wrong.
  DEVICE bool wait_for_splits(char* smem, int* counters, const WorkItem& item, int num_unsplit, int num_splits) const {
    int* splits_finished = finished(counters, item, num_unsplit) + num_rescans;
    if (threadIdx.x == 0) {
      wait_until(splits_finished, num_splits);
      *(int*)smem = *(const volatile int*)(splits_finished + num_rescans);
    }
    __syncthreads();
    const bool wrong = *(int*)smem;
    __syncthreads();
    return wrong;
  }
};
