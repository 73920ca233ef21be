"""Which parameters decay, and at which rate each layer learns: parameter groups for any of PyTorch's optimisers."""

from typing import Any

from torch import nn

from fused.models.videomamba.backbone import Backbone
from fused.modules.mamba import Mamba
from fused.rules import check_number
from fused.runtime.checks import check_choice

RULES = ("upstream", "corrected")
STATE_SPACE = ("A_log", "A_b_log", "D", "D_b")
EMBEDDINGS = ("cls_token", "pos_embed", "patch_embed")


def parameter_groups(
    model: nn.Module, lr: int | float, weight_decay: int | float, layer_decay: int | float = 1.0, rule: str = "upstream"
) -> list[dict[str, Any]]:
    """Groups for `torch.optim.AdamW(groups)`: every trainable parameter once, with its `lr` and `weight_decay`, and the
    group's `name`. `lr` > 0, weight_decay >= 0, layer_decay in (0, 1].

    No decay for vectors, biases and what the model's `no_weight_decay()` names. With "corrected" the state space's A_log,
    A_b_log, D and D_b do not decay either: A_log is a matrix, marked as not to be decayed, which upstream does not read, so
    that its rule pulls every A towards -1.

    Layer decay (arXiv 2106.08254): parameters learn at lr * layer_decay ** (depth + 1 - k), with k = 0 for the embeddings,
    i + 1 for layer i, and depth + 1, the whole lr, for the rest (last norm, heads, decoders). So is "corrected"; "upstream"
    has only k = 0, for cls_token, pos_embed and patch_embed, and trains all others, temporal_pos_embedding among them, at
    the whole lr.

    `model` may be a `VideoMamba` or `VideoMambaEncoder`, a wrapper of one (DistributedDataParallel, torch.compile), or a
    module that holds some beside other parts, which then learn at the whole lr. Raises TypeError or ValueError for what is
    out of range, and for a model without trainable parameters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"parameter_groups: model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("parameter_groups", "rule", rule, RULES)
    check_number("parameter_groups", "lr", lr, 0, float("inf"), "()")
    check_number("parameter_groups", "weight_decay", weight_decay, 0, float("inf"), "[)")
    check_number("parameter_groups", "layer_decay", layer_decay, 0, 1, "(]")

    plain, power = _not_decayed(model, rule), _powers(model, rule)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = not (parameter.dim() <= 1 or name.endswith(".bias") or name in plain)
        exponent = power.get(name, 0)
        if layer_decay == 1:
            exponent = 0
        group = groups.setdefault((exponent, decays), {"params": []})
        group["params"].append(parameter)
    if not groups:
        raise ValueError("parameter_groups: model must have a parameter with requires_grad, got one without")
    for (exponent, decays), group in groups.items():
        group["name"] = f"{'' if decays else 'not '}decayed, lr * {layer_decay:g}^{exponent}"
        group["lr"], group["weight_decay"] = lr * layer_decay**exponent, weight_decay if decays else 0.0
    return list(groups.values())


def _not_decayed(model: nn.Module, rule: str) -> set[str]:
    """Full names of parameters that do not decay, whatever their shape."""
    names = set()
    for path, module in model.named_modules():
        if isinstance(module, Backbone):
            names |= {_join(path, name) for name in module.no_weight_decay()}
        if rule == "corrected" and isinstance(module, Mamba):
            names |= {_join(path, name) for name in STATE_SPACE}
    return names


def _powers(model: nn.Module, rule: str) -> dict[str, int]:
    """depth + 1 - k of every parameter of a backbone, by full name."""
    powers = {}
    for path, module in model.named_modules():
        if not isinstance(module, Backbone):
            continue
        first = EMBEDDINGS if rule == "upstream" else (*EMBEDDINGS, "temporal_pos_embedding")
        top = module.config.depth + 1
        for name, _ in module.named_parameters():
            part, *rest = name.split(".")
            k = 0 if part in first else int(rest[0]) + 1 if part == "layers" and rule == "corrected" else top
            powers[_join(path, name)] = top - k
    return powers


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
