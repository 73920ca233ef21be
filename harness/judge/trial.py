"""One case under judgement: its inputs, the truth and the plain result, computed once and shared by all that are asked."""

import functools
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from harness.judge.case import ROUNDINGS, Case
from harness.judge.registry import Implementation, checks, subjects
from harness.records.finding import Finding, Tally
from reference.ops.dtypes import accumulation_dtype

T = TypeVar("T")
Named = dict[str, Tensor]
Cotangent = Callable[[str, Tensor], Tensor]  # of an output, by its name
DEAR = 1000  # tokens from which on only other implementations are asked what costs the reference several loops


@dataclass
class Result:
    """Outputs of one evaluation and, if they were asked for, the gradient of every leaf (None where there is none)."""

    outputs: Named
    gradients: dict[str, Tensor | None] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor | None]:
        """Outputs and gradients under names of their own."""
        return {**self.outputs, **{f"grad {k}": v for k, v in self.gradients.items()}}


class Trial:
    """A case on a device. Inputs and cotangents are drawn on the CPU, rounded to their dtypes, and upcast for the truth."""

    def __init__(self, case: Case, device: str, elsewhere: Callable[[Case, str], dict[str, str]] | None = None) -> None:
        self.case, self.device, self._elsewhere = case, device, elsewhere
        self.subject: ModuleType = subjects()[case.subject]
        self.reference: Implementation = self.subject.implementations()[0]
        self._leaves: dict[tuple[int, bool], Named] = {}
        self._known: dict[tuple[int, str, bool], Result] = {}
        self._once: dict[str, Any] = {}

    def truth(self, seed: int, grad: bool) -> Result:
        """The reference in float64."""
        return self._remember(seed, "truth", grad)

    def plain(self, seed: int, grad: bool) -> Result:
        """The reference in the case's precision."""
        return self._remember(seed, "plain", grad)

    def got(self, implementation: Implementation, seed: int, grad: bool) -> Result:
        """What an implementation gives."""
        return self.run(implementation, seed, grad, self.leaves(seed))

    def leaves(self, seed: int, exact: bool = False) -> Named:
        """Fresh inputs on the device in their own dtypes, or `exact`ly the same numbers in float64."""
        if (seed, False) not in self._leaves:
            precise, low = self.subject.precise(self.case), self.case.torch_dtype
            wide = accumulation_dtype(low)
            asker = checks().get(self.case.asker)
            drawn = getattr(asker, "draw", self.subject.draw)(self.case, self._draw_of(seed))
            real = {"clip"} if self.case.has("video") else set()
            for k in drawn.keys() - real if self.case.jittered else ():
                drawn[k] = self.case.jitter(drawn[k], seed, k)
            rounded = moved({k: v.to(wide if k in precise else low) for k, v in drawn.items()}, self.device)
            self._leaves[seed, False], self._leaves[seed, True] = rounded, {k: v.double() for k, v in rounded.items()}
        return {k: v.clone() for k, v in self._leaves[seed, exact].items()}

    def _draw_of(self, seed: int) -> int:
        return seed // ROUNDINGS if self.case.jittered else seed

    @functools.cached_property
    def on_cpu(self) -> "Trial":
        """The same case on the CPU."""
        return self if self.device == "cpu" else Trial(self.case, "cpu", self._elsewhere)

    def run(
        self, implementation: Implementation, seed: int, grad: bool, leaves: Named, cuts: tuple[int, ...] | None = None,
        cotangent: Cotangent | None = None, frames: int | None = None,
    ) -> Result:  # fmt: skip
        """Evaluate, whole, in chunks that begin at `cuts`, or a video in chunks of so many `frames`; with `grad`,
        backpropagate the case's cotangents, or those given. The result is on the CPU, where it is judged: many small
        questions to a GPU that others use take longer than the answers."""
        result = self.run_there(implementation, seed, grad, leaves, cuts, cotangent, frames)
        present = {k: g for k, g in result.gradients.items() if g is not None}
        return Result(moved(result.outputs, "cpu"), dict.fromkeys(result.gradients) | moved(present, "cpu"))

    def run_there(
        self, implementation: Implementation, seed: int, grad: bool, leaves: Named, cuts: tuple[int, ...] | None = None,
        cotangent: Cotangent | None = None, frames: int | None = None,
    ) -> Result:  # fmt: skip
        """`run`, its result where the implementation left it."""
        for leaf in leaves.values():
            leaf.requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            if frames is not None:
                outputs = self.subject.in_chunks(implementation.call, self.case, leaves, frames)
            elif cuts is not None:
                outputs = self.subject.chunked(implementation.call, self.case, leaves, cuts)
            else:
                outputs = self.subject.evaluate(implementation.call, self.case, leaves)
        if not grad:
            return Result(outputs)
        heard = {k: v for k, v in outputs.items() if k not in self.subject.silent(self.case) and v.requires_grad}
        cotangents = [cotangent(k, v) if cotangent else self.cotangent(seed, k, v) for k, v in heard.items()]
        gradients = torch.autograd.grad(list(heard.values()), list(leaves.values()), cotangents, allow_unused=True)
        return Result({k: v.detach() for k, v in outputs.items()}, dict(zip(leaves, gradients, strict=True)))

    def cotangent(self, seed: int, name: str, like: Tensor) -> Tensor:
        """The cotangent of an output: normal numbers that the output's low-precision dtype can hold."""
        drawn = self.case.normal(self._draw_of(seed), "cotangent " + name, *like.shape)
        low = like.dtype if like.dtype != torch.float64 else self._output_dtype(seed, name)
        return drawn.to(low).to(like.device, like.dtype)

    def _output_dtype(self, seed: int, name: str) -> torch.dtype:
        """The dtype in which plain returns an output."""
        if self.case.torch_dtype == torch.float64:
            return torch.float64
        known = self._known.get((seed, "plain", True)) or self.plain(seed, False)
        return known.outputs[name].dtype

    def _remember(self, seed: int, what: str, grad: bool) -> Result:
        for known in ((seed, what, True), (seed, what, grad)):
            if known in self._known:
                return self._known[known]
        result = self.run(self.reference, seed, grad, self.leaves(seed, exact=what == "truth"))
        self._known[seed, what, grad] = result
        return result

    def once(self, what: str, work: Callable[[], T]) -> T:
        """What a check computes for itself and needs for every implementation: computed when first asked for."""
        if what not in self._once:
            self._once[what] = work()
        return self._once[what]

    def judge(self, implementation: Implementation, grad: bool) -> list[Finding]:
        """The tolerance rule over all seeds, for outputs, and with `grad` for gradients too."""
        tally = Tally()
        for seed in self.case.seeds:
            plain = self.plain(seed, grad).named()  # before the truth, which rounds its cotangents to plain's dtypes
            truth, got = self.truth(seed, grad).named(), self.got(implementation, seed, grad).named()
            for name, exact in truth.items():
                if grad or not name.startswith("grad "):
                    tally.add(name, got.get(name), plain[name], exact)
        return tally.findings()

    def digests(self, implementation: Implementation, seed: int = 0) -> dict[str, str]:
        """SHA-256 of every output and gradient of one evaluation."""
        return {name: digest(t) for name, t in self.got(implementation, seed, self.asks_gradients).named().items()}

    def elsewhere(self, case: Case, implementation: str) -> dict[str, str]:
        """`digests`, computed in another process."""
        if self._elsewhere is None:
            raise RuntimeError("this trial has no other process to ask")
        return self._elsewhere(case, implementation)

    @property
    def asks_gradients(self) -> bool:
        """Whether the case is about training too."""
        return not self.case.has("infer")


