// The state pass of the forward on tensor cores, without an exponential for every token and state. It gives what the state
// pass of forward.cu gives, with the error of bfloat16 products (2^-9 of a token's share), and may exit.
//
// Exit. A state pass computes sum_t exp(A S_t) delta_t u_t B_t, S_t the sum of delta between token t and the end of the split.
// It begins with the last tile, and stops at a tile from which on exp(A S) is so small that what lies behind cannot matter.
// What lies behind is not read, so this is a guess. The block that scans the split later has the true state h where the state
// pass stopped, and checks the guess: exp(A S) h, which is all that was left out, must be below a rounding of the result. NaN
// and infinity fail. If a check fails, another block then scans the whole sequence as if it were not split, the rescan
// (work.cu).
//
// Moments. For the tokens of a tile let S be the sum of delta behind the tile, g_t that behind token t within the tile, and G
// that of the whole tile. With
//
//     x_t = 2 g_t / G - 1, from -1 to 1        z = A G / 2        exp(A S_t) = exp(A (S + G / 2)) exp(z x_t)
//
// and a minimax polynomial exp(z x) = sum_j k_j z^j x^j of degree 7, the tile's share is
//
//     exp(A (S + G / 2)) sum_j k_j z^j M_j[n]        M_j[n] = sum_t x_t^j delta_t u_t B_t[n]
//
// The moments M_j of 16 channels are products of (16 channels, 16 tokens) and (16 tokens, 16 states): one exponential a tile
// and state, where the tokens would take 16. The polynomial is good to 8e-5 of the largest weight where |A| G <= 5. Where some
// state of the warp forgets faster and has not forgotten the tile yet (exp(A S) > 2^-29), the warp walks the tile token by
// token.
//
// A warp has 16 channels of one direction. Lane (g, q) = (lane / 4, lane % 4) has the channels g and g + 8 and the states 2 q,
// 2 q + 1, 2 q + 8 and 2 q + 9, as an mma gives them. Shared memory, MOMENT_SLOTS times for a direction:
//     u, delta  [half of the channels][TILE][8]   io_t
//     B         [TILE][MOMENT_B_ROW]              io_t: rows lie in different banks

#if HAS_MOMENTS
#define MOMENT_SLOTS 3
#define MOMENT_B_ROW 24
#define MOMENT_SLOT_BYTES (2 * TILE * 16 * 2 + TILE * MOMENT_B_ROW * 2)
#define LARGEST_DECAY 7.2f    // |A| G log2(e) up to which a tile is summed by moments
#define FORGOTTEN_LOG2 -29.f  // exp(A S) below which a tile is summed by moments whatever G is
#define EXIT_LOG2 -60.f       // a state pass stops where every exp(A S) is below 2^EXIT_LOG2, if no state is almost 0 there
#define EXIT_LOG2_ANY -255.f  // the same for any state: the largest float32 times this is flushed to 0
#define EXIT_LEAST_STATE 0x1p-80f
static_assert(MOMENT_SLOTS * MOMENT_SLOT_BYTES <= SMEM_DIRECTION_BYTES);

