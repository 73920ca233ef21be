"""Calls of the driver in a launch plan, and the table of addresses that the kernels' argument lists point to."""

import ctypes
import struct
from collections.abc import Callable
from typing import Any

from fused.runtime import cuda_module
from fused.runtime.recording import Launch, View


class AddressTable:
    """The addresses that launches read, in the order in which they become known."""

    def __init__(self, entries: dict[int | None, list[tuple[int, int]]]) -> None:
        self._entries = entries
        self._position: dict[tuple[int, int], int] = {}
        for group in entries.values():
            for entry in group:
                self._position[entry] = len(self._position)
        self.words = (ctypes.c_int64 * max(1, len(self._position)))()

    def fill(self, slot: int | None) -> Callable[[list[Any]], None]:
        """Return a function that writes the addresses that are known once `slot` is made, given those of the slots."""
        group = self._entries.get(slot, [])
        if not group:
            return lambda where: None
        pack, words = struct.Struct(f"{len(group)}q").pack_into, self.words
        start = 8 * self._position[group[0]]
        return lambda where: pack(words, start, *[where[slot] + offset for slot, offset in group])

    def pointer(self, view: View) -> int:
        """Return where the address of a place stands."""
        return ctypes.addressof(self.words) + 8 * self._position[view.slot, view.offset]


def driver_launch(step: Launch, table: AddressTable) -> Callable[..., None]:
    """Return a function that launches a kernel with the addresses in the table."""
    function = step.function
    assert function is not None
    count = len(function.parameter_sizes)
    constants, pointers = (ctypes.c_int64 * count)(), (ctypes.c_void_p * count)()
    for i in range(count):
        argument = function.arguments[i] if i < len(function.arguments) else None
        if isinstance(argument, View):
            pointers[i] = table.pointer(argument)
            continue
        if isinstance(argument, float):
            struct.pack_into("f4x", constants, 8 * i, argument)
        else:
            constants[i] = argument or 0
        pointers[i] = ctypes.addressof(constants) + 8 * i
    head = (function.handle, *function.grid, function.threads, 1, 1, function.shared)
    launch, address = cuda_module.bindings("driver").cuLaunchKernel, ctypes.addressof(pointers)

    def run(memory: list[Any], where: list[Any], stream: Any, kept: Any = (constants, pointers, table)) -> None:
        result = launch(*head, stream, address, 0)
        if result[0]:
            raise cuda_module.KernelError(f"a kernel of a launch plan does not start: {result[0].name}")

    return run


def driver_zero(view: View) -> Callable[..., None]:
    """Return a function that sets all bytes of a slot to zero."""
    size, set_bytes = view.num_bytes, cuda_module.bindings("driver").cuMemsetD8Async

    def run(memory: list[Any], where: list[Any], stream: Any) -> None:
        result = set_bytes(where[view.slot], 0, size, stream)
        if result[0]:
            raise cuda_module.KernelError(f"memory of a launch plan is not set to zero: {result[0].name}")

    return run
