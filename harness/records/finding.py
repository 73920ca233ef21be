"""The error of one tensor and its budget: the one tolerance rule.

    ||got - truth|| <= 2 ||plain - truth|| + u ||truth||

truth is the reference in float64, plain the reference in the case's precision, u the unit roundoff of the dtype in which
plain returns the tensor plus 8 unit roundoffs of float32 (what a hardware exp2 may cost). The norms are L2 and max-abs, each
pooled (root mean square) over the seeds. Where truth and plain are both exactly 0, got must be exactly 0. NaN and infinity
never pass.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HARDWARE_EXP = 8 * 2.0**-24


@dataclass(frozen=True)
class Finding:
    """One tensor in one norm: "l2", "max", "zero" (largest value where 0 is due), "bitwise" (elements that differ), ..."""

    tensor: str
    norm: str
    error: float
    budget: float
    scale: float = 0.0  # the truth's norm, for plots
    worst: tuple[int, ...] = ()  # index of the worst element
    note: str = ""
    curve: tuple[float, ...] = ()  # what was measured step by step, for plots

    @property
    def passed(self) -> bool:
        """Return whether the error keeps within the budget; NaN does not."""
        return self.error <= self.budget

    @property
    def measured(self) -> bool:
        """Return whether it is a measurement that may be anything: its budget is infinite."""
        return self.budget == math.inf

    @property
    def ratio(self) -> float:
        """Return the error in budgets; above 1 fails."""
        if self.error == 0:
            return 0.0
        return self.error / self.budget if self.budget > 0 and math.isfinite(self.error) else math.inf


class PlainNotFinite(RuntimeError):
    """The reference itself gave NaN or infinity in the case's precision: the case has no measure."""


@dataclass(frozen=True)
class _Sample:
    """The errors and norms of one tensor under one seed: (L2, largest absolute value)."""

    error: tuple[float, float]
    plain: tuple[float, float]
    truth: tuple[float, float]
    worst: tuple[int, ...]  # the index of the largest error
    stray: float | None  # largest |got| where truth and plain are 0; None if there is no such place


class Tally:
    """The got, plain and truth of named tensors over the seeds, and the findings on them."""

    def __init__(self) -> None:
        self._samples: dict[str, list[_Sample]] = {}
        self._unit: dict[str, float] = {}
        self._wrong_form: dict[str, str] = {}

    def add(self, name: str, got: Tensor | None, plain: Tensor | None, truth: Tensor | None) -> None:
        """Add one seed's tensor. None is a gradient that does not exist; it counts as 0 only where the reference has none."""
        if truth is None or plain is None:
            stray = 0.0 if got is None else _largest(got.double())
            self._samples.setdefault(name, []).append(_Sample((0, 0), (0, 0), (0, 0), (), stray))
            self._unit[name] = 0.0
            return
        if not bool(plain.isfinite().all()):
            raise PlainNotFinite(f"the reference's {name} is not finite in {plain.dtype}")
        self._unit[name] = unit_roundoff(plain.dtype)
        if got is None or got.shape != plain.shape or got.dtype != plain.dtype:
            came = "no gradient" if got is None else f"{got.dtype} {tuple(got.shape)}"
            self._wrong_form[name] = f"got {came}, due is {plain.dtype} {tuple(plain.shape)}"
            self._samples.setdefault(name, [])
            return
        exact = truth.double()
        off = (got.double() - exact).abs()
        off = torch.where(got.isfinite(), off, torch.inf)
        zero = (exact == 0) & (plain == 0)
        worst = torch.unravel_index(off.argmax(), off.shape) if off.numel() else ()
        self._samples.setdefault(name, []).append(
            _Sample(
                _norms(off),
                _norms(plain.double() - exact),
                _norms(exact),
                tuple(int(i) for i in worst),
                _largest(got[zero].double()) if bool(zero.any()) else None,
            )  # fmt: skip
        )

    def findings(self) -> list[Finding]:
        """Return two findings a tensor, l2 and max, and one for places where 0 is due."""
        found = []
        for name, samples in self._samples.items():
            if name in self._wrong_form:
                found.append(Finding(name, "form", math.inf, 0.0, note=self._wrong_form[name]))
                continue
            worst = max(samples, key=lambda s: s.error[1]).worst
            for i, norm in enumerate(("l2", "max")):
                error, plain, scale = (rms([getattr(s, part)[i] for s in samples]) for part in ("error", "plain", "truth"))
                found.append(Finding(name, norm, error, 2 * plain + self._unit[name] * scale, scale, worst))
            strays = [s.stray for s in samples if s.stray is not None]
            if strays:
                found.append(Finding(name, "zero", max(strays), 0.0))
        return found


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return half the spacing at 1, and what a hardware exp2 may cost; in float64 only the former."""
    return torch.finfo(dtype).eps / 2 + (0.0 if dtype == torch.float64 else HARDWARE_EXP)


def differing(name: str, one: Tensor | None, other: Tensor | None) -> Finding:
    """Return a bitwise finding: how many elements differ; NaN differs from everything."""
    if one is None or other is None:
        return Finding(name, "bitwise", float((one is None) != (other is None)), 0.0)
    if one.shape != other.shape or one.dtype != other.dtype:
        note = f"{one.dtype} {tuple(one.shape)}, then {other.dtype} {tuple(other.shape)}"
        return Finding(name, "form", math.inf, 0.0, note=note)
    unequal = one != other
    count = int(unequal.sum())
    first = tuple(int(i) for i in torch.unravel_index(unequal.flatten().int().argmax(), one.shape)) if count else ()
    return Finding(name, "bitwise", float(count), 0.0, scale=float(one.numel()), worst=first)


def _norms(x: Tensor) -> tuple[float, float]:
    return float(x.square().sum().sqrt()), _largest(x)


def _largest(x: Tensor) -> float:
    largest = float(x.abs().max()) if x.numel() else 0.0
    return largest if math.isfinite(largest) else math.inf


def rms(values: list[float]) -> float:
    """Return the root mean square."""
    return math.sqrt(sum(v * v for v in values) / len(values))
