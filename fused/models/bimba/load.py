"""Published BIMBA folders: a base model, LoRA adapters of it, and `non_lora_trainables.bin`; or one folder with everything.

Upstream trains adapters on q_proj and v_proj of the language model, the projector and the compressor, and writes

    config.json  adapter_config.json  adapter_model.safetensors (or .bin)  non_lora_trainables.bin (or .safetensors)

beside which the base model, a folder in LLaVA's layout, is needed. A folder with weights of its own needs neither.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fused.io.checkpoint_file import CheckpointError, read_checkpoint, read_json_object
from fused.models.bimba.adapters import ADAPTER, find_file, merge_adapters
from fused.models.bimba.names import named
from fused.modules.mamba import check_backend

T = TypeVar("T", bound="Pretrained")
TRAINED = "non_lora_trainables.bin"
HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
UNUSED = ("vision_tower.head.", "vision_tower.post_layernorm.")  # LLaVA reads the tower before its last norm


class Pretrained:
    """`from_pretrained` of a `Bimba`."""

    base_folder: Path  # that of the base model, with its tokenizer

    @classmethod
    def from_pretrained(
        cls: type[T],
        folder: str | Path,
        *,
        base_model: str | Path | None = None,
        backend: str = "auto",
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> T:
        """Return the model of a folder in eval mode, with its adapters merged.

        `base_model` is the folder of the base model; without it that which adapter_config.json names. `dtype` is that of the
        parameters (None: as stored). Only A_log, A_b_log, D and D_b stay in float32. All parameters have to be there, and no
        tensor may be unknown, but for the parts of the vision tower that are not read.

        Raises FileNotFoundError for a folder without these files or without its base model; CheckpointError for weights that do
        not fit, and adapters that are no plain LoRA, or of another rank or base model; TypeError or ValueError for arguments
        and settings out of range, ImportError without transformers.
        """
        folder = _folder(folder, "folder")
        check_backend(backend)
        config, base, adapted = read_settings(folder / "config.json"), folder, (folder / ADAPTER).is_file()
        if adapted:
            base = base_folder(folder, base_model)
            config = {**read_settings(base / "config.json"), **{k: v for k, v in config.items() if k == "compressor_type"}}
        weights = _read_weights(base)
        if adapted:
            trained = find_file(folder, "non_lora_trainables", (".bin", ".safetensors"))
            weights |= named(read_checkpoint(trained), trained)
            merge_adapters(folder, weights)
        if not any(name.startswith("compressor.") for name in weights):
            raise CheckpointError(f"{folder} holds no compressor, whose keys begin with model.compressor.: it is no BIMBA")
        with torch.device("meta"):
            model: Any = cls(config, backend)  # type: ignore[call-arg]
        _assign(model, weights, folder, torch.device(device), dtype)
        model.base_folder = base
        return model.eval()

    @classmethod
    def from_base(cls: type[T], folder: str | Path, *, backend: str = "auto", dtype: torch.dtype | None = None) -> T:
        """Return the model with which a training of BIMBA begins, in eval mode on the CPU.

        `folder` holds a base model in LLaVA's layout. Without a compressor in it, the compressor has its initial values and
        returns its queries (`BimbaCompressor.zero_out_proj`), as upstream's training begins.

        Raises what `from_pretrained` raises, and CheckpointError for a folder of adapters.
        """
        folder = _folder(folder, "folder")
        check_backend(backend)
        if (folder / ADAPTER).is_file():
            raise CheckpointError(f"{folder} holds adapters; allowed: a base model, on which adapters are trained anew")
        config, weights = read_settings(folder / "config.json"), _read_weights(folder)
        if not any(name.startswith("mm_projector.") for name in weights):
            raise CheckpointError(f"{folder} holds no projector, whose keys begin with model.mm_projector.: it is no LLaVA")
        with torch.device("meta"):
            model: Any = cls(config, backend)  # type: ignore[call-arg]
        if not any(name.startswith("compressor.") for name in weights):
            new = model.new_compressor()
            new.zero_out_proj()
            weights |= {f"compressor.{name}": x for name, x in new.state_dict().items()}
        _assign(model, weights, folder, torch.device("cpu"), dtype)
        model.base_folder = folder
        return model.eval()


def is_bimba(folder: str | Path) -> bool:
    """Return whether a folder holds adapters, or has a config.json of LLaVA or with a compressor; False if none can be read."""
    path = Path(os.path.expanduser(folder))
    if (path / ADAPTER).is_file():
        return True
    try:
        config = read_settings(path / "config.json")
    except (OSError, CheckpointError):
        return False
    return "compressor_type" in config or str(config.get("model_type")).startswith("llava")


def _assign(
    model: nn.Module, weights: dict[str, Tensor], folder: Path, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Give a model on the meta device its weights. Raises CheckpointError where names or shapes do not fit."""
    due, language_model = model.state_dict(), cast(Any, model).language_model
    tied = bool(language_model.config.tie_word_embeddings)
    if tied and EMBEDDING in weights:
        weights.setdefault(HEAD, weights[EMBEDDING])
    for name, value in due.items():
        if name.startswith(UNUSED) and name not in weights:
            weights[name] = torch.zeros(value.shape)
    unknown = [name for name in weights if name not in due and not name.startswith(UNUSED)]
    missing = [name for name in due if name not in weights]
    wrong = [name for name in due if name in weights and weights[name].shape != due[name].shape]
    for words, names in (("unknown keys", unknown), ("missing keys", missing), ("keys of another shape", wrong)):
        if names:
            first = names[0]
            shapes = f", {tuple(weights[first].shape)} where the model has {tuple(due[first].shape)}" if names is wrong else ""
            raise CheckpointError(f"{folder} does not fit: {len(names)} {words}, the first is {first}{shapes}")

    def converted(name: str) -> Tensor:
        precise = name.rpartition(".")[2] in ("A_log", "A_b_log", "D", "D_b")
        return weights.pop(name).to(device, torch.float32 if precise else dtype)

    model.load_state_dict({name: converted(name) for name in due}, assign=True)
    if tied:
        language_model.tie_weights()
    for module in model.modules():  # buffers that are no weights
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, _computed(module, name, device))


