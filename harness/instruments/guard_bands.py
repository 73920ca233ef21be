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
    """Places tensors between guard bands, by hand or, within `allocating`, whenever PyTorch is asked for memory."""

    def __init__(self, garbage: float) -> None:
        self.garbage = garbage
        self._placed: list[tuple[str, Tensor, Tensor, Tensor | None]] = []  # name, whole, own part, what it must stay
        self._allocate = torch.empty  # what allocates, also while it is replaced

    def place(self, name: str, value: Tensor) -> Tensor:
        """Return a copy of the value, which nobody may change."""
        tensor, whole, own = self._between(value)
        tensor.copy_(value)
        self._placed.append((name, whole, own, own.clone()))
        return tensor

    def findings(self) -> list[Finding]:
        """Return how many bytes of what must stay, and of the bands beside anything, have changed."""
        changed: dict[str, float] = {}
        for name, whole, own, before in self._placed:
            begin = own.storage_offset()
            bands = whole[:begin], whole[begin + own.numel() :]
            beside = sum(int((band != 0xFF).sum()) for band in bands)
            changed[f"beside {name}"] = max(changed.get(f"beside {name}", 0.0), float(beside))
            if before is not None:
                changed[name] = float((own != before).sum())
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
            asked = original(*args, **options)
            if "out" in options or asked.is_meta or asked.layout != torch.strided or type(asked) is not Tensor:
                return asked
            tensor, whole, own = self._between(asked)
            tensor.copy_(asked) if "zeros" in name else tensor.fill_(self._garbage_of(asked.dtype))
            self._placed.append(("what was allocated", whole, own, None))
            return tensor.requires_grad_(asked.requires_grad)

        return allocate

    def _between(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a tensor with the layout of another, all the memory around it, and its own part of that."""
        reach = sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True)) + 1 if like.numel() else 0
        size = reach * like.element_size()
        band = BAND.get(like.device.type, 2**16)
        whole = self._allocate(band + size + band, dtype=torch.uint8, device=like.device).fill_(0xFF)
        tensor = self._allocate(0, dtype=like.dtype, device=like.device)
        tensor.set_(whole.untyped_storage(), band // like.element_size(), like.shape, like.stride())
        return tensor, whole, whole[band : band + size]

    def _garbage_of(self, dtype: torch.dtype) -> float:
        return self.garbage if dtype.is_floating_point else 77 if dtype != torch.bool else True
