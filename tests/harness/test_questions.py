"""Who is asked what, how each answer ends, and what a run of questions keeps: in a subject of its own, which is cheap."""

import errno
import importlib
import json
import os
import re
import signal
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from harness.checks import backward, forward
from harness.cli.app import app
from harness.judge import parity
from harness.judge.case import Case, cross
from harness.judge.check import CannotAsk
from harness.judge.implementation import Implementation, needed_abilities
from harness.judge.registry import subjects
from harness.judge.request import ParityRequest
from harness.judge.second_process import SecondProcess
from harness.judge.trial import Trial
from harness.records.finding import Finding, PlainNotFinite
from harness.records.record import Record
from harness.runs import sessions, store, workers
from harness.runs.conclude import FAILED, INTERRUPTED, NOTHING, PASSED, exit_code
from harness.runs.store import Run, StoreError

pytestmark = pytest.mark.usefixtures("undrawn")
CASE = Case("norm", (("B", 1), ("L", 3), ("D", 32)), ("kind=rms",), "float32")
NORM = ("parity", "--grid", "smoke", "--device", "cpu", "--jobs", "1", "--subject", "norm")
GOOD, BAD = Finding("y", "l2", 1.0, 2.0), Finding("y", "l2", 3.0, 2.0)


class Answering:
    """A check that answers with findings, or raises."""

    def __init__(self, answer: list[Finding] | BaseException) -> None:
        self._answer = answer

    def run(self, trial: Trial, implementation: Implementation) -> list[Finding]:
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer


def asked(answer: list[Finding] | BaseException, implementation: Implementation | None = None) -> Record:
    request = ParityRequest("smoke", "cpu", ("norm",))
    who = implementation or Implementation("mine", torch.clone)
    return parity.ask(request, Trial(CASE, "cpu"), "forward", Answering(answer), who)


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        ([GOOD], "pass", ""), ([GOOD, BAD], "fail", ""), ([], "error", "judged nothing"),
        (CannotAsk("no room"), "skip", "no room"), (torch.OutOfMemoryError("CUDA out of memory\nmore"), "oom", "CUDA out of"),
        (TimeoutError(), "timeout", "no answer"), (BrokenProcessPool("gone"), "error", "other process died"),
        (ValueError("wrong"), "error", "ValueError: wrong"), (MemoryError("host"), "error", "MemoryError"),
        (AssertionError("no"), "error", "AssertionError"), (IndexError("i"), "error", "IndexError"),
        (RuntimeError("CUDA error: an illegal memory access"), "error", "illegal memory access"),
        (NotImplementedError("never"), "skip", "declares it cannot: never"),
        (PlainNotFinite("plain's y is not finite"), "error", "plain's y is not finite"),
    ],
)  # fmt: skip
def test_whatever_happens_is_a_record(answer: list[Finding] | BaseException, status: str, said: str) -> None:
    """Only what says that it cannot is a skip; an error is never one."""
    record = asked(answer)
    assert (record.status, record.failed) == (status, status not in ("pass", "skip")) and said in record.reason
    assert record.key == ("norm", "mine", "forward", CASE.name) and record.seconds >= 0
    assert "--subject norm --check forward --impl mine --case B1-L3-D32-kind=rms-float32 --device cpu" in record.command


def returns_y_alone(u: Tensor, *args: object, **options: object) -> Tensor:
    return u


def divides(u: Tensor, *args: object, **options: object) -> tuple[Tensor, Tensor]:
    torch.zeros(2).expand(3)
    raise AssertionError("not reached")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (returns_y_alone, "ValueError: .* \\(harness/subjects/scan.py:[0-9]+, in evaluate\\)"),
        (divides, "RuntimeError: .* \\(tests/harness/test_questions.py:[0-9]+, in divides\\)"),
    ],
    ids=["in the caller", "in the callable"],
)
def test_an_error_says_which_line_raised_it(call: Callable[..., object], said: str) -> None:
    """The line of the harness that could not use a result, or the line of the callable; no line within PyTorch."""
    case = Case("scan", (("B", 1), ("L", 2), ("E", 3), ("N", 4)))
    record = parity.ask(ParityRequest("smoke", "cpu"), Trial(case, "cpu"), "forward", forward, Implementation("mine", call))
    assert record.status == "error" and re.fullmatch(said, record.reason, re.DOTALL), record.reason


