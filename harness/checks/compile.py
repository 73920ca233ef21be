"""Are registered ops well formed, and is a compiled, captured or later call equal to an eager or first one?

`torch.library.opcheck` on the implementation's `samples`; `torch.compile(fullgraph=True)` by the rule, training and inference,
and for a second batch size without compiling again. A module that is called, trained and loaded anew has the bits of a new one
with its weights, and draws new random numbers in every call. On a GPU the same is asked of CUDA graphs, which have the bits of
eager calls, and of `mode="reduce-overhead"`, by the rule.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

from fused.runtime import plans
from harness.fixtures import functional_modules as modules
from harness.instruments import cuda_graphs, real_module
from harness.instruments.real_module import Form, RealModule
from harness.judge.case import Case
from harness.judge.check import CannotAsk
from harness.judge.implementation import Implementation
from harness.judge.protocols import BatchIndependent, DrawsNumbers, HasCostlyChecks, HasModule, Subject
from harness.judge.trial import Result, Trial, worst_of
from harness.records.finding import Finding, Tally, differing

DRAWS = 8  # calls that would all drop the same clips by a chance of 2^-14 at most


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True at the few small points that the subject selects: compiling takes seconds."""
    selected = isinstance(subject, HasCostlyChecks) and "compile" in subject.costly_checks(case)
    selected = selected or case.only_check == "compile"
    return implementation.name != "reference" and selected and case.dtype in ("float32", "bfloat16")


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Ask all, as far as they can be asked."""
    found, reasons = [], []
    for part in (registered, compiled, second_batch, reduced_overhead, replayed, lived, lived_compiled, drawn):
        try:
            found += part(trial, implementation)
        except CannotAsk as why:
            reasons.append(str(why))
        except (torch._dynamo.exc.TorchDynamoException, ConstraintViolationError) as error:
            trial.got(implementation, 0, trial.asks_gradients)  # what an eager call raises is no failure to compile
            found.append(Finding("fullgraph", "compile", math.inf, 0.0, note=" ".join(str(error).split())[:300]))
    if not found:
        raise CannotAsk("; ".join(dict.fromkeys(reasons)))
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
    """Apply the rule to one graph, in training and in inference; that there is none is a finding too."""
    ask_reference(trial)
    with compiler(trial, implementation) as one_graph:
        found, inference = (trial.judge(one_graph, grad) for grad in (True, False))
    return found + [replace(f, tensor=f"{f.tensor}[inference]") for f in inference]


def reduced_overhead(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Apply the rule to `mode="reduce-overhead"`, which replays CUDA graphs from its third call on."""
    require_gpu(trial)
    ask_reference(trial)
    with compiler(trial, implementation, mode="reduce-overhead") as one_graph:
        found = [trial.judge(one_graph, grad) for grad in (True, False)]
    return [replace(f, tensor=f"{f.tensor}[reduce-overhead{', inference' * i}]") for i, mine in enumerate(found) for f in mine]


