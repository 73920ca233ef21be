"""Registration of kernels as PyTorch operators `videomamba::NAME`, with gradients.

    call = register("double(Tensor x) -> Tensor", kernel, fake, autograd=Double.apply)

The first argument of every operator is a tensor or a list of tensors, on whose device it runs. `torch.compile` sees an operator
and nothing inside of it; forward and backward are one operator each.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fused.runtime.autocast import no_autocast
from fused.runtime.plans import Planned

_LIBRARY = torch.library.Library("videomamba", "FRAGMENT")


def register(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], autograd: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Register an operator and return a function that calls it.

    `kernel` runs it. It may return None for a result, of which the dispatcher makes a tensor without elements. `fake` returns
    empty tensors of the results' shapes and dtypes. `autograd` applies a `torch.autograd.Function` to the operator's arguments
    where a gradient is wanted. An operator without it is a backward, whose gradient raises RuntimeError. The returned function
    skips one pass through the dispatcher, except while a compiler traces: the compiler must see the operator.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)

    def run(*arguments: Any) -> Any:
        first = arguments[0]
        device = first[0].device if isinstance(first, (list, tuple)) else first.device
        with no_autocast(device):  # autocast would change the calls inside the kernel, also within a backward
            return kernel(*arguments)

    planned = Planned(run)

    def dispatched(*arguments: Any) -> Any:
        return _all_tensors(planned(*arguments))

    for device in ("CUDA", "CPU"):  # on the CPU under interpreter and emulation only
        _LIBRARY.impl(name, dispatched, device)
    torch.library.register_fake(f"videomamba::{name}", fake, lib=_LIBRARY)  # unlike a Meta kernel, it knows the device
    operator = getattr(torch.ops.videomamba, name).default
    PLANNED[operator] = planned
    apply = autograd or functools.partial(_Backward.call, operator)

    def with_gradients(*arguments: Any) -> Any:
        return _all_tensors(call(*arguments))

    def call(*arguments: Any) -> Any:
        return apply(*arguments) if wants_gradients(*arguments) else below_autograd(operator, *arguments)

    def call_or_trace(*arguments: Any) -> Any:
        return operator(*arguments) if torch.compiler.is_compiling() else call(*arguments)

    _LIBRARY.impl(name, with_gradients, "Autograd")
    return call_or_trace


class _Backward(torch.autograd.Function):
    """Autograd of a backward operator whose own gradient may be wanted: it runs, and differentiating it raises."""

    @classmethod
    def call(cls, operator: Callable[..., Any], *arguments: Any) -> Any:
        """Apply to the tensors one by one, those in lists too, so that autograd sees each of them."""
        results: list[Any] = []
        flat = iter(apply_function(cls, operator, arguments, results, *_flatten(arguments)))
        return tuple(_map_leaves(results, lambda x: None if x is None else next(flat)))

    @staticmethod
    def forward(ctx: Any, operator: Any, arguments: tuple[Any, ...], results: list[Any], *_: Tensor) -> tuple[Tensor, ...]:
        ctx.name = operator.name()
        results += below_autograd(operator, *arguments)
        return tuple(_flatten(results))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name}: trying to differentiate twice; use backend='torch' or reference for what can be"
        )


def _flatten(values: Iterable[Any]) -> list[Tensor]:
    return [x for value in values for x in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(x, Tensor)]


PLANNED: dict[Any, Planned] = {}


def below_autograd(operator: Callable[..., Any], *arguments: Any) -> Any:
    """Run an operator's kernel: within its own `torch.autograd.Function`, or where no gradient is wanted.

    The dispatcher, which takes as much host time as several launches, is asked only where a mode, a transform, a tracer or the
    profiler listens to it, or a tensor is of a class that does.
    """
    if not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        results = PLANNED[operator](*arguments)
        if results is not NotImplemented:
            return results
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def wants_gradients(*arguments: Any) -> bool:
    """Return whether autograd will ask for a gradient of one of the arguments: of tensors, and of tensors in lists."""
    if not torch.is_grad_enabled():
        return False
    for x in arguments:
        if isinstance(x, Tensor):
            if x.requires_grad:
                return True
        elif isinstance(x, (list, tuple)) and wants_gradients(*x):
            return True
    return False


def _all_tensors(results: Any) -> Any:
    """Return an operator's results as the dispatcher wants them, with an empty tensor for None."""
    if not isinstance(results, (list, tuple)):
        return results
    like = next(x for y in results for x in (y if isinstance(y, (list, tuple)) else [y]) if x is not None)
    return tuple(_map_leaves(results, lambda x: like.new_empty(0) if x is None else x))


def _map_leaves(results: Iterable[Any], function: Callable[[Any], Any]) -> list[Any]:
    """Return a list with the function applied to every entry, and to the entries of lists."""
    return [[function(y) for y in x] if isinstance(x, (list, tuple)) else function(x) for x in results]


def apply_function(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Return function.apply(*arguments), without what PyTorch does for functorch's transforms where none is active."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    without: Any = super(torch.autograd.Function, function)
    return without.apply(*arguments)


def none_if_empty(x: Tensor | None) -> Tensor | None:
    """Return x, or None where it stands for a result that an operator does not have."""
    return None if x is None or x.numel() == 0 else x
