"""Ask every check of every implementation in every case, and keep what came of it."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing.util import Finalize
from pathlib import Path
from types import ModuleType

import torch

from fused import stamp
from fused.backends import operators_of
from harness.judge.case import DTYPES, Case
from harness.judge.plan import Plan
from harness.judge.registry import CannotAsk, Implementation, checks, subjects
from harness.judge.second_process import Elsewhere
from harness.judge.trial import Trial
from harness.records.finding import Finding, PlainNotFinite
from harness.records.record import Record, judged
from harness.runs import environment, workers
from harness.runs.store import Run

KEPT = 12


def about(plan: Plan, box: dict) -> dict:
    """What run.json says of a parity run at its start."""
    return {"kind": "parity", "plan": asdict(plan), "box": box, "filtered": plan.filtered}


def run_parity(
    plans: Sequence[Plan], run: Run, tell: Callable[[Case, Record | None], None], save_failing: bool = False, jobs: int = 1
) -> None:
    """Ask all that the run has not answered yet, in `jobs` processes; `tell` hears of records, and of cases when done."""
    answered = {r.key for r in run.records}
    for absence in (a for plan in plans for a in absences(plan)):
        if absence.key not in answered:
            run.add(absence)
    folder = run.folder if save_failing else None
    for case, record in (_answers_here if jobs == 1 else _answers_there)(plans, answered, folder, jobs):
        if record is not None:
            run.add(record)
        tell(case, record)


Key = tuple[str, str, str, str]
Answers = Iterator[tuple[Case, Record | None]]


def _answers_here(plans: Sequence[Plan], answered: set[Key], folder: Path | None, jobs: int) -> Answers:
    for plan in plans:
        asker = Asker(plan, folder)
        try:
            for case in plan.points():
                yield from ((case, record) for record in asker.answers(case, answered))
                yield case, None
        finally:
            asker.elsewhere.close()


def _answers_there(plans: Sequence[Plan], answered: set[Key], folder: Path | None, jobs: int) -> Answers:
    """Dear cases first, so that no process is left alone with one at the end."""
    pool = workers.pool(jobs, environment.prepare)
    try:
        asked = sorted(((plan, case) for plan in plans for case in plan.points()), key=lambda pair: -cost(*pair))
        coming = {pool.submit(_answers_of, plan, case, answered, folder): case for plan, case in asked}
        for done in as_completed(coming):
            yield from ((coming[done], record) for record in done.result())
            yield coming[done], None
        pool.shutdown()
    except BaseException:
        workers.end(pool)
        raise


class Asker:
    """Asks in one process; keeps its second process and the implementations that can run from case to case."""

    def __init__(self, plan: Plan, folder: Path | None) -> None:
        self.plan, self.folder, self.elsewhere = plan, folder, Elsewhere(plan)
        self._present: dict[str, set[str]] = {}
        plan.threads_here()
        gc.collect()
        gc.freeze()  # what is loaded by now stays: to walk it after every case took 0.13 s each, a tenth of a smoke grid

    def answers(self, case: Case, answered: set[Key]) -> Iterator[Record]:
        """A record for every question that is not answered yet; the tensors of failing ones go to the folder."""
        with self.plan.planted():
            if case.subject not in self._present:
                every = self.plan.implementations(case.subject).items()
                self._present[case.subject] = {name for name, i in every if i.absent(self.plan.device) is None}
            trial = Trial(case, self.plan.device, self.elsewhere.digests)
            for name, check, implementation in self.plan.questions(case):
                key = (case.subject, implementation.name, name, case.name)
                if implementation.name in self._present[case.subject] and key not in answered:
                    record = ask(self.plan, trial, name, check, implementation)
                    if record.failed and self.folder:
                        save_tensors(self.folder, trial, record, implementation)
                    yield record
        del trial
        _release(self.plan.device)


_askers: dict[Plan, Asker] = {}  # of a process that answers for another


def _answers_of(plan: Plan, case: Case, answered: set[Key], folder: Path | None) -> list[Record]:
    if plan not in _askers:
        _askers[plan] = Asker(plan, folder)
        Finalize(None, _askers[plan].elsewhere.close, exitpriority=1)  # this process would wait for that one at its end
    return list(_askers[plan].answers(case, answered))


def left(plan: Plan, run: Run) -> bool:
    """Whether a question of the plan has no answer yet."""
    answered = {r.key for r in run.records}
    asked = ((c.subject, i.name, name, c.name) for c in plan.points() for name, _, i in plan.questions(c))
    return any(key not in answered for key in asked)


def ask(plan: Plan, trial: Trial, name: str, check: ModuleType, implementation: Implementation) -> Record:
    """One question; whatever goes wrong becomes a record."""
    case, begin = trial.case, time.perf_counter()
    findings: list[Finding] = []
    status, reason = "skip", implementation.missing(case) or ""
    if not reason:
        try:
            findings = check.run(trial, implementation)
            status = judged(findings)
        except CannotAsk as why:
            reason = str(why)
        except NotImplementedError as error:
            declined = implementation.backend is None and implementation.name != "reference"
            status, reason = "skip" if declined else "error", f"declares it cannot: {error}"
        except torch.OutOfMemoryError as error:
            status, reason = "oom", str(error).splitlines()[0]
        except TimeoutError:
            status, reason = "timeout", "the other process gave no answer"
        except BrokenProcessPool as error:
            status, reason = "error", f"the other process died: {error}"
        except PlainNotFinite as error:
            status, reason = "error", str(error)
        except Exception as error:  # a kernel may raise anything; the run goes on and the record says what
            status, reason = "error", f"{type(error).__name__}: {str(error)[:600]}"
    return Record(
        case.subject, implementation.name, implementation.role, name, case.name, case.dtype, status,
        round(time.perf_counter() - begin, 4), reason, nearest(findings), plan.command(case, implementation.name, name),
    )  # fmt: skip


def nearest(findings: list[Finding]) -> tuple[Finding, ...]:
    """What a record keeps: the findings over their budgets and the closest to them, at most KEPT of either; and what has a
    curve or was only measured."""
    always = [f for f in findings if f.measured or f.curve]
    ranked = sorted((f for f in findings if f not in always), key=lambda f: (f.passed, -f.ratio))
    over = [f for f in ranked if not f.passed]
    return tuple(over[:KEPT] + ranked[len(over) : len(over) + KEPT] + always)


def absences(plan: Plan) -> Iterator[Record]:
    """One skip for every implementation that cannot run on this box."""
    wanted = {case.subject: case for case in plan.points()}
    for subject, case in wanted.items():
        asked = {i.name: i for _, _, i in plan.questions(case)}
        for name, implementation in asked.items():
            if reason := implementation.absent(plan.device):
                yield Record(subject, name, implementation.role, "all", "", "", "skip", reason=reason)


def cost(plan: Plan, case: Case) -> float:
    """Relative cost of a case: scan steps of the truth and plain runs over all seeds, with room for what is judged."""
    factor = 1.0 if case.has("infer") else 4.0
    overhead = 2000 if plan.device.startswith("cuda") else 20  # on a GPU everything but the loops takes longer than they do
    steps = getattr(checks().get(case.asker), "steps", subjects()[case.subject].steps)
    return (steps(case) + overhead) * factor * 2 * len(case.seeds)


def save_tensors(folder: Path, trial: Trial, record: Record, implementation: Implementation) -> None:
    """Leaves, truth, plain and got of the first seed of a failing question, for `torch.load`."""
    grad = record.check != "forward" and trial.asks_gradients
    target = folder / "failing" / f"{record.check}-{record.subject}-{record.implementation.replace(':', '_')}-{record.case}.pt"
    target.parent.mkdir(exist_ok=True)
    kept = {"leaves": trial.leaves(0), "truth": trial.truth(0, grad).named(), "plain": trial.plain(0, grad).named()}
    try:
        kept["got"] = trial.got(implementation, 0, grad).named()
    except Exception as error:  # what failed may fail again; its message is worth keeping
        kept["got"] = {"error": str(error)}  # type: ignore[dict-item]
    torch.save(kept, target)


def _release(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def memory(case: Case) -> float:
    """MiB, roughly: the truth's leaves and the states of one block of tokens, in float64, over all seeds."""
    sizes = dict(case.dims)
    width = sizes.get("E", 2 * sizes.get("D", 1))
    tokens = sizes.get("B", 1) * sizes.get("L", 1) * width
    return 8 * (len(case.seeds) * 16 * tokens + 64 * 8 * sizes.get("B", 1) * width * sizes.get("N", 16)) / 2**20


def stamps(plan: Plan, run: Run) -> list[tuple[str, str]]:
    """After an unfiltered run, leave a stamp for each of our backends and dtypes that passed every check; returns them."""
    if plan.filtered or plan.added:
        return []
    written = []
    asked = sorted({(r.implementation, r.dtype) for r in run.records if r.role == "ours" and r.dtype})
    for name, dtype in asked:
        backend = name.removeprefix("fused:")
        names = {name, f"fused:{operators_of(backend)}"}
        mine = [r for r in run.records if r.implementation in names and r.dtype == dtype]
        if backend == name or any(r.failed for r in mine) or not any(r.status == "pass" for r in mine):
            continue
        values = stamp.key(backend, DTYPES[dtype], plan.device)
        checked = tuple(sorted({r.check for r in mine if r.status == "pass"}))
        stamp.write_validation(stamp.Validation(**values, run=run.folder.name, date=run.about["ended"], checks=checked))
        written.append((backend, dtype))
    return written
