"""The short causal convolution in Triton: every direction of one x in one launch each way; a state that enters behind the last
token takes a small one more.

    s_t  = bias + sum_w W[w] x_{t-(K-1-w)}       ahead          s_t = bias + sum_w W[w] x_{t+(K-1-w)}       back
    y_t  = s_t sigmoid(s_t)                      or s_t
    g_t  = dy_t dy_t/ds_t
    dx_t = sum_w W[w] g_{t+(K-1-w)}              ahead          dx_t = sum_w W[w] g_{t-(K-1-w)}             back
    dW_w = sum_t g_t x_{t-(K-1-w)}                              dbias = sum_t g_t

A thread walks along a run of tokens with K-1 inputs in registers. At step t its window is x_t .. x_{t+K-1}: what `back`
needs for token t is what `ahead` needs for token t+K-1, so each input is read once for both. The walks of a program are
`RUNS` runs of `BE` channels. Nothing of y, dx and dstate depends on where a run begins; dW and dbias are summed run by
run, then program by program, in an order that depends on the shape alone.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fused.ops.causal_conv1d.kernels import backward_kernel, forward_kernel, reduce_kernel
from fused.runtime.triton_launch import NATIVE, blocks, launching_on

MAX_WIDTH = 8
# 4 channels a thread (96 registers) and 2 (126: it keeps 58 numbers for a pair of channels). SLOTS is how many programs
# an H200 holds at once, a constant because it decides the order of sums; LOST is what a run costs beside its own
# tokens, in steps, from the instructions in front of and behind the loop.
FORWARD = {"RUNS": 4, "BE": 128, "UNROLL": 4, "num_warps": 4}
BACKWARD = {"RUNS": 4, "BE": 64, "UNROLL": 4, "num_warps": 4}
SLOTS = {"forward": 132 * 5, "backward": 132 * 4}
LOST = {"forward": 3, "backward": 8}
REDUCE = {"ROWS": 64, "BE": 32, "num_warps": 4}

Optionals = Sequence[Tensor | None] | None  # None: a None for every direction
_ABSENT: tuple[Tensor | None, ...] = (None,) * 8  # the arguments of a direction that is not there


class Gradients(NamedTuple):
    """The gradients of a convolution, one entry a direction but for x; None for what was None."""

    x: Tensor  # (B, L, E), summed over the directions
    weights: tuple[Tensor, ...]  # (E, K) float32
    biases: tuple[Tensor | None, ...]  # (E,) float32
    initial_states: tuple[Tensor | None, ...]  # (B, E, K-1) in the state's dtype


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Optionals,
    initial_states: Optionals,
    reverses: Sequence[bool],
    silu: bool,
    want_states: bool = True,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Convolve x (B, L, E) in every direction: return y (directions, B, L, E), and the final states (B, E, K-1) or None.

    weights are (E, K), biases (E,), states (B, E, K-1), each one for a direction; there is one direction of each kind at most.
    x may have any strides over clips and tokens; other channel strides than 1 cost a copy.
    """
    x, none = x if x.stride(2) == 1 else x.contiguous(), (None,) * len(weights)
    biases, initial_states = biases or none, initial_states or none
    B, L, E = x.shape
    K = weights[0].shape[1]
    y = torch.empty((len(weights), B, L, E), dtype=x.dtype, device=x.device)
    if x.numel():
        if len(set(reverses)) != len(reverses):
            raise ValueError(f"reverses must name each direction once at most, got {tuple(reverses)}")
        forth = back = _ABSENT[:4]
        for i, reverse in enumerate(reverses):
            bias, state = biases[i], initial_states[i]
            bias = None if bias is None else bias.contiguous()
            state = None if state is None else state.to(x.dtype).contiguous()
            arguments = (weights[i].contiguous(), bias, state, y[i])
            forth, back = (forth, arguments) if reverse else (arguments, back)
        w, bias, state, out = back
        if state is None or out is None or K == 1:
            _launch_forward(x, forth, back, K, silu)
        else:  # looking for a state in the loop takes twice the registers: the few tokens that see it are made again
            _launch_forward(x, forth, (w, bias, None, out), K, silu)
            _launch_forward(x[:, 1 - K :], _ABSENT[:4], (w, bias, state, out[:, 1 - K :]), K, silu)
    if not want_states:
        return y, None
    pairs = zip(initial_states, reverses, strict=True)
    return y, tuple(_final_state(x, state, K - 1, reverse) for state, reverse in pairs)