DEVICE void state_pass_by_moments(
    char* smem, const io_t* u_base, i64 u_stride_b, int u_stride_t, const io_t* delta_base, i64 delta_stride_b,
    int delta_stride_t, const io_t* B_base, i64 B_stride_b, int B_stride_t, const float* A, float* split_final_states,
    float* delta_sums, int* unvisited_tiles, int clips, int L, int E, int num_splits, int flags, WorkItem item, int direction,
    bool reverse) {
  char* slots = smem + direction * SMEM_DIRECTION_BYTES;
  const int lane = threadIdx.x % 32, g = lane >> 2, q = lane & 3;
  const int channel_blocks = E / CHANNELS, clip = item.sequence / channel_blocks;
  const int first_channel = item.sequence % channel_blocks * CHANNELS;
  const i64 direction_clip_split = ((i64)direction * clips + clip) * num_splits + item.split;
  const TileIterator tiles(item, reverse);
  float A_log2e[2][4], h[2][4], S[2];
  #pragma unroll
  for (int c = 0; c < 2; c++) {
    const float* from = A + (i64)(first_channel + 8 * c + g) * 16 + 2 * q;
    #pragma unroll
    for (int i = 0; i < 4; i++) {
      const float a = from[i % 2 + i / 2 * 8];
      A_log2e[c][i] = (flags & A_LOG ? -expf(a) : a) * LOG2E, h[c][i] = 0.f;
    }
    S[c] = 0.f;
  }
  // A lane copies a row of eight channels of u and delta, and eight states of B; lanes 16 apart have the same token.
  const int row = lane & 15, half = lane >> 4;
  const io_t* u = u_base + clip * u_stride_b + first_channel + 8 * half;
  const io_t* delta = delta_base + clip * delta_stride_b + first_channel + 8 * half;
  const io_t* B = B_base + clip * B_stride_b + 8 * half;
  const int rows_at = half * 256 + row * 16, B_at = 1024 + row * MOMENT_B_ROW * 2 + half * 16;
  const int steps = tiles.num_tiles();
  auto prefetch = [&](int step) {  // steps go down: the state pass begins with the last tile
    char* slot = slots + (step + MOMENT_SLOTS) % MOMENT_SLOTS * MOMENT_SLOT_BYTES;
    const int token = step >= 0 ? tiles.token(step, row) : L;
    const bool exists = token < L;
    const i64 t = exists ? token : 0;
    copy_async<16>(slot + rows_at, u + t * u_stride_t, exists);
    copy_async<16>(slot + 512 + rows_at, delta + t * delta_stride_t, exists);
    copy_async<16>(slot + B_at, B + t * B_stride_t, exists);
    copy_commit();
  };
  for (int i = 1; i < MOMENT_SLOTS; i++) prefetch(steps - i);
  // Sums of delta behind a token of the tile are products with triangles of ones.
  const unsigned ones = 0x3f803f80u, triangle = (2 * q > g ? 0x3f80u : 0u) | (2 * q + 1 > g ? 0x3f800000u : 0u);
  const float ratios[7] = {  // k_(j+1) / k_j
      0.99991847f, 0.50070407f, 0.33344819f, 0.24433412f, 0.19972261f, 0.20554313f, 0.14315050f};
  int unvisited = 0;

  for (int step = steps - 1; step >= 0; step--) {
    const char* slot = slots + step % MOMENT_SLOTS * MOMENT_SLOT_BYTES;
    copy_wait<MOMENT_SLOTS - 2>();
    __syncwarp();
    prefetch(step - MOMENT_SLOTS + 1);
    unsigned u_pairs[4], delta_pairs[4];  // tokens 2 q, 2 q + 1 of channel g, then of g + 8; tokens 2 q + 8, 2 q + 9 of both
    load_matrices(u_pairs, slot + (lane & 7) * 16 + (lane >> 3 & 1) * 256 + (lane >> 4) * 128);
    load_matrices(delta_pairs, slot + 512 + (lane & 7) * 16 + (lane >> 3 & 1) * 256 + (lane >> 4) * 128);
    float behind[2][4] = {}, whole[4] = {};  // of tokens 2 q, 2 q + 1 and 2 q + 8, 2 q + 9
    mma_bf16(behind[0], delta_pairs, triangle, ones), mma_bf16(behind[1], delta_pairs, 0u, triangle);
    mma_bf16(whole, delta_pairs, ones, ones);
    const float G[2] = {whole[0], whole[2]};
    bool far = false;
    #pragma unroll
    for (int c = 0; c < 2; c++)
      #pragma unroll
      for (int i = 0; i < 4; i++)
        far |= !(A_log2e[c][i] * G[c] >= -LARGEST_DECAY) && !(A_log2e[c][i] * S[c] < FORGOTTEN_LOG2);
    if (__any_sync(0xffffffffu, far)) {
      const io_t* u_rows = (const io_t*)slot + g;
      #pragma unroll 4
      for (int t = TILE - 1; t >= 0; t--) {
        const unsigned *B_row = (const unsigned*)(slot + 1024 + t * MOMENT_B_ROW * 2), low = B_row[q], high = B_row[q + 4];
        const float B_t[4] = {from_bf16(low & 0xffff), from_bf16(low >> 16), from_bf16(high & 0xffff), from_bf16(high >> 16)};
        #pragma unroll
        for (int c = 0; c < 2; c++) {
          const float delta_t = from_bf16(u_rows[256 + c * 128 + t * 8]);
          const float delta_u = delta_t * from_bf16(u_rows[c * 128 + t * 8]);
          #pragma unroll
          for (int i = 0; i < 4; i++) h[c][i] = fmaf(exp_delta_A(S[c], A_log2e[c][i]), delta_u * B_t[i], h[c][i]);
          S[c] += delta_t;
        }
      }
    } else {
      unsigned B_pairs[4];  // tokens 2 q, 2 q + 1, then 2 q + 8, 2 q + 9 of state g; the same of state g + 8
      load_matrices(B_pairs, slot + 1024 + (lane & 15) * MOMENT_B_ROW * 2 + (lane >> 4) * 16);
      float x[2][4], delta_u[2][4], z[2][4], M[8][2][4];  // the first two by channel, then token
      #pragma unroll
      for (int c = 0; c < 2; c++) {
        const float scale = 2.f * rcp(fmaxf(G[c], 1e-30f));
        #pragma unroll
        for (int i = 0; i < 4; i++) {
          const unsigned u_pair = u_pairs[i / 2 * 2 + c], delta_pair = delta_pairs[i / 2 * 2 + c];
          x[c][i] = fmaf(behind[i / 2][2 * c + i % 2], scale, -1.f);
          delta_u[c][i] = __uint_as_float(i % 2 ? u_pair & 0xffff0000u : u_pair << 16) *
                          __uint_as_float(i % 2 ? delta_pair & 0xffff0000u : delta_pair << 16);
          z[c][i] = fmaxf(A_log2e[c][i] * (0.5f * LN2 * G[c]), -60.f);
        }
      }
      #pragma unroll
      for (int j = 0; j < 8; j++) {
        unsigned a[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) a[i] = pack_bf16(delta_u[i % 2][i / 2 * 2], delta_u[i % 2][i / 2 * 2 + 1]);
        #pragma unroll
        for (int s = 0; s < 2; s++) {
          #pragma unroll
          for (int i = 0; i < 4; i++) M[j][s][i] = 0.f;
          mma_bf16(M[j][s], a, B_pairs[2 * s], B_pairs[2 * s + 1]);
        }
        #pragma unroll
        for (int i = 0; i < 8; i++) delta_u[i / 4][i % 4] *= x[i / 4][i % 4];
      }
      #pragma unroll
      for (int c = 0; c < 2; c++) {
        const float middle = fmaf(0.5f, G[c], S[c]);
        #pragma unroll
        for (int i = 0; i < 4; i++) {
          float p = M[7][i / 2][2 * c + i % 2];
          #pragma unroll
          for (int j = 6; j >= 0; j--) p = fmaf(p, z[c][i] * ratios[j], M[j][i / 2][2 * c + i % 2]);
          h[c][i] = fmaf(exp_delta_A(middle, A_log2e[c][i]), p, h[c][i]);
        }
        S[c] += G[c];
      }
    }
    bool goes_on = false;  // written so that NaN goes on
    #pragma unroll
    for (int c = 0; c < 2; c++) {
      const float slowest = fmaxf(fmaxf(A_log2e[c][0], A_log2e[c][1]), fmaxf(A_log2e[c][2], A_log2e[c][3]));
      const float least = fminf(fminf(fabsf(h[c][0]), fabsf(h[c][1])), fminf(fabsf(h[c][2]), fabsf(h[c][3])));
      goes_on |= !(slowest * S[c] < (least > EXIT_LEAST_STATE ? EXIT_LOG2 : EXIT_LOG2_ANY));
    }
    unvisited = step;
    if (!__any_sync(0xffffffffu, goes_on)) break;
  }
  copy_wait<0>();
  #pragma unroll
  for (int c = 0; c < 2; c++) {
    const int channel = first_channel + 8 * c + g;
    float* to = split_final_states + (direction_clip_split * E + channel) * 16 + 2 * q;
    *(float2*)to = float2{h[c][0], h[c][1]}, *(float2*)(to + 8) = float2{h[c][2], h[c][3]};
    if (q == 0) delta_sums[direction_clip_split * E + channel] = S[c];
  }
  if (lane == 0)
    unvisited_tiles[direction_clip_split * channel_blocks + item.sequence % channel_blocks] = unvisited;
}
#endif
