// Sums over blocks of what scan_backward has stored, one sum a thread, in a fixed order:
//     dBC_partial over blocks of channels           to dB and dC (clip, L, N)
//     param_grads_partial over clips and splits     to dA (E, N), dD (E,) and ddelta_bias (E,)
// With A_LOG dA is the gradient of log(-A).
// The grid is (blocks, directions). Along x come first the blocks of dB and dC, clip by clip, since a grid has room for many
// clips only along x. The blocks of the parameters follow. CHANNELS is that of scan_backward.
KERNEL(scan_backward_reduce, 256, 1)(
    const float *dBC_partial, io_t *dB0, io_t *dB1, i64 dB_stride_b, i64 dB_stride_t, io_t *dC0, io_t *dC1, i64 dC_stride_b,
    i64 dC_stride_t, const float *param_grads_partial, i64 param_grads_row, const float *A0, const float *A1, float *dA0,
    float *dA1, float *dD0, float *dD1, float *ddelta_bias0, float *ddelta_bias1, SIZE_PARAMS) {
  const int blocks_per_clip = (int)((L * 2 * PADDED_STATES + 255) / 256);
  const i64 d = blockIdx.y, channel_blocks = (E + CHANNELS - 1) / CHANNELS;
  float sum = 0.f;
  if (blockIdx.x < blocks_per_clip * clips) {
    const i64 clip = blockIdx.x / blocks_per_clip, i = (i64)(blockIdx.x % blocks_per_clip) * 256 + threadIdx.x;
    const i64 token = i / (2 * PADDED_STATES);
    const int n = i % PADDED_STATES, is_C = i / PADDED_STATES % 2;
    if (token >= L || n >= N) return;
    const float* p =
        dBC_partial + ((d * clips + clip) * L + token) * channel_blocks * 2 * PADDED_STATES + i % (2 * PADDED_STATES);
    #pragma unroll 8
    for (i64 k = 0; k < channel_blocks; k++) sum += p[k * 2 * PADDED_STATES];
    if (is_C) (d ? dC1 : dC0)[clip * dC_stride_b + token * dC_stride_t + n] = to_io(sum);
    else (d ? dB1 : dB0)[clip * dB_stride_b + token * dB_stride_t + n] = to_io(sum);
    return;
  }
  const i64 i = (blockIdx.x - blocks_per_clip * clips) * 256 + threadIdx.x, i_vector = i - E * N;  // in dA; in dD, ddelta_bias
  if (i_vector >= 2 * E) return;
  const i64 channel_block = (i_vector < 0 ? i / N : i_vector % E) / CHANNELS;
  for (i64 clip = 0; clip < clips; clip++) {
    const i64 splits = (clip * channel_blocks + channel_block) * DIRECTIONS + d < num_unsplit ? 1 : num_splits;
    #pragma unroll 4
    for (i64 k = 0; k < splits; k++) sum += param_grads_partial[((d * clips + clip) * num_splits + k) * param_grads_row + i];
  }
  if (i_vector < 0) (d ? dA1 : dA0)[i] = flags & A_LOG ? sum * -expf((d ? A1 : A0)[i]) : sum;
  else if (i_vector < E) (d ? dD1 : dD0)[i_vector] = sum;
  else (d ? ddelta_bias1 : ddelta_bias0)[i_vector - E] = sum;
}
