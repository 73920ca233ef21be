"""The beginning of a training of Vamba: a folder of a Vamba, or of a Qwen2-VL that becomes one.

    model = begin("qwen2-vl-7b")        # mixers with initial values, cross-attention a copy of the self-attention
    names = select_trainable(model, "pretrain")
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused.io.checkpoint_file import CheckpointError
from fused.models.vamba.layer import VambaDecoderLayer, VisionMixer
from fused.models.vamba.load import (
    CONFIG,
    MIXER,
    VISION,
    assign,
    decoder_config,
    open_weights,
    read_json,
    read_stops,
    some,
    weight_files,
)
from fused.models.vamba.model import Vamba
from fused.models.vamba.training import init_cross_attention, init_mixers
from fused.models.vamba.vision import vision_tower

NEW = ("cross_attn", "vision_mixer", "alpha")  # parts of a layer that a Qwen2-VL lacks


def begin(folder: str | Path, *, backend: str = "auto", mixer: Mapping[str, Any] | None = None) -> Vamba:
    """Return the model of a folder in float32 on the CPU, with its vision tower, in eval mode.

    A folder of a Qwen2-VL gives a model whose cross-attention is a copy of its self-attention, whose mixers have initial
    values, with the keywords `mixer` of Mamba2, and whose alphas are 0.5. A Vamba says itself what its mixers are.

    Raises FileNotFoundError and CheckpointError for a folder that is neither, ValueError for a `mixer` of a Vamba, ImportError
    without safetensors or transformers.
    """
    folder = Path(os.path.expanduser(folder))
    given, files = read_json(folder / CONFIG), weight_files(folder)
    if MIXER + "in_proj.weight" in files:
        if mixer:
            raise ValueError(f"mixer is {dict(mixer)!r}, and {folder} is a Vamba; allowed: nothing, its weights say it")
        return Vamba.from_pretrained(folder, backend=backend, vision=True, dtype=torch.float32)
    tower = given.get("vision_config")
    if not isinstance(tower, dict) or not any(_name(key).startswith(VISION) for key in files):
        raise CheckpointError(f"{folder} is neither a Vamba nor a Qwen2-VL: it holds no vision tower, whose keys are visual.*")
    config = decoder_config(folder, given, True, mixer or {})
    with torch.device("meta"):
        model = Vamba(config, backend)
    model.visual, model.vision_config, model.stop_tokens = vision_tower(tower), tower, read_stops(folder, given)
    _load_stock(model, folder, files)
    for i, layer in enumerate(model.model.layers):
        assert isinstance(layer, VambaDecoderLayer)
        layer.alpha, layer.vision_mixer = nn.Parameter(torch.full((1,), 0.5)), VisionMixer(config, i)
        layer.cross_attn.to_empty(device="cpu")
    init_cross_attention(model)
    init_mixers(model)
    return model.eval()


def _load_stock(model: Vamba, folder: Path, files: Mapping[str, Path]) -> None:
    """Give the model the weights of a Qwen2-VL in float32. Raises CheckpointError for names and shapes that do not fit."""
    named = {_name(key): (key, file) for key, file in files.items()}
    if "lm_head.weight" not in named and "model.embed_tokens.weight" in named:  # tied
        named["lm_head.weight"] = named["model.embed_tokens.weight"]
    state = model.state_dict()
    due = {name: t.shape for name, t in state.items() if name.startswith(VISION) or not any(part in name for part in NEW)}
    for title, found in (
        ("lacks", [name for name in due if name not in named]),
        ("holds, which a Qwen2-VL does not have,", [name for name in named if name not in due]),
    ):
        if found:
            raise CheckpointError(f"{folder} does not fit a Qwen2-VL: it {title} {some(found)}")
    with ExitStack() as stack:
        handles = {file: stack.enter_context(open_weights(file)) for file in sorted(set(files.values()))}
        for name, (key, file) in named.items():
            tensor = handles[file].get_tensor(key).float()
            if tensor.shape != due[name]:
                raise CheckpointError(f"{folder}: {key} has shape {tuple(tensor.shape)}; due {tuple(due[name])}")
            assign(model, name, tensor)


def _name(key: str) -> str:
    """Return the name in a Vamba of a key of Qwen2-VL, in the published layout or in that of newer versions of transformers."""
    return key.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)
