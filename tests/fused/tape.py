"""A recorder for tests on a CPU that behaves as one of CUDA graphs: it records operators with the tensors that they got.

A replay runs the operators again on the same memory. Numbers and Python objects are those of the recording, so that whatever
does not reach a step through memory is found: a learning rate, a new parameter, a batch that was not copied. As in a capture,
recording has no effect, its output has no values before a replay, and reading a value raises RuntimeError.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default)


class Tape(TorchDispatchMode):
    """Recorded work."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.replays = 0
        self._created: dict[int, Tensor] = {}  # by storage, as the next
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}  # what was there, and its content
        generator = torch.get_rng_state()
        with self:
            self.output = work()
        torch.set_rng_state(generator)
        with torch.no_grad():
            for storage, content in self._before.values():
                storage.copy_(content)
            for *_, results in self.calls:
                for tensor in results:
                    if tensor.is_floating_point():
                        tensor.fill_(torch.nan)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
            for x in given:
                if _place(x) not in self._created:
                    storage = x.untyped_storage()
                    self._before.setdefault(_place(x), (storage, storage.clone()))
        result = func(*args, **kwargs)
        places = {_place(x) for x in given}
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.numel() and _place(x) not in places]
        self._created |= {_place(x): x for x in results}
        self.calls.append((func, args, kwargs, results))
        return result

    def replay(self) -> None:
        """Run the operators again, each into the memory of its recorded results. The record has autocast's casts."""
        self.replays += 1
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for func, args, kwargs, results in self.calls:
                places = {_place(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
                fresh = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor) and x.numel()]
                fresh = [x for x in fresh if _place(x) not in places]
                for old, new in zip(results, fresh, strict=True):
                    old.copy_(new)


class TapeRecorder:
    """A maker of tapes, which are in `tapes`."""

    memory_bytes = 0

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def record(self, work: Callable[[], Any]) -> Tape:
        self.tapes.append(Tape(work))
        return self.tapes[-1]

    def warming(self) -> AbstractContextManager[object]:
        return nullcontext()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        yield


def _place(x: Tensor) -> int:
    """Return where the memory of a tensor is."""
    return x.untyped_storage().data_ptr()
