"""One case under judgement: its inputs, the truth and the plain result, computed once and shared by all implementations."""

import functools
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.registry import subjects
from harness.judge.seeds import ROUNDINGS, is_jittered, seeds
from harness.records.finding import Finding, Tally
from reference.ops.dtypes import accumulation_dtype

T = TypeVar("T")
Named = dict[str, Tensor]
Cotangent = Callable[[str, Tensor], Tensor]  # of an output, by its name
MAX_REFERENCE_TOKENS = 1000  # beyond, the reference runs on the device, and skips questions that take several of its loops


@dataclass
class Result:
    """Outputs of one evaluation and, if requested, the gradient of every leaf (None where there is none)."""

    outputs: Named
    gradients: dict[str, Tensor | None] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor | None]:
        """Return outputs and gradients, each under a name of its own."""
        return {**self.outputs, **{f"grad {k}": v for k, v in self.gradients.items()}}


class Trial:
    """A case on a device. Inputs and cotangents are drawn on the CPU, rounded to their dtypes, and upcast for the truth."""

    def __init__(
        self, case: Case, device: str, second_process: Callable[[Case, str], dict[str, str]] | None = None
    ) -> None:
        self.case, self.device, self._second_process = case, device, second_process
        self.subject: Any = subjects()[case.subject]  # a `Subject`, with the members that its checks need
        self.reference: Implementation = self.subject.implementations()[0]
        self._leaves: dict[tuple[int, bool], Named] = {}
        self._reference_results: dict[tuple[int, str, bool], Result] = {}
        self._cached: dict[str, Any] = {}

    @property
    def seeds(self) -> range:
        """Return the seeds that a question pools."""
        return seeds(self.case)

    def truth(self, seed: int, grad: bool) -> Result:
        """Return the result of the reference in float64. That of few tokens comes from the CPU: on a GPU that several processes
        share, the reference's loop waits."""
        return self._by_reference(seed, "truth", grad)

    def plain(self, seed: int, grad: bool) -> Result:
        """Return the result of the reference in the case's precision."""
        return self._by_reference(seed, "plain", grad)

    def got(self, implementation: Implementation, seed: int, grad: bool) -> Result:
        """Return the result of an implementation."""
        return self.run(implementation, seed, grad, self.leaves(seed))

    def leaves(self, seed: int, exact: bool = False) -> Named:
        """Return fresh inputs on the device, in their own dtypes or, if `exact`, the same numbers in float64."""
        if (seed, False) not in self._leaves:
            precise, low = self.subject.precise(self.case), self.case.torch_dtype
            wide = accumulation_dtype(low)
            drawn = self.subject.draw(self.case, self._draw_of(seed))
            real = {"clip"} if self.case.has("video") else set()
            for k in drawn.keys() - real if is_jittered(self.case) else ():
                drawn[k] = self.case.jitter(drawn[k], seed, k)
            rounded = to_device({k: v.to(wide if k in precise else low) for k, v in drawn.items()}, self.device)
            self._leaves[seed, False], self._leaves[seed, True] = rounded, {k: v.double() for k, v in rounded.items()}
        return {k: v.clone() for k, v in self._leaves[seed, exact].items()}

    def _draw_of(self, seed: int) -> int:
        return seed // ROUNDINGS if is_jittered(self.case) else seed

    @functools.cached_property
    def on_cpu(self) -> "Trial":
        """Return the trial of the same case on the CPU."""
        return self if self.device == "cpu" else Trial(self.case, "cpu", self._second_process)

    def run(
        self, implementation: Implementation, seed: int, grad: bool, leaves: Named, cuts: tuple[int, ...] | None = None,
        cotangent: Cotangent | None = None, frames: int | None = None,
    ) -> Result:  # fmt: skip
        """Evaluate at once, in chunks that begin at `cuts`, or a video in chunks of `frames`; with `grad`, backpropagate the
        case's cotangents, or those given. The result is on the CPU, where it is judged: many small kernels on a GPU that is
        shared take longer."""
        result = self.run_on_device(implementation, seed, grad, leaves, cuts, cotangent, frames)
        present = {k: g for k, g in result.gradients.items() if g is not None}
        return Result(to_device(result.outputs, "cpu"), dict.fromkeys(result.gradients) | to_device(present, "cpu"))

    def run_on_device(
        self, implementation: Implementation, seed: int, grad: bool, leaves: Named, cuts: tuple[int, ...] | None = None,
        cotangent: Cotangent | None = None, frames: int | None = None,
    ) -> Result:  # fmt: skip
        """Do as `run`, but leave the result where the implementation left it."""
        for leaf in leaves.values():
            leaf.requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            if frames is not None:
                outputs = self.subject.forward_chunked(implementation.call, self.case, leaves, frames)
            elif cuts is not None:
                outputs = self.subject.chunked(implementation.call, self.case, leaves, cuts)
            else:
                outputs = self.subject.evaluate(implementation.call, self.case, leaves)
        if not grad:
            return Result(outputs)
        without = self.subject.no_cotangent(self.case)
        differentiated = {k: v for k, v in outputs.items() if k not in without and v.requires_grad}
        cotangents = [cotangent(k, v) if cotangent else self.cotangent(seed, k, v) for k, v in differentiated.items()]
        gradients = torch.autograd.grad(list(differentiated.values()), list(leaves.values()), cotangents, allow_unused=True)
        return Result({k: v.detach() for k, v in outputs.items()}, dict(zip(leaves, gradients, strict=True)))

    def cotangent(self, seed: int, name: str, like: Tensor) -> Tensor:
        """Return the cotangent of an output: normal numbers that the output's low-precision dtype can hold."""
        drawn = self.case.normal(self._draw_of(seed), "cotangent " + name, *like.shape)
        low = like.dtype if like.dtype != torch.float64 else self._output_dtype(seed, name)
        return drawn.to(low).to(like.device, like.dtype)

    def _output_dtype(self, seed: int, name: str) -> torch.dtype:
        """Return the dtype in which plain returns an output."""
        if self.case.torch_dtype == torch.float64:
            return torch.float64
        known = self._reference_results.get((seed, "plain", True)) or self.plain(seed, False)
        return known.outputs[name].dtype

    def _by_reference(self, seed: int, precision: str, grad: bool) -> Result:
        """Return a result of the reference; one with gradients serves where none are needed."""
        for key in ((seed, precision, True), (seed, precision, grad)):
            if key in self._reference_results:
                return self._reference_results[key]
        leaves, cotangent = self.leaves(seed, exact=precision == "truth"), functools.partial(self.cotangent, seed)
        if precision == "truth" and dict(self.case.dims).get("L", 0) <= MAX_REFERENCE_TOKENS:
            leaves = to_device(leaves, "cpu")
        result = self.run(self.reference, seed, grad, leaves, cotangent=cotangent)
        self._reference_results[seed, precision, grad] = result
        return result

    def knows(self, seed: int, grad: bool) -> bool:
        """Return whether truth and plain of a seed have been computed, so that they cost nothing more."""
        had = self._reference_results.keys()
        return all({(seed, precision, True), (seed, precision, grad)} & had for precision in ("truth", "plain"))

    def cached(self, key: str, compute: Callable[[], T]) -> T:
        """Return a value that a check computes once for all implementations."""
        if key not in self._cached:
            self._cached[key] = compute()
        return self._cached[key]

    def judge(self, implementation: Implementation, grad: bool) -> list[Finding]:
        """Apply the tolerance rule over all seeds, to outputs, and with `grad` to gradients too."""
        tally = Tally()
        for seed in self.seeds:
            plain = self.plain(seed, grad).named()  # before the truth, which rounds its cotangents to plain's dtypes
            truth, got = self.truth(seed, grad).named(), self.got(implementation, seed, grad).named()
            for name, exact in truth.items():
                if grad or not name.startswith("grad "):
                    tally.add(name, got.get(name), plain[name], exact)
        return tally.findings()

    def digests(self, implementation: Implementation, seed: int = 0) -> dict[str, str]:
        """Return the SHA-256 of every output and gradient of one evaluation."""
        return {name: digest(t) for name, t in self.got(implementation, seed, self.asks_gradients).named().items()}

    def digests_of_second_process(self, implementation: str) -> dict[str, str]:
        """Return `digests`, computed in another process."""
        if self._second_process is None:
            raise RuntimeError("this trial has no other process to ask")
        return self._second_process(self.case, implementation)

    @property
    def asks_gradients(self) -> bool:
        """Return whether the case is about training too."""
        return not self.case.has("infer")


