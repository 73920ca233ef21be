"""Published BIMBA folders: a base model, LoRA adapters of it, and `non_lora_trainables.bin`; or one folder with everything.

Upstream trains adapters on q_proj and v_proj of the language model, the projector and the compressor, and writes

    config.json  adapter_config.json  adapter_model.safetensors (or .bin)  non_lora_trainables.bin

beside which the base model, a folder in LLaVA's layout, is needed. A folder with weights of its own needs neither.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fused.io.checkpoint_file import CheckpointError, read_checkpoint, read_json_object
from fused.modules.mamba import check_backend

T = TypeVar("T", bound="Pretrained")
ADAPTER, TRAINED = "adapter_config.json", "non_lora_trainables.bin"
TOWER = ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.vision_tower.")
OWN = ("model.mm_projector.", "model.compressor.", "model.image_newline")
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

        Raises FileNotFoundError for a folder without these files or without its base model, CheckpointError for weights that
        do not fit, ImportError without transformers.
        """
        folder = _folder(folder, "folder")
        check_backend(backend)
        config, base, adapted = read_settings(folder / "config.json"), folder, (folder / ADAPTER).is_file()
        if adapted:
            base = _base_folder(folder, base_model)
            config = {**read_settings(base / "config.json"), **{k: v for k, v in config.items() if k == "compressor_type"}}
        weights = {_name(key): x for key, x in _read_weights(base).items()}
        if adapted:
            weights |= {_name(key): x for key, x in _read_trained(folder).items()}
            _merge_adapters(folder, weights)
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
        config, weights = read_settings(folder / "config.json"), {_name(key): x for key, x in _read_weights(folder).items()}
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
    due = model.state_dict()
    if "language_model.lm_head.weight" not in weights:  # tied
        weights["language_model.lm_head.weight"] = weights.get("language_model.model.embed_tokens.weight", torch.empty(0))
    for name, value in due.items():
        if name.startswith(UNUSED) and name not in weights:
            weights[name] = torch.zeros(value.shape)
    unknown = [name for name in weights if name not in due and not name.startswith(UNUSED)]
    missing = [name for name in due if name not in weights]
    wrong = [name for name in due if name in weights and weights[name].shape != due[name].shape]
    for words, names in (("unknown keys", unknown), ("missing keys", missing), ("keys of another shape", wrong)):
        if names:
            raise CheckpointError(f"{folder} does not fit: {len(names)} {words}, the first is {names[0]}")

    def converted(name: str) -> Tensor:
        precise = name.rpartition(".")[2] in ("A_log", "A_b_log", "D", "D_b")
        return weights.pop(name).to(device, torch.float32 if precise else dtype)

    model.load_state_dict({name: converted(name) for name in due}, assign=True)
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


def _name(key: str) -> str:
    """Return the name in a `Bimba` of a key in LLaVA's layout."""
    for prefix in TOWER:
        if key.startswith(prefix):
            return "vision_tower." + key.removeprefix(prefix)
    if key.startswith(OWN):
        return key.removeprefix("model.")
    return "language_model." + key


def _read_trained(folder: Path) -> dict[str, Tensor]:
    """Return what was trained beside the adapters, with the names of the base model."""
    state = {key.removeprefix("base_model."): x for key, x in read_checkpoint(folder / TRAINED).items()}
    if any(key.startswith("model.model.") for key in state):
        state = {key.removeprefix("model."): x for key, x in state.items()}
    return state


def _merge_adapters(folder: Path, weights: dict[str, Tensor]) -> None:
    """Add the products of adapters, W + (alpha / r) B A, to their weights. Raises CheckpointError for other kinds."""
    options = read_settings(folder / ADAPTER)
    if options.get("peft_type", "LORA") != "LORA" or options.get("use_dora") or options.get("bias", "none") != "none":
        raise CheckpointError(f"{folder / ADAPTER} is no plain LoRA; allowed: peft_type LORA, without DoRA and bias")
    rank = options["r"]
    scale = options["lora_alpha"] / (rank**0.5 if options.get("use_rslora") else rank)
    files = [folder / f"adapter_model.{kind}" for kind in ("safetensors", "bin")]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(2, "no adapter_model.safetensors or .bin in the folder", str(folder))
    state = {key.removeprefix("base_model.model."): x for key, x in read_checkpoint(found).items()}
    for key, A in state.items():
        stem, middle, _ = key.partition(".lora_A.")
        if not middle:
            continue
        name, B = _name(stem + ".weight"), next(x for k, x in state.items() if k.startswith(stem + ".lora_B."))
        if name not in weights:
            raise CheckpointError(f"{found} adapts {stem}, which the base model does not have")
        base = weights[name]
        weights[name] = (base.float() + scale * (B.float() @ A.float())).to(base.dtype)


def _base_folder(folder: Path, base_model: str | Path | None) -> Path:
    """Return the base model's folder. Raises FileNotFoundError where there is none."""
    named = base_model or read_settings(folder / ADAPTER).get("base_model_name_or_path")
    if named and Path(os.path.expanduser(named)).is_dir():
        return Path(os.path.expanduser(named))
    raise FileNotFoundError(
        2, f"{folder} holds adapters of {named!r}, which is no folder here: download that model and pass base_model=FOLDER",
        str(named),
    )  # fmt: skip


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder's files of weights. Raises FileNotFoundError where there is none."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(2, "no model*.safetensors or pytorch_model*.bin in the folder", str(folder))
    return {key: x for file in files for key, x in read_checkpoint(file).items()}


def _folder(path: str | Path, name: str) -> Path:
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        raise FileNotFoundError(2, f"{name} is no folder", str(path))
    return folder


def read_settings(path: Path) -> Mapping[str, Any]:
    """Return the object in a JSON file. Raises FileNotFoundError, or CheckpointError for what is none."""
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    return read_json_object(path)
