"""Launches of the causal convolution's Triton kernels: all directions of one x in one launch of the forward and one of the
backward. Only an initial state of the reverse direction takes a second, small launch of the forward.

    forward in time                              reverse
    s_t  = bias + sum_k W[k] x_{t-(K-1-k)}       s_t = bias + sum_k W[k] x_{t+(K-1-k)}
    y_t  = s_t sigmoid(s_t) or s_t               the same
    ds_t = dL/dy_t dy_t/ds_t                     the same
    dx_t = sum_k W[k] ds_{t+(K-1-k)}             dx_t = sum_k W[k] ds_{t-(K-1-k)}
    dW_k = sum_t ds_t x_{t-(K-1-k)}              dW_k = sum_t ds_t x_{t+(K-1-k)}
    dbias = sum_t ds_t                           the same

A thread goes through a segment of consecutive tokens in order, with K-1 inputs in registers. At step t its window is x_t to
x_{t+K-1}. The reverse direction reads these inputs for token t and the forward one for token t+K-1, so each input is loaded
once for both. A program has `BLOCK_SEGMENTS` segments of `BLOCK_CHANNELS` channels. y, dx and dstate do not depend on where a
segment begins. dW and dbias are summed by segment and then by program, in an order that depends only on the shape.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fused.ops.causal_conv1d.backward_kernels import backward_kernel, reduce_kernel
from fused.ops.causal_conv1d.kernels import forward_kernel
from fused.runtime.triton_launch import FUSED_MULTIPLY_ADD, NATIVE, blocks, launch

MAX_WIDTH = 8
# The forward has 4 channels a thread (96 registers), the backward 2 (126 registers: it keeps 58 numbers for two channels).
# PROGRAMS_PER_GPU is the number of programs that an H200 holds at once. It is a constant because it decides the order of sums.
# SEGMENT_OVERHEAD_STEPS is the cost, in steps of the loop, of the instructions before and after a segment's loop.
FORWARD = {"BLOCK_SEGMENTS": 4, "BLOCK_CHANNELS": 128, "UNROLL": 4, "num_warps": 4, **FUSED_MULTIPLY_ADD}
BACKWARD = {"BLOCK_SEGMENTS": 4, "BLOCK_CHANNELS": 64, "UNROLL": 4, "num_warps": 4, **FUSED_MULTIPLY_ADD}
PROGRAMS_PER_GPU = {"forward": 132 * 5, "backward": 132 * 4}
SEGMENT_OVERHEAD_STEPS = {"forward": 3, "backward": 8}
REDUCE = {"BLOCK_PROGRAMS": 64, "BLOCK_CHANNELS": 32, "num_warps": 4, **FUSED_MULTIPLY_ADD}

Optionals = Sequence[Tensor | None] | None  # None: a None for every direction
_NO_ARGUMENTS: tuple[Tensor | None, ...] = (None,) * 8  # the arguments of a direction that is not computed


class Gradients(NamedTuple):
    """The gradients of a convolution, one entry a direction but for x; None for what was None."""

    x: Tensor  # (B, L, E), summed over the directions
    weights: tuple[Tensor, ...]  # in the weight's shape and dtype
    biases: tuple[Tensor | None, ...]  # (E,) in the bias's dtype
    initial_states: tuple[Tensor | None, ...]  # (B, E, K-1) in the state's dtype


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Optionals,
    initial_states: Optionals,
    reverses: Sequence[bool],
    silu: bool,
    want_states: bool = True,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Convolve x (B, L, E) in every direction: return y (directions, B, L, E), and the final states (B, E, K-1) or None.

    weights are (E, K) or (E, 1, K), biases (E,), states (B, E, K-1), each one for a direction, of which there is one a kind at
    most. Weights, biases and states of two directions have one dtype each. x may have any strides over clips and tokens; other
    channel strides than 1 cost a copy. `seq_idx` (B, L) numbers the sequences of each row: a token reads no input of another
    one.
    """
    x, all_none = x if x.stride(2) == 1 else x.contiguous(), (None,) * len(weights)
    biases, initial_states = biases or all_none, initial_states or all_none
    B, L, E = x.shape
    K = weights[0].shape[-1]
    y = torch.empty((len(weights), B, L, E), dtype=x.dtype, device=x.device)
    if x.numel():
        if len(set(reverses)) != len(reverses):
            raise ValueError(f"reverses must name each direction once at most, got {tuple(reverses)}")
        fwd = rev = _NO_ARGUMENTS[:4]
        for i, reverse in enumerate(reverses):
            bias, state = biases[i], initial_states[i]
            bias = None if bias is None else bias.contiguous()
            state = None if state is None else state.to(x.dtype).contiguous()
            arguments = (weights[i].contiguous(), bias, state, y[i])
            fwd, rev = (fwd, arguments) if reverse else (arguments, rev)
        weight, bias, state, out = rev
        if state is None or out is None or K == 1:
            _launch_forward(x, fwd, rev, K, silu, seq_idx)
        else:  # a loop that reads a state needs twice the registers: the K-1 tokens that read it are computed again
            _launch_forward(x, fwd, (weight, bias, None, out), K, silu, seq_idx)
            ids = None if seq_idx is None else seq_idx[:, 1 - K :]
            _launch_forward(x[:, 1 - K :], _NO_ARGUMENTS[:4], (weight, bias, state, out[:, 1 - K :]), K, silu, ids)
    if not want_states:
        return y, None
    pairs = zip(initial_states, reverses, strict=True)
    return y, tuple(_final_state(x, state, K - 1, reverse, seq_idx) for state, reverse in pairs)


