"""Folders of published weights: config.json beside model.safetensors, or beside shards with model.safetensors.index.json.

The names in config.json are those of Qwen2-VL and of upstream. Sizes of the mixers are read off the weights, since published
configurations leave `d_state` to a default that the paper contradicts.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fused.io.atomic_write import atomic_write
from fused.io.checkpoint_file import CheckpointError, read_json_object, save_checkpoint
from fused.models.vamba.config import MIXER_FIELDS, VambaConfig
from fused.models.vamba.stored import INDEX, WEIGHTS, StoredTensors
from fused.models.vamba.vision import vision_tower
from fused.modules.mamba import check_backend
from fused.rules import abbreviate, is_integer

T = TypeVar("T", bound="Pretrained")
CONFIG, GENERATION = "config.json", "generation_config.json"
SHARD_BYTES = 4 * 2**30
VISION = "visual."
MIXER = "model.layers.0.vision_mixer.mixer."
FLOAT32 = ("A_log", "D")  # parameters that stay in float32

_log = logging.getLogger("fused")


@dataclass
class VambaLoadReport:
    """The report on every tensor of a folder."""

    folder: str
    loaded: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)  # loaded, and without effect: the mixer of the last layer
    dropped: list[str] = field(default_factory=list)  # of the vision tower, which was not asked for

    def __str__(self) -> str:
        lines = [f"{self.folder}: {len(self.loaded)} tensors loaded"]
        if self.unused:
            lines.append(f"  without effect, since no layer follows: {abbreviate(self.unused)}")
        if self.dropped:
            lines.append(f"  left out, the vision tower: {abbreviate(self.dropped)}")
        return "\n".join(lines)


class Pretrained:
    """`from_pretrained` and `save_pretrained` of a `Vamba`."""

    config: VambaConfig
    visual: nn.Module | None
    stop_tokens: tuple[int, ...]
    vision_config: Mapping[str, Any] | None = None
    load_report: VambaLoadReport | None = None

    @classmethod
    def from_pretrained(
        cls: type[T],
        folder: str | Path,
        *,
        backend: str = "auto",
        vision: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> T:
        """Return the model of a folder in eval mode, with its vision tower if `vision`.

        `dtype` is that of the parameters (None: as stored); A_log and D stay in float32. Every name has to fit; the report,
        also in `load_report`, is logged. Tensors are read one by one, straight to `device`. The tower needs transformers.

        Raises FileNotFoundError for a folder without these files, CheckpointError for one that is no Vamba and for weights
        that do not fit, ImportError without safetensors, or with `vision` without transformers.
        """
        model: Any
        model, stored = cls.outline(folder, backend=backend, vision=vision)
        for name in model.load_report.loaded:
            keeps = name.rpartition(".")[2] in FLOAT32
            tensor = stored.read(name)
            assign(model, name, tensor.to(device=device, dtype=torch.float32 if keeps else dtype or tensor.dtype))
        if vision:
            model.visual.to(device)  # its buffers
        _log.info("%s", model.load_report)
        return model

    @classmethod
    def outline(cls: type[T], folder: str | Path, *, backend: str = "auto", vision: bool = False) -> tuple[T, StoredTensors]:
        """Return the model of a folder in eval mode, its parameters on the meta device, and their values, which fit, in files.

        Arguments and errors are those of `from_pretrained`.
        """
        folder = existing_folder(folder)
        check_backend(backend)
        given, stored = read_json(folder / CONFIG), StoredTensors(folder)
        config = read_config(folder, given, stored.shapes)
        try:
            with torch.device("meta"):
                model: Any = cls(config, backend)  # type: ignore[call-arg]
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / CONFIG} is no configuration of a Vamba: {error}") from error
        tower = given.get("vision_config")
        if vision:
            if not tower or not any(name.startswith(VISION) for name in stored.shapes):
                lacking = "weights visual.*" if tower else f"vision_config in {CONFIG}"
                raise CheckpointError(f"{folder} holds no vision tower: it lacks {lacking}; allowed: vision=False")
            model.visual = read_tower(folder, tower)
        model.vision_config, model.stop_tokens = tower, read_stops(folder, given)
        model.load_report = _check_names(folder, model, stored.shapes)
        return model.eval(), stored

    def save_pretrained(self, folder: str | Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
        """Write config.json and the weights in shards of at most `shard_bytes`, and return the folder.

        Each file is written atomically, the index last. Raises ImportError without safetensors, OSError if the disk is full.
        """
        folder = Path(os.path.expanduser(folder))
        folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Tensor] = self.state_dict()  # type: ignore[attr-defined]
        shards: list[dict[str, Tensor]] = [{}]
        size = 0
        for name, tensor in state.items():
            if shards[-1] and size + tensor.nbytes > shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = tensor
            size += tensor.nbytes
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        names = [WEIGHTS] if len(shards) == 1 else names
        for file, shard in zip(names, shards, strict=True):
            save_checkpoint(shard, folder / file)
        _write_json(folder / CONFIG, self._description())
        if len(shards) > 1:
            placed = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
            total = sum(t.nbytes for t in state.values())
            _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
            (folder / WEIGHTS).unlink(missing_ok=True)  # of an earlier save, and not what the index says
        else:
            (folder / INDEX).unlink(missing_ok=True)
        return folder

    def _description(self) -> dict[str, Any]:
        """Return the content of config.json."""
        c = self.config
        same = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "rms_norm_eps", "rope_theta", "use_alpha_balancing", "cross_attn_use_layer_norm",
            "cross_attn_use_position_embeddings",
        )  # fmt: skip
        described: dict[str, Any] = {"architectures": ["Vamba"], "model_type": "vamba"}
        described |= {name: getattr(c, name) for name in same}
        described["rope_scaling"] = {"type": "mrope", "mrope_section": list(c.mrope_section)}
        mixer = {key: list(v) if isinstance(v, tuple) else v for key, v in c.mixer.items()}
        described["vision_mamba_mixer_config"] = {"enable": True, **mixer}
        described["tie_word_embeddings"] = False
        if self.stop_tokens:
            described["eos_token_id"] = list(self.stop_tokens)
        if self.vision_config:
            described["vision_config"] = dict(self.vision_config)
        return described


def existing_folder(folder: str | Path) -> Path:
    """Return the folder of a model, ~ in front being the home folder. Raises FileNotFoundError for one that is not there."""
    path = Path(os.path.expanduser(folder))
    if not path.is_dir():
        found = "it is a file" if path.exists() else "there is no such folder"
        advice = "a repository of the Hugging Face hub has to be downloaded first (hf download NAME --local-dir FOLDER)"
        raise FileNotFoundError(2, f"{found}; allowed: the folder of a model; {advice}", str(folder))
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises FileNotFoundError, and CheckpointError for anything else than an object."""
    try:
        return read_json_object(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(2, f"the folder holds no {path.name}", str(path)) from error


def read_stops(folder: Path, given: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the tokens that end an answer: those of generation_config.json, else of `given`, the content of config.json."""
    stops = given.get("eos_token_id") or []
    file = folder / CONFIG
    if (folder / GENERATION).is_file() and (found := read_json(folder / GENERATION).get("eos_token_id")):
        stops, file = found, folder / GENERATION
    tokens = tuple(stops) if isinstance(stops, list) else (stops,)
    if not all(is_integer(token, 0) for token in tokens):
        raise CheckpointError(f"{file}: eos_token_id is {stops!r}; allowed: the number of a token, or a list of them")
    return tokens


def read_tower(folder: Path, given: object) -> nn.Module:
    """Return the vision tower of a `vision_config`, its parameters on the meta device. Raises CheckpointError for no such."""
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{folder / CONFIG}: vision_config is {given!r}; allowed: an object")
    try:
        return vision_tower(given, weights=False)
    except ImportError:
        raise
    except Exception as error:  # the library has exceptions of its own
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder / CONFIG}: vision_config is none of a Qwen2-VL: {reason}") from error


def read_config(folder: Path, given: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> VambaConfig:
    """Return the configuration of a folder: decoder by its config.json, mixers by the shapes of the weights.

    Raises CheckpointError for a folder that is no Vamba, and for values that are wrong or missing.
    """
    try:
        rows, width = shapes[MIXER + "in_proj.weight"]
        (heads,), d_inner = shapes[MIXER + "A_log"], shapes[MIXER + "out_proj.weight"][1]
        conv, d_conv = shapes[MIXER + "conv1d.weight"][0], shapes[MIXER + "conv1d.weight"][2]
    except KeyError as error:
        raise CheckpointError(f"{folder} is no Vamba: it lacks {error}, of the first layer's Mamba-2 mixer") from error
    stated = {key: v for key, v in _section(folder, given, "vision_mamba_mixer_config").items() if key in MIXER_FIELDS}
    groups = stated.get("ngroups", 1)
    if not is_integer(groups, 1):
        raise CheckpointError(f"{folder / CONFIG}: ngroups is {groups!r}; allowed: a positive integer")
    d_ssm = 2 * d_inner + conv + heads - rows  # rows are 2 (d_inner - d_ssm) + d_ssm + conv + heads
    mixer = stated | {
        "expand": d_inner // width, "headdim": d_ssm // heads, "d_state": (conv - d_ssm) // (2 * groups), "d_conv": d_conv,
        "d_ssm": None if d_ssm == d_inner else d_ssm,
    }  # fmt: skip
    return decoder_config(folder, given, "model.layers.0.alpha" in shapes, mixer)


def decoder_config(folder: Path, given: Mapping[str, Any], balances: bool, mixer: Mapping[str, Any]) -> VambaConfig:
    """Return the configuration with the decoder of a config.json, with alpha if `balances`, and the keywords of the mixers.

    Raises CheckpointError for values that are wrong or missing.
    """
    rope = _section(folder, given, "rope_scaling") or _section(folder, given, "rope_parameters")
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"
    )  # fmt: skip
    text = given["text_config"] if isinstance(given.get("text_config"), dict) else given
    optional = {
        "head_dim": _find(given, "head_dim"), "rms_norm_eps": _find(given, "rms_norm_eps"),
        "rope_theta": _find(given, "rope_theta"), "mrope_section": rope.get("mrope_section"),
        "cross_attn_use_layer_norm": _find(given, "cross_attn_use_layer_norm"),
        "cross_attn_use_position_embeddings": _find(given, "cross_attn_use_position_embeddings"),
    }  # fmt: skip
    try:
        return VambaConfig(
            **{name: text[name] for name in names},
            **{name: value for name, value in optional.items() if value is not None},
            use_alpha_balancing=balances,
            mixer=mixer,
        )
    except KeyError as error:
        raise CheckpointError(f"{folder / CONFIG} lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} is no configuration of a Vamba: {error}") from error


def _find(given: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key at the top, or in the first section that has it except the vision tower's; None without."""
    if key in given:
        return given[key]
    sections = [v for name, v in given.items() if isinstance(v, Mapping) and name != "vision_config"]
    return next((found for section in sections if (found := _find(section, key)) is not None), None)


def _section(folder: Path, given: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the object that `_find` finds, an empty one without; raise CheckpointError for what is none."""
    found = _find(given, key)
    if found is not None and not isinstance(found, Mapping):
        raise CheckpointError(f"{folder / CONFIG}: {key} is {found!r}; allowed: an object")
    return found or {}


def _check_names(folder: Path, model: Any, shapes: Mapping[str, tuple[int, ...]]) -> VambaLoadReport:
    """Return the report of a load that can begin; raise CheckpointError for names and shapes that differ from the model's."""
    due = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    tower_due = any(name.startswith(VISION) for name in due)
    dropped = [name for name in shapes if name.startswith(VISION) and not tower_due]
    lines = []
    for title, found in (
        ("not in the folder", [name for name in due if name not in shapes]),
        ("not in the model", [name for name in shapes if name not in due and name not in dropped]),
        ("of another shape", [f"{n} ({shapes[n]}, due {due[n]})" for n in due if n in shapes and shapes[n] != due[n]]),
    ):
        lines += [f"  {title}: {abbreviate(found)}"] if found else []
    if lines:
        raise CheckpointError("\n".join([f"{folder} does not fit its configuration; nothing was loaded.", *lines]))
    last = f"model.layers.{model.config.num_hidden_layers - 1}.vision_mixer."
    return VambaLoadReport(str(folder), list(due), [name for name in due if name.startswith(last)], dropped)


def assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter, or of a buffer, of the model."""
    module = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value)
    else:
        module._buffers[leaf] = value


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON, atomically."""
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
