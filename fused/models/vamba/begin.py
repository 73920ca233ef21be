"""The beginning of a training of Vamba: a folder of a Vamba, or of a Qwen2-VL that becomes one.

    model = begin("qwen2-vl-7b")        # mixers with initial values, cross-attention a copy of the self-attention
    names = select_trainable(model, "pretrain")
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused.io.checkpoint_file import CheckpointError
from fused.models.vamba.layer import VisionMixer
from fused.models.vamba.load import CONFIG, MIXER, VISION, decoder_config, existing_folder, read_json, read_stops, read_tower
from fused.models.vamba.model import Vamba
from fused.models.vamba.stored import StoredTensors, weight_files
from fused.models.vamba.training import draw_mixer
from fused.rules import abbreviate

NEW = ("cross_attn", "vision_mixer", "alpha")  # parts of a layer that a Qwen2-VL lacks

Place = Callable[[nn.Parameter], tuple[Tensor, int, int] | None]


class Beginning:
    """A model in outline, its parameters on the meta device, and the values that they begin with.

    A folder of a Qwen2-VL gives a model whose cross-attention is a copy of its self-attention, whose mixers have initial
    values, with the keywords `mixer` of Mamba2, and whose alphas are 0.5. A Vamba says itself what its mixers are.

    Raises FileNotFoundError and CheckpointError for a folder that is neither, ValueError for a `mixer` of a Vamba, ImportError
    without safetensors or transformers.
    """

    def __init__(self, folder: str | Path, *, backend: str = "auto", mixer: Mapping[str, Any] | None = None) -> None:
        folder = existing_folder(folder)
        given, files = read_json(folder / CONFIG), weight_files(folder)
        self.model: Vamba
        if MIXER + "in_proj.weight" in files:
            if mixer:
                raise ValueError(f"mixer is {dict(mixer)!r}, and {folder} is a Vamba; allowed: nothing, its weights say it")
            self.model, self.stored = Vamba.outline(folder, backend=backend, vision=True)
            return
        tower = given.get("vision_config")
        if not isinstance(tower, dict) or not any(_name(key).startswith(VISION) for key in files):
            lacking = "it holds no vision tower, whose keys are visual.*"
            raise CheckpointError(f"{folder} is neither a Vamba nor a Qwen2-VL: {lacking}")
        config = decoder_config(folder, given, True, mixer or {})
        with torch.device("meta"):
            self.model = Vamba(config, backend)
        self.model.visual, self.model.vision_config = read_tower(folder, tower), tower
        self.model.stop_tokens = read_stops(folder, given)
        self.stored = _stock_weights(self.model, folder, files)
        self.model.eval()

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a parameter in the folder, float32 of one that is not there."""
        return self.stored.dtype(name) if name in self.stored.shapes else torch.float32

    @property
    def mixer_bytes(self) -> int:
        """The bytes of the initial values that are drawn at a time, those of one mixer; 0 if all values are in the folder."""
        sizes = (p.numel() for name, p in self.model.named_parameters() if name.startswith(MIXER))
        return 0 if MIXER + "in_proj.weight" in self.stored.shapes else 4 * sum(sizes)

    @torch.no_grad()
    def load(self, place: Place) -> None:
        """Give all parameters their values, one after another.

        `place` returns the memory of the rows from one to another of a parameter, and their numbers; None for no rows. Only
        they are read. Initial values are drawn whole, a mixer at a time: with the same seed they are the same in all processes.
        """
        drawn: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if name not in self.stored.shapes and ".vision_mixer." in name and name not in drawn:
                drawn = self._draw_mixer(name)
            if (found := place(parameter)) is None:
                continue
            memory, start, stop = found
            if name in self.stored.shapes:
                memory.copy_(self.stored.read_rows(name, start, stop))
            elif name in drawn:
                memory.copy_(drawn[name][start:stop])
            else:
                memory.fill_(0.5)  # alpha

    def _draw_mixer(self, name: str) -> dict[str, Tensor]:
        """Return the initial values, by the names of parameters, of the mixer that has the parameter `name`."""
        prefix = name[: name.index(".vision_mixer.")] + ".vision_mixer."
        config, number = self.model.config, int(prefix.split(".")[2])
        block = VisionMixer(config, number)
        draw_mixer(block.mixer, config.num_hidden_layers)
        return {prefix + key: value for key, value in block.state_dict().items()}


def begin(folder: str | Path, *, backend: str = "auto", mixer: Mapping[str, Any] | None = None) -> Vamba:
    """Return the model of a `Beginning` in float32 on the CPU, with its vision tower, in eval mode."""
    beginning = Beginning(folder, backend=backend, mixer=mixer)
    model = beginning.model
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32))
    beginning.load(lambda parameter: (parameter.detach(), 0, len(parameter)))
    return model


def _stock_weights(model: Vamba, folder: Path, files: Mapping[str, Path]) -> StoredTensors:
    """Return the weights of a Qwen2-VL by the names of a Vamba's parameters. Raises CheckpointError for what does not fit."""
    keys = {_name(key): key for key in files}
    if "lm_head.weight" not in keys and "model.embed_tokens.weight" in keys:  # tied
        keys["lm_head.weight"] = keys["model.embed_tokens.weight"]
    state = model.state_dict()
    due = {name: tuple(t.shape) for name, t in state.items() if name.startswith(VISION) or not any(p in name for p in NEW)}
    for title, found in (
        ("lacks", [name for name in due if name not in keys]),
        ("holds, which a Qwen2-VL does not have,", [name for name in keys if name not in due]),
    ):
        if found:
            raise CheckpointError(f"{folder} does not fit a Qwen2-VL: it {title} {abbreviate(found)}")
    copied = {name: keys[name.replace(".cross_attn.", ".self_attn.")] for name in state if ".cross_attn." in name}
    stored = StoredTensors(folder, keys | copied)
    for name, shape in due.items():
        if stored.shapes[name] != shape:
            raise CheckpointError(f"{folder}: {keys[name]} has shape {stored.shapes[name]}; due {shape}")
    return stored


def _name(key: str) -> str:
    """Return the name in a Vamba of a key of Qwen2-VL, in the published layout or in that of newer versions of transformers."""
    return key.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)