def to_device(tensors: Named, device: str) -> Named:
    """Return the tensors on a device, all of a dtype in one copy, each in memory of its own."""
    if all(t.device.type == torch.device(device).type for t in tensors.values()):
        return {k: t.detach() for k, t in tensors.items()}
    copies: Named = {}
    for dtype in {t.dtype for t in tensors.values()}:
        same = {k: t.detach() for k, t in tensors.items() if t.dtype == dtype}
        flat = torch.cat([t.flatten() for t in same.values()]).to(device)
        parts = flat.split([t.numel() for t in same.values()])
        copies |= {k: part.view(t.shape).clone() for (k, t), part in zip(same.items(), parts, strict=True)}
    return {k: copies[k] for k in tensors}


def digest(tensor: Tensor | None) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    if tensor is None:
        return "none"
    raw = tensor.detach().contiguous().flatten().view(torch.uint8).cpu()
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def worst_of(findings: Iterable[Finding], group: str = "[") -> list[Finding]:
    """Return the failing findings or, if there are none, the worst of each tensor and norm.

    A finding on a part of a tensor is named `name[part]`; `group` begins the part.
    """
    worst: dict[tuple[str, str], Finding] = {}
    failing = []
    for f in findings:
        key = (f.tensor.partition(group)[0], f.norm)
        if key not in worst or f.ratio > worst[key].ratio:
            worst[key] = f
        if not f.passed:
            failing.append(f)
    return failing or list(worst.values())