def second_batch(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Apply the rule to a batch of another size, which a graph of a dynamic batch takes without compiling again."""
    size = max(2, trial.case["B"])  # a batch of one is always compiled by itself
    first, second = (Trial(real_module.of_batch(trial.case, n), trial.device) for n in (size, size + 1))
    per_clip = names_per_clip(trial)

    def run(asked: Trial, seed: int) -> Result:
        leaves = asked.leaves(seed)
        for name in per_clip:
            torch._dynamo.mark_dynamic(leaves[name], 0)
        return asked.run(one_graph, seed, True, leaves)

    ask_reference(second)
    with compiler(trial, implementation) as one_graph:
        run(first, 0)
        before, tally = counters["stats"]["unique_graphs"], Tally()
        for seed in second.seeds:
            got, plain, truth = run(second, seed), second.plain(seed, True), second.truth(seed, True)
            add(tally, got, plain, truth, f"[batch {size + 1}]")
        again = counters["stats"]["unique_graphs"] - before
    return [Finding(f"graphs for batch {size + 1}", "compile", float(again), 0.0), *tally.findings()]


def ask_reference(trial: Trial) -> None:
    """Let the trial compute what the reference says, which is not to be compiled."""
    for seed in trial.seeds:
        trial.plain(seed, True), trial.truth(seed, True)


def names_per_clip(trial: Trial) -> set[str]:
    """Return the leaves whose axis 0 is the batch. Raises CannotAsk for a subject that does not say."""
    if isinstance(trial.subject, BatchIndependent):
        return trial.subject.per_clip(trial.case) & trial.leaves(0).keys()
    if isinstance(trial.subject, HasModule):
        module = modules.on_meta(trial.subject.build, trial.reference.call, trial.case)
        return trial.leaves(0).keys() - {name for name, _ in module.named_parameters()}
    raise CannotAsk(f"{trial.case.subject} does not say which of its leaves have a batch")


def add(tally: Tally, got: Result, plain: Result, truth: Result, label: str) -> None:
    """Add the tensors of one evaluation to a tally, each under its name and a label."""
    for name, exact in truth.named().items():
        tally.add(name + label, got.named().get(name), plain.named()[name], exact)


@contextlib.contextmanager
def compiler(trial: Trial, implementation: Implementation, **options: Any) -> Iterator[Implementation]:
    """Give the implementation, compiled as one graph with these options for the time within. Inductor only on a GPU: for a
    CPU it needs gcc. Raises CannotAsk for an implementation that does not declare it."""
    require_fullgraph(implementation)
    options |= {"backend": "inductor" if trial.device.startswith("cuda") else "aot_eager"}
    torch.compiler.reset()
    with quietly(), contextlib.ExitStack() as stack:
        if isinstance(trial.subject, HasModule):
            stack.enter_context(modules.compiled(**options))
        else:
            implementation = replace(implementation, call=torch.compile(implementation.call, fullgraph=True, **options))
        yield implementation


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Compile in this process, which may have no children, and suppress the warnings that PyTorch causes itself."""
    with warnings.catch_warnings(), torch._inductor.config.patch(compile_threads=1):
        warnings.simplefilter("ignore")
        yield


def require_fullgraph(implementation: Implementation) -> None:
    """Raise CannotAsk for an implementation that does not declare that it can be compiled as one graph."""
    if implementation.abilities and not implementation.abilities.fullgraph:
        raise CannotAsk(f"{implementation.name} does not declare fullgraph")


def require_gpu(trial: Trial) -> None:
    """Raise CannotAsk without a GPU."""
    if not trial.device.startswith("cuda"):
        raise CannotAsk("a CUDA graph needs a GPU")


def replayed(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Compare a graph captured on the first seed's inputs and replayed on the last's with an eager call on these, with and
    without gradients."""
    require_gpu(trial)
    return [f for grad in (True, False) for f in replayed_with(trial, implementation, grad)]


def replayed_with(trial: Trial, implementation: Implementation, grad: bool) -> list[Finding]:
    """Compare a replay with an eager call, bit by bit."""
    last = trial.seeds[-1]
    eager = trial.run(implementation, last, grad, trial.leaves(last))
    leaves, given = trial.leaves(0), cotangents(trial, 0, eager.outputs)

    def call() -> dict[str, Tensor | None]:
        return trial.run_on_device(implementation, 0, grad, leaves, cotangent=lambda name, output: given[name]).named()

    with torch.cuda.device(trial.device):
        cuda_graphs.warm_up(call)
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
    label = "[replayed]" if grad else "[replayed, inference]"
    return [differing(name + label, due, got[name]) for name, due in eager.named().items()]


def cotangents(trial: Trial, seed: int, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the cotangents of all outputs, on the device."""
    return {k: trial.cotangent(seed, k, v).to(trial.device) for k, v in outputs.items()}


def lived(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Compare the calls in a module's life with those of new modules, bit by bit: eagerly, and on a GPU as CUDA graphs.

    New modules run without launch plans. The module's own are recorded in its second call of a kind and run from the third on.
    """
    require_module(trial)
    found = []
    for form in (real_module.eager, real_module.graphed)[: 1 + trial.device.startswith("cuda")]:
        real = RealModule(trial, implementation, form)
        for call in real_module.life(real):
            got = real.run(call.trial, call.seed, call.grad).named()
            with plans.enabled(False):  # they are the operator's, not the module's
                due = real.renewed().run(call.trial, call.seed, call.grad).named()
            found += [differing(f"{name}{call.label(form.__name__)}", due[name], got[name]) for name in due]
    return worst_of(found)


def lived_compiled(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Apply the rule to the calls in the life of a module by `mode="reduce-overhead"`, each repeated on the inputs of all
    seeds: the rule pools them."""
    require_module(trial)
    require_fullgraph(implementation)
    require_gpu(trial)
    torch.compiler.reset()
    tally = Tally()
    with quietly():
        real = RealModule(trial, implementation, real_module.compiled(mode="reduce-overhead"))
        for call in real_module.life(real):
            for seed in call.trial.seeds:
                leaves = {k: v.detach().clone() for k, v in real.leaves(call.trial, seed).items()}
                exact = {k: v.double() for k, v in leaves.items()}
                got = real.run(call.trial, seed, call.grad)
                plain, truth = (call.trial.run(trial.reference, seed, call.grad, given) for given in (leaves, exact))
                add(tally, got, plain, truth, call.label("reduce-overhead", event=False))
    return tally.findings()


def drawn(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Ask whether a training module draws new random numbers in every call, and CUDA graphs those of eager calls."""
    if not isinstance(trial.subject, DrawsNumbers):
        raise CannotAsk(f"{trial.case.subject} draws no random numbers")
    trial = Trial(replace(trial.case, options=(*trial.case.options, trial.subject.random_option())), trial.device)

    def draws(form: Form) -> list[dict[str, Tensor]]:
        real = RealModule(trial, implementation, form)
        real.run(trial, 0, grad=True)  # captures
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return [real.run(trial, 0, grad=True).outputs for _ in range(DRAWS)]

    eager = draws(real_module.eager)
    same = all(torch.equal(first, later[name]) for later in eager[1:] for name, first in eager[0].items())
    found = [Finding(f"outputs of {DRAWS} random calls", "alike", float(same), 0.0)]
    if trial.device.startswith("cuda"):
        pairs = zip(eager, draws(real_module.graphed), strict=True)
        found += [differing(f"{k}[draw {i}]", due[k], got[k]) for i, (due, got) in enumerate(pairs) for k in due]
    return worst_of(found)


def require_module(trial: Trial) -> None:
    """Raise CannotAsk for an operator."""
    if not isinstance(trial.subject, HasModule):
        raise CannotAsk(f"{trial.case.subject} has no parameters of its own")
