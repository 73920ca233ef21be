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

// The exit of a state pass. A state pass computes sum_t exp(A S_t) x_t, where S_t is the sum of delta between token t and the end
// of the split to which the state goes, and it begins at that end. It may stop at a tile from which on exp(A S) is so small that
// what lies behind cannot matter. What lies behind is not read, so this is a guess. The block that scans the split later has the
// true state where the state pass stopped, and checks the guess: exp(A S) times that state, which is all that was left out, must
// be below a rounding of the result. NaN and infinity fail. If a check fails, another block then scans the whole sequence again
// as if it were not split, the rescan.
#define EXIT_LOG2 -60.f       // a state pass stops where every exp(A S) is below 2^EXIT_LOG2, if no state is (almost) 0 there
#define EXIT_LOG2_ANY -255.f  // the same for any state: the largest float32 times this is flushed to 0
#define EXIT_LEAST_STATE 0x1p-80f
#define EXIT_ROUNDING 0x1p-25f

// Whether a state pass must go on for the sake of this lane's states of one channel.
DEVICE bool remembers(const float* h, const float* A_log2e, float delta_sum, int N, int quarter) {
  float slowest = -3.4e38f, least = 3.4e38f;
  #pragma unroll
  for (int i = 0; i < STATES_PER_THREAD; i++) {
    const bool exists = NO_PADDING || (i / 4) * 16 + quarter * 4 + i % 4 < N;
    if (exists) slowest = fmaxf(slowest, A_log2e[i]), least = fminf(least, fabsf(h[i]));
  }
  // Written so that NaN goes on.
  return !(slowest * delta_sum < (least > EXIT_LEAST_STATE ? EXIT_LOG2 : EXIT_LOG2_ANY));
}
// Whether what the state pass of a split has left out is below a rounding of its result. All are of that split: exit_states (E, N)
// the true states where the state pass stopped, results (E, N) and delta_sums (E,) what it has stored.
template <int CHANNELS_PER_THREAD> DEVICE bool exit_was_right(
    const float* exit_states, const float* results, const float* delta_sums, const float (*A_log2e)[STATES_PER_THREAD],
    const int* slot, int first_channel, int E, int N, int quarter) {
  bool right = true;
  #pragma unroll
  for (int k = 0; k < CHANNELS_PER_THREAD; k++) {
    const int channel = first_channel + slot[k];
    float h[STATES_PER_THREAD], result[STATES_PER_THREAD];
    load_states(h, exit_states, channel, E, N, quarter), load_states(result, results, channel, E, N, quarter);
    const float delta_sum = CHANNEL_EXISTS(channel) ? delta_sums[channel] : 0.f;
    #pragma unroll
    for (int i = 0; i < STATES_PER_THREAD; i++) {
      const float left_out = exp_delta_A(delta_sum, A_log2e[k][i]) * fabsf(h[i]);
      right &= left_out <= fmaxf(EXIT_ROUNDING * fabsf(result[i]), 0x1p-126f);
    }
  }
  return right;
}

// Advance `h` from the state before split `from` to the state before split `to`, in the order of the scan:
//     h <- exp(A delta_sum) h + split_final_state
// split_final_states (split, E, N) are the final states of splits that start from zero. delta_sums (split, E) are their sums of
// delta over the tiles that their state passes have read. Where unvisited_tiles (split, block of channels), those that they have
// not read, is not 0, the exponential is taken as 0. The backward advances the adjoint in the same way.
template <int CHANNELS_PER_THREAD> DEVICE void combine_splits(
    float (*h)[STATES_PER_THREAD], const float (*A_log2e)[STATES_PER_THREAD], const int* slot, const float* split_final_states,
    const float* delta_sums, const int* unvisited_tiles, int channel_blocks, int from, int to, int first_channel, int E, int N,
    int quarter) {
  #pragma unroll 1
  for (int split = from; split != to; split += from < to ? 1 : -1) {
    const bool exits = unvisited_tiles && unvisited_tiles[split * channel_blocks];
    #pragma unroll
    for (int k = 0; k < CHANNELS_PER_THREAD; k++) {
      const int channel = first_channel + slot[k];
      float delta_sum = CHANNEL_EXISTS(channel) ? delta_sums[(i64)split * E + channel] : 0.f;
      if (exits) delta_sum = 3.4e38f;  // exp(A delta_sum) is 0, but 1 for the padding, where A is 0
      float final_state[STATES_PER_THREAD];
      load_states(final_state, split_final_states + (i64)split * E * N, channel, E, N, quarter);
      #pragma unroll
      for (int i = 0; i < STATES_PER_THREAD; i++)
        h[k][i] = fmaf(exp_delta_A(delta_sum, A_log2e[k][i]), h[k][i], final_state[i]);
    }
  }
}

