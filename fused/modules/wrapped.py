"""Modules that are more than their weight: with an adapter such as LoRA, a hook, a pruning, or of another class than nn.Linear.

A fused operator reads a module's `weight` and `bias` and does not call the module. That is right for nn.Linear and nn.Conv1d,
for subclasses that compute the same, and for parametrizations, whose value is the attribute. Others have to be called.
Hooks for all modules of the process (`torch.nn.modules.module.register_module_forward_hook`) are not looked for.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PLAIN = (nn.Linear, nn.Conv1d)
_PLAIN_WEIGHTS = (nn.Parameter, Tensor, type(None))  # None where the weight has a parametrization
_HOOKS = {
    "_forward_hooks": "forward hook", "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook", "_backward_pre_hooks": "backward pre-hook",
}  # fmt: skip

_log = logging.getLogger("fused")
_noted: dict[str, str] = {}  # mixers that run outside of the fused operator, and why; they are not logged yet
_logged: set[tuple[str, str]] = set()


def modules_to_call(modules: Mapping[str, Any], names: Sequence[str], layer: int | None) -> tuple[str, ...]:
    """Return those of `names` whose module has to be called, of the `modules` of a mixer, the one of layer number `layer`.

    Every forward of a mixer asks this, so it reads few attributes of a plain module. Raises ValueError for a quantised module.
    """
    found: tuple[str, ...] = ()
    for name in names:
        m = modules[name]
        if (
            (type(m) not in _PLAIN and not computes_plainly(m))
            or m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
            or "forward" in m.__dict__
        ):  # fmt: skip
            found += (name,)
        elif type(m._parameters.get("weight")) in _PLAIN_WEIGHTS:
            continue
        check_weights(m, f"{mixer_name(layer)}.{name}")
    return found


def mixer_name(layer: int | None) -> str:
    """Return the name of the mixer of layer number `layer` within its model."""
    return "mixer" if layer is None else f"layers.{layer}.mixer"


def computes_plainly(module: nn.Module) -> bool:
    """Return whether the class of `module` computes what PyTorch's own Linear or convolution computes from its weight."""
    for plain in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(module, plain):
            methods = ("__call__", "forward", "_conv_forward")
            return all(getattr(type(module), name, None) is getattr(plain, name, None) for name in methods)
    return False


def hooks_of(module: nn.Module) -> list[str]:
    """Return what runs beside the forward of its class when `module` is called, in words: ["1 forward hook"]."""
    counts = {words: len(getattr(module, name)) for name, words in _HOOKS.items()}
    found = [f"{count} {words}{'s' if count > 1 else ''}" for words, count in counts.items() if count]
    return [*found, "a forward of its own"] if "forward" in vars(module) else found


def describe(module: nn.Module) -> str:
    """Return why `module` has to be called: "has 1 forward hook", or "is a peft.tuners.lora.layer.Linear"."""
    hooks = hooks_of(module)
    return f"has {' and '.join(hooks)}" if hooks else f"is a {_class_name(module)}"


def is_untouched(mixer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether `mixer` is a `kind` that holds nn.Linear and nn.Conv1d, without any wrapper, parametrization or hook."""
    return all(type(m) in (kind, *_PLAIN) and not hooks_of(m) for m in mixer.modules())


def check_weights(module: nn.Module, name: str) -> None:
    """Raise ValueError if `module` or a module in it has a weight that is no plain tensor of a floating-point dtype."""
    for inner, m in module.named_modules(prefix=name):
        weight = None if parametrize.is_parametrized(m) else getattr(m, "weight", None)
        if weight is None or isinstance(weight, nn.Module):  # the latter is a module's name in a container
            continue
        if not isinstance(weight, Tensor):
            found = "no tensor"
        elif type(weight) not in _PLAIN_WEIGHTS and is_traceable_wrapper_subclass(weight):  # torchao's, also a DTensor
            found = f"a {_class_name(weight)}"
        elif not weight.is_floating_point():
            found = f"{weight.dtype}"
        else:
            continue
        raise ValueError(
            f"the weight of {inner}, a {_class_name(m)}, is {found}; allowed in a Mamba mixer: plain tensors of floating-point "
            "dtypes. A mixer cannot be quantised: leave its modules out of the quantisation"
        )


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of `module`, or the first parameter of a wrapper without one: both have the module's dtype, device."""
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else next(p for p in module.parameters() if p.is_floating_point())


def note_slow_path(mixer: nn.Module, names: Sequence[str], layer: int | None) -> None:
    """Note that the modules `names` of `mixer` are called, and that it therefore runs in more operators.

    `log_slow_path` says so for all mixers of a model. One that is in no model, or comes a second time, is logged here.
    """
    if torch.compiler.is_compiling():
        return
    name, reasons = mixer_name(layer), ", ".join(f"{name} {describe(mixer.get_submodule(name))}" for name in names)
    if (name, reasons) in _logged:
        return
    comes_again, _noted[name] = name in _noted, reasons
    if layer is None or comes_again:
        log_slow_path()


def log_slow_path() -> None:
    """Log, in one warning and once per process, which mixers were noted since the last call."""
    if torch.compiler.is_compiling() or not _noted:
        return
    (first, reasons), *others = _noted.items()
    more = f"; so do {len(others)} more mixers" if others else ""
    words = "%s runs outside of the fused operator, which is slower, since modules have to be called: %s%s"
    _log.warning(words, first, reasons, more)
    _logged.update(_noted.items())
    _noted.clear()


def _class_name(x: object) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"