def moved(tensors: Named, device: str) -> Named:
    """The tensors on a device, all of a dtype in one copy, each in memory of its own."""
    if all(t.device.type == torch.device(device).type for t in tensors.values()):
        return {k: t.detach() for k, t in tensors.items()}
    there: Named = {}
    for dtype in {t.dtype for t in tensors.values()}:
        mine = {k: t.detach() for k, t in tensors.items() if t.dtype == dtype}
        flat = torch.cat([t.flatten() for t in mine.values()]).to(device)
        parts = flat.split([t.numel() for t in mine.values()])
        there |= {k: part.view(t.shape).clone() for (k, t), part in zip(mine.items(), parts, strict=True)}
    return {k: there[k] for k in tensors}


def digest(tensor: Tensor | None) -> str:
    """SHA-256 of a tensor's bytes."""
    if tensor is None:
        return "none"
    raw = tensor.detach().contiguous().flatten().view(torch.uint8).cpu()
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def worst_of(findings: Iterable[Finding], group: str = "[") -> list[Finding]:
    """Of findings on parts of a tensor, `name[part]`, the failing ones and the worst of each tensor and norm."""
    kept: dict[tuple[str, str], Finding] = {}
    failing = []
    for f in findings:
        key = (f.tensor.partition(group)[0], f.norm)
        if key not in kept or f.ratio > kept[key].ratio:
            kept[key] = f
        if not f.passed:
            failing.append(f)
    return failing or list(kept.values())
