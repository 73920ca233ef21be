"""A parity run: every check of every implementation in every case, and the records of it."""

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from multiprocessing.queues import SimpleQueue
from multiprocessing.util import Finalize
from pathlib import Path

import torch

from harness.judge.case import Case
from harness.judge.check import CannotAsk, Check, HasCost, checks
from harness.judge.implementation import Implementation
from harness.judge.locate import locate
from harness.judge.registry import subjects
from harness.judge.request import ParityRequest
from harness.judge.second_process import SecondProcess
from harness.judge.seeds import seeds
from harness.judge.trial import Trial
from harness.records.finding import Finding, PlainNotFinite
from harness.records.location import Location
from harness.records.record import Record, judged
from harness.runs import environment, workers
from harness.runs.store import Run

MAX_SEARCHES = 5  # for failing lengths, in a process: a broken kernel fails everywhere
MAX_FINDINGS = 12  # of either kind in a record: over their budgets, and within

LOST = (  # in CUDA's errors after which a process can use the GPU no more
    "illegal memory access", "ILLEGAL_ADDRESS", "misaligned address", "MISALIGNED_ADDRESS", "illegal instruction",
    "unspecified launch failure", "LAUNCH_FAILED", "device-side assert", "hardware stack error",
)  # fmt: skip

Key = tuple[str, str, str, str]  # `Record.key`
Answers = Iterator[tuple[Case, Record | None]]  # a case with None when all its questions are answered


class ContextLost(RuntimeError):
    """The error of a process that can use the GPU no more; the question that caused it has its record."""


def describe(request: ParityRequest, box: dict) -> dict:
    """Return the description of a parity run for run.json, at its start."""
    return {"kind": "parity", "plan": asdict(request), "box": box, "filtered": request.filtered}


def run_parity(
    requests: Sequence[ParityRequest],
    run: Run,
    tell: Callable[[Case, Record | None], None],
    save_failing: bool = False,
    jobs: int = 1,
) -> None:
    """Ask all that the run has not answered yet, in `jobs` processes; `tell` gets every record, and every case when done.

    Where an implementation makes its process lose the GPU, others go on. Raises ContextLost where it is this process.
    """
    answered = {r.key for r in run.records}
    for skip in (a for request in requests for a in absent_implementations(request)):
        if skip.key not in answered:
            run.add(skip)
    folder = run.folder if save_failing else None
    finished: set[Case] = set()
    while True:
        try:
            for case, record in (_in_this_process if jobs == 1 else _in_processes)(requests, answered, folder, jobs):
                if record is not None:
                    run.add(record)
                elif case in finished:
                    continue
                finished |= {case} if record is None else set()
                tell(case, record)
            return
        except ContextLost:
            before, answered = answered, {r.key for r in run.records}
            if jobs == 1 or answered == before:
                raise


def _in_this_process(requests: Sequence[ParityRequest], answered: set[Key], folder: Path | None, jobs: int) -> Answers:
    for request in requests:
        judge = Judge(request, folder)
        try:
            for case in request.selected_cases():
                yield from ((case, record) for record in judge.answers(case, answered))
                yield case, None
        finally:
            judge.second_process.close()


def _in_processes(requests: Sequence[ParityRequest], answered: set[Key], folder: Path | None, jobs: int) -> Answers:
    """Answer the most expensive cases first, so that no process is left alone with one at the end.

    Records come question by question: of a case that takes minutes, an interrupted run keeps what was answered.
    """
    records = workers.queue()
    pool = workers.pool(jobs, _prepare, records)
    try:
        pairs = sorted(((request, case) for request in requests for case in request.selected_cases()), key=lambda p: -cost(*p))
        futures = {pool.submit(_answer, request, case, answered, folder): case for request, case in pairs}
        running = set(futures)
        while running:
            done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            while not records.empty():
                yield records.get()
            for future in done:
                future.result()  # raises what went wrong there
                yield futures[future], None
        pool.shutdown()
    except BaseException:
        workers.end(pool)
        raise


class Judge:
    """A judge in one process; it keeps its second process and the implementations that can run from case to case."""

    def __init__(self, request: ParityRequest, folder: Path | None) -> None:
        self.request, self.folder, self.second_process = request, folder, SecondProcess(request)
        self._present: dict[str, set[str]] = {}
        self._searches = 0
        request.set_threads()
        gc.collect()
        gc.freeze()  # what is loaded by now stays: to traverse it after every case took 0.13 s each, a tenth of a smoke grid

    def answers(self, case: Case, answered: set[Key]) -> Iterator[Record]:
        """Yield a record for every question that is not answered yet; the tensors of failing ones go to the folder."""
        with self.request.planted():
            if case.subject not in self._present:
                every = self.request.implementations(case.subject).items()
                self._present[case.subject] = {name for name, i in every if i.absent(self.request.device) is None}
            trial = Trial(case, self.request.device, self.second_process.digests)
            for name, check, implementation in self.request.questions(case):
                key = (case.subject, implementation.name, name, case.name)
                if implementation.name in self._present[case.subject] and key not in answered:
                    record = ask(self.request, trial, name, check, implementation)
                    if record.status == "fail":
                        record = replace(record, location=self.locate(trial, implementation, record))
                    if record.failed and self.folder and not any(words in record.reason for words in LOST):
                        save_tensors(self.folder, trial, record, implementation)
                    yield record
                    if record.status == "error" and any(words in record.reason for words in LOST):
                        raise ContextLost(f"{name} of {implementation.name} at {case.subject} {case.name}: {record.reason}")
        del trial
        _release(self.request.device)


    def locate(self, trial: Trial, implementation: Implementation, record: Record) -> Location | None:
        """Return where a question fails. Of rivals, and after MAX_SEARCHES failures of ours, lengths are not searched."""
        search = record.role == "ours" and self._searches < MAX_SEARCHES
        self._searches += search
        try:
            return locate(trial, implementation, record.findings, search)
        except Exception as error:  # what is wrong may do anything when it is run again
            return Location(lengths=f"not located, {type(error).__name__}: {str(error)[:200]}")


