"""Inference by CUDA graphs: a model whose calls are replays, without the Python of its forward."""

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fused.rules import check_integer
from fused.runtime.autocast import autocast_of_graph
from fused.runtime.graphs import CudaRecorder, Recorder, Recording, warm
from fused.runtime.modes import is_batch_invariant


@dataclass(frozen=True)
class _Graph:
    """A recorded call."""

    inputs: dict[str | int, Tensor]  # which the graph reads
    recording: Recording
    state: list[Any]  # the model's, see `_state`
    kept: list[Any]  # what the state speaks of: as long as it is alive, nothing else can have its addresses


class Graphed:
    """A model in eval mode whose calls replay CUDA graphs; `graphed` makes it.

    A call takes the model's arguments, which are tensors or None, on any device, and returns its output, without gradients. The
    output is the caller's: later calls do not write into it. A call of new shapes or dtypes, or under another autocast, runs
    the model a few times and records a graph; the `max_graphs` that were used last are kept. Calls may come from several
    threads and streams.

    A graph is recorded again when parameters or buffers of the model were written to or replaced, and when modules or hooks
    were added, removed or replaced. Other Python state of a model, such as an attribute that its forward reads, is that of the
    recording: `clear` forgets all graphs.
    """

    def __init__(
        self, model: nn.Module, max_graphs: int = 8, recorder: Callable[[torch.device], Recorder] = CudaRecorder
    ) -> None:
        self.model, self.max_graphs, self._make_recorder = model, max_graphs, recorder
        self._device = self._find_device()
        self._recorder: Recorder | None = None
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Graphed({type(self.model).__name__}, {len(self._graphs)} graphs, {self.memory_bytes / 2**20:.1f} MiB)"

    @property
    def memory_bytes(self) -> int:
        """The GPU memory of all graphs, with the copies of their input: bytes that a graph shares with others count once."""
        inputs = sum(x.nbytes for graph in self._graphs.values() for x in graph.inputs.values())
        return inputs + (self._recorder.memory_bytes if self._recorder is not None else 0)

    def clear(self) -> None:
        """Forget all graphs, and free their memory."""
        with self._lock:
            self._clear()

    def __call__(self, *args: Tensor | None, **kwargs: Tensor | None) -> Any:
        """Return the model's output for its arguments.

        Raises TypeError for an argument that is neither a tensor nor None, ValueError for a model in training mode, one that
        moved to a CPU, or an input that requires a gradient, RuntimeError for a model whose forward cannot be recorded, and the
        model's own errors.
        """
        if self.model.training:
            raise ValueError("graphed: model is in training mode; allowed: eval mode, after model.eval()")
        given: dict[str | int, Any] = dict(enumerate(args))
        given.update(kwargs)
        for name, value in given.items():
            self._check(name, value)
        tensors = {name: value for name, value in given.items() if value is not None}
        with self._lock, torch.inference_mode(False), torch.no_grad():
            key = self._key(given)
            graph = self._graphs.get(key)
            if graph is not None:
                # the GPU works while the host looks whether the graph still is that of the model
                output = self._replay(graph, tensors)
                if graph.state == self._state():
                    self._graphs.move_to_end(key)
                    return output
                self._clear()
            while len(self._graphs) >= self.max_graphs:
                self._graphs.popitem(last=False)
            graph = self._graphs[key] = self._record(given, tensors)
            return self._replay(graph, tensors)

    def _check(self, name: str | int, value: Any) -> None:
        """Raise TypeError or ValueError for an argument that a graph cannot take."""
        if value is None or (isinstance(value, Tensor) and not (value.requires_grad and torch.is_grad_enabled())):
            return
        if isinstance(name, int):
            name = ([*inspect.signature(self.model.forward).parameters] + [f"argument {name}"] * (name + 1))[name]
        if not isinstance(value, Tensor):
            raise TypeError(
                f"graphed: {name} is {value!r}; allowed: tensors and None. A graph has a value of Python as it was recorded: "
                "write a module around the model that sets it"
            )
        raise ValueError(
            f"graphed: {name} requires a gradient; allowed: inference, without gradients. For training there is "
            "torch.cuda.make_graphed_callables"
        )

    def _key(self, given: dict[str | int, Any]) -> Any:
        """Return what a graph is recorded for, beside the model."""
        kind = self._device.type
        shapes = tuple((name, None if x is None else (x.shape, x.dtype)) for name, x in given.items())
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        modes = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), is_batch_invariant()
        return shapes, autocast, modes

    def _record(self, given: dict[str | int, Any], tensors: dict[str | int, Tensor]) -> _Graph:
        """Return a graph of the model's call for these arguments."""
        state = self._state()
        kept = [*self.model.modules(), *(x.detach() for x in (*self.model.parameters(), *self.model.buffers()))]
        if self._recorder is None:
            self._device = self._find_device()
            self._recorder = self._make_recorder(self._device)
        device = self._device
        inputs = {name: torch.empty(x.shape, dtype=x.dtype, device=device) for name, x in tensors.items()}
        for name, x in tensors.items():
            inputs[name].copy_(x)
        arguments = {name: inputs.get(name) for name in given}
        args = [x for name, x in arguments.items() if isinstance(name, int)]
        kwargs = {name: x for name, x in arguments.items() if isinstance(name, str)}
        autocast = autocast_of_graph(device)

        def call() -> Any:
            with autocast():
                return self.model(*args, **kwargs)

        with self._recorder.in_turn():
            warm(self._recorder, call)
        try:
            recording = self._recorder.record(call)
        except RuntimeError as error:
            raise RuntimeError(
                f"graphed: the forward of {type(self.model).__name__} cannot be recorded for these arguments: {error}"
            ) from error
        return _Graph(inputs, recording, state, kept)

    def _replay(self, graph: _Graph, tensors: dict[str | int, Tensor]) -> Any:
        """Return the output of a graph for other tensors."""
        assert self._recorder is not None
        with self._recorder.in_turn():
            for name, x in tensors.items():
                graph.inputs[name].copy_(x)
            graph.recording.replay()
            output = graph.recording.output
            return output.clone() if isinstance(output, Tensor) else tree_map_only(Tensor, torch.clone, output)

    def _state(self) -> list[Any]:
        """Return what a graph depends on in the model, to be compared.

        It is where parameters and buffers are and how often they were written to, and which modules and hooks there are.
        """
        state: list[Any] = []
        waiting = [self.model]
        while waiting:
            module = waiting.pop()
            state += (id(module), module.training, tuple(module._forward_hooks), tuple(module._forward_pre_hooks))
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None:
                        state += (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.dtype)
            waiting += [child for child in module._modules.values() if child is not None]
        return state

    def _find_device(self) -> torch.device:
        """Return the model's device. Raise ValueError for several, for none, and for another than the recorder's."""
        devices = {tensor.device for tensor in (*self.model.parameters(), *self.model.buffers())}
        if len(devices) != 1 or (self._make_recorder is CudaRecorder and next(iter(devices)).type != "cuda"):
            found = " and ".join(sorted(map(str, devices))) or "no device, for want of parameters"
            raise ValueError(f"graphed: model is on {found}; allowed: one CUDA device. On others call the model itself")
        return next(iter(devices))

    def _clear(self) -> None:
        """Forget all graphs; the caller holds the lock."""
        self._graphs.clear()
        self._recorder = None


def graphed(model: nn.Module, max_graphs: int = 8) -> Graphed:
    """Return a callable with the model's signature that replays CUDA graphs, for inference.

        fast = fused.graphed(model.eval())
        logits = fast(clips)

    It returns what `model` returns under `torch.no_grad()`, bit for bit. `Graphed` says when a graph is recorded, and what its
    arguments may be. `max_graphs`, at least 1, bounds the number of graphs, one for each shape of the arguments. Raises
    TypeError unless `model` is a module, ValueError for a model that is not on a CUDA device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"graphed: model must be a torch.nn.Module, got {type(model).__name__}")
    check_integer("graphed", "max_graphs", max_graphs, 1)
    return Graphed(model, max_graphs)