def test_ours_and_the_reference_may_not_decline() -> None:
    """What declares its abilities cannot raise NotImplementedError for what it declared."""
    ours = Implementation("fused:torch", torch.clone, backend="torch")
    assert asked(NotImplementedError("x"), ours).status == "error"
    assert asked(NotImplementedError("x"), Implementation("reference", torch.clone)).status == "error"
    with pytest.raises(KeyboardInterrupt):
        asked(KeyboardInterrupt())


def test_what_is_not_declared_is_skipped_with_the_reason() -> None:
    scan = {i.name: i for i in subjects()["scan"].implementations()}
    sizes = (("B", 1), ("L", 2), ("E", 4), ("N", 4))
    theirs, every = scan["fused:mamba_ssm"], ((), ("reverse",), ("groups=2",), ("state",))
    said = [theirs.missing(Case("scan", sizes, options)) for options in every]
    assert said == [None] * 3 + ["fused:mamba_ssm does not declare initial_state"]
    assert not any(scan["fused:torch"].missing(Case("scan", sizes, o)) for o in every)
    needed = [needed_abilities(Case("scan", sizes, options)) for options in (*every, ("groups=1",))]
    assert needed == [[], ["reverse"], ["groups"], ["initial_state", "final_state_grad"], []]
    assert theirs.missing(Case("scan", sizes, (), "float64")) == "fused:mamba_ssm does not declare dtype float64"
    trial = Trial(Case("scan", sizes, ("state",)), "cpu")
    record = parity.ask(ParityRequest("smoke", "cpu"), trial, "forward", Answering(ValueError("ran")), scan["fused:mamba_ssm"])
    assert record.status == "skip" and "does not declare" in record.reason


def test_a_record_keeps_the_findings_that_matter() -> None:
    many = [Finding(f"t{i}", "l2", i / 100, 1.0) for i in range(90)]
    over = [Finding(f"o{i}", "l2", 2.0 + i, 1.0) for i in range(20)]
    curve, measured = Finding("c", "l2", 0.0, 1.0, curve=(1.0,)), Finding("d", "deviation", 5.0, float("inf"))
    kept = parity.selected_findings([*many, curve, *over, measured])
    assert [f.tensor for f in kept] == [f"o{i}" for i in range(19, 7, -1)] + [f"t{i}" for i in range(89, 77, -1)] + ["c", "d"]


def scaled(factor: float) -> Callable[..., tuple[Tensor, Tensor]]:
    import reference

    def norm(x, *args, **options):
        result = reference.add_norm(x, *args, **options)
        return tuple(t * factor for t in result) if isinstance(result, tuple) else result * factor

    return norm


slightly_wrong, right = scaled(1.0 + 1e-3), scaled(1.0)


def steep(x, *args, **options):
    return right(x + 0.1 * (x - x.detach()), *args, **options)


@pytest.mark.parametrize(
    ("call", "check", "code"),
    [
        ("slightly_wrong", "forward", FAILED), ("steep", "forward", PASSED), ("steep", "backward", FAILED),
        ("right", "backward", PASSED),
    ],
)
def test_forward_and_backward_by_the_command(call: str, check: str, code: int, tmp_path: Path) -> None:
    words = ("--case", "B*-L*-D32-kind=rms*", "--dtype", "float32", "--impl", "mine", "--check", check, "--out", str(tmp_path))
    done = CliRunner().invoke(app, [*NORM, *words, "--with", f"norm:mine=test_questions:{call}"])
    assert done.exit_code == code, done.output


