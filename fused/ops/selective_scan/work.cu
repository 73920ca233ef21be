// Work distribution of the scan: which tiles of which sequence a block scans, and how splits hand states on (split-L).

// The part of a sequence that a block scans: tiles first_tile to end_tile - 1. The first num_unsplit sequences are not split.
// Each of the others has num_splits splits of tiles_per_split tiles.
struct WorkItem {
  int sequence, split, tiles_per_split, first_tile, end_tile;
  bool is_split;
  // blocks_per_sequence: blocks of each sequence that is split. Split i gets block i, or block i - 1 if next_split() is called.
  DEVICE WorkItem(int index, int num_unsplit, int blocks_per_sequence, int tiles_per_split, int L)
      : tiles_per_split(tiles_per_split) {
    is_split = index >= num_unsplit;
    sequence = is_split ? num_unsplit + (index - num_unsplit) / blocks_per_sequence : index;
    split = is_split ? (index - num_unsplit) % blocks_per_sequence : 0;
    set_tiles(L);
  }
  DEVICE void next_split(int L) { split++, set_tiles(L); }
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
// delta. The backward advances the adjoint in the same way.
template <int CHANNELS_PER_THREAD> DEVICE void combine_splits(
    float (*h)[STATES_PER_THREAD], const float (*A_log2e)[STATES_PER_THREAD], const int* slot, const float* split_final_states,
    const float* delta_sums, int from, int to, int first_channel, int E, int N, int quarter) {
  #pragma unroll 1
  for (int split = from; split != to; split += from < to ? 1 : -1) {
    #pragma unroll
    for (int k = 0; k < CHANNELS_PER_THREAD; k++) {
      const int channel = first_channel + slot[k];
      const float delta_sum = CHANNEL_EXISTS(channel) ? delta_sums[(i64)split * E + channel] : 0.f;
      float final_state[STATES_PER_THREAD];
      load_states(final_state, split_final_states + (i64)split * E * N, channel, E, N, quarter);
      #pragma unroll
      for (int i = 0; i < STATES_PER_THREAD; i++)
        h[k][i] = fmaf(exp_delta_A(delta_sum, A_log2e[k][i]), h[k][i], final_state[i]);
    }
  }
}

// Which work a block does. A launch has three kinds of work, one block each:
//   1. an unsplit sequence
//   2. a state pass: the final state of one split that starts from zero (num_state_passes of them, 0 if the states before all
//      splits are known)
//   3. a split, which waits for the state passes of its sequence
// Blocks claim work with tickets, in the order in which they start, since the hardware promises no order. Each scheduler of
// each multiprocessor first gets up to unsplit_per_scheduler unsplit sequences, so that these are spread evenly. Then come
// state passes, then splits, then the other unsplit sequences. So a block waits only for blocks that run or have run.
//
// `counters` are zeros at the launch:
//   [0]                            state passes claimed
//   [1]                            splits claimed
//   [2]                            unsplit sequences claimed
//   [3 ... ]                       SCHEDULER_COUNTERS counts of the blocks that have started on a scheduler
//   [3 + SCHEDULER_COUNTERS ... ]  state passes finished, of each sequence that is split
// Without counters the work of a block is given by its index in the grid.
struct WorkQueue {
  int index;  // as WorkItem takes it
  bool is_state_pass;
  DEVICE WorkQueue(char* smem, int* counters, int num_unsplit, int num_state_passes, int unsplit_per_scheduler)
      : index(blockIdx.x), is_state_pass(false) {
    if (!counters) return;
    if (threadIdx.x == 0) {
      int* claim = (int*)smem;  // index, is_state_pass
      int* started = counters + 3 + (multiprocessor() * 4 + scheduler() / (blockDim.x / 32)) % SCHEDULER_COUNTERS, k;
      const int splits = gridDim.x - num_unsplit - num_state_passes;
      claim[1] = 0;
      if (take_ticket(started) < unsplit_per_scheduler && (k = take_ticket(counters + 2)) < num_unsplit) claim[0] = k;
      else if ((k = take_ticket(counters)) < num_state_passes) claim[0] = num_unsplit + k, claim[1] = 1;
      else if ((k = take_ticket(counters + 1)) < splits) claim[0] = num_unsplit + k;
      else claim[0] = take_ticket(counters + 2);
    }
    __syncthreads();
    index = ((int*)smem)[0], is_state_pass = ((int*)smem)[1];
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
};