// Which work a block does. A launch has four kinds of work, one block each:
//   1. an unsplit sequence
//   2. a state pass: the final state of one split that starts from zero (num_state_passes of them, 0 if the states before all
//      splits are known)
//   3. a split, which waits for the state passes of its sequence
//   4. a rescan of a sequence that is split, if state passes may exit: it waits for all splits, and mostly has nothing to do
// Blocks claim work with tickets, in the order in which they start, since the hardware promises no order. Each scheduler of
// each multiprocessor first gets up to unsplit_per_scheduler unsplit sequences, so that these are spread evenly. Then come
// state passes, then splits, then the other unsplit sequences, then rescans. So a block waits only for blocks that run or have
// run.
//
// `counters` are zeros at the launch:
//   [0]                            state passes claimed
//   [1]                            splits claimed
//   [2]                            unsplit sequences claimed
//   [3]                            rescans claimed
//   [4 ... ]                       SCHEDULER_COUNTERS counts of the blocks that have started on a scheduler
//   [4 + SCHEDULER_COUNTERS ... ]  of each sequence that is split: state passes finished, splits finished, failed checks of exits
// Without counters the work of a block is given by its index in the grid.
struct WorkQueue {
  int index;  // as WorkItem takes it
  bool is_state_pass, is_rescan;
  DEVICE WorkQueue(
      char* smem, int* counters, int num_unsplit, int num_state_passes, int unsplit_per_scheduler, int num_splits, bool may_exit)
      : index(blockIdx.x), is_state_pass(false), is_rescan(false) {
    if (!counters) return;
    if (threadIdx.x == 0) {
      int* claim = (int*)smem;  // index, and which kind of work: 1 a state pass, 2 a rescan
      int* started = counters + 4 + (multiprocessor() * 4 + scheduler() / (blockDim.x / 32)) % SCHEDULER_COUNTERS, k;
      const int rescans = may_exit ? num_state_passes / (num_splits - 1) : 0;
      const int splits = gridDim.x - num_unsplit - num_state_passes - rescans;
      claim[1] = 0;
      if (take_ticket(started) < unsplit_per_scheduler && (k = take_ticket(counters + 2)) < num_unsplit) claim[0] = k;
      else if ((k = take_ticket(counters)) < num_state_passes) claim[0] = num_unsplit + k, claim[1] = 1;
      else if ((k = take_ticket(counters + 1)) < splits) claim[0] = num_unsplit + k;
      else if ((k = take_ticket(counters + 2)) < num_unsplit) claim[0] = k;
      else claim[0] = num_unsplit + take_ticket(counters + 3), claim[1] = 2;
    }
    __syncthreads();
    index = ((int*)smem)[0], is_state_pass = ((int*)smem)[1] == 1, is_rescan = ((int*)smem)[1] == 2;
    __syncthreads();
  }
  DEVICE static int* finished(int* counters, const WorkItem& item, int num_unsplit) {
    return counters + 4 + SCHEDULER_COUNTERS + 3 * (item.sequence - num_unsplit);
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
  // A split is finished, whose state pass has or has not exited rightly.
  DEVICE void finish_split(int* counters, const WorkItem& item, int num_unsplit, bool right) const {
    int* of_sequence = finished(counters, item, num_unsplit);
    if (!right) take_ticket(of_sequence + 2);
    __syncthreads();
    if (threadIdx.x == 0) announce(of_sequence + 1);
  }
  // Wait for all splits of the sequence, and return whether an exit of one was wrong.
  DEVICE bool wait_for_splits(char* smem, int* counters, const WorkItem& item, int num_unsplit, int num_splits) const {
    int* of_sequence = finished(counters, item, num_unsplit);
    if (threadIdx.x == 0) {
      wait_until(of_sequence + 1, num_splits);
      *(int*)smem = *(const volatile int*)(of_sequence + 2);
    }
    __syncthreads();
    const bool wrong = *(int*)smem;
    __syncthreads();
    return wrong;
  }
};