def test_a_rival_exempts_whom_it_names_and_no_one_else(tmp_path: Path) -> None:
    words = ["--case", "B1-L1-D32-kind=rms-float32", "--check", "forward", "--impl", "mine*"]
    both = ["--with", "norm:mine=test_questions:slightly_wrong", "--with", "norm:mine2=test_questions:slightly_wrong"]
    done = CliRunner().invoke(app, [*NORM, *words, *both, "--rival", "mine", "--out", str(tmp_path / "one")])
    roles = {r.implementation: r.role for r in Run.open(tmp_path / "one").records}
    assert done.exit_code == FAILED and roles == {"mine": "rival", "mine2": "ours"}
    assert "0 passed, 1 failed, 0 skipped (rivals: 0 passed, 1 failed)" in done.output
    done = CliRunner().invoke(app, [*NORM, *words, *both, "--rival", "mine*", "--out", str(tmp_path / "both")])
    assert done.exit_code == PASSED


def test_every_precision_and_training_are_asked() -> None:
    subject, who = subjects()["scan"], Implementation("mine", torch.clone)
    sizes = (("B", 1), ("L", 2), ("E", 4), ("N", 4))
    for dtype, due in (("float32", True), ("bfloat16", True), ("float16", True), ("float64", False)):
        assert forward.asks(subject, who, Case("scan", sizes, (), dtype)) == due
        assert backward.asks(subject, who, Case("scan", sizes, (), dtype)) == due
        assert not backward.asks(subject, who, Case("scan", sizes, ("infer",), dtype))
    assert not forward.asks(subject, Implementation("reference", torch.clone), Case("scan", sizes))


def test_names_of_cases_are_unique_and_filters_take_what_they_name() -> None:
    for grid in ("smoke", "full", "long"):
        for name, subject in subjects().items():
            names = [c.name for c in subject.cases(grid)]
            assert len(set(names)) == len(names), (grid, name)
    request = ParityRequest("smoke", "cpu", ("scan",), dtypes=("bfloat16",), cases=("*reverse*",))
    cases = request.selected_cases()
    assert cases and all(c.subject == "scan" and c.dtype == "bfloat16" and c.has("reverse") for c in cases)
    assert {name for c in cases for name, _, _ in request.questions(c)} > {"forward", "backward"}
    narrow = replace(request, checks=("backward",), names=("fused:t*",))
    assert {(n, i.name) for c in narrow.selected_cases() for n, _, i in narrow.questions(c)} == {("backward", "fused:torch")}
    assert [c.name for c in cross("s", [{"B": 1}, {"B": 2}], [(), ("x",)], ["float32"])] == [
        "B1-float32", "B1-x-float32", "B2-float32", "B2-x-float32",
    ]  # fmt: skip


def test_random_numbers_are_the_same_everywhere() -> None:
    """On every machine, in every process and dtype: literal values."""
    first = CASE.normal(0, "x", 4)
    assert first.tolist() == replace(CASE, dtype="bfloat16").normal(0, "x", 4).tolist()
    assert first.tolist() == pytest.approx([-0.786714144572, 1.967925708894, 0.647924912355, 0.564729996172])
    assert first.dtype == torch.float64
    assert CASE.log_uniform(0, "x", 1e-3, 1e3, 500).log10().abs().max() <= 3
    low, high = CASE.log_uniform(0, "x", 1e-3, 1e3, 500).log10().aminmax()
    assert low < -2.8 and high > 2.8
    many = CASE.normal(0, "many", 10_000)
    assert abs(float(many.mean())) < 0.05 and abs(float(many.std()) - 1) < 0.05 and float(many.max()) > 3


def run_of(folder: Path, *records: tuple[str, str]) -> Run:
    """A run with a record of each (role, status)."""
    run = Run.create(folder, {"kind": "parity", "plan": {}, "box": {}})
    for i, (role, status) in enumerate(records):
        found = {"pass": (GOOD,), "fail": (BAD,)}.get(status, ())
        run.add(Record("s", "x", role, "c", str(i), "float32", status, reason="why", findings=found))
    return run


