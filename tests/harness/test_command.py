"""The command line around the work: what is missing or cannot be written, what has nothing to do, exit codes, the time left."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from harness.cli import bench
from harness.cli.app import app
from harness.judge.request import UsageError
from harness.records.speed import Entry, Point, Speed
from harness.report import bench as report
from harness.runs import environment, store
from harness.runs.conclude import FAILED, NOTHING, PASSED
from harness.runs.progress import Progress
from harness.runs.store import StoreError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib", "markdown_it", "pytest_benchmark"])
def test_without_its_extra_the_command_says_which(missing: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")  # as if it were not there
    done = subprocess.run(
        [sys.executable, "-m", "harness", "list"], cwd=ROOT, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 4 and done.stdout == ""
    assert done.stderr == (
        f"error: python -m harness needs {missing}, which is not installed: pip install 'videomamba-bench[harness]'\n"
    )


def run(*words: str) -> Result:
    return CliRunner().invoke(app, [*words, "--device", "cpu"])


PARITY = ("parity", "--grid", "smoke", "--subject", "norm", "--case", "B1-L1-D32-kind=rms-float32", "--check", "forward")
COMMANDS = [PARITY, ("bench", "--race", "norm"), ("learn", "--task", "digits", "--steps", "1")]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
@pytest.mark.parametrize("kind", ["a file", "in a file", "in a folder of the system"])
def test_a_folder_that_cannot_be_written_is_found_before_any_work(
    words: tuple[str, ...], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    out = {"a file": tmp_path / "file", "in a file": tmp_path / "file" / "run"}.get(kind, Path("/proc/nobody/run"))
    monkeypatch.setattr(environment, "prepare", lambda: pytest.fail("it has begun to work"))
    error = run(*words, "--out", str(out)).exception
    assert isinstance(error, StoreError) and str(error).startswith(f"--out {out} ") and "\n" not in str(error), error
    assert "is a file; name a folder" in str(error) or "cannot be written (" in str(error)


@pytest.mark.parametrize("words", COMMANDS[:2], ids=lambda words: words[0])
def test_a_dry_run_finds_it_too_and_leaves_nothing(words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert isinstance(run(*words, "--dry-run", "--out", str(tmp_path / "file" / "run")).exception, StoreError)
    assert run(*words, "--dry-run", "--out", str(tmp_path / "new" / "run")).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_folder_of_all_runs_is_tried_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(store, "RUNS", tmp_path / "file" / "runs")
    error = run(*PARITY).exception
    assert isinstance(error, StoreError) and "name another folder with --out" in str(error)
    assert run(*PARITY, "--dry-run").exit_code == 0  # which writes nothing


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("parity", "--case", "no-such-case"), "the options leave no question"),
        (("parity", "--grid", "smoke", "--subject", "conv", "--check", "gradcheck", "--dtype", "bfloat16"), "no question"),
        (("parity", "--grid", "smoke", "--subject", "scan", "--impl", "fused:native"), "fused:native: "),
        (("bench", "--point", "no-such-point"), "no such point"),
        (("bench", "--race", "norm", "--impl", "fused:native"), "fused:native: "),
        (("bench", "--race", "norm", "--impl", "reference"), "reference takes part at none"),
        (("learn", "--task", "digits", "--impl", "fused:native"), "fused:native: "),
    ],
)
def test_what_has_nothing_to_do_leaves_no_folder(words: tuple[str, ...], why: str, tmp_path: Path) -> None:
    done = run(*words, "--out", str(tmp_path / "parent" / "run"))
    assert done.exit_code == NOTHING and "nothing ran:\n    " in done.output and why in done.output, done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["parity", "bench", "learn"])
@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named(command: str, device: str) -> None:
    """A dry run too, which lists what would run there."""
    error = CliRunner().invoke(app, [command, "--device", device, *["--dry-run"] * (command != "learn")]).exception
    assert isinstance(error, UsageError) and repr(device) in str(error) and "there are cpu" in str(error)


def test_every_option_says_what_it_takes() -> None:
    for name, command in typer.main.get_command(app).commands.items():
        without = [p.opts[0] for p in command.params if p.name != "help" and not p.help]
        assert not without, f"{name}: {without}"


def test_bench_knows_its_contenders() -> None:
    error = run("bench", "--impl", "nobody").exception
    assert isinstance(error, UsageError) and "fused:torch" in str(error) and "sdpa" in str(error)


# the exit code of bench


def speeds(folder: Path, *found: tuple[str, str]) -> store.Run:
    kept = store.Run.create(folder, {"kind": "bench"})
    for number, (role, status) in enumerate(found, 1):
        point = Point("norm", (("B", 1), ("L", number)), "infer", dtype="float32")
        entry = Entry("norm", f"{role}{number}", role)
        kept.add_speed(Speed(entry, point, status, (1.0,) * (status == "ok"), reason=f"reason {number}" * (status != "ok")))
    return kept


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ([("ours", "ok"), ("rival", "error")], PASSED), ([("ours", "ok"), ("ours", "oom"), ("ours", "implied")], PASSED),
        ([("ours", "ok"), ("ours", "gated")], FAILED), ([("ours", "ok"), ("ours", "error")], FAILED),
        ([("ours", "ok"), ("ours", "timeout")], FAILED), ([("ours", "gated")], FAILED), ([("ours", "oom")], NOTHING),
        ([("rival", "timeout")], NOTHING), ([], NOTHING),
    ],
)  # fmt: skip
def test_the_verdict_and_the_exit_code_of_bench_agree(found: list[tuple[str, str]], code: int, tmp_path: Path) -> None:
    kept = speeds(tmp_path / "run", *found)
    assert bench.exit_code(kept) == code
    assert ("of ours failed." in report.verdict(kept)) == (code == FAILED)
    lines = "\n".join(bench.untimed(kept))
    for number, (role, status) in enumerate(found, 1):
        line = f"{status.upper()} (ours) norm ours{number}: reason {number}\n    at norm-B1-L{number}-infer-eager-float32"
        named = line in lines
        assert named == (role == "ours" and status in ("gated", "error", "timeout"))


def test_the_help_of_bench_says_what_gated_means() -> None:
    said = " ".join(CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"}).output.split())
    assert "1 if a point of ours failed, ran out of time or is gated" in said


# the time left


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def estimates(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[float | None]]:
    def spend(progress: Progress, clock: Clock, steps: list[tuple[str, float, bool]]) -> list[float | None]:
        found = []
        for item, seconds, known in steps:
            clock.now += seconds
            progress._spoke = -1e9  # every line is printed
            progress.done(item, "text", known)
            left = re.search(r"about ([\d.]+) min left", capsys.readouterr().out)
            found.append(float(left[1]) if left else None)
        return found

    return spend


def test_no_time_left_is_shown_before_there_is_ground_for_it(estimates) -> None:
    """Five minutes of licences, a first point that starts processes, then one a minute of a hundred."""
    clock = Clock()
    progress = Progress({}, clock)
    clock.now = 300.0
    progress.expect({str(n): 1.0 for n in range(100)})
    first, *more = estimates(progress, clock, [(str(n), 120.0 if n == 0 else 60.0, False) for n in range(12)])
    assert [first, *more[:3]] == [None] * 4
    assert more[3] == pytest.approx(95 * 6 / 5, abs=0.1)  # 6 minutes for 5 of them
    assert more[-1] == pytest.approx(88 * 13 / 12, abs=0.1)


def test_few_items_are_ground_when_half_is_done(estimates) -> None:
    clock = Clock()
    progress = Progress({"a": 1.0, "b": 2.0, "c": 3.0}, clock)
    assert estimates(progress, clock, [("a", 60.0, False), ("b", 120.0, False), ("c", 1.0, False)]) == [None, 3.0, 0.0]


def test_many_small_items_are_no_ground_for_a_large_one(estimates) -> None:
    clock = Clock()
    progress = Progress({"large": 1000.0} | {str(n): 1.0 for n in range(10)}, clock)
    assert estimates(progress, clock, [(str(n), 1.0, False) for n in range(10)]) == [None] * 10


def test_what_an_earlier_session_did_is_no_measure(estimates) -> None:
    clock = Clock()
    progress = Progress({str(n): 1.0 for n in range(20)}, clock)
    known = [(str(n), 0.0, True) for n in range(10)]
    assert estimates(progress, clock, [*known, *((str(n), 60.0, False) for n in range(10, 16))]) == [None] * 14 + [5.0, 4.0]
