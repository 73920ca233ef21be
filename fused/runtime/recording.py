"""A record of what an operator does on the host: memory that it allocates, kernels that it launches, PyTorch operations.

    with Recorder(inputs) as recorder:
        results = kernel(*arguments)

`launch_plan.py` makes a launch plan of it. Within the context, `launch` and PyTorch's dispatcher report to the recorder.
"""

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

Argument = Tensor | int | float | None
_aten = torch.ops.aten
_EMPTY = {
    _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default,
    _aten.new_empty_strided.default,
}  # fmt: skip
_ZEROS = {_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default}
_current = threading.local()


class Function(NamedTuple):
    """A kernel as the driver launches it: its handle, the grid's blocks, the threads and dynamic shared bytes of a block."""

    handle: Any
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: tuple[Any, ...]  # those of the launch that the kernel takes, without the ones that are compiled into it
    parameter_sizes: Sequence[int]  # bytes of each parameter; more parameters than arguments are null pointers


class View(NamedTuple):
    """A tensor of the record: a region of a slot."""

    slot: int
    offset: int  # bytes from the slot's first element
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """The bytes of its elements."""
        return math.prod(self.size) * self.dtype.itemsize


class Launch(NamedTuple):
    """A launch of a kernel. `call` repeats it with other tensors; `function` is None where there is no driver to do that."""

    call: Callable[..., Any]
    arguments: tuple[Any, ...]  # with a View for each tensor
    function: Function | None


class Zero(NamedTuple):
    """Memory that is set to zero, all of an allocation."""

    view: View


class Operation(NamedTuple):
    """A call of a PyTorch operation. `results` are the slots of its new tensors, None for a result that is an argument."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    results: tuple[int | None, ...]


class NotRecordable(Exception):
    """Something that a plan could not repeat, as the message says."""


class Recorder(TorchDispatchMode):
    """The steps of an operator, and its slots: inputs, then whatever is allocated, each a storage of its own."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[Launch | Zero | Operation] = []
        self.slots: list[View] = []  # each slot's whole memory, as it was allocated
        self._first_address: list[int] = []
        self._slot_of_storage: dict[int, list[int]] = {}
        self.reason: str | None = None  # why no plan can repeat the steps
        for x in inputs:
            self._add_slot(x, shared=True)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return that nothing here is traced, so that PyTorch does not import its compiler, which takes seconds, to say so."""
        return False

    def __enter__(self) -> "Recorder":
        super().__enter__()
        _current.recorder = self
        return self

    def __exit__(self, *error: Any) -> None:
        _current.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a PyTorch operation and note it, unless it only makes views."""
        kwargs = kwargs or {}
        arguments, options = self._views((args, kwargs))
        out = func(*args, **kwargs)
        results = out if isinstance(out, (list, tuple)) else (out,)
        if func in _EMPTY:
            self._add_slot(out)
        elif func in _ZEROS:
            self._add_slot(out)
            self.steps.append(Zero(self.view(out)))
        elif not all(isinstance(x, Tensor) for x in results):
            self.reason = f"{func} returns something else than tensors"
        else:
            given = {x.untyped_storage()._cdata for x in leaves((args, kwargs), Tensor)}
            new = [x.untyped_storage()._cdata not in given for x in results]
            if func._schema.is_mutable or any(new):
                slots = tuple(self._add_slot(x) if is_new else None for x, is_new in zip(results, new, strict=True))
                self.steps.append(Operation(func, arguments, options, slots))
        return out

    def note(self, call: Callable[..., Any], arguments: tuple[Argument, ...], function: Function | None) -> None:
        """Note a launch."""
        if function is not None:
            function = function._replace(arguments=self._views(function.arguments))
        self.steps.append(Launch(call, self._views(arguments), function))

    def view(self, x: Tensor) -> View:
        """Return the place of a tensor. Raises NotRecordable for one that is neither an input nor was allocated meanwhile."""
        slots = self._slot_of_storage.get(x.untyped_storage()._cdata)
        if slots is None:
            raise NotRecordable(f"a tensor of shape {tuple(x.shape)} is neither an input nor allocated by the operator")
        slot = slots[0]  # of inputs that share their storage any will do, because a plan checks their distance
        offset = x.data_ptr() - self._first_address[slot] if x.numel() else 0
        return View(slot, offset, tuple(x.shape), x.stride(), x.dtype)

    def shared_inputs(self) -> list[tuple[int, int, int]]:
        """Return (i, j, address of j minus address of i) for inputs i and j that share their storage."""
        return [
            (slots[0], j, self._first_address[j] - self._first_address[slots[0]])
            for slots in self._slot_of_storage.values() for j in slots[1:]
        ]  # fmt: skip

    def _add_slot(self, x: Tensor, shared: bool = False) -> int:
        storage, slot = x.untyped_storage()._cdata, len(self.slots)
        others = self._slot_of_storage.get(storage, []) if shared else []
        self._slot_of_storage[storage] = [*others, slot]
        self.slots.append(View(slot, 0, tuple(x.shape), x.stride(), x.dtype))
        self._first_address.append(x.data_ptr())
        return slot

    def _views(self, value: Any) -> Any:
        """Return nested arguments with a View for each tensor."""
        return map_leaves(value, Tensor, self.view)


def leaves(value: Any, kind: type) -> list[Any]:
    """Return all that is of a `kind` in nested lists, tuples and dictionaries."""
    if isinstance(value, kind):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [x for y in values for x in leaves(y, kind)]


def map_leaves(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Return nested lists, tuples and dictionaries with the function applied to all that is of a `kind`."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([map_leaves(x, kind, function) for x in value])
    return {name: map_leaves(x, kind, function) for name, x in value.items()} if isinstance(value, dict) else value


def launch(call: Callable[..., Any], args: tuple[Argument, ...], describe: Callable[[Any], Function | None]) -> None:
    """Launch a kernel by call(*args) and note it in a record; `describe` tells of call's result what the driver was told."""
    current: Recorder | None = getattr(_current, "recorder", None)
    if current is None:
        call(*args)
        return
    with _disable_current_modes():  # an interpreter of kernels uses PyTorch operations
        launched = call(*args)
    current.note(call, args, describe(launched))


def launch_cuda(module: Any, name: str, grid: tuple[int, int, int], threads: int, shared: int, *args: Argument) -> None:
    """Queue a kernel of a `cuda_module.Module`, whose `launch` has these arguments, and note it in a record."""

    def call(*tensors: Argument) -> None:
        module.launch(name, grid, threads, shared, *tensors)

    def describe(_: None) -> Function | None:
        return module.function(name, grid, threads, shared, args) if hasattr(module, "function") else None

    launch(call, args, describe)
