"""Something that runs a subject: its callable, its backend, and the abilities that it declares."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fused import backends
from harness.judge.case import Case

Sample = tuple[Any, tuple[Any, ...], dict[str, Any]]  # an op, as torch.library.opcheck takes it, and its arguments


@dataclass(frozen=True)
class Implementation:
    """An implementation of a subject. `call` is the operator, or builds the module from its configuration.

    `backend` and the operator's `table` of abilities say what it declares; without them it declares everything.

    `batch_invariant` enters the mode in which a clip's bits do not depend on its batch, where that is a mode: the check
    `batch` runs within it, all others without. `samples(case, leaves)` gives calls of the ops that the implementation
    registers with `torch.library`, on the case's leaves, for the check `compile`; None where it registers none.
    """

    name: str
    call: Callable[..., Any]
    rival: bool = False
    backend: str | None = None
    table: Mapping[str, backends.Abilities] | None = None
    batch_invariant: Callable[[], AbstractContextManager[Any]] = nullcontext
    samples: Callable[[Case, dict[str, Tensor]], Sequence[Sample]] | None = None

    @property
    def role(self) -> str:
        """Return "rival" or "ours"."""
        return "rival" if self.rival else "ours"

    @property
    def abilities(self) -> backends.Abilities | None:
        """Return the abilities that it declares; None for all."""
        return backends.declared(self.name, self.table, self.backend) if self.backend and self.table else None

    def absent(self, device: str) -> str | None:
        """Return why it cannot run on this box, with the fix; None if it can."""
        return backends.unavailable(self.backend, device) if self.backend else None

    def missing(self, case: Case) -> str | None:
        """Return which ability that the case needs is not declared; None if it can be asked."""
        able = self.abilities
        if able is None:
            return None
        if case.torch_dtype not in able.dtypes:
            return f"{self.name} does not declare dtype {case.dtype}"
        for ability in needed_abilities(case):
            if not getattr(able, ability):
                return f"{self.name} does not declare {ability}"
        return None


def needed_abilities(case: Case) -> list[str]:
    """Return the abilities that a case needs."""
    needed = {"initial_state": case.has("state"), "final_state_grad": case.has("state"), "reverse": case.has("reverse")}
    return [ability for ability, used in needed.items() if used] + ["groups"] * (case.option("groups", "1") != "1")


def fused_implementations(
    table: Mapping[str, backends.Abilities],
    call_with: Callable[[str], Callable[..., Any]],
    samples: Callable[[Case, dict[str, Tensor]], Sequence[Sample]] | None = None,
    every_backend: bool = False,
    cpu_samples: Callable[[Case, dict[str, Tensor]], Sequence[Sample]] | None = None,
) -> list[Implementation]:
    """Return the backends of `fused` with operators of their own or, for mixers and models, every one; mamba-ssm's are rivals.

    `samples` are of native's registered ops, `cpu_samples` of those of the kernels for CPUs.
    """
    names = [b for b in backends.BACKENDS if backends.operators_of(b) == b or every_backend]
    mode, sampled = backends.batch_invariant, {"native": samples, "cpu": cpu_samples}
    return [
        Implementation(f"fused:{b}", call_with(b), b.startswith("mamba_ssm"), b, table, mode, sampled.get(b))
        for b in names
    ]
