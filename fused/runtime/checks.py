"""Checks of an operator's arguments; a message names the argument, its value, and what is allowed."""

import torch
from torch import Tensor

from fused.runtime.dtypes import KERNEL_DTYPES, dtype_name


def check_tensor(op: str, name: str, value: object, letters: str, sizes: dict[str, int], device: torch.device | None) -> None:
    """Raise unless `value` is a real floating-point tensor on `device` (None: any) with one of the shapes in `letters`.

    `letters` reads "B L N" or, where several shapes are allowed, "B L N | B L G N"; a letter that `sizes` lacks may
    have any size. TypeError for a wrong type or dtype, ValueError for a wrong shape or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor of shape {_spell(letters, sizes)}, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be real floating point (float16 to float64), got {value.dtype}")
    if not any(_fits(tuple(value.shape), shape.split(), sizes) for shape in letters.split("|")):
        raise ValueError(f"{op}: {name} must have shape {_spell(letters, sizes)}, got {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name} is on {value.device}, every tensor must be on {device} like the first one")


def check_choice(op: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_native_dtypes(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor has a dtype that the native kernels read."""
    for name, value in tensors.items():
        if value is not None and value.dtype not in KERNEL_DTYPES:
            names = ", ".join(map(dtype_name, KERNEL_DTYPES))
            raise ValueError(f"{op}: backend 'native' has {names}, got {name} in {value.dtype}; use backend='torch'")


def _fits(shape: tuple[int, ...], letters: list[str], sizes: dict[str, int]) -> bool:
    return len(shape) == len(letters) and all(
        sizes.get(letter, size) == size for letter, size in zip(letters, shape, strict=True)
    )


def _spell(letters: str, sizes: dict[str, int]) -> str:
    return " or ".join(
        "({})".format(", ".join(f"{x}={sizes[x]}" if x in sizes else x for x in shape.split())) for shape in letters.split("|")
    )