def _launch_forward(
    x: Tensor, fwd: tuple[Tensor | None, ...], rev: tuple[Tensor | None, ...], K: int, silu: bool, seq_idx: Tensor | None
) -> None:
    """Launch with the weight, bias, state and y (B, L, E) of either direction. The rows of y are dense."""
    B, L, E = x.shape
    y = fwd[3] if rev[3] is None else rev[3]
    assert y is not None
    segment_length, blocks_per_sequence = _choose_segments("forward", B, L if rev[3] is None else L + K - 1, E, 0)
    launch(
        forward_kernel, x.device, (B * blocks_per_sequence * blocks(E, FORWARD["BLOCK_CHANNELS"]),),
        x, *fwd, *rev, seq_idx, L, E, x.stride(0), x.stride(1), y.stride(0), 0 if seq_idx is None else seq_idx.stride(0),
        blocks_per_sequence, segment_length,
        K=K, SILU=silu, NATIVE=NATIVE, **FORWARD,
    )  # fmt: skip


def backward(
    dy: Sequence[Tensor] | Tensor,
    dfinals: Optionals,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Optionals,
    initial_states: Optionals,
    reverses: Sequence[bool],
    silu: bool,
    dx: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Gradients:
    """Return the gradients of `forward`.

    dy is (directions, B, L, E) or one (B, L, E) for each direction; dfinals (B, E, K-1) or None for each. dx is written
    where given, through any strides over clips and tokens, and must not overlap x or dy: segments read beyond their own tokens.
    """
    x, all_none = x if x.stride(2) == 1 else x.contiguous(), (None,) * len(weights)
    biases, initial_states, dfinals = biases or all_none, initial_states or all_none, dfinals or all_none
    B, L, E = x.shape
    K = weights[0].shape[-1]
    directions = len(weights)
    dx = torch.empty((B, L, E), dtype=x.dtype, device=x.device) if dx is None else dx
    if dx.shape != x.shape or dx.stride(2) != 1:
        raise ValueError(f"dx must be {tuple(x.shape)} with unit channel stride, got {tuple(dx.shape)}, {dx.stride()}")
    dstates = tuple(
        None if state is None else torch.empty((B, E, K - 1), dtype=state.dtype, device=x.device) for state in initial_states
    )
    has_state = any(state is not None for state in initial_states)
    dweights = [torch.empty(w.shape, dtype=w.dtype, device=x.device) for w in weights]
    dbiases = [None if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=x.device) for bias in biases]
    if x.numel():
        segment_length, blocks_per_sequence = _choose_segments("backward", B, L, E, K - 1)
        steps = segment_length + (K - 1) * (2 if has_state else 1)
        partial = torch.empty((directions, B * blocks_per_sequence, K + 1, E), dtype=torch.float32, device=x.device)
        fwd = rev = _NO_ARGUMENTS[:7]
        for i, reverse in enumerate(reverses):
            bias, state, dfinal = biases[i], initial_states[i], dfinals[i]
            arguments = (
                weights[i].contiguous(), None if bias is None else bias.contiguous(),
                None if state is None else state.to(x.dtype).contiguous(), dy[i].contiguous(),
                None if dfinal is None else dfinal.contiguous(), dstates[i], partial[i],
            )  # fmt: skip
            fwd, rev = (fwd, arguments) if reverse else (arguments, rev)
        launch(
            backward_kernel, x.device, (B * blocks_per_sequence * blocks(E, BACKWARD["BLOCK_CHANNELS"]),),
            x, dx, *fwd, *rev, seq_idx, L, E, x.stride(0), x.stride(1), 0 if seq_idx is None else seq_idx.stride(0),
            dx.stride(0), dx.stride(1),
            blocks_per_sequence, segment_length, steps,
            K=K, SILU=silu, NATIVE=NATIVE, **BACKWARD,
        )  # fmt: skip
        grid = blocks(E, REDUCE["BLOCK_CHANNELS"]), directions * (K + 1)
        launch(
            reduce_kernel, x.device, grid, partial, dweights[0], dweights[-1], dbiases[0], dbiases[-1],
            E, B * blocks_per_sequence, K=K, **REDUCE,
        )  # fmt: skip
    else:  # no token: the final state is the initial state
        for grad in (*dweights, *dbiases):
            if grad is not None:
                grad.zero_()
        for dstate, dfinal in zip(dstates, dfinals, strict=True):
            if dstate is not None:
                dstate.zero_() if dfinal is None else dstate.copy_(dfinal)
    return Gradients(dx, tuple(dweights), tuple(dbiases), dstates)


