"""Parameter groups for any of PyTorch's optimisers: which parameters decay, and at which rate each layer learns."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fused.models.videomamba.backbone import Backbone
from fused.modules.mamba import Mamba
from fused.rules import check_number
from fused.runtime.checks import check_choice

DECAY_RULES = ("upstream", "corrected")
STATE_SPACE = ("A_log", "A_b_log", "D", "D_b")
EMBEDDINGS = ("cls_token", "pos_embed", "patch_embed")


def parameter_groups(
    model: nn.Module, lr: int | float, weight_decay: int | float, layer_decay: int | float = 1.0, rule: str = "upstream"
) -> list[dict[str, Any]]:
    """Return groups for `torch.optim.AdamW(groups)`, which hold every trainable parameter once.

    A group has the keys `params`, `name`, `lr` and `weight_decay`. `lr` > 0, weight_decay >= 0, layer_decay in (0, 1].

    Weight decay leaves out vectors, biases and the names that the model's `no_weight_decay()` returns. "corrected" also leaves
    out A_log, A_b_log, D and D_b of the state space. A_log is a matrix that upstream marks as not to be decayed, but its rule
    does not read the mark, and so pulls every A towards -1.

    Layer decay (arXiv 2106.08254): a parameter learns at lr * layer_decay ** (depth + 1 - k). "corrected" has k = 0 for the
    embeddings, i + 1 for layer i, and depth + 1, which is the full lr, for the rest (last norm, heads, decoders). "upstream"
    has k = 0 for cls_token, pos_embed and patch_embed, and the full lr for all others, temporal_pos_embedding among them.

    `model` may be a `VideoMamba` or `VideoMambaEncoder`, a wrapper of one (DistributedDataParallel, torch.compile), or a
    module that contains some beside other modules; those learn at the full lr. Raises TypeError or ValueError for arguments
    out of range, and for a model without trainable parameters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"parameter_groups: model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("parameter_groups", "rule", rule, DECAY_RULES)
    check_number("parameter_groups", "lr", lr, 0, float("inf"), "()")
    check_number("parameter_groups", "weight_decay", weight_decay, 0, float("inf"), "[)")
    check_number("parameter_groups", "layer_decay", layer_decay, 0, 1, "(]")

    undecayed, exponents = _undecayed_names(model, rule), _layer_decay_exponents(model, rule)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = not (parameter.dim() <= 1 or name.endswith(".bias") or name in undecayed)
        exponent = 0 if layer_decay == 1 else exponents.get(name, 0)
        group = groups.setdefault((exponent, decays), {"params": []})
        group["params"].append(parameter)
    if not groups:
        raise ValueError("parameter_groups: model must have a parameter with requires_grad, got one without")
    for (exponent, decays), group in groups.items():
        group["name"] = f"{'' if decays else 'not '}decayed, lr * {layer_decay:g}^{exponent}"
        group["lr"], group["weight_decay"] = lr * layer_decay**exponent, weight_decay if decays else 0.0
    return list(groups.values())


class LearningRates:
    """The learning rates of an optimiser's groups, float32 on a device, where a CUDA graph reads them.

    They replace the numbers `lr` of the groups. Step s, counted from 0, runs at lr * factor(s).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float], device: torch.device) -> None:
        self._base = [group["lr"] for group in optimizer.param_groups]
        self._factor = factor
        self._values = torch.zeros(len(self._base), device=device)
        for group, value in zip(optimizer.param_groups, self._values.unbind(), strict=True):
            group["lr"] = value

    def set(self, step: int) -> float:
        """Set the learning rates of a step, and return the highest."""
        factor = self._factor(step)
        rates = [base * factor for base in self._base]
        values = torch.tensor(rates, dtype=torch.float32)
        if self._values.is_cuda:
            values = values.pin_memory()  # from which the copy does not wait for the GPU
        self._values.copy_(values, non_blocking=True)
        return max(rates)


def _undecayed_names(model: nn.Module, rule: str) -> set[str]:
    """Return the full names of parameters that do not decay, whatever their shape."""
    names = set()
    for path, module in model.named_modules():
        if isinstance(module, Backbone):
            names |= {_join(path, name) for name in module.no_weight_decay()}
        if rule == "corrected" and isinstance(module, Mamba):
            names |= {_join(path, name) for name in STATE_SPACE}
    return names


def _layer_decay_exponents(model: nn.Module, rule: str) -> dict[str, int]:
    """Return depth + 1 - k of every parameter of a backbone, by full name."""
    exponents = {}
    for path, module in model.named_modules():
        if not isinstance(module, Backbone):
            continue
        embeddings = EMBEDDINGS if rule == "upstream" else (*EMBEDDINGS, "temporal_pos_embedding")
        top = module.config.depth + 1
        for name, _ in module.named_parameters():
            child, *rest = name.split(".")
            k = 0 if child in embeddings else int(rest[0]) + 1 if child == "layers" and rule == "corrected" else top
            exponents[_join(path, name)] = top - k
    return exponents


def _join(path: str, name: str) -> str:
    """Return the full name of a parameter of the module at `path`, which is "" for the model itself."""
    return f"{path}.{name}" if path else name
