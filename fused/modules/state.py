"""The state of a causal stream: made, checked, carried, moved and cut off from its graph.

For a mixer a pair of tensors, (conv_state (B, E, K-1) in the stream's dtype, ssm_state (B, E, N) in at least float32): the
raw inputs before the cut, and the recurrence's state. For a model a list, tuple or dict with that pair of every layer from 0
on, and, where the model reads a running mean, behind them (count (), total (B, D)): how many patch tokens have gone by, an
integer, and their sum. Zeros stand for nothing before. Only tensors and plain containers, which `torch.save` writes and
`torch.load` reads with weights_only; none is ever written to, so that any state can serve again.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from fused.models.videomamba.config import VideoMambaConfig
from fused.runtime.dtypes import accumulation_dtype

State = tuple[Tensor, Tensor]
States = Sequence[State] | Mapping[int, State]


class Chunk(NamedTuple):
    """What a forward continues: the layers' states and the running mean, if any, and its place, None for a whole video."""

    states: list[State] | None = None
    mean: State | None = None
    offset: int | None = None


def linear_dtype(weight: Tensor, device: torch.device) -> torch.dtype:
    """The dtype in which a Linear of this weight gives its output on a device."""
    if weight.dtype == torch.float64 or not torch.amp.is_autocast_available(device.type):
        return weight.dtype
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype


