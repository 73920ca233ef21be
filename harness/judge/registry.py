"""What runs: an implementation of a subject, and what a subject module in `harness/subjects/` provides.

A subject is a module; its name is the file's, its title the first sentence of its docstring. It has

    cases(grid)                              the points of a grid ("smoke", "full", "long")
    implementations()                        what can run it, `reference` first
    draw(case, seed)                         named float64 CPU tensors, the inputs and parameters ("leaves")
    precise(case)                            names of leaves that are float32 at least, whatever the case's dtype
    evaluate(call, case, leaves)             named output tensors of one implementation
    silent(case)                             names of outputs that get no cotangent
    steps(case)                              sequential scan steps of one forward: what the truth costs

if it can be cut in time,

    chunked(call, case, leaves, cuts)        the same outputs, computed chunk by chunk through the state
    time_axes(case)                          name of a leaf or output -> its axis of tokens
    pieces(case)                             of how many pieces it is; where this is absent, of L tokens

if it is a model of whole videos that can be run in chunks of them,

    in_chunks(call, case, leaves, frames)    what `evaluate` gives, by `forward_chunked`
    chunk_frames(case)                       lengths of chunks to try, in frames; none where chunks are not offered

if it is a classifier that takes a video frame by frame,

    framewise(call, case, leaves)            the logits that `evaluate` gives, by `FrameStream`
    by_tubelets(case)                        whether the case is of a video that is cut

if it promises that the clips of a batch do not know each other,

    clips(case)                              names of leaves that have an entry per clip on axis 0, as all outputs do

and, if it is a module with parameters,

    build(call, case)                        the module

A check is a module in `harness/checks/`; its name and title come from the file in the same way. It has

    asks(subject, implementation, case)      whether it is asked at this point
    run(trial, implementation)               findings; raises `CannotAsk` where the box or the implementation has nothing to ask

and, if a subject's cases are not what it needs,

    cases(grid)                              cases of its own, with the option "for=NAME": no other check is asked in them
    draw(case, seed)                         their leaves, instead of the subject's
    steps(case)                              what their truth costs, instead of the subject's
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

import harness.checks
import harness.mutants
import harness.subjects
from fused import backends
from harness.judge.case import Case


class CannotAsk(Exception):
    """A check has nothing to ask at this point; the message says why. The record is a skip."""


Sample = tuple[Any, tuple[Any, ...], dict[str, Any]]  # an op, as torch.library.opcheck takes it, and its arguments


@dataclass(frozen=True)
class Implementation:
    """Something that runs a subject. `call` is the operator, or builds the module from its configuration.

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
        """ "rival" or "ours"."""
        return "rival" if self.rival else "ours"

    @property
    def abilities(self) -> backends.Abilities | None:
        """What it declares; None for everything."""
        return backends.declared(self.name, self.table, self.backend) if self.backend and self.table else None

    def absent(self, device: str) -> str | None:
        """Why it cannot run on this box, with the fix; None if it can."""
        return backends.unavailable(self.backend, device) if self.backend else None

    def missing(self, case: Case) -> str | None:
        """Which declared inability the case runs into; None if it can be asked."""
        can = self.abilities
        if can is None:
            return None
        if case.torch_dtype not in can.dtypes:
            return f"{self.name} does not declare dtype {case.dtype}"
        for ability in needs(case):
            if not getattr(can, ability):
                return f"{self.name} does not declare {ability}"
        return None


def needs(case: Case) -> list[str]:
    """Abilities that a case uses."""
    wanted = {"initial_state": case.has("state"), "final_state_grad": case.has("state"), "reverse": case.has("reverse")}
    return [ability for ability, used in wanted.items() if used] + ["groups"] * (case.option("groups", "1") != "1")


def fused_implementations(
    table: Mapping[str, backends.Abilities],
    call_with: Callable[[str], Callable[..., Any]],
    samples: Callable[[Case, dict[str, Tensor]], Sequence[Sample]] | None = None,
    every_backend: bool = False,
) -> list[Implementation]:
    """Return the backends of `fused` with operators of their own or, for mixers and models, every one; mamba-ssm's are rivals.

    `samples` are of native's registered ops.
    """
    names = [b for b in backends.BACKENDS if backends.operators_of(b) == b or every_backend]
    mode = backends.batch_invariant
    return [
        Implementation(
            f"fused:{b}", call_with(b), b.startswith("mamba_ssm"), b, table, mode, samples if b == "native" else None
        )
        for b in names
    ]


def subjects() -> dict[str, ModuleType]:
    """Subjects by name: the modules of `harness/subjects/`."""
    return _modules(harness.subjects)


def checks() -> dict[str, ModuleType]:
    """Checks by name: the modules of `harness/checks/`."""
    return _modules(harness.checks)


def mutants() -> dict[str, ModuleType]:
    """Planted bugs by name: the modules of `harness/mutants/`."""
    return _modules(harness.mutants)


def title(module: ModuleType) -> str:
    """The first sentence of a module's docstring."""
    return " ".join((module.__doc__ or "").split("\n\n")[0].split())


def name_of(module: ModuleType) -> str:
    """A subject's, check's or mutant's name on the command line."""
    return module.__name__.rpartition(".")[2]


def _modules(package: ModuleType) -> dict[str, ModuleType]:
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__))
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}
