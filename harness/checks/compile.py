"""Are registered ops well formed, and is a compiled or captured call equal to an eager one?

`torch.library.opcheck` on the implementation's `samples`; `torch.compile(fullgraph=True)` by the rule, outputs and gradients;
and on a GPU the replay of a CUDA graph of forward and backward, on inputs that it was not captured with, bit by bit.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from harness.fixtures import functional_modules as modules
from harness.judge.case import Case
from harness.judge.registry import CannotAsk, Implementation
from harness.judge.trial import Trial
from harness.records.finding import Finding, differing

# One small odd size of each, and options with all that there is: compiling takes seconds.
SHAPES = {"scan": {"B": 3, "L": 7}, "conv": {"B": 3, "L": 7}, "norm": {"B": 2, "L": 9}, "mixer": {"B": 2, "L": 9}}
OPTIONS = (("reverse", "state"), ("kind=layer", "low"), ("autocast",))


def asks(subject: ModuleType, implementation: Implementation, case: Case) -> bool:
    """Of operators and the mixer."""
    here = case.subject in SHAPES and dict(case.dims).items() >= SHAPES[case.subject].items() and case.options in OPTIONS
    return implementation.name != "reference" and here and case.dtype in ("float32", "bfloat16")


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """All three, as far as they can be asked."""
    found, reasons = [], []
    for part in (registered, compiled, replayed):
        try:
            found += part(trial, implementation)
        except CannotAsk as why:
            reasons.append(str(why))
    if not found:
        raise CannotAsk("; ".join(reasons))
    return found


def registered(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Schema, fake implementation, autograd and dispatch of every op that is registered."""
    if implementation.samples is None:
        raise CannotAsk(f"{implementation.name} registers no ops")
    found = []
    leaves = {k: v.requires_grad_() for k, v in trial.leaves(0).items()}
    for op, args, kwargs in implementation.samples(trial.case, leaves):
        for test, said in torch.library.opcheck(op, args, kwargs, raise_exception=False).items():
            wrong = said != "SUCCESS"
            found.append(Finding(f"{op} {test}", "opcheck", float(wrong), 0.0, note=str(said)[:300] * wrong))
    return found


def compiled(trial: Trial, implementation: Implementation) -> list[Finding]:
    """The rule for one graph; that there is none is a finding too. Inductor on a GPU; on a CPU it would take a compiler."""
    if implementation.abilities and not implementation.abilities.fullgraph:
        raise CannotAsk(f"{implementation.name} does not declare fullgraph")
    backend = "inductor" if trial.device.startswith("cuda") else "aot_eager"
    torch.compiler.reset()
    with contextlib.ExitStack() as stack:
        if hasattr(trial.subject, "build"):
            stack.enter_context(modules.compiled(backend))
        else:
            implementation = replace(implementation, call=torch.compile(implementation.call, fullgraph=True, backend=backend))
        stack.enter_context(quietly())
        try:
            return trial.judge(implementation, grad=True)
        except torch._dynamo.exc.TorchDynamoException as error:
            return [Finding("fullgraph", "compile", math.inf, 0.0, note=" ".join(str(error).split())[:300])]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Compile in this process, which may have no children, and keep what PyTorch warns itself of to itself."""
    with warnings.catch_warnings(), torch._inductor.config.patch(compile_threads=1):
        warnings.simplefilter("ignore")
        yield


def replayed(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Captured on the first seed's inputs, replayed on the last's."""
    if not trial.device.startswith("cuda"):
        raise CannotAsk("a CUDA graph needs a GPU")
    last = trial.case.seeds[-1]
    eager = trial.run(implementation, last, True, trial.leaves(last))
    leaves, given = trial.leaves(0), cotangents(trial, 0, eager.outputs)

    def once() -> dict[str, Tensor | None]:
        return trial.run_there(implementation, 0, True, leaves, cotangent=lambda name, output: given[name]).named()

    with torch.cuda.device(trial.device):
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # what happens at a first call is not to be captured
            for _ in range(3):
                once()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = once()
        with torch.no_grad():
            for static, fresh in ((leaves, trial.leaves(last)), (given, cotangents(trial, last, eager.outputs))):
                for name, tensor in static.items():
                    tensor.copy_(fresh[name])
        graph.replay()
        torch.cuda.synchronize()
    got = {k: None if t is None else t.detach().cpu() for k, t in results.items()}
    return [differing(f"{name}[replayed]", due, got[name]) for name, due in eager.named().items()]


def cotangents(trial: Trial, seed: int, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of all outputs, on the device."""
    return {k: trial.cotangent(seed, k, v).to(trial.device) for k, v in outputs.items()}
