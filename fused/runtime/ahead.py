"""Compilation of Triton's kernels before they are launched.

Code that launches kernels is run on small tensors on the CPU, as what chooses a kernel and its options depends on neither the
device nor the sizes that differ from call to call. In that thread nothing is launched then: what would be is compiled instead.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fused.runtime import background

Compile = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]  # of a kernel, its arguments and its constants


class _Thread(threading.local):
    """The target of a thread that compiles ahead, and the way it compiles."""

    capability = 0  # 90 for compute capability 9.0; 0 where kernels are launched
    compile: Compile | None = None


_thread = _Thread()
_started: set[tuple[Any, ...]] = set()  # keys of compilations in background threads that no launch has asked for


@contextlib.contextmanager
def compiling(capability: int, compile: Compile) -> Iterator[None]:
    """Call `compile` for each kernel that this thread would launch within the context, for a compute capability."""
    _thread.capability, _thread.compile = capability, compile
    try:
        yield
    finally:
        _thread.capability, _thread.compile = 0, None


def capability() -> int:
    """Return the compute capability that this thread compiles for, 0 if it launches kernels."""
    return _thread.capability


def compiler() -> Compile | None:
    """Return the function that is called instead of a launch in this thread, None if it launches."""
    return _thread.compile


def compile_in_background(device: torch.device, compile: Callable[..., object]) -> Compile:
    """Return a function that starts, once for a kernel and its arguments, `compile(kernel, args, constants, capability)` in a
    background thread on which `device` is current."""

    def start(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        key, target = _key(kernel, args, constants), capability()
        if key not in _started:
            _started.add(key)
            background.start(key, lambda: _on(device, lambda: compile(kernel, args, constants, target)))

    return start


def _on(device: torch.device, work: Callable[[], object]) -> None:
    with torch.cuda.device(device):
        work()


def wait(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Wait for a background thread that compiles a kernel for such arguments; one that has not begun is not to begin."""
    if _started and (key := _key(kernel, args, constants)) in _started:
        _started.discard(key)
        background.take(key, lambda: None)


def _key(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """Return what arguments on the CPU have in common with those of a launch, as far as a kernel depends on it."""
    kinds = tuple(x.dtype if isinstance(x, Tensor) else type(x) for x in args)
    return kernel, kinds, tuple(sorted(constants.items()))


class NoModule:
    """Stands in for kernels in CUDA C++, which are compiled elsewhere."""

    def launch(self, *arguments: Any) -> None:
        """Launch nothing."""
