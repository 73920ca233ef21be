"""The beginning of a training of Vamba: initial weights of what a language model lacks, and the parts that are learnt.

    model = Vamba.from_pretrained(folder)      # or Vamba(config) with a language model's weights loaded
    init_cross_attention(model)
    learnt = select_trainable(model, "pretrain")
    model.recompute_layers = True
"""

import math

import torch
from torch import nn

from fused.models.vamba.layer import VambaDecoderLayer
from fused.models.vamba.model import Vamba
from fused.rules import invalid

STAGES = {"pretrain": ("cross_attn", "vision_mixer", "alpha"), "sft": ("model.", "visual.merger.")}
"""By stage, parts of the names that are learnt: substrings in "pretrain", beginnings in "sft". Source: upstream's scripts."""


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
        mixer = layer.vision_mixer.mixer
        nn.init.normal_(mixer.in_proj.weight, 0.0, 0.02)
        edge = 1 / math.sqrt(mixer.d_inner * len(layers))
        nn.init.uniform_(mixer.out_proj.weight, -edge, edge)


def select_trainable(model: Vamba, stage: str) -> list[str]:
    """Let the parameters of a stage require gradients and no others, and return their names.

    "pretrain" learns cross-attention, mixers and alpha; "sft" the whole decoder but lm_head, and the merger of the vision
    tower. The mixer of the last layer, which gets no gradient, is left out. Raises ValueError for another stage.
    """
    if stage not in STAGES:
        raise invalid("stage", stage, "one of " + ", ".join(map(repr, STAGES)))
    unused = f"model.layers.{len(_layers(model)) - 1}.vision_mixer."
    learnt = []
    for name, parameter in model.named_parameters():
        fits = name.startswith(STAGES[stage]) if stage == "sft" else any(part in name for part in STAGES[stage])
        parameter.requires_grad_(fits and not name.startswith(unused))
        if parameter.requires_grad:
            learnt.append(name)
    return learnt


def _layers(model: Vamba) -> list[VambaDecoderLayer]:
    """Return the model's layers; raise TypeError for another model."""
    if not isinstance(model, Vamba):
        raise TypeError(f"model is a {type(model).__name__}; allowed: a Vamba")
    return [layer for layer in model.model.layers if isinstance(layer, VambaDecoderLayer)]
