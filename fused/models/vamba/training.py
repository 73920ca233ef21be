"""The beginning of a training of Vamba: initial weights of what a language model lacks, and the parts that are learnt.

    model = Vamba.from_pretrained(folder)      # or Vamba(config) with a language model's weights loaded
    init_cross_attention(model)
    learnt = select_trainable(model, "pretrain")
    model.recompute_layers = True
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from fused.models.vamba.layer import VambaDecoderLayer
from fused.models.vamba.model import Vamba
from fused.modules.mamba2 import Mamba2
from fused.rules import invalid

STAGES = {"pretrain": ("cross_attn", "vision_mixer", "alpha"), "sft": ("model.", "visual.merger.")}
"""By stage, parts of the names of the parameters that are learnt. Source: upstream's scripts."""


@torch.no_grad()
def init_cross_attention(model: Vamba) -> None:
    """Copy the self-attention of every layer into its cross-attention, weights and biases, as upstream's pretraining begins."""
    for layer in _layers(model):
        layer.cross_attn.load_state_dict(layer.self_attn.state_dict())


@torch.no_grad()
def init_mixers(model: Vamba) -> None:
    """Draw the mixers' products as upstream does; the rest has the initial values of `Mamba2`.

    in_proj is normal with deviation 0.02. out_proj is uniform within 1/sqrt(d_inner), divided by sqrt(number of layers).
    """
    layers = _layers(model)
    for layer in layers:
        draw_mixer(layer.vision_mixer.mixer, len(layers))


@torch.no_grad()
def draw_mixer(mixer: Mamba2, layers: int) -> None:
    """Draw the products of one mixer of a model with so many layers, see `init_mixers`."""
    nn.init.normal_(mixer.in_proj.weight, 0.0, 0.02)
    edge = 1 / math.sqrt(mixer.d_inner * layers)
    nn.init.uniform_(mixer.out_proj.weight, -edge, edge)


def select_trainable(model: Vamba, stage: str | Sequence[str]) -> list[str]:
    """Let the parameters of a stage, or those with one of some parts in their names, require gradients; return their names.

    "pretrain" learns cross-attention, mixers and alpha; "sft" the whole decoder but lm_head, and the merger of the vision
    tower. The mixer of the last layer, which gets no gradient, is left out, as are the other parameters. Raises ValueError for
    another stage, and for a part that no such parameter's name holds.
    """
    if isinstance(stage, str) and stage not in STAGES:
        raise invalid("stage", stage, "one of " + ", ".join(map(repr, STAGES)))
    parts = STAGES[stage] if isinstance(stage, str) else tuple(stage)
    unused = f"model.layers.{len(_layers(model)) - 1}.vision_mixer."
    usable = [name for name, _ in model.named_parameters() if not name.startswith(unused)]
    if not isinstance(stage, str) and (lacking := [part for part in parts if not any(part in name for name in usable)]):
        shown = ", ".join(groups(usable))
        raise ValueError(f"no parameter that can learn has {lacking[0]!r} in its name; allowed: parts of {shown}")
    learnt = {name for name in usable if any(part in name for part in parts)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learnt)
    return [name for name in usable if name in learnt]


def groups(names: Sequence[str]) -> list[str]:
    """Return the modules of parameters in order, layers of one kind as one: model.layers.*.cross_attn and so on."""
    shown = [".".join("*" if part.isdigit() else part for part in name.split(".")[:4]) for name in names]
    return list(dict.fromkeys(name.removesuffix(".weight").removesuffix(".bias") for name in shown))


def _layers(model: Vamba) -> list[VambaDecoderLayer]:
    """Return the model's layers; raise TypeError for another model."""
    if not isinstance(model, Vamba):
        raise TypeError(f"model is a {type(model).__name__}; allowed: a Vamba")
    return [layer for layer in model.model.layers if isinstance(layer, VambaDecoderLayer)]