def _computed(module: nn.Module, name: str, device: torch.device) -> Tensor:
    """Return a buffer that the library transformers computes when a module is made."""
    owner: Any = module
    if name == "position_ids":
        return torch.arange(owner.num_positions, device=device).expand((1, -1))
    return getattr(type(owner)(owner.config), name).to(device)


def base_folder(folder: str | Path, base_model: str | Path | None = None) -> Path:
    """Return the base model's folder of a BIMBA, which is its own if it holds no adapters.

    `base_model` is that of `from_pretrained`. Raises FileNotFoundError where there is none.
    """
    folder = _folder(folder, "folder")
    if not (folder / ADAPTER).is_file():
        return folder
    name = base_model or read_settings(folder / ADAPTER).get("base_model_name_or_path")
    if isinstance(name, str | os.PathLike) and Path(os.path.expanduser(name)).is_dir():
        return Path(os.path.expanduser(name))
    raise FileNotFoundError(
        2, f"{folder} holds adapters of {name!r}, which is no folder here: download that model, from the Hugging Face hub by "
        "hf download NAME --local-dir FOLDER, and pass base_model=FOLDER", str(name),
    )  # fmt: skip


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder's files of weights by their names in a `Bimba`.

    Raises FileNotFoundError where there is none, and CheckpointError for two files with the same weights.
    """
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(2, "no model*.safetensors or pytorch_model*.bin in the folder", str(folder))
    weights: dict[str, Tensor] = {}
    for file in files:
        part = named(read_checkpoint(file), file)
        if twice := weights.keys() & part:
            raise CheckpointError(f"{folder} holds {min(twice)} twice, in {file.name} and before it; allowed: one set of files")
        weights |= part
    return weights


def _folder(path: str | Path, name: str) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{name} is a {type(path).__name__}; allowed: the path of a folder")
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        raise FileNotFoundError(2, f"{name} is no folder", str(path))
    return folder


def read_settings(path: Path) -> Mapping[str, Any]:
    """Return the object in a JSON file. Raises FileNotFoundError, or CheckpointError for what is none."""
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    return read_json_object(path)
