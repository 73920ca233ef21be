"""Launch plans: what an operator does on the host, recorded once for its shapes and repeated at less cost.

An operator's Python code chooses grids, configurations and workspaces, makes views and packs arguments. All of this depends
only on the shapes, strides, dtypes, alignments and options of its arguments. Its second call with the same of these is recorded
(`recording.py`). From the third on a plan (`launch_plan.py`) runs instead: it allocates the results and one workspace,
writes addresses into the arguments of the kernels, and launches them. Kernels, their arguments and their order are those of the
record, so that results have the same bits.

Another shape, stride, dtype, device or alignment is another plan. Weights are read at every call, so none can be stale. Plans
belong to a thread, and the LIMIT plans of an operator that were used last are kept.
"""

import contextlib
import functools
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from fused.runtime.launch_plan import Plan
from fused.runtime.recording import NotRecordable, Recorder

LIMIT = 256
_ADDRESS, _STRIDE, _DEVICE = Tensor.data_ptr, Tensor.stride, Tensor.get_device
_SHAPE_AND_DTYPE = operator.attrgetter("shape", "dtype")
_enabled = {"cuda": True, "cpu": False}  # on a CPU, where kernels are only emulated, tests enable it


@contextlib.contextmanager
def enabled(value: bool, device_type: str = "cuda") -> Iterator[None]:
    """Make and use plans on this type of device, or do not, within the context."""
    before = _enabled[device_type]
    _enabled[device_type] = value
    try:
        yield
    finally:
        _enabled[device_type] = before


class Planned:
    """A function of tensors, lists of tensors and plain values, with a plan for each kind of arguments that it meets again.

    The first argument is a tensor or a list of tensors, on whose device the function runs.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._of_thread = threading.local()

    def __call__(self, *arguments: Any) -> Any:
        """Return function(*arguments), or NotImplemented if one of their tensors is of a subclass of Tensor but Parameter."""
        tensors: list[Tensor] = []
        key: list[Any] = []
        for x in arguments:
            kind = type(x)
            if kind is Tensor or kind is Parameter:
                tensors.append(x)
            elif kind is list or kind is tuple:
                key.append(len(x))
                for y in x:
                    kind = type(y)
                    if kind is Tensor or kind is Parameter:
                        tensors.append(y)
                    elif isinstance(y, Tensor):
                        return NotImplemented
                    else:
                        key += (len(tensors), y)
            elif isinstance(x, Tensor):
                return NotImplemented
            else:
                key += (len(tensors), x)
        first = tensors[0]
        if not _enabled.get("cuda" if first.is_cuda else "cpu"):
            return self.function(*arguments)
        addresses = list(map(_ADDRESS, tensors))
        if functools.reduce(operator.or_, addresses) & 15:
            key += [address & 15 for address in addresses]
        all_of = (*key, *map(_SHAPE_AND_DTYPE, tensors), *map(_STRIDE, tensors), *map(_DEVICE, tensors))
        return self._run(all_of, arguments, tensors, addresses)

    def plans(self) -> "OrderedDict[Any, Plan | str | None]":
        """Return this thread's plans: None for arguments seen once, a string for the reason why there can be no plan."""
        try:
            return self._of_thread.plans
        except AttributeError:
            self._of_thread.plans = OrderedDict()
            return self._of_thread.plans

    def _run(self, key: tuple[Any, ...], arguments: tuple[Any, ...], tensors: list[Tensor], addresses: list[int]) -> Any:
        plans = self.plans()
        plan = plans.get(key, plans)
        if plan.__class__ is Plan:
            plans.move_to_end(key)
            if plan.fits(addresses):
                return plan.run(tensors, addresses)
        elif plan is plans:  # never seen
            plans[key] = None
            if len(plans) > LIMIT:
                plans.popitem(last=False)
        elif plan is None:
            results, plans[key] = _record(self.function, arguments, tensors)
            return results
        return self.function(*arguments)


def _record(function: Callable[..., Any], arguments: tuple[Any, ...], tensors: list[Tensor]) -> tuple[Any, "Plan | str"]:
    """Return the function's results and a plan for its next call, or why there can be none."""
    recorder = Recorder(tensors)
    try:
        with recorder:
            results = function(*arguments)
        if recorder.reason:
            return results, recorder.reason
        return results, Plan(recorder, results, len(tensors), tensors[0].device)
    except NotRecordable as error:
        return function(*arguments), str(error)
