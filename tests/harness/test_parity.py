"""The judge's command line: filters, exit codes, added implementations, resume, records."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import reference
from harness.cli.app import app
from harness.judge.request import UsageError
from harness.records.finding import Tally
from harness.records.record import Record
from harness.runs.conclude import FAILED, INTERRUPTED, NOTHING, PASSED, conclude
from harness.runs.progress import Progress
from harness.runs.store import Run, StoreError

# loops whose every step is checked take twice as long
pytestmark = pytest.mark.usefixtures("answered_once", "undrawn", "unchecked")
TINY = ("--subject", "scan", "--dtype", "float32", "--case", "B3-L7-E10-N16-float32")


def parity(*options: str) -> Result:
    return CliRunner().invoke(app, ["parity", "--grid", "smoke", "--device", "cpu", *options])


def nan_scan(*args, **options):
    y, state = reference.selective_scan(*args, **options)
    return y * float("nan"), state


def transposed_scan(*args, **options):
    y, state = reference.selective_scan(*args, **options)
    return y.mT, state


def shy_scan(*args, **options):
    raise NotImplementedError("never does anything")


def unrepeatable_scan(*args, **options):
    y, state = reference.selective_scan(*args, **options)
    return y * (1 + 1e-4 * torch.rand(1).to(y)), state


def scan_in_their_layout(u, delta, A, B, C, D, z, delta_bias, softplus, return_last):
    lines = (u.transpose(1, 2), delta.transpose(1, 2), A, B.permute(0, 3, 1, 2), C.permute(0, 3, 1, 2), D)
    y, state = reference.selective_scan(*lines, None if z is None else z.transpose(1, 2), delta_bias, softplus=softplus)
    return y.transpose(1, 2), state


def test_passes_and_says_so(tmp_path: Path) -> None:
    done = parity(*TINY, "--out", str(tmp_path))
    assert done.exit_code == PASSED, done.output
    assert done.output.splitlines()[-1].startswith("11 passed, 0 failed, 3 skipped")
    run = Run.open(tmp_path)
    asked = {(r.implementation, r.check) for r in run.records if r.status == "pass"}
    asked_of_ours = ("forward", "backward", "determinism", "batch", "writes")
    ours = {(name, check) for name in ("fused:cpu", "fused:torch") for check in asked_of_ours}
    assert asked == ours | {("reference", "determinism")}
    skipped = {(r.implementation, r.check) for r in run.records if r.status == "skip"}
    absent = {("fused:native", "all"), ("fused:mamba_ssm", "all")}
    assert skipped == absent | {("fused:cpu", "device"), ("fused:torch", "device")}


@pytest.mark.parametrize(
    ("call", "check", "status"),
    [("nan_scan", "forward", "fail"), ("shy_scan", "forward", "skip"), ("unrepeatable_scan", "determinism", "fail")],
)
def test_added_implementation(call: str, check: str, status: str, tmp_path: Path) -> None:
    added = ("--with", f"scan:mine=test_parity:{call}", "--impl", "mine", "--check", check)
    done = parity(*TINY, *added, "--out", str(tmp_path / "ours"))
    assert [r.status for r in Run.open(tmp_path / "ours").records] == [status]
    assert done.exit_code == {"fail": FAILED, "skip": NOTHING}[status]
    assert status == "skip" or ("--impl mine" in done.output and "--with" in done.output)


def test_a_rival_that_fails_decides_nothing(tmp_path: Path) -> None:
    added = ("--with", "scan:mine=test_parity:nan_scan", "--impl", "mine", "--check", "forward")
    rival = parity(*TINY, *added, "--rival", "mine", "--out", str(tmp_path))
    assert rival.exit_code == PASSED and "rivals: 0 passed, 1 failed" in rival.output


def test_what_has_another_shape_is_told_so(tmp_path: Path) -> None:
    added = ("--with", "scan:mine=test_parity:transposed_scan", "--impl", "mine", "--check", "forward")
    done = parity(*TINY, *added, "--out", str(tmp_path))
    assert done.exit_code == FAILED and "got torch.float32 (3, 10, 7), due is torch.float32 (3, 7, 10)" in done.output


def test_adapter_for_mamba_ssms_layout_and_a_planted_bug_in_two_processes(tmp_path: Path) -> None:
    """What is added and what is planted reach the processes that answer: theirs passes, ours, with the bug, fails."""
    added = ("--with", "scan:theirs=test_parity:scan_in_their_layout@mamba_ssm", "--impl", "theirs", "--impl", "fused:torch")
    asked = ("--subject", "scan", "--case", "B3-L7-*-float32", "--check", "forward", "--mutant", "drop_skip")
    done = parity(*asked, *added, "--jobs", "2", "--out", str(tmp_path))
    assert done.exit_code == FAILED, done.output
    records = Run.open(tmp_path).records
    assert {r.status for r in records if r.implementation == "theirs"} == {"pass", "skip"}
    assert "fail" in {r.status for r in records if r.implementation == "fused:torch"}


@pytest.mark.parametrize(("jobs", "cases"), [("1", "B3-L7-*state-float32"), ("2", "B3-L7-*e-float32")])
def test_interrupted_run_is_readable_and_goes_on(jobs: str, cases: str, tmp_path: Path) -> None:
    options = ["--grid", "smoke", "--device", "cpu", "--subject", "scan", "--case", cases, "--out", str(tmp_path)]
    command = [sys.executable, "-m", "harness", "parity", *options, "--impl", "fused:torch", "--jobs", jobs]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as here, where it goes on: the plan holds their number
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests run in the background ignore it
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heard
    )
    while len(Run.open(tmp_path).records if (tmp_path / "run.json").exists() else []) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    for _ in range(2):  # as an impatient hand does, to the whole group as a terminal does
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.2)
    said, _ = process.communicate(timeout=60)
    run = Run.open(tmp_path)
    assert process.returncode == INTERRUPTED and run.about["status"] == "interrupted", said
    assert f"--resume --out {tmp_path}" in said and "So far: the run is interrupted." in (tmp_path / "report.md").read_text()
    assert "--out" not in run.about["command"] and "--impl fused:torch" in run.about["command"]
    asked = len(run.records)
    done = CliRunner().invoke(app, ["parity", *options, "--impl", "fused:torch", "--jobs", "1", "--resume"])
    run = Run.open(tmp_path)
    assert done.exit_code == PASSED and run.about["status"] == "finished" and len(run.records) > asked, done.output
    assert len({r.key for r in run.records}) == len(run.records)


@pytest.mark.parametrize("pressed", [True, False])
def test_a_ctrl_c_within_a_lock_ends_a_run_as_any(pressed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda which: signal.default_int_handler)  # tests in the background ignore it

    def work() -> None:
        try:
            if pressed:
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass
        raise RuntimeError("release unlocked lock")  # as Python 3.12 makes of it

    run = Run.create(tmp_path, {"kind": "parity"})
    ending = functools.partial(conclude, run, Progress({}), work, lambda run: run.folder)
    if pressed:
        assert not ending() and Run.open(tmp_path).about["status"] == "interrupted"
    else:
        with pytest.raises(RuntimeError, match="unlocked"):
            ending()


def test_resume_asks_only_what_is_left(tmp_path: Path) -> None:
    assert parity(*TINY, "--out", str(tmp_path)).exit_code == PASSED
    path = tmp_path / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:20])  # a kill in the middle of a line
    assert parity(*TINY, "--out", str(tmp_path), "--resume").exit_code == PASSED
    before, after = (sorted(json.loads(x)["check"] for x in ls) for ls in (lines, path.read_text().splitlines()))
    assert before == after
    error = parity("--subject", "conv", "--out", str(tmp_path), "--resume").exception
    assert isinstance(error, StoreError) and f"{Run.open(tmp_path).about['command']} --resume --out {tmp_path}" in str(error)


def test_a_file_is_no_folder_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = parity(*TINY, "--out", str(tmp_path / "file")).exception
    assert isinstance(error, StoreError) and "is a file" in str(error)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        (("--subject", "scam"), "scan"), (("--dtype", "int8"), "bfloat16"), (("--impl", "nobody"), "fused:torch"),
        (("--video", "/no/file"), "not a file"), (("--video", __file__), "video"), (("--device", "cuda:99"), "there are cpu"),
        (("--device", "cuda:x"), "there are cpu"),
    ],
)  # fmt: skip
def test_wrong_wishes_say_what_is_allowed(options: tuple[str, ...], allowed: str) -> None:
    error = parity(*options).exception
    assert isinstance(error, UsageError) and allowed in str(error)


@pytest.mark.parametrize(
    ("options", "near"),
    [
        (("--check", "determinizm"), "determinism"), (("--impl", "native"), "fused:native"), (("--grid", "large"), ""),
        (("--mutant", "drop-skip"), "drop_skip"), (("--rival", "fused:mamba"), "fused:mamba_ssm"),
    ],
)  # fmt: skip
def test_a_slip_is_told_the_nearest_name(options: tuple[str, ...], near: str) -> None:
    said = str(parity(*options).exception)
    assert said.endswith(f"; did you mean {near!r}?") if near else "did you mean" not in said, said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("garbage", "is not SUBJECT:NAME=module:callable or"), ("", "is not SUBJECT"), ("scan:x", "is not SUBJECT"),
        ("scan:=fused:selective_scan", "is not SUBJECT"), (":x=fused:selective_scan", "is not SUBJECT"),
        ("scan:x=fused", "is not SUBJECT"), ("scan:x=:f", "is not SUBJECT"), ("scan:x=fused:", "is not SUBJECT"),
        ("scan:x=fused:@mamba_ssm", "is not SUBJECT"),
        ("scam:x=fused:selective_scan", "subject 'scam' is unknown; allowed are bimba, clips, conv, "),
        ("scan:a*=fused:selective_scan", "the name 'a*' is not a letter or digit, then"),
        ("scan:a b=fused:selective_scan", "the name 'a b' is not a letter or digit, then"),
        ("scan:-x=fused:selective_scan", "the name '-x' is not"), ("scan:_=fused:selective_scan", "the name '_' is not"),
        ("scan:reference=fused:selective_scan", "scan has an implementation 'reference' already"),
        ("scan:fused:torch=fused:selective_scan", "scan has an implementation 'fused:torch' already"),
        ("scan:x=nowhere:f", "No module named 'nowhere'"), ("scan:x=fused:nothing", "has no attribute 'nothing'"),
        ("scan:x=fused:VideoMamba.nothing", "has no attribute 'nothing'"),
        ("scan:x=.fused:f", "importing '.fused' raises TypeError"),
        ("scan:x=raises:f", "importing 'raises' raises ZeroDivisionError: division by zero"),
        ("scan:x=leaves:f", "importing 'leaves' raises SystemExit: 2"),
        ("scan:x=broken:f", "importing 'broken' raises SyntaxError"),
        ("scan:x=math:pi", "math:pi is no callable but of type float"),
        ("norm:x=fused:add_norm@mamba_ssm", "norm has this project's layout only, so that @mamba_ssm has to go (conv has "),
        ("norm:x=fused:add_norm@", "norm has this project's layout only"),
        ("scan:x=fused:selective_scan@flax", "scan has no layout 'flax'; allowed are mamba_ssm, or no @"),
        ("scan:x=fused:selective_scan@", "scan has no layout ''; allowed are mamba_ssm"),
        ("scan:x=fused:selective_scan@mamba_ssm@flax", "scan has no layout 'mamba_ssm@flax'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_what_is_added_is_said(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, code in (("raises", "1 / 0"), ("leaves", "import sys; sys.exit(2)"), ("broken", "def f(:")):
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    error = parity("--dry-run", "--with", text).exception
    assert isinstance(error, UsageError) and str(error).startswith(f"--with {text!r}: ") and said in str(error), error


def test_a_name_is_added_once_and_callables_may_be_nested(tmp_path: Path) -> None:
    added = ("--with", "scan:x=fused:selective_scan", "--with", "scan:x=fused:selective_scan")
    error = parity(*TINY, *added, "--dry-run").exception
    assert isinstance(error, UsageError) and "adds scan:x twice" in str(error)
    nested = ("--with", "scan:fused:mine=fused:ops.selective_scan.api.selective_scan", "--with", "conv:x=fused:causal_conv1d")
    assert parity(*TINY, *nested, "--impl", "fused:mine", "--check", "forward", "--out", str(tmp_path)).exit_code == PASSED


def test_nothing_ran_is_not_green(tmp_path: Path) -> None:
    done = parity("--subject", "scan", "--case", "no-such-case", "--out", str(tmp_path / "none"))
    assert done.exit_code == NOTHING
    assert "nothing ran:\n    the options leave no question: no case of grid smoke fits (--dry-run" in done.output
    done = parity("--subject", "scan", "--check", "layout", "--out", str(tmp_path / "none"))
    assert re.search(r"of the \d+ cases that fit none is asked these", " ".join(done.output.split()))
    done = parity(*TINY, "--impl", "fused:native", "--out", str(tmp_path / "native"))
    assert done.exit_code == NOTHING and "nothing ran:\n    fused:native: " in done.output


def test_dry_run_runs_nothing(tmp_path: Path) -> None:
    done = parity(*TINY, "--dry-run", "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists() and "questions, about" in done.output
    assert done.exit_code == PASSED and "B3-L7-E10-N16-float32" in done.output and "1 cases" in done.output


def test_impossible_records_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="findings"):
        Record("scan", "x", "ours", "forward", "c", "float32", "pass")
    with pytest.raises(ValueError, match="over its budget"):
        Record("scan", "x", "ours", "forward", "c", "float32", "fail")
    with pytest.raises(ValueError, match="says why"):
        Record("scan", "x", "ours", "forward", "c", "float32", "skip")


def test_the_rule() -> None:
    """Twice plain's error and one rounding is allowed, in each norm; a stray value where 0 is due is not; NaN is not."""
    truth = torch.linspace(1, 2, 64, dtype=torch.float64)
    plain = truth.float()

    def verdict(got: torch.Tensor, truth: torch.Tensor = truth, plain: torch.Tensor = plain) -> dict[str, bool]:
        tally = Tally()
        tally.add("x", got, plain, truth)
        return {f.norm: f.passed for f in tally.findings()}

    assert verdict(plain) == {"l2": True, "max": True}
    assert verdict(plain * (1 + 2e-6)) == {"l2": False, "max": False}
    one_off = plain.clone()
    one_off[5] += 3e-6
    assert verdict(one_off) == {"l2": True, "max": False}
    assert not any(verdict(torch.where(truth > 1.5, torch.nan, truth).float()).values())
    assert verdict(plain.double()) == {"form": False}
    zeros = torch.zeros(4)
    assert verdict(zeros + 1e-30, zeros.double(), zeros)["zero"] is False
