"""Are registered ops well formed, and is a compiled or captured call equal to an eager one?

`torch.library.opcheck` on the implementation's `samples`; `torch.compile(fullgraph=True)` by the rule, outputs and gradients;
and on a GPU the replay of a CUDA graph of forward and backward, on inputs that it was not captured with, bit by bit.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from harness.fixtures import functional_modules as modules
from harness.judge.case import Case
from harness.judge.check import CannotAsk
from harness.judge.implementation import Implementation
from harness.judge.protocols import HasCostlyChecks, Subject
from harness.judge.trial import Trial
from harness.records.finding import Finding, differing


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True at the few small points that the subject selects: compiling takes seconds."""
    selected = isinstance(subject, HasCostlyChecks) and "compile" in subject.costly_checks(case)
    return implementation.name != "reference" and selected and case.dtype in ("float32", "bfloat16")


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Ask all three, as far as they can be asked."""
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
    """Judge schema, fake implementation, autograd and dispatch of every op that is registered."""
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
    """Apply the rule to one graph; that there is none is a finding too. Inductor only on a GPU: for a CPU it needs gcc."""
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
    """Compile in this process, which may have no children, and suppress the warnings that PyTorch causes itself."""
    with warnings.catch_warnings(), torch._inductor.config.patch(compile_threads=1):
        warnings.simplefilter("ignore")
        yield


def replayed(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Compare a graph captured on the first seed's inputs and replayed on the last's with an eager call on these."""
    if not trial.device.startswith("cuda"):
        raise CannotAsk("a CUDA graph needs a GPU")
    last = trial.seeds[-1]
    eager = trial.run(implementation, last, True, trial.leaves(last))
    leaves, given = trial.leaves(0), cotangents(trial, 0, eager.outputs)

    def call() -> dict[str, Tensor | None]:
        return trial.run_on_device(implementation, 0, True, leaves, cotangent=lambda name, output: given[name]).named()

    with torch.cuda.device(trial.device):
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):  # the work of a first call must not be captured
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        with torch.no_grad():
            for static, fresh in ((leaves, trial.leaves(last)), (given, cotangents(trial, last, eager.outputs))):
                for name, tensor in static.items():
                    tensor.copy_(fresh[name])
        graph.replay()
        torch.cuda.synchronize()
    got = {k: None if t is None else t.detach().cpu() for k, t in results.items()}
    return [differing(f"{name}[replayed]", due, got[name]) for name, due in eager.named().items()]


def cotangents(trial: Trial, seed: int, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the cotangents of all outputs, on the device."""
    return {k: trial.cotangent(seed, k, v).to(trial.device) for k, v in outputs.items()}
