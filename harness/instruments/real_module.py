"""A module that has parameters of its own, trained and loaded between calls, as a user's is.

Elsewhere the judge gives a module its parameters anew in every call (`functional_modules`). What a module keeps from call to
call, such as packed weights or CUDA graphs, is only seen here.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from harness.fixtures import functional_modules as modules
from harness.instruments import cuda_graphs
from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.trial import Named, Result, Trial

Form = Callable[[nn.Module, bool], cuda_graphs.Run]  # of a module, for calls with or without gradients
LEARNING_RATE = 0.05


class RealModule:
    """The module of a case with the parameters of a seed, called in a form. It has to be one that `evaluate` calls once."""

    def __init__(self, trial: Trial, implementation: Implementation, form: Form | None = None, seed: int = 0) -> None:
        self.trial, self.implementation, self.form = trial, implementation, form or eager
        self.module = trial.subject.build(implementation.call, trial.case)
        self.load(seed)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=LEARNING_RATE)
        self._runs: dict[bool, cuda_graphs.Run] = {}

    def load(self, seed: int) -> None:
        """Load the parameters of a seed; in the first call on the trial's device, in the dtypes that the case gives them."""
        names = {name for name, _ in self.module.named_parameters()}
        state = {name: leaf for name, leaf in self.trial.leaves(seed).items() if name in names}
        first = not hasattr(self, "optimizer")
        self.module.load_state_dict(state, strict=False, assign=first)
        if first:
            self.module.to(self.trial.device)

    def leaves(self, trial: Trial, seed: int) -> Named:
        """Return the inputs of a seed of a trial, and the parameters as they are."""
        return trial.leaves(seed) | dict(self.module.named_parameters())

    def run(self, trial: Trial, seed: int, grad: bool) -> Result:
        """Return outputs and, with `grad`, gradients, on the inputs of a seed; the trial may be of another batch size."""
        self.module.train(grad)

        def call(method: Any, values: Named, args: tuple[Any, ...]) -> Any:
            if grad not in self._runs:
                self._runs[grad] = self.form(modules.Method(self.module, method.function), grad)
            return self._runs[grad](*args)

        with mock.patch.object(modules, "_call", call):
            return trial.run(self.implementation, seed, grad, self.leaves(trial, seed))

    def step(self, result: Result) -> None:
        """Take a step of AdamW along the gradients of a result."""
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_()
            gradient = result.gradients[name]
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def renewed(self) -> "RealModule":
        """Return another module, never called, called eagerly, with copies of the parameters."""
        other = RealModule(self.trial, self.implementation)
        other.module.load_state_dict(copy.deepcopy(self.module.state_dict()))
        return other


@dataclass(frozen=True)
class Call:
    """One call in the life of a module: what came before it, on which inputs, and whether with gradients."""

    event: str
    trial: Trial
    seed: int
    grad: bool

    def label(self, form: str, event: bool = True) -> str:
        """Return the form, the kind of call and the event, for a finding's name."""
        kind = "training" if self.grad else "inference"
        return f"[{form}, {kind}{f', {self.event}' * event}]"


def life(real: RealModule) -> Iterator[Call]:
    """Yield the calls of a module's life, after what changes it: new data, a larger batch, an optimiser's step, new weights.

    The module has been trained or loaded when a call is yielded; whoever iterates makes the call.
    """
    trial, last = real.trial, real.trial.seeds[-1]
    larger = Trial(of_batch(trial.case, trial.case["B"] + 1), trial.device)

    def both(event: str, trial: Trial, seed: int) -> Iterator[Call]:
        yield from (Call(event, trial, seed, grad) for grad in (False, True))

    yield from both("first", trial, 0)
    yield from both("new data", trial, last)
    yield from both("larger batch", larger, 0)
    yield from both("first batch size again", trial, 0)
    real.step(real.run(trial, 0, grad=True))
    yield from both("after a step", trial, 0)
    real.load(last)
    yield from both("after load_state_dict", trial, 0)


def of_batch(case: Case, size: int) -> Case:
    """Return the case with another batch size."""
    return replace(case, dims=tuple((letter, size if letter == "B" else n) for letter, n in case.dims))


def eager(module: nn.Module, grad: bool) -> cuda_graphs.Run:
    """Return the module."""
    return module


def compiled(**options: Any) -> Form:
    """Return the form of `torch.compile` as one graph, with these options."""
    return lambda module, grad: torch.compile(module, fullgraph=True, **options)


def graphed(module: nn.Module, grad: bool) -> cuda_graphs.Run:
    """Return the module by CUDA graphs: with gradients by `make_graphed_callables`, else by `fused.graphed`, or by hand."""
    assert isinstance(module, modules.Method)
    if not grad and (own := cuda_graphs.by_product(module.module)):
        return own
    runs: dict[tuple[torch.Size, ...], cuda_graphs.Run] = {}

    def call(*args: Tensor) -> Any:
        shapes = tuple(arg.shape for arg in args)
        if shapes not in runs:
            fresh = modules.Method(module.module, module.function).train(grad)
            runs[shapes] = cuda_graphs.for_training(fresh, args) if grad else cuda_graphs.for_inference(fresh, args)
        return runs[shapes](*args)

    return call