@lru_cache(maxsize=1024)
def _choose_segments(name: str, clips: int, tokens: int, E: int, halo: int) -> tuple[int, int]:
    """Return (tokens of a segment, blocks of segments of a sequence) of the cheapest division of a sequence into segments.

    The cost is the number of waves of programs times the steps of a segment, with SEGMENT_OVERHEAD_STEPS. The
    tokens of a segment and its `halo`, the tokens beyond it that it reads, are together a multiple of UNROLL.
    """
    config = FORWARD if name == "forward" else BACKWARD
    segments, unroll = config["BLOCK_SEGMENTS"], config["UNROLL"]
    programs = clips * blocks(E, config["BLOCK_CHANNELS"])  # of one block of segments
    overhead, slots = SEGMENT_OVERHEAD_STEPS[name], PROGRAMS_PER_GPU[name]
    max_blocks = min(blocks(tokens, segments * (unroll + overhead)), blocks(8 * slots, programs))
    cheapest = (0, 0, 0)  # cost, tokens of a segment, blocks of segments
    for count in range(1, max_blocks + 1):
        steps = blocks(blocks(tokens, count * segments) + halo, unroll) * unroll
        waves = blocks(count * programs, slots)
        cost = waves * (steps + overhead)
        if not cheapest[0] or cost < cheapest[0]:
            cheapest = cost, steps - halo, count
    return cheapest[1:]


def _final_state(x: Tensor, state: Tensor | None, size: int, reverse: bool, seq_idx: Tensor | None) -> Tensor:
    """Return the last (reverse: first) `size` raw inputs of the sequence and the state beyond it, (B, E, size), a copy.

    With `seq_idx` those of another sequence than the last (reverse: first) token are zeros.
    """
    length = x.shape[1]
    tokens = slice(None, size) if reverse else slice(max(length - size, 0), None)
    inside = x[:, tokens].transpose(1, 2)
    ends = None
    if seq_idx is not None and length:
        ends = seq_idx[:, -1:], seq_idx[:, :1]
        ends = ends if reverse else ends[::-1]  # of the first token in the order of the convolution, and of the last
        inside = inside.masked_fill((seq_idx[:, tokens] != ends[1])[:, None], 0)
    if length >= size:
        return inside.clone(memory_format=torch.contiguous_format)
    edge = x.new_zeros((x.shape[0], x.shape[2], size)) if state is None else state.to(x.dtype)
    if ends is not None:
        edge = edge.masked_fill((ends[0] != ends[1])[:, None], 0)
    return torch.cat((inside, edge[..., : size - length]) if reverse else (edge[..., length:], inside), dim=2)