@pytest.mark.parametrize(
    ("records", "code"),
    [
        ((), NOTHING), ((("ours", "skip"),), NOTHING), ((("ours", "pass"),), PASSED),
        ((("ours", "pass"), ("ours", "skip")), PASSED),
        *(((("ours", "pass"), ("ours", bad)), FAILED) for bad in ("fail", "error", "oom", "timeout")),
        *(((("ours", bad), ("ours", "pass")), FAILED) for bad in ("fail", "error", "oom", "timeout")),
        ((("ours", "pass"), ("rival", "fail")), PASSED), ((("rival", "fail"),), PASSED), ((("rival", "pass"),), PASSED),
        ((("rival", "skip"), ("ours", "skip")), NOTHING),
    ],
)  # fmt: skip
def test_exit_codes(records: tuple[tuple[str, str], ...], code: int, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", *records)
    assert exit_code(run) == exit_code(Run.open(run.folder)) == code
    bad = [r for r, s in records if s not in ("pass", "skip")]
    assert run.counts()["failed"] == bad.count("ours") and run.counts("rival")["failed"] == bad.count("rival")


def test_the_last_line_counts_everyone(tmp_path: Path) -> None:
    every = [("ours", s) for s in ("pass", "pass", "fail", "error", "oom", "timeout", "skip")]
    every += [("rival", "pass"), ("rival", "oom")]
    assert run_of(tmp_path / "a", *every).last_line() == "2 passed, 4 failed, 1 skipped (rivals: 1 passed, 1 failed)"
    assert run_of(tmp_path / "b", ("ours", "pass"), ("rival", "skip")).last_line() == "1 passed, 0 failed, 0 skipped"


def test_records_outlive_a_kill_at_any_byte(tmp_path: Path) -> None:
    """A last line cut anywhere is left out; what is added next stands on a line of its own."""
    whole = run_of(tmp_path / "whole", ("ours", "pass"), ("ours", "fail"), ("ours", "skip"))
    data = (whole.folder / "records.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for length in (0, 1, ends[0] - 1, ends[0], ends[0] + 1, ends[1] - 1, ends[1], ends[2] - 2, ends[2]):
        (whole.folder / "records.jsonl").write_bytes(data[:length])
        run = Run.open(whole.folder)
        kept = sum(end - 1 <= length for end in ends)
        assert [r.case for r in run.records] == ["0", "1", "2"][:kept], length
        run.add(replace(whole.records[0], case="new"))
        run.add(replace(whole.records[0], case="newer"))
        lines = (whole.folder / "records.jsonl").read_text().splitlines()
        assert [json.loads(line)["case"] for line in lines] == [*["0", "1", "2"][:kept], "new", "newer"], length
    lines = data.splitlines(keepends=True)
    (whole.folder / "records.jsonl").write_bytes(lines[0] + lines[1][:9] + b"\n" + lines[2])
    with pytest.raises(StoreError, match="records.jsonl, line 2 is not a record"):
        Run.open(whole.folder)


def test_a_question_without_an_answer_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that loses one of its records."""
    judge = parity.Judge.answers
    monkeypatch.setattr(parity.Judge, "answers", lambda self, *given: list(judge(self, *given))[1:])
    words = ("--case", "B1-L1-D32-kind=rms-float32", "--check", "forward", "--check", "backward", "--impl", "fused:torch")
    done = CliRunner().invoke(app, [*NORM, *words, "--out", str(tmp_path)])
    assert done.exit_code == FAILED and "1 questions have no answer" in done.output


def deadly(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_ends_the_run_and_its_answers_stay(tmp_path: Path) -> None:
    """The command fails; when it is resumed, what was answered is not asked again."""
    words = ("--case", "B1-L1-D32-kind=*-float32", "--check", "forward", "--impl", "fused:torch", "--impl", "mine")
    added = ("--with", "norm:mine=test_questions:deadly", "--out", str(tmp_path))
    done = CliRunner().invoke(app, [*(w for w in NORM if w not in ("--jobs", "1")), "--jobs", "2", *words, *added])
    assert done.exit_code != PASSED and isinstance(done.exception, BrokenProcessPool)
    run = Run.open(tmp_path)
    assert run.about["status"] == "running" and {r.implementation for r in run.records} == {"fused:torch"}
    assert {r.status for r in run.records} == {"pass"}


_broken: list[int] = []  # of this process
ILLEGAL = "CUDA error: an illegal memory access was encountered"


def breaks_the_gpu(*args, **options):
    _broken.append(1)
    raise RuntimeError(ILLEGAL)


def needs_the_gpu(x, *args, **options):
    if _broken:
        raise RuntimeError(ILLEGAL)
    return right(x, *args, **options)


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_illegal_access_is_the_fault_of_one_implementation(jobs: int, tmp_path: Path) -> None:
    """Its process can use the GPU no more; those asked after it are asked by another."""
    words = [*(w for w in NORM if w not in ("--jobs", "1")), "--jobs", str(jobs), "--impl", "breaks", "--impl", "works"]
    words += ["--case", "B1-L1-D32-kind=rms-float32", "--check", "forward", "--out", str(tmp_path)]
    for name, call in (("breaks", "breaks_the_gpu"), ("works", "needs_the_gpu")):
        words += ["--with", f"norm:{name}=test_questions:{call}"]
    done = CliRunner().invoke(app, words)
    importlib.import_module("test_questions")._broken.clear()  # as the command has imported it
    if jobs == 1:
        assert done.exit_code == INTERRUPTED and "can use the GPU no more, since forward of breaks" in done.output
        assert [(r.implementation, r.status) for r in Run.open(tmp_path).records] == [("breaks", "error")]
        done = CliRunner().invoke(app, [*words, "--resume"])
    assert done.exit_code == FAILED, done.output
    run = Run.open(tmp_path)
    assert {r.implementation: r.status for r in run.records} == {"breaks": "error", "works": "pass"}
    assert len(run.records) == 2 and run.about["status"] == "finished"


def test_a_clock_that_steps_back_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run ends before it began; it is finished, and has its page."""
    times = iter(["2026-01-01T00:00:09+00:00", "2026-01-01T00:00:09+00:00", "2025-12-31T23:00:00+00:00"])
    monkeypatch.setattr(sessions, "now", lambda: next(times))
    words = ["--case", "B1-L1-D32-kind=rms-float32", "--check", "forward", "--impl", "fused:torch", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, [*NORM, *words]).exit_code == PASSED
    run = Run.open(tmp_path)
    assert run.about["status"] == "finished" and run.about["ended"] < run.about["started"]
    assert (tmp_path / "report.md").exists() and all(r.seconds >= 0 for r in run.records)


def test_a_full_disk_ends_the_run_and_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*NORM, "--case", "B1-L1-D32-kind=*-float32", "--check", "forward", "--check", "backward", "--impl", "fused:torch",
             "--out", str(tmp_path)]  # fmt: skip
    fsync, left = os.fsync, [3]

    def full(file: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "fsync", full)
        done = CliRunner().invoke(app, words)
        assert isinstance(done.exception, OSError) and done.exit_code != PASSED
    kept = len(Run.open(tmp_path).records)
    assert kept >= 1
    assert CliRunner().invoke(app, [*words, "--resume"]).exit_code == PASSED
    run = Run.open(tmp_path)
    assert len({r.key for r in run.records}) == len(run.records) > kept and run.about["status"] == "finished"


def test_the_other_process_is_asked_of_each_case() -> None:
    class Pool:
        def submit(self, ask: Callable, request: ParityRequest, case: Case, name: str) -> "Pool":
            self.asked = (case.name, name)
            return self

        def result(self, timeout: float) -> dict[str, str]:
            return dict([self.asked])

    second = SecondProcess(ParityRequest("smoke", "cpu"))
    second._pool = Pool()
    other = replace(CASE, dtype="bfloat16")
    assert [second.digests(c, n) for c, n in ((CASE, "a"), (other, "a"), (other, "b"))] == [
        {CASE.name: "a"}, {other.name: "a"}, {other.name: "b"},
    ]  # fmt: skip


@pytest.mark.parametrize("error", [TimeoutError(), BrokenProcessPool("gone")])
def test_a_stuck_process_is_replaced(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck:
        def submit(self, *asked):
            raise error

    made, ended = [], []
    monkeypatch.setattr(workers, "pool", lambda count: made.append(count) or Stuck())
    monkeypatch.setattr(workers, "end", ended.append)
    second = SecondProcess(ParityRequest("smoke", "cpu"))
    for _ in range(2):
        with pytest.raises(type(error)):
            second.digests(CASE, "mine")
    assert made == [1, 1] and len(ended) == 2
