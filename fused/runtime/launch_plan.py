"""A launch plan: the steps of a recorded call, ready to be repeated with tensors at other addresses; `plans.py` chooses it."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused.runtime import cuda_module
from fused.runtime.driver_calls import AddressTable, driver_launch, driver_zero
from fused.runtime.recording import Launch, NotRecordable, Operation, Recorder, View, Zero, leaves, map_leaves

ALIGNMENT = 256  # bytes, of every region of a workspace
# the functions of torch take less host time than the operations that the dispatcher names
_aten = torch.ops.aten
_FUNCTIONS = {
    _aten.mm.default: torch.mm, _aten.mm.out: torch.mm, _aten.bmm.default: torch.bmm, _aten.bmm.out: torch.bmm,
    _aten.addmm.default: torch.addmm, _aten.cat.default: torch.cat, _aten.baddbmm_.default: Tensor.baddbmm_,
    getattr(_aten.mm, "dtype", None): torch.mm, getattr(_aten.bmm, "dtype", None): torch.bmm, _aten._to_copy.default: Tensor.to,
}  # fmt: skip
# Inductor's allocation and views of CUDA memory, past the dispatcher; PyTorch's public functions where they are missing
_guards = torch._C._dynamo.guards
_empty_cuda = getattr(_guards, "_empty_strided_cuda", functools.partial(torch.empty_strided, device="cuda"))
_view = getattr(_guards, "_reinterpret_tensor", None)


class Plan:
    """The steps of a recorded call, ready to be repeated with tensors at other addresses.

    While it runs, `memory` holds the tensor of every slot, and the workspace last; `where` holds the slots' addresses.
    """

    def __init__(self, recorder: Recorder, results: Any, num_inputs: int, device: torch.device) -> None:
        """Raise NotRecordable if a result is an input, is written by no step, or is memory that the recorder does not know."""
        self._device, self._index, slots, steps = device, device.index, recorder.slots, recorder.steps
        self._shared_inputs = recorder.shared_inputs()
        results = map_leaves(results, Tensor, recorder.view)
        made = {slot for step in steps if isinstance(step, Operation) for slot in step.results if slot is not None}
        as_tensors, returned = [view for step in steps for view in _tensor_views(step)], leaves(results, View)
        if any(view.slot < num_inputs for view in returned):
            raise NotRecordable("a result is an input")
        touched = {view.slot for step in steps for view in (*_address_views(step), *_tensor_views(step))} | made
        if any(view.slot not in touched and 0 not in view.size for view in returned):
            raise NotRecordable("a result is written by nothing that was recorded: kernels are launched by recording.launch")
        # Memory that only kernels use is part of the workspace. The rest are tensors, in the shape of their first use.
        own = {view.slot for view in (*as_tensors, *returned) if view.slot >= num_inputs} - made
        self._allocations, shapes = [], dict(enumerate(slots))
        for slot in sorted(own):
            uses = [view for view in (*returned, *as_tensors) if view.slot == slot]
            shapes[slot] = use = next((view for view in uses if _is_whole(view, slots[slot])), slots[slot])
            self._allocations.append((slot, use.size, use.stride, use.dtype))
        in_workspace = [slot for slot in range(num_inputs, len(slots)) if slot not in own and slot not in made]
        self._workspace_bytes, self._workspace = _place(in_workspace, slots, steps)
        self._shapes, self._missing = shapes, [None] * (len(slots) - num_inputs)
        self._steps, self._first_fill = self._compile(steps, made)
        self._results = map_leaves(results, View, self._getter)

    def fits(self, addresses: Sequence[int]) -> bool:
        """Return whether inputs that shared their memory in the record have the same distance at these addresses."""
        for i, j, distance in self._shared_inputs:
            if addresses[j] - addresses[i] != distance:
                return False
        return True

    def run(self, tensors: list[Tensor], addresses: list[int]) -> Any:
        """Repeat the steps with other inputs, given with their addresses. Return the results, in new memory."""
        if self._index is not None and torch.cuda.current_device() != self._index:
            with torch.cuda.device(self._index):
                return self._run(tensors, addresses)
        return self._run(tensors, addresses)

    def _run(self, tensors: list[Tensor], addresses: list[int]) -> Any:
        memory: list[Any] = tensors + self._missing
        where: list[Any] = addresses + self._missing
        empty: Any = self._empty if self._index is None or torch.are_deterministic_algorithms_enabled() else _empty_cuda
        for slot, size, stride, dtype in self._allocations:
            memory[slot] = x = empty(size, stride, dtype)
            where[slot] = x.data_ptr()
        if self._workspace:
            workspace = empty((self._workspace_bytes,), (1,), torch.uint8)
            base = workspace.data_ptr()
            for slot, offset in self._workspace.items():
                where[slot] = base + offset
            memory.append(workspace)
        self._first_fill(where)
        kind = "cpu" if self._index is None else "cuda"
        autocast = torch.is_autocast_enabled(kind)
        if autocast:  # it would change the operations
            torch.set_autocast_enabled(kind, False)
        try:
            stream = None if self._index is None else cuda_module.current_stream(self._index)
            for step in self._steps:
                step(memory, where, stream)
        finally:
            if autocast:
                torch.set_autocast_enabled(kind, True)
        return _collect(self._results, memory)

    def _empty(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return new memory on the plan's device, filled where PyTorch's deterministic mode wants that."""
        return torch.empty_strided(size, stride, dtype=dtype, device=self._device)

    def _compile(self, steps: list[Any], made: set[int]) -> tuple[list[Callable[..., None]], Callable[..., None]]:
        """Return the steps as functions of (memory, where, stream), and the function that writes the first addresses."""
        entries: dict[int | None, list[tuple[int, int]]] = {None: []}  # by the slot that has to be made first
        for step in steps:
            for view in _address_views(step):
                group = entries.setdefault(view.slot if view.slot in made else None, [])
                if (view.slot, view.offset) not in group:
                    group.append((view.slot, view.offset))
        table = AddressTable(entries)
        functions: list[Callable[..., None]] = []
        for step in steps:
            if isinstance(step, Launch) and step.function is not None:
                functions.append(driver_launch(step, table))
            elif isinstance(step, Zero) and 0 in step.view.size:
                continue  # a tensor without elements has no address
            elif isinstance(step, Zero) and self._index is not None:
                functions.append(driver_zero(step.view))
            else:
                functions.append(self._call(step, table))
        return functions, table.fill(None)

    def _call(self, step: Any, table: AddressTable) -> Callable[..., None]:
        """Return a function that runs a step with tensors as its arguments."""
        if isinstance(step, Operation):
            function, options, results = _FUNCTIONS.get(step.function, step.function), step.options, step.results
            arguments = step.arguments
        else:
            zero = isinstance(step, Zero)
            function, options, results = Tensor.zero_ if zero else step.call, {}, ()
            arguments = (step.view,) if zero else step.arguments
        arguments, options = map_leaves((arguments, options), View, self._getter)
        fills = [(i, slot, table.fill(slot)) for i, slot in enumerate(results) if slot is not None]
        if not options and len(arguments) == 2 and all(isinstance(x, _Getter) for x in arguments) and len(fills) == 1:
            _, slot, fill = fills[0]
            return _product(function, arguments[0], arguments[1], slot, fill)

        def run(memory: list[Any], where: list[Any], stream: Any) -> None:
            out = function(*_collect(arguments, memory), **{name: _collect(x, memory) for name, x in options.items()})
            for i, slot, fill in fills:
                memory[slot] = x = out[i] if isinstance(out, (list, tuple)) else out
                where[slot] = x.data_ptr()
                fill(where)

        return run

    def _getter(self, view: View) -> "_Getter":
        """Return a function that takes the tensor at a place out of `memory`."""
        if view.slot in self._workspace:
            offset = (self._workspace[view.slot] + view.offset) // view.dtype.itemsize
            empty = torch.empty(0, dtype=view.dtype, device=self._device)
            return _Getter(lambda memory: empty.new_empty(0).set_(memory[-1].untyped_storage(), offset, view.size, view.stride))
        slot, shape = view.slot, self._shapes[view.slot]
        if view == shape:
            return _Getter(operator.itemgetter(slot))
        if view.dtype != shape.dtype:
            raise NotRecordable(f"a tensor of {shape.dtype} is viewed as {view.dtype}")
        size, stride, offset = view.size, view.stride, view.offset // view.dtype.itemsize
        if _view is not None:
            return _Getter(lambda memory: _view(memory[slot], size, stride, offset))
        return _Getter(lambda memory: memory[slot].as_strided(size, stride, memory[slot].storage_offset() + offset))