def blank(
    clips: int, conv: tuple[int, int], scan: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "B E S"], Float[Tensor, "B E N"]]:
    """A mixer's state with nothing before it, its tensors (clips, *conv) and (clips, *scan).

    Raises ValueError for a number of clips below 1, TypeError for a dtype that is not floating point.
    """
    if not isinstance(clips, int) or isinstance(clips, bool) or clips < 1:
        raise ValueError(f"batch_size is {clips!r}; allowed: a positive integer, the clips of a batch")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}; allowed: the floating-point dtype of the stream (parameters, or autocast's)")
    state = torch.zeros((clips, *conv), dtype=dtype, device=device)
    return state, torch.zeros((clips, *scan), dtype=accumulation_dtype(dtype), device=device)


def blank_mean(state: State, width: int) -> State:
    """(count, total) with nothing before it, beside a layer's blank state."""
    _, scan = state
    return scan.new_zeros((), dtype=torch.int64), scan.new_zeros(len(scan), width)


def unpack(state: States, depth: int, mean: bool, name: str) -> list[State]:
    """The pairs of a model's state in order.

    Raises TypeError for what is no list, tuple or dict of pairs of tensors, ValueError for too many, too few or other keys.
    """
    due = f"one per layer ({depth})" + (", then (count, total) of the running mean" if mean else "")
    if not isinstance(state, (list, tuple, Mapping)):
        raise TypeError(f"{name} is a {type(state).__name__}; allowed: a list, tuple or dict with {due}")
    if len(state) != depth + mean:
        raise ValueError(f"{name} has {len(state)} entries; allowed: {due}, as `init_state` makes them")
    if isinstance(state, Mapping) and (strange := [key for key in state if key not in range(len(state))]):
        raise ValueError(f"{name} has the keys {strange}; allowed: 0 to {len(state) - 1}, {due}")
    for i in range(len(state)):
        if not (isinstance(state[i], (list, tuple)) and len(state[i]) == 2 and all(isinstance(x, Tensor) for x in state[i])):
            form = "(conv_state, ssm_state)" if i < depth else "(count, total)"
            raise TypeError(f"entry {i} of {name} is not two tensors {form}; neither does without the other")
    return [cast(State, tuple(state[i])) for i in range(len(state))]


def continued(
    config: VideoMambaConfig, mean: bool, state: States | None, return_state: bool, offset: int | None, use_image: bool = False
) -> Chunk:
    """What the arguments of a model's forward ask for; `mean` says whether it reads a running one.

    Raises ValueError for what cannot be streamed, or not like that, and what `unpack` raises.
    """
    if state is None and not return_state and offset is None:
        return Chunk()
    if use_image or config.num_frames is None:
        raise ValueError(
            "an image is not streamed: ssm_state, return_state and temporal_pos_offset are for videos. A frame of a video "
            "is a clip (B, C, kernel_size, H, W), and use_image is False"
        )
    if config.bimamba:
        raise ValueError(
            "a bidirectional model cannot be streamed: one of its directions starts at the last token of the video, so "
            "that a chunk would need the future. Run the whole clip at once, or build the model with bimamba=False"
        )
    if state is None:
        if offset:
            raise ValueError(
                f"temporal_pos_offset is {offset} without an ssm_state: pass what the chunk before returned for "
                "return_state=True, or init_state(batch_size) to forget what was before"
            )
        return Chunk(offset=0)
    if offset is None:
        raise ValueError(
            "ssm_state came without temporal_pos_offset; allowed: the tubelets of all chunks before, 0 for a state that "
            "init_state made"
        )
    pairs = unpack(state, config.depth, mean, "ssm_state")
    return Chunk(pairs[: config.depth], pairs[-1] if mean else None, offset)


def pack(pairs: Any, like: States | None, mean: State | None = None) -> States:
    """The pairs, and behind them a running mean, in a dict, tuple or list, whichever `like` is; a list for None."""
    pairs = [*pairs] if mean is None else [*pairs, mean]
    if isinstance(like, Mapping):
        return {i: pair for i, pair in enumerate(pairs)}
    return tuple(pairs) if isinstance(like, tuple) else pairs


def check_mixer_state(state: State, x: Float[Tensor, "B L E"], taps: int, N: int, layer: int | None) -> None:
    """Raise unless the state is one of the mixer whose convolution and scan are about to take x: ValueError for shapes and
    devices, TypeError for dtypes."""
    clips, _, E = x.shape
    of = "" if layer is None else f" of layer {layer}"
    _check(f"conv_state{of}", state[0], (clips, E, taps - 1), x.dtype, x.device)
    _check(f"ssm_state{of}", state[1], (clips, E, N), accumulation_dtype(x.dtype), x.device)


def _check(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
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
    """The mean of all tokens up to here, in the tokens' dtype, and (count, total) for the next chunk.

    Adds and divides in at least float32. Raises ValueError or TypeError for a (count, total) that does not fit.
    """
    total = tokens.sum(dim=1, dtype=accumulation_dtype(tokens.dtype))
    count = torch.full((), tokens.shape[1], device=tokens.device)
    if before is not None:
        _check("count of the running mean", before[0], (), count.dtype, total.device)
        _check("total of the running mean", before[1], tuple(total.shape), total.dtype, total.device)
        count, total = count + before[0], total + before[1]
    return (total / count).to(tokens.dtype), (count, total)


def detach_state(state: Any) -> Any:
    """A mixer's or model's state without its history: gradients end here. Memory is shared, unless the state was made in
    inference mode and is wanted outside of it, where autograd would refuse it: then it is copied.
    """

    def cut(x: Tensor) -> Tensor:
        return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x.detach()

    return _each(state, cut, cut)


def state_to(state: Any, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
    """A mixer's or model's state on another device, or for a stream of another dtype. Gradients pass through.

    In the stream's `dtype` is what was an input of a convolution; the rest is in at least float32, and a count an integer.
    """

    def first(x: Tensor) -> Tensor:
        return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

    def second(x: Tensor) -> Tensor:
        return x.to(device=device, dtype=dtype and accumulation_dtype(dtype))

    return _each(state, first, second)


def _each(state: Any, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Any:
    match state:
        case [Tensor() as one, Tensor() as other]:
            found = [first(one), second(other)]
        case list() | tuple():
            found = [_each(entry, first, second) for entry in state]
        case Mapping():
            return {key: _each(entry, first, second) for key, entry in state.items()}
        case _:
            raise TypeError(f"state is a {type(state).__name__}; allowed: what `init_state` made or `return_state` returned")
    return tuple(found) if isinstance(state, tuple) else found