# Of a process that answers for another:
_judges: dict[ParityRequest, Judge] = {}
_records: "SimpleQueue[tuple[Case, Record]] | None" = None


def _prepare(records: "SimpleQueue[tuple[Case, Record]]") -> None:
    """Begin a process of the pool, which puts its records into the queue."""
    global _records
    _records = records
    environment.prepare()


def _answer(request: ParityRequest, case: Case, answered: set[Key], folder: Path | None) -> None:
    """Answer the questions of a case in a process of the pool."""
    if request not in _judges:
        _judges[request] = Judge(request, folder)
        Finalize(None, _judges[request].second_process.close, exitpriority=1)  # this process would wait for it at its end
    assert _records is not None
    for record in _judges[request].answers(case, answered):
        _records.put((case, record))


def is_unanswered(request: ParityRequest, run: Run) -> bool:
    """Return whether a question of the request has no answer yet."""
    answered = {r.key for r in run.records}
    keys = ((c.subject, i.name, name, c.name) for c in request.selected_cases() for name, _, i in request.questions(c))
    return any(key not in answered for key in keys)


def ask(request: ParityRequest, trial: Trial, name: str, check: Check, implementation: Implementation) -> Record:
    """Ask one question; whatever goes wrong becomes a record."""
    case, start = trial.case, time.perf_counter()
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
            reason += _raised_at(error)
    return Record(
        case.subject, implementation.name, implementation.role, name, case.name, case.dtype, status,
        round(time.perf_counter() - start, 4), reason, selected_findings(findings),
        request.command(case, implementation.name, name),
    )  # fmt: skip


def _raised_at(error: Exception) -> str:
    """Return the innermost line of a traceback that is of no installed package, such as " (scan.py:7, in scan)"."""
    frames = [f for f in traceback.extract_tb(error.__traceback__)[1:] if "site-packages" not in f.filename]
    if not frames:
        return ""
    path = Path(frames[-1].filename)
    where = path.relative_to(environment.ROOT) if path.is_relative_to(environment.ROOT) else path
    return f" ({where}:{frames[-1].lineno}, in {frames[-1].name})"


def selected_findings(findings: list[Finding]) -> tuple[Finding, ...]:
    """Return the findings that a record keeps.

    They are those over their budgets and the closest to them, at most MAX_FINDINGS of either; and those that have a curve or
    were only measured.
    """
    always = [f for f in findings if f.measured or f.curve]
    ranked = sorted((f for f in findings if f not in always), key=lambda f: (f.passed, -f.ratio))
    over = [f for f in ranked if not f.passed]
    return tuple(over[:MAX_FINDINGS] + ranked[len(over) : len(over) + MAX_FINDINGS] + always)


def absent_implementations(request: ParityRequest) -> Iterator[Record]:
    """Yield one skip for every implementation that cannot run on this box."""
    last_cases = {case.subject: case for case in request.selected_cases()}
    for subject, case in last_cases.items():
        implementations = {i.name: i for _, _, i in request.questions(case)}
        for name, implementation in implementations.items():
            if reason := implementation.absent(request.device):
                yield Record(subject, name, implementation.role, "all", "", "", "skip", reason=reason)


def cost(request: ParityRequest, case: Case) -> float:
    """Return the relative cost of a case: scan steps of the truth and plain runs over all seeds, with room for what is
    judged."""
    factor = 1.0 if case.has("infer") else 4.0
    overhead = 2000 if request.device.startswith("cuda") else 20  # on a GPU all but the loops takes longer than they do
    check = checks().get(case.only_check)
    steps = check.steps(case) if isinstance(check, HasCost) else subjects()[case.subject].steps(case)
    return (steps + overhead) * factor * 2 * len(seeds(case))


def save_tensors(folder: Path, trial: Trial, record: Record, implementation: Implementation) -> None:
    """Save leaves, truth, plain and got of the first seed of a failing question, for `torch.load`."""
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
    """Return MiB, roughly: the truth's leaves and the states of one block of tokens, in float64, over all seeds."""
    sizes = dict(case.dims)
    width = sizes.get("E", 2 * sizes.get("D", 1))
    tokens = sizes.get("B", 1) * sizes.get("L", 1) * width
    return 8 * (len(seeds(case)) * 16 * tokens + 64 * 8 * sizes.get("B", 1) * width * sizes.get("N", 16)) / 2**20
