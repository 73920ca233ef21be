"""Ways to wrap a Linear or a depthwise Conv1d, each with the plain weight and bias that it amounts to."""

import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from fused.runtime import cpu_library

CPU = ["cpu"] if not torch.cuda.is_available() and cpu_library.unavailable() is None else []  # the backend, where it can run
NAMES = ("in_proj", "out_proj", "conv1d", "x_proj", "dt_proj", "conv1d_b", "x_proj_b", "dt_proj_b")


class Adapter(nn.Module):
    """A module with a low-rank product beside it, for a Linear as for a Conv1d; it has no attribute `weight`."""

    def __init__(self, base, rank=2, dropout=0.0):
        super().__init__()
        self.base, self.dropout = base, nn.Dropout(dropout)
        rows, shape = base.weight.shape[0], base.weight.shape
        self.down = nn.Parameter(0.3 * torch.randn(rank, shape[1:].numel()))
        self.up = nn.Parameter(0.3 * torch.randn(rows, rank))

    def delta(self):
        return (self.up @ self.down).view_as(self.base.weight)

    def forward(self, x):
        y, options = self.base(x), {}
        if isinstance(self.base, nn.Conv1d):
            options = {"padding": self.base.padding, "groups": self.base.groups}
            return y + nn.functional.conv1d(self.dropout(x), self.delta(), **options)
        return y + nn.functional.linear(self.dropout(x), self.delta())


class Scaled(nn.Linear):
    """A Linear of another class, whose result is scaled."""

    def forward(self, x):
        return self.scale * super().forward(x)


class ScaledConv(nn.Conv1d):
    """The same for a convolution, by the method that `nn.Conv1d.forward` calls."""

    def _conv_forward(self, *arguments):
        return self.scale * super()._conv_forward(*arguments)


class Times(nn.Module):
    """A parametrization: the weight times a number for each row."""

    def __init__(self, rows, dims):
        super().__init__()
        self.scale = nn.Parameter((torch.rand(rows) + 0.5).view(-1, *(1,) * (dims - 1)))

    def forward(self, weight):
        return weight * self.scale


def scale(module, of_inputs=False):
    """Give a module a number for each channel of its results or inputs, and return it."""
    rows = module.weight.shape[1] if of_inputs and isinstance(module, nn.Linear) else module.weight.shape[0]
    module.scale = nn.Parameter((torch.rand(rows) + 0.5).view(-1, *(1,) * (module.weight.dim() - 2)))
    return module


def adapter(module):
    return Adapter(module)


def subclass(module):
    scale(module).__class__ = Scaled if isinstance(module, nn.Linear) else ScaledConv
    return module


def hook(module):
    scale(module).register_forward_hook(lambda m, inputs, y: y * m.scale)
    return module


def pre_hook(module):
    scale(module, of_inputs=True).register_forward_pre_hook(lambda m, inputs: (inputs[0] * m.scale,))
    return module


def own_forward(module):
    """Replace the forward of a module, as accelerate does to offload it."""

    def forward(self, x):
        return self.scale * type(self).forward(self, x)

    scale(module).forward = types.MethodType(forward, module)
    return module


def pruned(module):
    prune.random_unstructured(module, "weight", 0.5)
    with torch.no_grad():
        module.weight_orig.mul_(1.5)  # as a step of an optimiser: the attribute `weight` is renewed by a call only
    return module


def weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module)
    with torch.no_grad():
        module.weight_g.mul_(1.5)
    return module


def parametrized(module):
    parametrize.register_parametrization(module, "weight", Times(module.weight.shape[0], module.weight.dim()))
    return module


def lora(module):
    """Peft's adapter of a Linear, not at zero as it begins."""
    peft = pytest.importorskip("peft")
    holder = nn.ModuleDict({"module": module})
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["module"], init_lora_weights=False), holder)
    return holder["module"]


WRAPS = {f.__name__: f for f in (adapter, subclass, hook, pre_hook, own_forward, pruned, weight_norm, parametrized)}


def merged(module, kind):
    """Return the weight and the bias of the plain module that computes what the wrapped one does, with its gradients."""
    if kind == "adapter":
        return module.base.weight + module.delta(), module.base.bias
    if kind == "lora":
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        return module.base_layer.weight + B @ A * module.scaling["default"], module.base_layer.bias
    weight, bias = getattr(module, "weight", None), module.bias
    if kind in ("subclass", "hook", "own_forward"):
        return weight * module.scale.unsqueeze(-1), None if bias is None else bias * module.scale.flatten()
    if kind == "pre_hook":  # a row of a depthwise convolution is a channel of its inputs
        return weight * (module.scale if weight.dim() == 2 else module.scale.unsqueeze(-1)), bias
    if kind == "pruned":
        return module.weight_orig * module.weight_mask, bias
    if kind == "weight_norm":
        v = module.weight_v
        return module.weight_g * v / v.flatten(1).norm(dim=1).view(-1, *(1,) * (v.dim() - 1)), bias
    return weight, bias


def wrap(mixer, names, kind):
    """Wrap modules of a mixer in place, and return it."""
    for name in names:
        setattr(mixer, name, (WRAPS | {"lora": lora})[kind](getattr(mixer, name)))
    return mixer


def merged_weights(mixer, names, kind):
    """Return the parameters of the plain mixer that a mixer with wrapped modules amounts to, by name."""
    found = {name: p for name, p in mixer.named_parameters() if name.partition(".")[0] not in names}
    for name in names:
        weight, bias = merged(getattr(mixer, name), kind)
        found |= {f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias})
    return found
