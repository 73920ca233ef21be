"""The state of a causal model between two chunks of a video.

A mixer's state is a pair (conv_state (B, E, K-1), ssm_state (B, E, N)): the last K-1 inputs of its convolution in the dtype of
the stream, and the state of its scan in at least float32. In Mamba-2 the latter is (B, H, P, N), and E counts the convolved
channels. A model's state is a list, tuple or dict with such a pair of every layer, numbered from 0. If the model reads a
running mean, one entry (count (), total (B, D)) follows: the number of patch tokens so far, an integer, and their sum.

Zeros are the state before a video. A state holds tensors and plain containers only, which `torch.save` writes and
`torch.load` reads with weights_only. No function writes into a state, so any state can be used again.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from fused.runtime.autocast import AUTOCAST_DEVICES
from fused.runtime.dtypes import accumulation_dtype

State = tuple[Tensor, Tensor]
States = Sequence[State] | Mapping[int, State]


def linear_dtype(weight: Tensor, device: torch.device) -> torch.dtype:
    """Return the dtype of the output of a Linear with this weight on a device: the weight's, or autocast's."""
    if weight.dtype == torch.float64 or device.type not in AUTOCAST_DEVICES:
        return weight.dtype
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype


def zero_state(
    clips: int, conv: tuple[int, int], scan: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> State:
    """Return a mixer's state before the first token: zeros (clips, *conv) in `dtype`, (clips, *scan) in at least float32.

    Raises ValueError for a number of clips below 1, TypeError for a dtype that is not floating point.
    """
    if not isinstance(clips, int) or isinstance(clips, bool) or clips < 1:
        raise ValueError(f"batch_size is {clips!r}; allowed: a positive integer, the clips of a batch")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}; allowed: the floating-point dtype of the stream (parameters, or autocast's)")
    state = torch.zeros((clips, *conv), dtype=dtype, device=device)
    return state, torch.zeros((clips, *scan), dtype=accumulation_dtype(dtype), device=device)


def zero_mean(state: State, width: int) -> State:
    """Return (count (), total (B, width)) before the first token, for the clips and on the device of a mixer's state."""
    _, ssm_state = state
    return ssm_state.new_zeros((), dtype=torch.int64), ssm_state.new_zeros(len(ssm_state), width)


def unpack(state: States, depth: int, mean: bool, name: str) -> list[State]:
    """Return the pairs of a model's state in order: `depth` of layers, then (count, total) if `mean`.

    `name` is the argument's name in the errors. Raises TypeError unless the state is a list, tuple or dict of pairs of tensors,
    ValueError for too many or too few entries or for other keys.
    """
    expected = f"one per layer ({depth})" + (", then (count, total) of the running mean" if mean else "")
    if not isinstance(state, (list, tuple, Mapping)):
        raise TypeError(f"{name} is a {type(state).__name__}; allowed: a list, tuple or dict with {expected}")
    if len(state) != depth + mean:
        raise ValueError(f"{name} has {len(state)} entries; allowed: {expected}, as `init_state` makes them")
    if isinstance(state, Mapping) and (unknown := [key for key in state if key not in range(len(state))]):
        raise ValueError(f"{name} has the keys {unknown}; allowed: 0 to {len(state) - 1}, {expected}")
    for i in range(len(state)):
        if not (isinstance(state[i], (list, tuple)) and len(state[i]) == 2 and all(isinstance(x, Tensor) for x in state[i])):
            form = "(conv_state, ssm_state)" if i < depth else "(count, total)"
            raise TypeError(f"entry {i} of {name} is not two tensors; allowed: {form}, as `init_state` makes them")
    return [cast(State, tuple(state[i])) for i in range(len(state))]


def pack(pairs: Any, like: States | None, mean: State | None = None) -> States:
    """Return the pairs, followed by a running mean, in a container of the type of `like`: dict, tuple, or else list."""
    pairs = [*pairs] if mean is None else [*pairs, mean]
    if isinstance(like, Mapping):
        return {i: pair for i, pair in enumerate(pairs)}
    return tuple(pairs) if isinstance(like, tuple) else pairs


def check_mixer_state(state: State, x: Float[Tensor, "B L E"], K: int, scan: tuple[int, ...], layer: int | None) -> None:
    """Raise unless `state` fits x, the input of a mixer's convolution of width K, and a scan whose state is (B, *scan):
    ValueError for shapes and devices, TypeError for dtypes. `layer` is the mixer's number for the message."""
    clips, _, E = x.shape
    suffix = "" if layer is None else f" of layer {layer}"
    _check(f"conv_state{suffix}", state[0], (clips, E, K - 1), x.dtype, x.device)
    _check(f"ssm_state{suffix}", state[1], (clips, *scan), accumulation_dtype(x.dtype), x.device)


def _check(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless `value` has this shape, device and dtype."""
    if value.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; allowed: {shape}. Every chunk needs the clips, and the model, whose state "
            "it is; a new video begins with `init_state`"
        )
    if value.device != device:
        hint = f"state_to(state, {str(device)!r}) moves it"
        raise ValueError(f"{name} is on {value.device}; allowed: {device}, where the tokens are; {hint}")
    if value.dtype != dtype:
        raise TypeError(
            f"{name} is {value.dtype}; allowed: {dtype}. `init_state` and `state_to` take the stream's dtype, which is that of "
            "autocast where it is on, and keep what has to be precise in float32"
        )


def running_mean(tokens: Float[Tensor, "B V D"], before: State | None) -> tuple[Float[Tensor, "B D"], State]:
    """Return the mean of all tokens so far, in the tokens' dtype, and (count, total) for the next chunk.

    `before` is (count, total) of the chunks before. Sums and divides in at least float32.

    Raises ValueError or TypeError for a (count, total) that does not fit.
    """
    total = tokens.sum(dim=1, dtype=accumulation_dtype(tokens.dtype))
    count = torch.full((), tokens.shape[1], device=tokens.device)
    if before is not None:
        _check("count of the running mean", before[0], (), count.dtype, total.device)
        _check("total of the running mean", before[1], tuple(total.shape), total.dtype, total.device)
        count, total = count + before[0], total + before[1]
    return (total / count).to(tokens.dtype), (count, total)


def detach_state(state: Any) -> Any:
    """Return a mixer's or model's state without its autograd history.

    Memory is shared, but a state that was made in inference mode is copied outside of that mode, where autograd refuses it.
    """

    def detached(x: Tensor) -> Tensor:
        return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x.detach()

    return _map_pairs(state, detached, detached)


def state_to(state: Any, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
    """Return a mixer's or model's state on another device, or for a stream of another dtype. Gradients pass through.

    conv_state gets the stream's `dtype`; ssm_state and total get it widened to at least float32; count stays an integer.
    """

    def first(x: Tensor) -> Tensor:
        return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

    def second(x: Tensor) -> Tensor:
        return x.to(device=device, dtype=dtype and accumulation_dtype(dtype))

    return _map_pairs(state, first, second)


def _map_pairs(state: Any, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Any:
    """Return the state with `first` applied to the first tensor of every pair and `second` to the second."""
    match state:
        case [Tensor() as one, Tensor() as other]:
            found = [first(one), second(other)]
        case list() | tuple():
            found = [_map_pairs(entry, first, second) for entry in state]
        case Mapping():
            return {key: _map_pairs(entry, first, second) for key, entry in state.items()}
        case _:
            raise TypeError(f"state is a {type(state).__name__}; allowed: what `init_state` made or `return_state` returned")
    return tuple(found) if isinstance(state, tuple) else found
