"""LoRA adapters in the files of the library peft, added to the weights of a base model: W + (alpha / r) B A."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fused.io.checkpoint_file import CheckpointError, read_checkpoint, read_json_object
from fused.models.bimba.names import check_floating, name_of
from fused.rules import is_integer, is_number

ADAPTER = "adapter_config.json"
_MATRIX = re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")  # with or without the name of the adapter
# Options with which adapters are another function of the weights. Where they are off they are absent, None, False or empty.
_OTHER_KINDS = (
    "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "fan_in_fan_out", "lora_bias",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_qalora",
)  # fmt: skip


def merge_adapters(folder: Path, weights: dict[str, Tensor]) -> None:
    """Add the adapters of a folder to their weights, by the names of a `Bimba`; sums are made in float32.

    Raises FileNotFoundError without the file of adapters. Raises CheckpointError for adapters that are no plain LoRA, a file
    with other tensors than them, and matrices that do not fit each other, the rank, or the base model.
    """
    rank, scale = _rank_and_scale(folder / ADAPTER)
    file = find_file(folder, "adapter_model", (".safetensors", ".bin"))
    for name, pair in _pairs(read_checkpoint(file), file).items():
        if name not in weights:
            raise CheckpointError(f"{file} adapts {name}, which the base model does not have")
        base = weights[name]
        due = {"A": (rank, base.shape[-1]), "B": (base.shape[0], rank)}
        found = {half: tuple(x.shape) for half, x in pair.items()}
        if found != due or base.dim() != 2:
            raise CheckpointError(
                f"{file}: of {name}, {tuple(base.shape)}, there are {_spell(found)}; allowed, by r={rank} in {ADAPTER}: "
                f"{_spell(due)}"
            )
        weights[name] = (base.float() + scale * (pair["B"].float() @ pair["A"].float())).to(base.dtype)


def find_file(folder: Path, stem: str, kinds: tuple[str, ...]) -> Path:
    """Return the file of a folder with this name and one of these suffixes. Raises FileNotFoundError without one."""
    found = next((file for kind in kinds if (file := folder / (stem + kind)).is_file()), None)
    if found is None:
        raise FileNotFoundError(2, f"no {stem}{' or '.join(kinds)} in the folder", str(folder))
    return found


def _rank_and_scale(path: Path) -> tuple[int, float]:
    """Return r and alpha / r of adapter_config.json. Raises CheckpointError for what is no plain LoRA."""
    options = read_json_object(path)
    wrong = [key for key, plain in (("peft_type", "LORA"), ("bias", "none")) if options.get(key, plain) != plain]
    wrong += [key for key in _OTHER_KINDS if options.get(key)]
    if wrong:
        said = ", ".join(f"{key} is {options[key]!r}" for key in wrong)
        raise CheckpointError(f"{path} is no plain LoRA: {said}; allowed: peft_type LORA, bias none, and no other kind")
    rank, alpha = options.get("r"), options.get("lora_alpha")
    for key, value, good in (("r", rank, is_integer(rank, 1)), ("lora_alpha", alpha, is_number(alpha, lambda x: x > 0))):
        if not good:
            raise CheckpointError(f"{path}: {key} is {value!r}; allowed: a positive number")
    assert rank is not None and alpha is not None
    return rank, alpha / (rank**0.5 if options.get("use_rslora") else rank)


def _pairs(state: Mapping[str, Any], file: Path) -> dict[str, dict[str, Tensor]]:
    """Return A and B of every adapted weight by its name. Raises CheckpointError for a key that is neither, and without one."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, x in state.items():
        matrix = _MATRIX.fullmatch(key)
        if matrix is None:
            raise CheckpointError(f"{file} holds {key}; allowed: lora_A and lora_B of linear layers, nothing beside them")
        check_floating(key, x, file)
        pair = pairs.setdefault(name_of(matrix[1] + ".weight"), {})
        if matrix[2] in pair:
            raise CheckpointError(f"{file} holds lora_{matrix[2]} of {matrix[1]} twice; allowed: one adapter")
        pair[matrix[2]] = x
    if not pairs:
        raise CheckpointError(f"{file} holds no adapters; allowed: lora_A and lora_B of every adapted layer")
    return pairs


def _spell(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return " and ".join(f"lora_{half} {shape}" for half, shape in sorted(shapes.items()))
