// The kernel of the forward. forward.cu says what it computes.

#define SCAN_FORWARD_ITEM(COMPUTE_OUTPUTS, CHECK_EXIT) \
    scan_forward_item<COMPUTE_OUTPUTS, CHECK_EXIT>( \
        smem, d ? u1 : u0, u_stride_b, (int)u_stride_t, d ? delta1 : delta0, delta_stride_b, (int)delta_stride_t, \
        z, z_stride_b, (int)z_stride_t, d ? B1 : B0, B_stride_b, (int)B_stride_t, d ? C1 : C0, C_stride_b, (int)C_stride_t, \
        d ? A1 : A0, d ? D1 : D0, d ? delta_bias1 : delta_bias0, initial_state, split_initial_states, split_final_states, \
        delta_sums, unvisited_tiles, exit_states, final_state, tile_states, y_out, y_pre_gate, y_other_direction, \
        QUERY_ARGUMENTS (int)clips, (int)L, (int)E, (int)N, (int)num_splits, (int)flags, item, d, reverse, exit_is_right)

// Inputs beside the streams
//   initial_state         (direction, clip, E, N) the state before a sequence, or null for zeros
//   y_other_direction     (clip, L, E) or null, only if DIRECTIONS is 1
//   tile_queries          (tile) and num_queries, if QUERY_ROWS; z, y_other_direction, y_out and y_pre_gate are then
//                         (clip, num_queries, E)
// Outputs
//   y_out                 (clip, L, E)
//   final_state           (direction, clip, E, N), or null
//   tile_states           (direction, clip, tile, E, N) the state before every tile, if STORE_TILE_STATES
//   y_pre_gate            (clip, L, E) the sum of both directions before the gate, if STORE_TILE_STATES and HAS_Z
// Split-L
//   split_initial_states  (direction, clip, split, E, N) the state before every split; an input if num_state_passes is 0
//   split_final_states    (direction, clip, split, E, N) the final state of every split but the last one, if the state before
//                         the split is zero; null if num_state_passes is 0
//   delta_sums            (direction, clip, split, E) the sum of delta over the same splits, or what state passes have read of
//                         them, or null
//   unvisited_tiles       (direction, clip, split, block of channels) the tiles that a state pass has not read; null if state
//                         passes read every tile, as without BY_MOMENTS
//   exit_states           (direction, clip, split, E, N) the true states where the state passes have stopped, or null
// With STATES_ONLY every split has a state pass, the last one too, and num_splits + 1 blocks of every sequence combine them:
// one for the state before each split and one for final_state.
KERNEL(scan_forward, DIRECTIONS * THREADS, FWD_MIN_BLOCKS_PER_SM)(
    STREAM_PARAMS, const float *initial_state, float *split_initial_states, float *split_final_states, float *delta_sums,
    int *unvisited_tiles, float *exit_states, float *final_state, float *tile_states, io_t *y_out, io_t *y_pre_gate,
    const io_t *y_other_direction, int *work_counters, i64 num_state_passes, i64 unsplit_per_scheduler,
    QUERY_PARAMS SIZE_PARAMS) {
  SHARED(smem);
  const int d = DIRECTIONS == 2 && threadIdx.x >= THREADS;
  const bool reverse = DIRECTIONS == 2 ? d : flags & REVERSE;
  const int num_rescans = HAS_MOMENTS && unvisited_tiles ? (int)(num_state_passes / (num_splits - 1)) : 0;
  const WorkQueue work(smem, work_counters, (int)num_unsplit, (int)num_state_passes, (int)unsplit_per_scheduler, num_rescans);
  const int blocks_per_sequence = (int)num_splits + (flags & STATES_ONLY ? 1 : 0);  // state passes: one fewer
  const int blocks_of_kind = HAS_MOMENTS && work.is_rescan ? 1 : blocks_per_sequence - work.is_state_pass;
  WorkItem item(work.index, (int)num_unsplit, blocks_of_kind, (int)tiles_per_split, (int)L);
  bool exit_is_right = true;
  if (work.is_state_pass) {
    if (reverse && blocks_per_sequence == num_splits) item.next_split((int)L);
#if HAS_MOMENTS
    if (flags & BY_MOMENTS)
      state_pass_by_moments(
          smem, d ? u1 : u0, u_stride_b, (int)u_stride_t, d ? delta1 : delta0, delta_stride_b, (int)delta_stride_t,
          d ? B1 : B0, B_stride_b, (int)B_stride_t, d ? A1 : A0, split_final_states, delta_sums, unvisited_tiles, (int)clips,
          (int)L, (int)E, (int)num_splits, (int)flags, item, d, reverse);
    else
#endif
      SCAN_FORWARD_ITEM(false, false);
    work.finish_state_pass(work_counters, item, (int)num_unsplit);
    return;
  }
#if HAS_MOMENTS
  if (unvisited_tiles && (work.is_rescan || item.is_split)) {
    if (!work.is_rescan) {
      work.wait_for_state_passes(work_counters, item, (int)num_unsplit, blocks_per_sequence);
    } else {
      if (!work.wait_for_splits(smem, work_counters, item, (int)num_unsplit, (int)num_splits)) return;
      item.rescan((int)L);
    }
    SCAN_FORWARD_ITEM(true, true);
    if (item.is_split) work.finish_split(work_counters, item, (int)num_unsplit, exit_is_right);
    return;
  }
#endif
  if (num_state_passes && item.is_split)
    work.wait_for_state_passes(work_counters, item, (int)num_unsplit, blocks_per_sequence);
  SCAN_FORWARD_ITEM(true, false);
}
