"""Triton source of the causal convolution: its forward, and what `backward_kernels.py` shares; `launch.py` has the equations.

A segment is a range of consecutive tokens of one sequence. A program computes a tile of BLOCK_SEGMENTS segments by
BLOCK_CHANNELS channels: it goes through the tokens of all its segments at once, in order, and keeps the last K-1 inputs in
registers. In names, `fwd` is the direction forward in time and `rev` the reverse one; `forward` and `backward` are the passes
of autograd. Shapes: S is BLOCK_SEGMENTS, C is BLOCK_CHANNELS, B the clips, L the tokens, E the channels, K the width.
`ids` (B, L) number the sequences that a row of tokens consists of (`seq_idx`); within a kernel they are a tuple of (S,), one
for each token of a window, and an empty tuple where there are none.
"""

# mypy: disable-error-code="assignment"
# (a tuple that grows in an unrolled loop has another type after every step)

import triton
import triton.language as tl


@triton.jit
def sigmoid_of(x: tl.tensor, NATIVE: tl.constexpr):
    """Return 1 / (1 + exp(-x)) in float32."""
    if NATIVE:  # one ex2 and one rcp: Triton's exp and division also handle ranges that do not occur here
        return tl.inline_asm_elementwise(
            "{ .reg .f32 a; mul.f32 a, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 a, a;"
            " add.f32 a, a, 0f3F800000; rcp.approx.ftz.f32 $0, a; }",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tile_of_program(blocks_per_sequence: tl.tensor, E: tl.tensor, BLOCK_SEGMENTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Return this program's clip, its block of segments, the indices of its segments (S,) and of its channels (C,)."""
    channel_blocks = tl.cdiv(E, BLOCK_CHANNELS)
    program = tl.program_id(0)
    block = (program // channel_blocks) % blocks_per_sequence
    clip = (program // channel_blocks // blocks_per_sequence).to(tl.int64)
    segments = block * BLOCK_SEGMENTS + tl.arange(0, BLOCK_SEGMENTS)
    return clip, block, segments, (program % channel_blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)


@triton.jit
def load_weights(weight_ptr: tl.tensor, bias_ptr: tl.tensor, channels: tl.tensor, E: tl.tensor, K: tl.constexpr):
    """Return one direction's K weights as a tuple, and its bias (zeros without one), each (1, C) in float32."""
    weights = ()
    for k in tl.static_range(K):
        weights = weights + (tl.load(weight_ptr + channels * K + k, mask=channels < E, other=0.0).to(tl.float32)[None, :],)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channels, mask=channels < E, other=0.0).to(tl.float32)[None, :]
    else:
        bias = tl.zeros((1, channels.shape[0]), tl.float32)
    return weights, bias


@triton.jit
def load_tokens(
    ptr: tl.tensor, tokens: tl.tensor, channels: tl.tensor, L: tl.tensor, E: tl.tensor, token_stride: tl.tensor,
    CHECK_NEGATIVE: tl.constexpr,
):  # fmt: skip
    """Return (S, C) in float32 of an (L, E) tensor at `tokens` (S,) and `channels` (C,), zero outside of it.

    Tokens may be negative only with CHECK_NEGATIVE. The data are evicted from the cache first, because the outputs are read
    sooner, by the next kernel.
    """
    inside = ((tokens >= 0) & (tokens < L) if CHECK_NEGATIVE else tokens < L)[:, None] & (channels < E)[None, :]
    ptrs = ptr + tokens.to(tl.int64)[:, None] * token_stride + channels[None, :]
    return tl.load(ptrs, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def load_ids(ids_ptr: tl.tensor, tokens: tl.tensor, L: tl.tensor):
    """Return the sequences (S,) of `tokens` as a tuple of one; those beyond an end belong to the first or the last."""
    if ids_ptr is not None:
        return (tl.load(ids_ptr + tl.minimum(tl.maximum(tokens, 0), L - 1)),)
    else:
        return ()


@triton.jit
def of_sequence(values: tl.tuple, ids: tl.tuple, FIRST: tl.constexpr, TOKEN: tl.constexpr, K: tl.constexpr):
    """Return the K values (S, C) that begin with values[FIRST], zeros for those of another sequence than token TOKEN."""
    found = ()
    for k in tl.static_range(K):
        if len(ids) > 0:
            found = found + (tl.where((ids[FIRST + k] == ids[TOKEN])[:, None], values[FIRST + k], 0.0),)
        else:
            found = found + (values[FIRST + k],)
    return found


@triton.jit
def select_conv_state(
    values: tl.tensor, state_ptr: tl.tensor, tokens: tl.tensor, first_token: tl.tensor, clip: tl.tensor, channels: tl.tensor,
    E: tl.tensor, K: tl.constexpr,
):  # fmt: skip
    """Return `values` (S, C), replaced by a conv_state (B, E, K-1) for tokens `first_token` to `first_token + K - 2`."""
    if state_ptr is not None:
        in_state = ((tokens >= first_token) & (tokens < first_token + K - 1))[:, None] & (channels < E)[None, :]
        ptrs = state_ptr + ((clip * E + channels) * (K - 1))[None, :] + (tokens - first_token)[:, None]
        state = tl.load(ptrs, mask=in_state, other=0.0)
        values = tl.where(in_state, state.to(tl.float32), values)
    return values


@triton.jit
def convolve(inputs: tl.tuple, weights: tl.tuple, bias: tl.tensor, REVERSE: tl.constexpr, K: tl.constexpr):
    """Return the convolution (S, C) before its activation, from K inputs (S, C) in the order of time."""
    total = bias + tl.zeros_like(inputs[0])
    for k in tl.static_range(K):
        total = tl.fma(inputs[K - 1 - k if REVERSE else k], weights[k], total)
    return total


@triton.jit
def _activate(pre_activation: tl.tensor, SILU: tl.constexpr, NATIVE: tl.constexpr):
    return pre_activation * sigmoid_of(pre_activation, NATIVE) if SILU else pre_activation


@triton.jit(do_not_specialize=["L", "blocks_per_sequence", "segment_length"])
def forward_kernel(
    x_ptr: tl.tensor,
    fwd_weight_ptr: tl.tensor, fwd_bias_ptr: tl.tensor, fwd_initial_state_ptr: tl.tensor, fwd_y_ptr: tl.tensor,
    rev_weight_ptr: tl.tensor, rev_bias_ptr: tl.tensor, rev_initial_state_ptr: tl.tensor, rev_y_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    L: tl.tensor, E: tl.tensor, x_clip_stride: tl.tensor, x_token_stride: tl.tensor, y_clip_stride: tl.tensor,
    ids_clip_stride: tl.tensor,
    blocks_per_sequence: tl.tensor, segment_length: tl.tensor,
    K: tl.constexpr, SILU: tl.constexpr, NATIVE: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Convolve x (B, L, E) in one direction or both; all arguments of a direction that is not computed are None, ids may be."""
    clip, _, segments, channels = tile_of_program(blocks_per_sequence, E, BLOCK_SEGMENTS, BLOCK_CHANNELS)
    first_input = segments * segment_length - (K - 1)
    x_ptr += clip * x_clip_stride
    if fwd_y_ptr is not None:
        fwd_weights, fwd_bias = load_weights(fwd_weight_ptr, fwd_bias_ptr, channels, E, K)
        fwd_y_ptr += clip * y_clip_stride
    if rev_y_ptr is not None:
        rev_weights, rev_bias = load_weights(rev_weight_ptr, rev_bias_ptr, channels, E, K)
        rev_y_ptr += clip * y_clip_stride
    if ids_ptr is not None:
        ids_ptr += clip * ids_clip_stride
    window, window_ids = (), ()  # the K-1 inputs before the next one
    for j in tl.static_range(K - 1):
        t = first_input + j
        x = load_tokens(x_ptr, t, channels, L, E, x_token_stride, True)
        x = select_conv_state(x, fwd_initial_state_ptr, t, 1 - K, clip, channels, E, K)
        window = window + (select_conv_state(x, rev_initial_state_ptr, t, L, clip, channels, E, K),)
        window_ids = window_ids + load_ids(ids_ptr, t, L)
    for i in range(0, segment_length, UNROLL):
        inputs, ids = window, window_ids
        for j in tl.static_range(UNROLL):
            t = first_input + (i + j + K - 1)
            x = load_tokens(x_ptr, t, channels, L, E, x_token_stride, False)
            inputs = inputs + (select_conv_state(x, rev_initial_state_ptr, t, L, clip, channels, E, K),)
            ids = ids + load_ids(ids_ptr, t, L)
        for j in tl.static_range(UNROLL):
            t = first_input + (i + j)
            if fwd_y_ptr is not None:
                fwd_inputs = of_sequence(inputs, ids, j, j + K - 1, K)
                y = _activate(convolve(fwd_inputs, fwd_weights, fwd_bias, False, K), SILU, NATIVE)
                fwd_t = t + (K - 1)
                offsets = fwd_t.to(tl.int64)[:, None] * E + channels[None, :]
                inside = (fwd_t < L)[:, None] & (channels < E)[None, :]
                tl.store(fwd_y_ptr + offsets, y.to(fwd_y_ptr.dtype.element_ty), mask=inside)
            if rev_y_ptr is not None:
                rev_inputs = of_sequence(inputs, ids, j, j, K)
                y = _activate(convolve(rev_inputs, rev_weights, rev_bias, True, K), SILU, NATIVE)
                offsets = t.to(tl.int64)[:, None] * E + channels[None, :]
                inside = ((t >= 0) & (t < L))[:, None] & (channels < E)[None, :]
                tl.store(rev_y_ptr + offsets, y.to(rev_y_ptr.dtype.element_ty), mask=inside)
        window = inputs[UNROLL:]
        if ids_ptr is not None:
            window_ids = ids[UNROLL:]
