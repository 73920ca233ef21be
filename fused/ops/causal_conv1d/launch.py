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

import torch
from torch import Tensor

from fused.ops.causal_conv1d.kernels import backward_kernel, forward_kernel, reduce_kernel
from fused.runtime.triton_launch import NATIVE, blocks, launching_on

MAX_WIDTH = 8
# 4 channels a thread (96 registers) and 2 (126: it keeps 58 numbers for a pair of channels). SLOTS is how many programs
# an H200 holds at once, a constant because it decides the order of sums; LOST is what a run costs beside its own
# tokens, in steps, from the instructions in front of and behind the loop.
AHEAD = {"RUNS": 4, "BE": 128, "UNROLL": 4, "num_warps": 4}
BACKWARD = {"RUNS": 4, "BE": 64, "UNROLL": 4, "num_warps": 4}
SLOTS = {"forward": 132 * 5, "backward": 132 * 4}
LOST = {"forward": 3, "backward": 8}
REDUCE = {"ROWS": 64, "BE": 32, "num_warps": 4}

Optionals = Sequence[Tensor | None] | None


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Optionals,
    states: Optionals,
    reverses: Sequence[bool],
    activated: bool,
    want_states: bool = True,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Convolve x (B, L, E) in every direction: y (directions, B, L, E), and the states (B, E, K-1) that leave, or None.

    weights are (E, K), biases (E,) or None, states (B, E, K-1) or None, each one for a direction; the directions are
    one of each kind at most. x may have any strides over clips and tokens; other channel strides than 1 cost a copy.
    """
    biases, states = _each(biases, weights), _each(states, weights)
    x = _unit(x)
    B, L, E = x.shape
    K = weights[0].shape[1]
    y = torch.empty((len(weights), B, L, E), dtype=x.dtype, device=x.device)
    if x.numel():
        ahead, back = _sides(reverses, _contiguous(weights), _contiguous(biases), _as(states, x.dtype), y)
        if back[2] is None or K == 1:
            _launch_forward(x, ahead, back, K, activated)
        else:  # looking for a state in the loop takes twice the registers: the few tokens that see it are made again
            w, b, state, out = back
            _launch_forward(x, ahead, (w, b, None, out), K, activated)
            _launch_forward(x[:, 1 - K :], (None,) * 4, (w, b, state, out[:, 1 - K :]), K, activated)
    if not want_states:
        return y, None
    return y, tuple(_leaving(x, s, K - 1, reverse) for s, reverse in zip(states, reverses, strict=True))


def _launch_forward(x: Tensor, ahead: Sequence, back: Sequence, K: int, activated: bool) -> None:
    """Of either direction its weights, bias, state and y (B, L, E), whose rows are dense; None throughout: not wanted."""
    B, L, E = x.shape
    y = ahead[3] if back[3] is None else back[3]
    run, chunks = _runs("forward", B, L if back[3] is None else L + K - 1, E, 0)
    with launching_on(x.device):
        forward_kernel[(B * chunks * blocks(E, AHEAD["BE"]),)](
            x, *ahead, *back, L, E, x.stride(0), x.stride(1), y.stride(0), chunks, run,
            K=K, SILU=activated, NATIVE=NATIVE, **AHEAD,
        )  # fmt: skip


def backward(
    dy: Sequence[Tensor] | Tensor,
    dfinals: Optionals,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Optionals,
    states: Optionals,
    reverses: Sequence[bool],
    activated: bool,
    dx: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """(dx, dweights, dbiases, dstates) of `forward`: dx summed over the directions, the others one for each.

    dy is (directions, B, L, E) or one (B, L, E) for each direction; dfinals (B, E, K-1) or None for each. dx is written
    where given, through any strides over clips and tokens, and must not overlap x or dy: runs read beyond their own tokens.
    dweights (E, K) and dbiases (E,) are float32, dstates have
    their state's dtype; a bias or state that is None has no gradient.
    """
    biases, states, dfinals = _each(biases, weights), _each(states, weights), _each(dfinals, weights)
    x = _unit(x)
    B, L, E = x.shape
    K = weights[0].shape[1]
    directions = len(weights)
    dx = torch.empty((B, L, E), dtype=x.dtype, device=x.device) if dx is None else dx
    if dx.shape != x.shape or dx.stride(2) != 1:
        raise ValueError(f"dx must be {tuple(x.shape)} with unit channel stride, got {tuple(dx.shape)}, {dx.stride()}")
    dstates = tuple(None if s is None else torch.empty((B, E, K - 1), dtype=s.dtype, device=x.device) for s in states)
    dbias = torch.empty((directions, E), dtype=torch.float32, device=x.device) if any(b is not None for b in biases) else None
    dweight = torch.empty((directions, E, K), dtype=torch.float32, device=x.device)
    if x.numel():
        run, chunks = _runs("backward", B, L, E, K - 1)
        steps = run + (K - 1) * (1 if all(s is None for s in states) else 2)
        partial = torch.empty((directions, B * chunks, K + 1, E), dtype=torch.float32, device=x.device)
        ahead, back = _sides(
            reverses, _contiguous(weights), _contiguous(biases), _as(states, x.dtype),
            _contiguous(dy), _contiguous(dfinals), dstates, partial,
        )  # fmt: skip
        with launching_on(x.device):
            backward_kernel[(B * chunks * blocks(E, BACKWARD["BE"]),)](
                x, dx, *ahead, *back, L, E, x.stride(0), x.stride(1), dx.stride(0), dx.stride(1), chunks, run, steps,
                K=K, SILU=activated, NATIVE=NATIVE, **BACKWARD,
            )  # fmt: skip
            reduce_kernel[(blocks(E, REDUCE["BE"]), directions * (K + 1))](
                partial, dweight, dbias, E, B * chunks, K=K, **REDUCE
            )
    else:  # no token: what leaves is what entered
        dweight.zero_()
        dbias = None if dbias is None else dbias.zero_()
        for dstate, dfinal in zip(dstates, dfinals, strict=True):
            if dstate is not None:
                dstate.zero_() if dfinal is None else dstate.copy_(dfinal)
    dbiases = tuple(None if b is None or dbias is None else dbias[i] for i, b in enumerate(biases))
    return dx, dweight.unbind(0), dbiases, dstates


@lru_cache(maxsize=1024)
def _runs(name: str, clips: int, tokens: int, E: int, halo: int) -> tuple[int, int]:
    """(tokens of a run, chunks of a clip): of all ways to cut a clip the one with the fewest steps, counted as waves of
    programs times steps of a run. A run and its halo are a multiple of what one round of the kernel takes."""
    config = AHEAD if name == "forward" else BACKWARD
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


def _sides(reverses: Sequence[bool], *per_direction: Sequence[Tensor | None] | Tensor) -> tuple[list, list]:
    """The arguments of ahead and those of back; None throughout for a direction that is not there."""
    if len(set(reverses)) != len(reverses):
        raise ValueError(f"reverses must name each direction once at most, got {tuple(reverses)}")
    at = {reverse: i for i, reverse in enumerate(reverses)}
    ahead, back = ([x[at[r]] if r in at else None for x in per_direction] for r in (False, True))
    return ahead, back


def _each(values: Optionals, like: Sequence) -> Sequence[Tensor | None]:
    return (None,) * len(like) if values is None else values


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _contiguous(tensors: Sequence[Tensor | None] | Tensor) -> Sequence[Tensor | None] | Tensor:
    return tensors.contiguous() if isinstance(tensors, Tensor) else [None if t is None else t.contiguous() for t in tensors]


def _as(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Sequence[Tensor | None]:
    return [None if t is None else t.to(dtype).contiguous() for t in tensors]


def _leaving(x: Tensor, state: Tensor | None, size: int, reverse: bool) -> Tensor:
    """The last (reverse: first) `size` raw inputs of the sequence and the state beyond its edge, (B, E, size), a copy."""
    length = x.shape[1]
    inside = (x[:, :size] if reverse else x[:, max(length - size, 0) :]).transpose(1, 2)
    if length >= size:
        return inside.clone(memory_format=torch.contiguous_format)
    edge = x.new_zeros((x.shape[0], x.shape[2], size)) if state is None else state.to(x.dtype)
    return torch.cat((inside, edge[..., : size - length]) if reverse else (edge[..., length:], inside), dim=2)
