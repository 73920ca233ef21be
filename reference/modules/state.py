"""The state that a causal model carries from chunk to chunk of a video.

The state of a mixer is a pair (conv_state, ssm_state). conv_state (B, E, K-1) holds the last K-1 inputs of the convolution, in
the dtype of the mixer's activations (here: the stream's dtype). ssm_state (B, E, N) holds h of the scan, in at least float32.
In Mamba-2 it is S (B, H, P, N), and E counts the convolved channels.

The state of a model has one such pair per layer, in a list, a tuple or a dict by layer. A model that reads a running mean has
one pair more, at index `depth`: (count (), total (B, D)), the number of patch tokens so far and their sum.

The state before a video is zero. A state is never changed in place, so it can be used again after any call. It consists of
tensors and plain containers only, so `torch.save` and `torch.load(..., weights_only=True)` take it.
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
    """Return the dtype of the output of a Linear with this weight on `device`: the weight's own, or autocast's."""
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return weight.dtype


def zero_state(B: int, E: int, K: int, scan: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
    """Return a mixer's state before the first token: zeros (B, E, K-1) in `dtype` and (B, *scan) in at least float32.

    Raise ValueError for a batch size below 1, TypeError for a dtype that is not floating-point.
    """
    if not isinstance(B, int) or isinstance(B, bool) or B < 1:
        raise ValueError(f"batch_size is {B!r}; allowed is the number of clips in a batch, an integer from 1 up")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}; allowed is the floating-point dtype of the stream, of parameters or autocast")
    precise = accumulation_dtype(dtype)
    return torch.zeros(B, E, K - 1, dtype=dtype, device=device), torch.zeros(B, *scan, dtype=precise, device=device)


def zero_mean_state(mixer_state: State, D: int) -> State:
    """Return (count (), total (B, D)) before the first token, with the batch size and the device of a mixer's state."""
    ssm_state = mixer_state[1]
    return torch.zeros((), dtype=torch.long, device=ssm_state.device), ssm_state.new_zeros(ssm_state.shape[0], D)


def unpack_state(state: ModelState, layers: int, with_mean: bool = False, name: str = "state") -> list[State]:
    """Return the pairs of a model's state in the order of layers, with the running mean's last.

    `name` is the argument's name in messages. Raise ValueError for another number of pairs, TypeError for another type.
    """
    count = layers + with_mean
    expected = f"one per layer ({layers})" + " and (count, total) of the running mean" * with_mean
    if not isinstance(state, list | tuple | Mapping):
        raise TypeError(
            f"{name} is a {type(state).__name__}; allowed: a list, tuple or dict by layer of (conv_state, ssm_state)"
        )
    if isinstance(state, Mapping) and set(state) != set(range(count)):
        raise ValueError(f"{name} has the keys {sorted(state, key=str)}; allowed: {expected}, numbered from 0 to {count - 1}")
    if len(state) != count:
        raise ValueError(f"{name} has {len(state)} entries; allowed: {expected}; `init_state` makes one")
    pairs = [state[i] for i in range(count)]
    for i, entry in enumerate(pairs):
        if not isinstance(entry, list | tuple) or len(entry) != 2 or not all(isinstance(x, Tensor) for x in entry):
            pair = "(conv_state, ssm_state)" if i < layers else "(count, total)"
            raise TypeError(
                f"entry {i} of {name} is no pair of tensors {pair}; each half alone loses the tokens before the cut"
            )
    return [(first, second) for first, second in pairs]


def pack_state(pairs: list[State], like: ModelState | None) -> ModelState:
    """Return the pairs in a container of the same kind as `like`, or in a list if that is None."""
    if isinstance(like, Mapping):
        return dict(enumerate(pairs))
    return tuple(pairs) if isinstance(like, tuple) else pairs


def check_state(state: State, x: Float[Tensor, "B L E"], K: int, scan: tuple[int, ...], layer: int | None) -> None:
    """Check a mixer's state against x, the input of its convolution; an ssm_state is (B, *scan); `layer` is named in messages.

    Raise ValueError for another shape or device, TypeError for another dtype.
    """
    B, _, E = x.shape
    of_layer = "" if layer is None else f" of layer {layer}"
    _check_tensor("conv_state" + of_layer, state[0], (B, E, K - 1), x.dtype, x.device)
    _check_tensor("ssm_state" + of_layer, state[1], (B, *scan), accumulation_dtype(x.dtype), x.device)


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError for another shape or device, TypeError for another dtype, naming the tensor."""
    if tuple(tensor.shape) != shape:
        hint = "go on with the same clips, or begin a video with `init_state`"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: {shape} for this batch and this model: {hint}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the tokens are on {device}; move it with `state_to(state, device)`")
    if tensor.dtype != dtype:
        hint = "`init_state` and `state_to` take the dtype of the stream, under autocast that of autocast"
        raise TypeError(f"{name} is {tensor.dtype}; allowed: {dtype}: {hint}")


def running_mean(tokens: Float[Tensor, "B V D"], before: State | None) -> tuple[Float[Tensor, "B D"], State]:
    """Return the mean (B, D) over these tokens and all before, and the new (count, total). Sums are in at least float32.

    `before` is the (count, total) of the tokens before, or None. Raise ValueError or TypeError if it does not fit.
    """
    precise = accumulation_dtype(tokens.dtype)
    count: Int[Tensor, ""] = torch.tensor(tokens.shape[1], device=tokens.device)
    total = tokens.to(precise).sum(1)
    if before is not None:
        _check_tensor("count of the running mean", before[0], (), count.dtype, tokens.device)
        _check_tensor("total of the running mean", before[1], tuple(total.shape), precise, tokens.device)
        count, total = before[0] + count, before[1] + total
    return (total / count).to(tokens.dtype), (count, total)


def detach_state(state: Any) -> Any:
    """Return the state, of a mixer or a model, cut off from the autograd graph: truncated backpropagation stops here.

    The result shares memory with the state. Only inference tensors, which training cannot use, are copied when the call is
    outside of inference mode. Raise TypeError for anything but a state.
    """

    def detach(x: Tensor) -> Tensor:
        return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x.detach()

    return _map_pairs(state, detach, detach)


def state_to(state: Any, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
    """Return the state, of a mixer or a model, on another device or for a stream of another dtype. Gradients flow through.

    conv_state takes `dtype`; ssm_state and total take at least float32; count stays an integer. Raise TypeError for anything
    but a state.
    """
    precise = None if dtype is None else accumulation_dtype(dtype)
    return _map_pairs(
        state,
        lambda first: first.to(device=device, dtype=dtype if first.is_floating_point() else None),
        lambda second: second.to(device=device, dtype=precise),
    )


def _map_pairs(state: Any, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Any:
    """Apply `first` to the first tensor of every pair and `second` to the second, and keep the kinds of containers."""
    if isinstance(state, Mapping):
        return {key: _map_pairs(entry, first, second) for key, entry in state.items()}
    if not isinstance(state, list | tuple):
        raise TypeError(f"state is a {type(state).__name__}; allowed: what `init_state` or a call with `return_state` gave")
    if len(state) == 2 and all(isinstance(x, Tensor) for x in state):
        mapped = [first(state[0]), second(state[1])]
    else:
        mapped = [_map_pairs(entry, first, second) for entry in state]
    return tuple(mapped) if isinstance(state, tuple) else mapped
