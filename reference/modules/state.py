"""What a causal model carries from chunk to chunk of a video.

A mixer's state is a pair (conv_state (B, E, K-1), ssm_state (B, E, N)): the last K-1 inputs of its convolution, in the dtype
of the stream, and h of its scan, in at least float32. A model's state has one pair per layer, in a list, a tuple or a dict by
layer. A model that reads a running mean has one entry more, number `depth`: (count (), total (B, D)), how many patch tokens
there were and their sum.

Zeros are the state before a video. A state is never changed in place: it can be used again after any call, and nothing but
tensors and plain containers is in it, for `torch.save` and `torch.load(..., weights_only=True)`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reference.ops.dtypes import accumulation_dtype

State = tuple[Tensor, Tensor]  # (conv_state, ssm_state), or (count, total)
ModelState = Sequence[State] | Mapping[int, State]


def stream_dtype(weight: Tensor, device: torch.device) -> torch.dtype:
    """What a Linear with this weight returns: its own dtype, or autocast's."""
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return weight.dtype


def zero_state(B: int, E: int, K: int, N: int, dtype: torch.dtype, device: torch.device) -> State:
    """A mixer's state before the first token. Raises ValueError or TypeError for no clips, or a dtype that is no stream's."""
    if not isinstance(B, int) or isinstance(B, bool) or B < 1:
        raise ValueError(f"batch_size is {B!r}; allowed is the number of clips in a batch, an integer from 1 up")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}; allowed is the floating-point dtype of the stream, of parameters or autocast")
    precise = accumulation_dtype(dtype)
    return torch.zeros(B, E, K - 1, dtype=dtype, device=device), torch.zeros(B, E, N, dtype=precise, device=device)


def zero_mean(like: State, D: int) -> State:
    """(count, total) before the first token, for the clips and on the device of a mixer's state."""
    ssm_state = like[1]
    return torch.zeros((), dtype=torch.long, device=ssm_state.device), ssm_state.new_zeros(ssm_state.shape[0], D)


def entries(state: ModelState, layers: int, with_mean: bool = False, name: str = "state") -> list[State]:
    """The entries of a model's state by number. Raises ValueError for another number of them, TypeError for other things."""
    count = layers + with_mean
    due = f"one per layer ({layers})" + " and (count, total) of the running mean" * with_mean
    if not isinstance(state, list | tuple | Mapping):
        raise TypeError(
            f"{name} is a {type(state).__name__}; allowed: a list, tuple or dict by layer of (conv_state, ssm_state)"
        )
    if isinstance(state, Mapping) and set(state) != set(range(count)):
        raise ValueError(f"{name} has the keys {sorted(state, key=str)}; allowed: {due}, numbered from 0 to {count - 1}")
    if len(state) != count:
        raise ValueError(f"{name} has {len(state)} entries; allowed: {due}; `init_state` makes one")
    found = [state[i] for i in range(count)]
    for i, entry in enumerate(found):
        if not isinstance(entry, list | tuple) or len(entry) != 2 or not all(isinstance(x, Tensor) for x in entry):
            pair = "(conv_state, ssm_state)" if i < layers else "(count, total)"
            raise TypeError(
                f"entry {i} of {name} is no pair of tensors {pair}; each half alone loses the tokens before the cut"
            )
    return [(first, second) for first, second in found]


def packed(new: list[State], like: ModelState | None) -> ModelState:
    """Entries in the kind of container that came; in a list if none came."""
    if isinstance(like, Mapping):
        return dict(enumerate(new))
    return tuple(new) if isinstance(like, tuple) else new


def check_state(state: State, x: Float[Tensor, "B L E"], K: int, N: int, layer: int | None) -> None:
    """Raise unless a mixer's state fits the tokens x that its convolution is about to read: ValueError for a shape or device,
    TypeError for a dtype."""
    B, _, E = x.shape
    where = "" if layer is None else f" of layer {layer}"
    _check("conv_state" + where, state[0], (B, E, K - 1), x.dtype, x.device)
    _check("ssm_state" + where, state[1], (B, E, N), accumulation_dtype(x.dtype), x.device)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(tensor.shape) != shape:
        hint = "go on with the same clips, or begin a video with `init_state`"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: {shape} for this batch and this model: {hint}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the tokens are on {device}; move it with `state_to(state, device)`")
    if tensor.dtype != dtype:
        hint = "`init_state` and `state_to` take the dtype of the stream, under autocast that of autocast"
        raise TypeError(f"{name} is {tensor.dtype}; allowed: {dtype}: {hint}")


def running_mean(tokens: Float[Tensor, "B V D"], before: State | None) -> tuple[Float[Tensor, "B D"], State]:
    """The mean over these tokens and all that came before, and the (count, total) to carry on. Sums in at least float32.

    Raises ValueError or TypeError for a (count, total) that does not fit.
    """
    precise = accumulation_dtype(tokens.dtype)
    count: Int[Tensor, ""] = torch.tensor(tokens.shape[1], device=tokens.device)
    total = tokens.to(precise).sum(1)
    if before is not None:
        _check("count of the running mean", before[0], (), count.dtype, tokens.device)
        _check("total of the running mean", before[1], tuple(total.shape), precise, tokens.device)
        count, total = before[0] + count, before[1] + total
    return (total / count).to(tokens.dtype), (count, total)


def detach_state(state: Any) -> Any:
    """The same state, of a mixer or a model, without the graph behind it: where truncated backpropagation stops.

    Shares memory with it, but for what was made in inference mode, which training cannot use: that is copied outside of it.
    """

    def detached(x: Tensor) -> Tensor:
        return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x.detach()

    return _mapped(state, detached, detached)


def state_to(state: Any, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
    """The same state, of a mixer or a model, on another device, or for a stream of another dtype; gradients flow through it.

    `dtype` is the stream's: conv_state takes it, ssm_state and total take at least float32, count stays an integer.
    """
    precise = None if dtype is None else accumulation_dtype(dtype)
    return _mapped(
        state,
        lambda first: first.to(device=device, dtype=dtype if first.is_floating_point() else None),
        lambda second: second.to(device=device, dtype=precise),
    )


def _mapped(state: Any, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Any:
    """Functions of the first and second tensor of every pair, in containers of the same kinds."""
    if isinstance(state, Mapping):
        return {key: _mapped(entry, first, second) for key, entry in state.items()}
    if not isinstance(state, list | tuple):
        raise TypeError(f"state is a {type(state).__name__}; allowed: what `init_state` or a call with `return_state` gave")
    if len(state) == 2 and all(isinstance(x, Tensor) for x in state):
        mapped = [first(state[0]), second(state[1])]
    else:
        mapped = [_mapped(entry, first, second) for entry in state]
    return tuple(mapped) if isinstance(state, tuple) else mapped