def _launch_forward(
    x: Tensor, forth: tuple[Tensor | None, ...], back: tuple[Tensor | None, ...], K: int, silu: bool
) -> None:
    """Launch with the weight, bias, state and y (B, L, E) of either direction. The rows of y are dense."""
    B, L, E = x.shape
    y = forth[3] if back[3] is None else back[3]
    assert y is not None
    run, chunks = _runs("forward", B, L if back[3] is None else L + K - 1, E, 0)
    with launching_on(x.device):
        forward_kernel[(B * chunks * blocks(E, FORWARD["BE"]),)](
            x, *forth, *back, L, E, x.stride(0), x.stride(1), y.stride(0), chunks, run,
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
) -> Gradients:
    """Return the gradients of `forward`.

    dy is (directions, B, L, E) or one (B, L, E) for each direction; dfinals (B, E, K-1) or None for each. dx is written
    where given, through any strides over clips and tokens, and must not overlap x or dy: runs read beyond their own tokens.
    """
    x, none = x if x.stride(2) == 1 else x.contiguous(), (None,) * len(weights)
    biases, initial_states, dfinals = biases or none, initial_states or none, dfinals or none
    B, L, E = x.shape
    K = weights[0].shape[1]
    directions = len(weights)
    dx = torch.empty((B, L, E), dtype=x.dtype, device=x.device) if dx is None else dx
    if dx.shape != x.shape or dx.stride(2) != 1:
        raise ValueError(f"dx must be {tuple(x.shape)} with unit channel stride, got {tuple(dx.shape)}, {dx.stride()}")
    dstates = tuple(
        None if state is None else torch.empty((B, E, K - 1), dtype=state.dtype, device=x.device) for state in initial_states
    )
    has_bias, has_state = any(bias is not None for bias in biases), any(state is not None for state in initial_states)
    dbias = torch.empty((directions, E), dtype=torch.float32, device=x.device) if has_bias else None
    dweight = torch.empty((directions, E, K), dtype=torch.float32, device=x.device)
    if x.numel():
        run, chunks = _runs("backward", B, L, E, K - 1)
        steps = run + (K - 1) * (2 if has_state else 1)
        partial = torch.empty((directions, B * chunks, K + 1, E), dtype=torch.float32, device=x.device)
        forth = back = _ABSENT[:7]
        for i, reverse in enumerate(reverses):
            bias, state, dfinal = biases[i], initial_states[i], dfinals[i]
            arguments = (
                weights[i].contiguous(), None if bias is None else bias.contiguous(),
                None if state is None else state.to(x.dtype).contiguous(), dy[i].contiguous(),
                None if dfinal is None else dfinal.contiguous(), dstates[i], partial[i],
            )  # fmt: skip
            forth, back = (forth, arguments) if reverse else (arguments, back)
        with launching_on(x.device):
            backward_kernel[(B * chunks * blocks(E, BACKWARD["BE"]),)](
                x, dx, *forth, *back, L, E, x.stride(0), x.stride(1), dx.stride(0), dx.stride(1), chunks, run, steps,
                K=K, SILU=silu, NATIVE=NATIVE, **BACKWARD,
            )  # fmt: skip
            reduce_kernel[(blocks(E, REDUCE["BE"]), directions * (K + 1))](
                partial, dweight, dbias, E, B * chunks, K=K, **REDUCE
            )
    else:  # no token: the final state is the initial state
        dweight.zero_()
        dbias = None if dbias is None else dbias.zero_()
        for dstate, dfinal in zip(dstates, dfinals, strict=True):
            if dstate is not None:
                dstate.zero_() if dfinal is None else dstate.copy_(dfinal)
    dbiases = tuple(None if bias is None or dbias is None else dbias[i] for i, bias in enumerate(biases))
    return Gradients(dx, dweight.unbind(0), dbiases, dstates)


@lru_cache(maxsize=1024)
def _runs(name: str, clips: int, tokens: int, E: int, halo: int) -> tuple[int, int]:
    """(tokens of a run, chunks of a clip): of all ways to cut a clip the one with the fewest steps, counted as waves of
    programs times steps of a run. A run and its halo are a multiple of what one round of the kernel takes."""
    config = FORWARD if name == "forward" else BACKWARD
    runs, unroll = config["RUNS"], config["UNROLL"]
    programs = clips * blocks(E, config["BE"])  # of one chunk
    most = min(blocks(tokens, runs * (unroll + LOST[name])), blocks(8 * SLOTS[name], programs))
    best = (0, 0, 0)
    for chunks in range(1, most + 1):
        steps = blocks(blocks(tokens, chunks * runs) + halo, unroll) * unroll
        waves = blocks(chunks * programs, SLOTS[name])
        cost = waves * (steps + LOST[name])
        if not best[0] or cost < best[0]:
            best = cost, steps - halo, chunks
    return best[1:]


def _final_state(x: Tensor, state: Tensor | None, size: int, reverse: bool) -> Tensor:
    """Return the last (reverse: first) `size` raw inputs of the sequence and the state beyond it, (B, E, size), a copy."""
    length = x.shape[1]
    inside = (x[:, :size] if reverse else x[:, max(length - size, 0) :]).transpose(1, 2)
    if length >= size:
        return inside.clone(memory_format=torch.contiguous_format)
    edge = x.new_zeros((x.shape[0], x.shape[2], size)) if state is None else state.to(x.dtype)
    return torch.cat((inside, edge[..., : size - length]) if reverse else (edge[..., length:], inside), dim=2)
