"""Registration of kernels as PyTorch operators `videomamba::NAME`, with gradients.

    backward = register("cube_backward(Tensor x, Tensor dy) -> Tensor", kernel_backward, fake_backward)
    cube = register("cube(Tensor x) -> Tensor", kernel, fake, backward=backward)

The first argument of every operator is a tensor or a list of tensors, on whose device it runs. `torch.compile` sees an operator
and nothing inside of it; forward and backward are one operator each.
"""

import functools
from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused.runtime.autocast import no_autocast
from fused.runtime.plans import Planned

_LIBRARY = torch.library.Library("videomamba", "FRAGMENT")


def register(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], backward: Callable[..., Any] | None = None,
    autograd: Callable[..., Any] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """Register an operator and return a function that calls it.

    `kernel` runs it. It may return None for a result, of which the dispatcher makes a tensor without elements. `fake` returns
    empty tensors of the results' shapes and dtypes. The returned function skips one pass through the dispatcher, except while a
    compiler traces: the compiler must see the operator.

    `backward` is what `register` returned for the operator of the gradients. The arguments of the forward are tensors and lists
    of tensors, the inputs, and behind them options. Those of the backward are the inputs, the first options, results of the
    forward that are kept for it, by the names that they have there, and the gradients of the other results, None where none
    arrives. It returns the gradients of the inputs; the last inputs may have none. Instead of it `autograd` can apply a
    `torch.autograd.Function` to the operator's arguments. The gradient of an operator with neither, as of every backward,
    raises RuntimeError.
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
    apply: Callable[..., Any]
    if backward is not None:
        apply = functools.partial(_Forward.call, _Signature.of(operator, backward))
    else:
        apply = autograd or functools.partial(_Backward.call, operator)

    def with_gradients(*arguments: Any) -> Any:
        return _all_tensors(call(*arguments))

    def call(*arguments: Any) -> Any:
        return apply(*arguments) if wants_gradients(*arguments) else below_autograd(operator, *arguments)

    def call_or_trace(*arguments: Any) -> Any:
        return operator(*arguments) if torch.compiler.is_compiling() else call(*arguments)

    _LIBRARY.impl(name, with_gradients, "Autograd")
    _SCHEMAS[call_or_trace] = operator._schema
    return call_or_trace


class _Signature(NamedTuple):
    """An operator, its backward, and which arguments and results they share."""

    operator: Callable[..., Any]
    backward: Callable[..., Any]
    num_inputs: int  # arguments before the options
    num_options: int  # of those that the backward takes
    num_results: int  # results with a gradient; those behind them are kept

    @classmethod
    def of(cls, operator: Any, backward: Callable[..., Any]) -> "_Signature":
        """Return the signature by the names in both schemas."""
        arguments, names = operator._schema.arguments, {argument.name for argument in _SCHEMAS[backward].arguments}
        num_inputs = sum("Tensor" in str(argument.type) for argument in arguments)
        num_options = sum(option.name in names for option in arguments[num_inputs:])
        return cls(operator, backward, num_inputs, num_options, sum(r.name not in names for r in operator._schema.returns))


class _Forward(torch.autograd.Function):
    """Autograd of an operator by its backward operator."""

    @classmethod
    def call(cls, signature: _Signature, *arguments: Any) -> Any:
        """Apply to the tensors one by one, those in lists too, so that autograd sees each of them."""
        of_inputs: list[int | None] = []
        of_results: list[int | None] = []
        inputs = _flatten(arguments[: signature.num_inputs], of_inputs)
        return _nest(apply_function(cls, signature, arguments, of_inputs, of_results, *inputs), of_results)

    @staticmethod
    def forward(
        ctx: Any, signature: _Signature, arguments: tuple[Any, ...], of_inputs: list[int | None],
        of_results: list[int | None], *inputs: Tensor | None,
    ) -> Any:  # fmt: skip
        results, lengths = below_autograd(signature.operator, *arguments), list[int | None]()
        kept = _flatten(() if isinstance(results, Tensor) else results[signature.num_results :], lengths)
        ctx.signature, ctx.options = signature, arguments[signature.num_inputs :][: signature.num_options]
        ctx.num_kept, ctx.lengths = len(lengths), lengths + of_inputs
        ctx.mark_non_differentiable(*(x for x in kept if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *inputs)
        return results if isinstance(results, Tensor) else tuple(_flatten(results, of_results))

    @staticmethod
    def backward(ctx: Any, *dresults: Tensor | None) -> tuple[Tensor | None, ...]:
        signature, dresults = ctx.signature, dresults[: ctx.signature.num_results]
        if all(grad is None for grad in dresults):
            return (None,) * len(ctx.needs_input_grad)
        saved = _nest(ctx.saved_tensors, ctx.lengths)  # read once: activation checkpointing recomputes them at every access
        kept, inputs = saved[: ctx.num_kept], saved[ctx.num_kept :]
        grads = signature.backward(*inputs, *ctx.options, *kept, *dresults)
        pairs = zip_longest(_flatten(inputs, []), _flatten([grads] if isinstance(grads, Tensor) else grads, []))
        return None, None, None, None, *(None if x is None else grad for x, grad in pairs)


class _Backward(torch.autograd.Function):
    """Autograd of a backward operator whose own gradient may be wanted: it runs, and differentiating it raises."""

    @classmethod
    def call(cls, operator: Callable[..., Any], *arguments: Any) -> Any:
        """Apply to the arguments one by one, tensors in lists too, so that autograd sees each of them."""
        of_results: list[int | None] = []
        return _nest(apply_function(cls, operator, arguments, of_results, *_flatten(arguments, [])), of_results)

    @staticmethod
    def forward(ctx: Any, operator: Any, arguments: tuple[Any, ...], of_results: list[int | None], *_: Any) -> Any:
        ctx.name = operator.name()
        results = below_autograd(operator, *arguments)
        return results if isinstance(results, Tensor) else tuple(_flatten(results, of_results))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name}: trying to differentiate twice; use backend='torch' or reference for what can be"
        )


def _flatten(values: Iterable[Any], lengths: list[int | None]) -> list[Any]:
    """Return the values, with the entries of lists in their place; add to `lengths` those of the lists, None for no list."""
    leaves: list[Any] = []
    for value in values:
        is_list = isinstance(value, (list, tuple))
        lengths.append(len(value) if is_list else None)
        leaves += value if is_list else (value,)
    return leaves


def _nest(leaves: Any, lengths: list[int | None]) -> Any:
    """Return the leaves as the values that `_flatten` got; a tensor, which is one result, is returned as it is."""
    if isinstance(leaves, Tensor):
        return leaves
    values, at = list[Any](), 0
    for length in lengths:
        values.append(leaves[at] if length is None else list(leaves[at : at + length]))
        at += 1 if length is None else length
    return tuple(values)


PLANNED: dict[Any, Planned] = {}
_SCHEMAS: dict[Callable[..., Any], Any] = {}


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