class _Getter(NamedTuple):
    """A function of `memory` in the place of an argument or a result."""

    get: Callable[[list[Any]], Tensor]


def _collect(value: Any, memory: list[Any]) -> Any:
    """Return nested lists and tuples with the tensor in the place of every _Getter."""
    kind = value.__class__
    if kind is _Getter:
        return value.get(memory)
    if kind is list or kind is tuple:
        return kind([_collect(x, memory) for x in value])
    return value


def _product(function: Any, left: _Getter, right: _Getter, slot: int, fill: Callable[..., None]) -> Callable[..., None]:
    """Return a step that runs a function of two tensors with one result, as most operations of a plan are."""
    get_left, get_right = left.get, right.get

    def run(memory: list[Any], where: list[Any], stream: Any) -> None:
        memory[slot] = x = function(get_left(memory), get_right(memory))
        where[slot] = x.data_ptr()
        fill(where)

    return run


def _place(slots: list[int], views: list[View], steps: list[Any]) -> tuple[int, dict[int, int]]:
    """Return the bytes of the workspace, and the offset of each slot that a step uses. Slots of other times share memory."""
    life: dict[int, list[int]] = {}
    for i, step in enumerate(steps):
        for view in (*_address_views(step), *_tensor_views(step)):
            life.setdefault(view.slot, [i, i])[1] = i
    placed: list[tuple[int, int, int]] = []  # begin, end, slot
    for slot in sorted((s for s in slots if s in life), key=lambda s: -views[s].num_bytes):
        first, last = life[slot]
        size = -(-views[slot].num_bytes // ALIGNMENT) * ALIGNMENT
        begin = 0
        for other_begin, other_end, other in sorted(placed):
            if life[other][0] <= last and first <= life[other][1] and other_begin < begin + size:
                begin = max(begin, other_end)
        placed.append((begin, begin + size, slot))
    return max((end for _, end, _ in placed), default=0), {slot: begin for begin, _, slot in placed}


def _is_whole(view: View, slot: View) -> bool:
    """Return whether a view covers its slot, in another shape, without gaps."""
    expected = 1
    for n, step in reversed([*zip(view.size, view.stride, strict=True)]):
        if n != 1 and step != expected:
            return False
        expected *= n
    return view.offset == 0 and view.dtype == slot.dtype and view.num_bytes == slot.num_bytes


def _address_views(step: Any) -> list[View]:
    """Return the places of a step that may be part of the workspace."""
    if isinstance(step, Launch):
        return leaves(step.arguments if step.function is None else step.function.arguments, View)
    return [step.view] if isinstance(step, Zero) else []


def _tensor_views(step: Any) -> list[View]:
    """Return the places that a step takes as tensors and that cannot be part of the workspace."""
    return leaves((step.arguments, step.options), View) if isinstance(step, Operation) else []
