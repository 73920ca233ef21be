"""Names of a BIMBA's parameters in LLaVA's layout, with the prefixes that wrappers put in front."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fused.io.checkpoint_file import CheckpointError

_WRAPPERS = re.compile(r"((base_model|model)\.)*")
_TOWER = re.compile(r"vision_tower\.(vision_tower\.)?(vision_model\.)?")
_OWN = ("mm_projector.", "compressor.", "image_newline")
_HEAD = "lm_head."


def name_of(key: str) -> str:
    """Return the name in a `Bimba` of a key in LLaVA's layout, in which any number of "model." and "base_model." may lead.

    Upstream writes the projector as base_model.model.model.mm_projector, or with fewer prefixes, by how the model was wrapped.
    """
    plain = key[_WRAPPERS.match(key).end() :]  # type: ignore[union-attr]  # it matches everything
    if tower := _TOWER.match(plain):
        return "vision_tower." + plain[tower.end() :]
    if plain.startswith(_OWN):
        return plain
    return f"language_model.{plain}" if plain.startswith(_HEAD) else f"language_model.model.{plain}"


def named(state: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by their names in a `Bimba`.

    Raises CheckpointError for what is no tensor of floating-point numbers, and for two keys of one name.
    """
    keys: dict[str, str] = {}
    for key, x in state.items():
        check_floating(key, x, file)
        other = keys.setdefault(name_of(key), key)
        if other != key:
            raise CheckpointError(f"{file} holds {name_of(key)} twice, as {other} and as {key}; allowed: once")
    return {name: state[key] for name, key in keys.items()}


def check_floating(key: str, value: object, file: Path) -> None:
    """Raise CheckpointError unless `value` is a tensor of floating-point numbers."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        what = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise CheckpointError(f"{file}: {key} is {what}; allowed: tensors of floating-point numbers, not quantised")
