"""Triton source of the causal convolution's backward; `kernels.py` says how a program goes through the tokens."""

# mypy: disable-error-code="assignment"
# (a tuple that grows in an unrolled loop has another type after every step)

import triton
import triton.language as tl

from fused.ops.causal_conv1d.kernels import (
    convolve,
    load_ids,
    load_tokens,
    load_weights,
    of_sequence,
    select_conv_state,
    sigmoid_of,
    tile_of_program,
)


@triton.jit
def _fill_tuple(value: tl.tensor, LENGTH: tl.constexpr):
    values = ()
    for _ in tl.static_range(LENGTH):
        values = values + (value,)
    return values


@triton.jit
def _activation_backward(dy: tl.tensor, pre_activation: tl.tensor, SILU: tl.constexpr, NATIVE: tl.constexpr):
    """Return the gradient (S, C) of the pre-activation."""
    if SILU:
        sigmoid = sigmoid_of(pre_activation, NATIVE)
        # the fma is explicit: results must not depend on whether the compiler contracts a product and a sum
        dy = dy * sigmoid * tl.fma(pre_activation, 1.0 - sigmoid, 1.0)
    return dy


@triton.jit
def _add_parameter_gradients(
    sums: tl.tuple, ds: tl.tensor, in_segment: tl.tensor, inputs: tl.tuple, REVERSE: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """Return the sums (S, C) for the K weights and the bias, increased by one token's terms where it is in its segment."""
    ds = tl.where(in_segment[:, None], ds, 0.0)
    new_sums = ()
    for k in tl.static_range(K):
        new_sums = new_sums + (tl.fma(ds, inputs[K - 1 - k if REVERSE else k], sums[k]),)
    return new_sums + (sums[K] + ds,)


@triton.jit
def _add_input_gradient(
    dx: tl.tensor, ds_window: tl.tuple, weights: tl.tuple, dfinal_state_ptr: tl.tensor, t: tl.tensor, ids: tl.tuple,
    final_ids: tl.tuple, first_state_token: tl.tensor, clip: tl.tensor, channels: tl.tensor, E: tl.tensor,
    REVERSE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Return dx (S, C) plus one direction's terms: of the K outputs that read token t, in time order in `ds_window`, and of
    the final state, whose first entry is token `first_state_token`, where ids[0], of token t, is the final state's."""
    for k in tl.static_range(K):
        dx = tl.fma(ds_window[k if REVERSE else K - 1 - k], weights[k], dx)
    if dfinal_state_ptr is not None:
        dstate = select_conv_state(tl.zeros_like(dx), dfinal_state_ptr, t, first_state_token, clip, channels, E, K)
        dx += of_sequence((dstate,), final_ids + ids, 0, 1, 1)[0]
    return dx


@triton.jit
def _store_state_gradient(
    dstate_ptr: tl.tensor, dx: tl.tensor, t: tl.tensor, in_segment: tl.tensor, first_state_token: tl.tensor, clip: tl.tensor,
    channels: tl.tensor, E: tl.tensor, K: tl.constexpr,
):  # fmt: skip
    """Store dx (S, C) to the gradient of an initial state (B, E, K-1), where t is a token of that state."""
    in_state = (in_segment & (t >= first_state_token) & (t < first_state_token + K - 1))[:, None] & (channels < E)[None, :]
    offsets = ((clip * E + channels) * (K - 1))[None, :] + (t - first_state_token)[:, None]
    tl.store(dstate_ptr + offsets, dx.to(dstate_ptr.dtype.element_ty), mask=in_state)


@triton.jit
def _store_partial_sums(
    partial_ptr: tl.tensor, sums: tl.tuple, program: tl.tensor, channels: tl.tensor, E: tl.tensor, K: tl.constexpr
):
    """Store K+1 sums (S, C), added over the segments, to partial[program] (K+1, E)."""
    partial_ptr += program * (K + 1) * E
    for k in tl.static_range(K + 1):
        tl.store(partial_ptr + k * E + channels, tl.sum(sums[k], axis=0), mask=channels < E)


@triton.jit(do_not_specialize=["L", "blocks_per_sequence", "segment_length", "steps"])
def backward_kernel(
    x_ptr: tl.tensor, dx_ptr: tl.tensor,
    fwd_weight_ptr: tl.tensor, fwd_bias_ptr: tl.tensor, fwd_initial_state_ptr: tl.tensor, fwd_dy_ptr: tl.tensor,
    fwd_dfinal_state_ptr: tl.tensor, fwd_dinitial_state_ptr: tl.tensor, fwd_partial_ptr: tl.tensor,
    rev_weight_ptr: tl.tensor, rev_bias_ptr: tl.tensor, rev_initial_state_ptr: tl.tensor, rev_dy_ptr: tl.tensor,
    rev_dfinal_state_ptr: tl.tensor, rev_dinitial_state_ptr: tl.tensor, rev_partial_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    L: tl.tensor, E: tl.tensor, x_clip_stride: tl.tensor, x_token_stride: tl.tensor, ids_clip_stride: tl.tensor,
    dx_clip_stride: tl.tensor, dx_token_stride: tl.tensor,
    blocks_per_sequence: tl.tensor, segment_length: tl.tensor, steps: tl.tensor,
    K: tl.constexpr, SILU: tl.constexpr, NATIVE: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Compute dx, the gradients of initial states, and each program's partial sums of dweight and dbias.

    A segment has the tokens [start, end). The loop begins K-1 tokens before it, to fill the windows of x and of ds, the
    gradient before the activation. All arguments of a direction that is not computed are None; ids may be.
    """
    clip, block, segments, channels = tile_of_program(blocks_per_sequence, E, BLOCK_SEGMENTS, BLOCK_CHANNELS)
    start = segments * segment_length
    end = tl.minimum(start + segment_length, L)
    first_input = start - (K - 1)
    x_ptr += clip * x_clip_stride
    dx_ptr += clip * dx_clip_stride
    zero = tl.zeros((BLOCK_SEGMENTS, BLOCK_CHANNELS), tl.float32)
    fwd_ds_window, rev_ds_window, fwd_sums, rev_sums = (), (), (), ()
    if fwd_dy_ptr is not None:
        fwd_weights, fwd_bias = load_weights(fwd_weight_ptr, fwd_bias_ptr, channels, E, K)
        fwd_dy_ptr += clip * L * E
        fwd_ds_window, fwd_sums = _fill_tuple(zero, K - 1), _fill_tuple(zero, K + 1)
    if rev_dy_ptr is not None:
        rev_weights, rev_bias = load_weights(rev_weight_ptr, rev_bias_ptr, channels, E, K)
        rev_dy_ptr += clip * L * E
        rev_ds_window, rev_sums = _fill_tuple(zero, K - 1), _fill_tuple(zero, K + 1)
    if ids_ptr is not None:
        ids_ptr += clip * ids_clip_stride
    window, window_ids = (), ()  # the K-1 inputs before the next one
    for j in tl.static_range(K - 1):
        t = first_input + j
        x = load_tokens(x_ptr, t, channels, L, E, x_token_stride, True)
        x = select_conv_state(x, fwd_initial_state_ptr, t, 1 - K, clip, channels, E, K)
        window = window + (select_conv_state(x, rev_initial_state_ptr, t, L, clip, channels, E, K),)
        window_ids = window_ids + load_ids(ids_ptr, t, L)
    first_ids, last_ids = load_ids(ids_ptr, segments * 0, L), load_ids(ids_ptr, segments * 0 + L, L)
    rev_ids = window_ids  # of the K-1 tokens before, whose ds are zeros so far
    for i in range(0, steps, UNROLL):
        inputs, ids, fwd_dy, rev_dy = window, window_ids, (), ()
        for j in tl.static_range(UNROLL):  # all loads of an iteration come before its arithmetic
            t = first_input + (i + j)
            x = load_tokens(x_ptr, t + (K - 1), channels, L, E, x_token_stride, False)
            inputs = inputs + (select_conv_state(x, rev_initial_state_ptr, t + (K - 1), L, clip, channels, E, K),)
            ids = ids + load_ids(ids_ptr, t + (K - 1), L)
            if fwd_dy_ptr is not None:
                fwd_dy = fwd_dy + (load_tokens(fwd_dy_ptr, t + (K - 1), channels, L, E, E, False),)
            if rev_dy_ptr is not None:
                rev_dy = rev_dy + (load_tokens(rev_dy_ptr, t, channels, L, E, E, True),)
        for j in tl.static_range(UNROLL):
            t = first_input + (i + j)
            dx = zero
            if fwd_dy_ptr is not None:
                fwd_inputs = of_sequence(inputs, ids, j, j + K - 1, K)
                s = convolve(fwd_inputs, fwd_weights, fwd_bias, False, K)
                ds = _activation_backward(fwd_dy[j], s, SILU, NATIVE)
                fwd_sums = _add_parameter_gradients(fwd_sums, ds, t + (K - 1) < end, fwd_inputs, False, K)
                fwd_ds_window = fwd_ds_window + (ds,)
                readers = of_sequence(fwd_ds_window, ids[j : j + K], 0, 0, K)
                dx = _add_input_gradient(
                    dx, readers, fwd_weights, fwd_dfinal_state_ptr, t, ids[j : j + 1], last_ids, L - (K - 1), clip, channels, E,
                    False, K,
                )  # fmt: skip
                if fwd_dinitial_state_ptr is not None:
                    _store_state_gradient(fwd_dinitial_state_ptr, dx, t, start == 0, 1 - K, clip, channels, E, K)
                fwd_ds_window = fwd_ds_window[1:]
            if rev_dy_ptr is not None:
                rev_inputs = of_sequence(inputs, ids, j, j, K)
                s = convolve(rev_inputs, rev_weights, rev_bias, True, K)
                ds = _activation_backward(rev_dy[j], s, SILU, NATIVE)
                rev_sums = _add_parameter_gradients(rev_sums, ds, (t >= start) & (t < end), rev_inputs, True, K)
                rev_ds_window = rev_ds_window + (ds,)
                rev_ids = rev_ids + ids[j : j + 1]
                readers = of_sequence(rev_ds_window, rev_ids, 0, K - 1, K)
                if rev_dinitial_state_ptr is not None:
                    rev_dx = _add_input_gradient(
                        zero, readers, rev_weights, rev_dfinal_state_ptr, t, ids[j : j + 1], first_ids, 0, clip, channels, E,
                        True, K,
                    )  # fmt: skip
                    has_end = (start < L) & (end == L)
                    _store_state_gradient(rev_dinitial_state_ptr, rev_dx, t, has_end, L, clip, channels, E, K)
                dx = _add_input_gradient(
                    dx, readers, rev_weights, rev_dfinal_state_ptr, t, ids[j : j + 1], first_ids, 0, clip, channels, E, True, K
                )
                rev_ds_window = rev_ds_window[1:]
                if ids_ptr is not None:
                    rev_ids = rev_ids[1:]
            in_segment = ((t >= start) & (t < end))[:, None] & (channels < E)[None, :]
            offsets = t.to(tl.int64)[:, None] * dx_token_stride + channels[None, :]
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=in_segment)
        window = inputs[UNROLL:]
        if ids_ptr is not None:
            window_ids = ids[UNROLL:]
    program = clip * blocks_per_sequence + block
    if fwd_dy_ptr is not None:
        _store_partial_sums(fwd_partial_ptr, fwd_sums, program, channels, E, K)
    if rev_dy_ptr is not None:
        _store_partial_sums(rev_partial_ptr, rev_sums, program, channels, E, K)


@triton.jit(do_not_specialize=["programs"])
def reduce_kernel(
    partial_ptr: tl.tensor, dweight_0_ptr: tl.tensor, dweight_1_ptr: tl.tensor, dbias_0_ptr: tl.tensor, dbias_1_ptr: tl.tensor,
    E: tl.tensor, programs: tl.tensor,
    K: tl.constexpr, BLOCK_PROGRAMS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sum partial (directions, programs, K+1, E) to a direction's dweight (E, K) and its dbias (E,) or None."""
    channels = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    k = tl.program_id(1) % (K + 1)  # K is the bias
    direction = tl.program_id(1) // (K + 1)
    partial_ptr += (direction.to(tl.int64) * programs * (K + 1) + k) * E
    total = tl.zeros((BLOCK_PROGRAMS, BLOCK_CHANNELS), tl.float32)
    for i in range(0, programs, BLOCK_PROGRAMS):
        rows = i + tl.arange(0, BLOCK_PROGRAMS)
        inside = (rows < programs)[:, None] & (channels < E)[None, :]
        ptrs = partial_ptr + rows.to(tl.int64)[:, None] * ((K + 1) * E) + channels[None, :]
        total += tl.load(ptrs, mask=inside, other=0.0)
    result = tl.sum(total, axis=0)
    if k < K:
        dweight_ptr = dweight_0_ptr if direction == 0 else dweight_1_ptr
        tl.store(dweight_ptr + channels * K + k, result.to(dweight_ptr.dtype.element_ty), mask=channels < E)
    elif direction == 0:
        if dbias_0_ptr is not None:
            tl.store(dbias_0_ptr + channels, result.to(dbias_0_ptr.dtype.element_ty), mask=channels < E)
    elif dbias_1_ptr is not None:
        tl.store(dbias_1_ptr + channels, result.to(dbias_1_ptr.dtype.element_ty), mask=channels < E)
