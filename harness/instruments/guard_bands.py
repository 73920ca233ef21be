"""Memory between guard bands, which starts as garbage.

All bits of a guard band are set, which is NaN in every floating-point format: whoever reads it cannot hide it, and whoever
writes it leaves a trace.
"""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from harness.records.finding import Finding

BAND = {"cuda": 2**16, "cpu": 2**13}  # bytes on either side: more than a tile of tokens that runs over an edge
FUNCTIONS = ("empty", "empty_like", "empty_strided", "zeros", "zeros_like")
METHODS = ("new_empty", "new_empty_strided", "new_zeros")


class GuardedMemory:
    """Tensors placed between guard bands, by hand or, within `allocating`, whenever PyTorch allocates memory."""

    def __init__(self, garbage: float) -> None:
        self.garbage = garbage
        self._placed: list[tuple[str, Tensor, Tensor, Tensor | None]] = []  # name, memory, interior, bytes that must not change
        self._allocate = torch.empty  # the original, while `torch.empty` is replaced

    def place(self, name: str, value: Tensor) -> Tensor:
        """Return a copy of the value, which no call may change."""
        tensor, memory, interior = self._between(value)
        tensor.copy_(value)
        self._placed.append((name, memory, interior, interior.clone()))
        return tensor

    def findings(self) -> list[Finding]:
        """Return the number of changed bytes in placed values and in the bands around every tensor."""
        changed: dict[str, float] = {}
        for name, memory, interior, before in self._placed:
            begin = interior.storage_offset()
            bands = memory[:begin], memory[begin + interior.numel() :]
            overwritten = sum(int((band != 0xFF).sum()) for band in bands)
            changed[f"beside {name}"] = max(changed.get(f"beside {name}", 0.0), float(overwritten))
            if before is not None:
                changed[name] = float((interior != before).sum())
        return [Finding(name, "bytes", count, 0.0) for name, count in changed.items()]

    @contextlib.contextmanager
    def allocating(self) -> Iterator[None]:
        """Give memory that PyTorch's functions allocate guard bands; uninitialised memory starts as garbage."""
        with contextlib.ExitStack() as stack:
            for name in FUNCTIONS:
                stack.enter_context(mock.patch.object(torch, name, self._guarded(name, getattr(torch, name))))
            for name in METHODS:
                stack.enter_context(mock.patch.object(Tensor, name, self._guarded(name, getattr(Tensor, name))))
            yield

    def _guarded(self, name: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args: object, **options: object) -> Tensor:
            allocated = original(*args, **options)
            if "out" in options or allocated.is_meta or allocated.layout != torch.strided or type(allocated) is not Tensor:
                return allocated
            tensor, memory, interior = self._between(allocated)
            tensor.copy_(allocated) if "zeros" in name else tensor.fill_(self._garbage_of(allocated.dtype))
            self._placed.append(("what was allocated", memory, interior, None))
            return tensor.requires_grad_(allocated.requires_grad)

        return allocate

    def _between(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a tensor with the layout of another, all of its memory with the bands, and the interior between them."""
        reach = sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True)) + 1 if like.numel() else 0
        size = reach * like.element_size()
        band = BAND.get(like.device.type, 2**16)
        memory = self._allocate(band + size + band, dtype=torch.uint8, device=like.device).fill_(0xFF)
        tensor = self._allocate(0, dtype=like.dtype, device=like.device)
        tensor.set_(memory.untyped_storage(), band // like.element_size(), like.shape, like.stride())
        return tensor, memory, memory[band : band + size]

    def _garbage_of(self, dtype: torch.dtype) -> float:
        return self.garbage if dtype.is_floating_point else 77 if dtype != torch.bool else True
