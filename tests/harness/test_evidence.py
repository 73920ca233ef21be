"""The command `evidence`: what is missing is made in the time that there is, what was cut goes on, what is there is kept."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from harness.cli import evidence as command
from harness.cli.app import app
from harness.judge.request import UsageError
from harness.runs import acceptance, environment, evidence, freshness, store
from harness.runs.conclude import FAILED, INTERRUPTED, NOTHING, PASSED
from harness.runs.store import Run

# A command that behaves as those of the harness do: "pass", "fail" and "wait", which goes on with --resume only.
FAKE = '''\
import json, signal, sys, time
from datetime import datetime, UTC
from pathlib import Path

kind, words, here = sys.argv[1], sys.argv[2:], Path(__file__).parent
with open(here / "calls", "a") as calls:
    calls.write(" ".join([kind, *["--resume"] * ("--resume" in words)]) + "\\n")
if kind == "crash":
    sys.exit(5)
folder = Path(words[words.index("--out") + 1])
folder.mkdir(parents=True, exist_ok=True)
own = {"box": json.loads((here / "box.json").read_text()), "started": datetime.now(UTC).isoformat()}


def save(status):
    about = own | {"kind": "parity", "plan": {}, "command": f"python {__file__} {kind}", "status": status}
    (folder / "run.json").write_text(json.dumps(about | {"ended": datetime.now(UTC).isoformat()}))


def stop(*_):
    save("interrupted")
    sys.exit(130)


signal.signal(signal.SIGTERM, stop)
save("running")
while kind == "wait" and "--resume" not in words:
    time.sleep(0.02)
if kind == "fail":
    (folder / "records.jsonl").write_text((here / "failed.json").read_text())
save("finished")
sys.exit(1 if kind == "fail" else 0)
'''
FAILED_RECORD = {
    "subject": "scan", "implementation": "fused:torch", "role": "ours", "check": "forward", "case": "B1", "dtype": "float32",
    "status": "error", "seconds": 0.1, "reason": "it broke", "findings": [], "command": "",
}  # fmt: skip


class Desk:
    """A folder with the fake command, a list of runs that use it, and what was called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        (folder / "fake.py").write_text(FAKE)
        (folder / "box.json").write_text(json.dumps(environment.describe("cpu")))
        (folder / "failed.json").write_text(json.dumps(FAILED_RECORD) + "\n")

    def write(self, **minutes: float) -> Path:
        """Write the list: entries by the kind of their command, with the minutes that they take; an x in front needs a GPU."""
        text = ""
        for name, needs in minutes.items():
            kind = name.lstrip("x")
            text += f'[{name}]\ncommand = "python {self.folder / "fake.py"} {kind}"\nminutes = {needs}\n'
            text += f'gpus = {int(kind != name)}\nclaim = "something"\n'
        (self.folder / "list.toml").write_text(text)
        return self.folder / "list.toml"

    def ask(self, *words: str) -> Result:
        """Call the command."""
        return CliRunner().invoke(app, ["evidence", "--list", str(self.folder / "list.toml"), *words])

    def status(self) -> str:
        """Return the status of the run that waits; empty while there is none."""
        found = evidence.runs_in(self.runs.glob("*-wait"))
        return found[0].about["status"] if found else ""

    def ask_and_interrupt(self, end: signal.Signals, *words: str) -> Result:
        """Call the command, and send it a signal while the run that waits is under way."""
        ended = threading.Event()

        def interrupt() -> None:
            while self.status() != "running":
                if ended.wait(0.02):
                    return
            os.kill(os.getpid(), end)

        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background hands on that it is ignored
        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            return self.ask(*words)
        finally:
            ended.set()
            thread.join()
            signal.signal(signal.SIGINT, before)

    def calls(self) -> list[str]:
        """Return the commands that were called since the last look."""
        path = self.folder / "calls"
        said = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return said


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))  # the tests pass in a checkout with edits too
    monkeypatch.setattr(store, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(acceptance, "ACCEPTED", tmp_path / "accepted")
    monkeypatch.setattr(command, "RESERVE", 0.0)
    monkeypatch.setattr(evidence, "LEAST", 1e-3)
    return Desk(tmp_path)


def statuses(done: Result) -> dict[str, str]:
    """Return the status of each entry in the table."""
    known = evidence.ACCEPTED, evidence.FINISHED, evidence.FAILED, evidence.CUT, evidence.MISSING
    lines = [line.split() for line in done.output.splitlines()]
    return {line[1]: line[0] for line in lines if len(line) > 1 and line[0] in known}


def test_what_fits_goes_first_and_what_was_cut_goes_on(desk: Desk) -> None:
    desk.write(wait=600, **{"pass": 10})
    done = desk.ask_and_interrupt(signal.SIGTERM)
    assert done.exit_code == INTERRUPTED and desk.calls() == ["pass", "wait"], done.output
    assert statuses(done) == {"wait": "cut", "pass": "finished"}
    (desk.runs / "damaged").mkdir()
    (desk.runs / "damaged" / "run.json").write_text("{")
    accept = [line for line in done.output.splitlines() if line.startswith("accept with: ")]
    [kept] = desk.runs.glob("*-pass")
    assert accept == [f"accept with: python -m harness accept {kept}"]
    done = desk.ask()
    assert done.exit_code == PASSED and desk.calls() == ["wait --resume"] and len(list(desk.runs.iterdir())) == 3
    assert statuses(done) == {"wait": "finished", "pass": "finished"}
    assert desk.ask().exit_code == PASSED and desk.calls() == []


def test_one_that_fails_does_not_keep_the_others_from_their_time(desk: Desk) -> None:
    desk.write(fail=1, crash=1, **{"pass": 1})
    done = desk.ask()
    assert done.exit_code == FAILED and desk.calls() == ["fail", "crash", "pass"]
    assert statuses(done) == {"fail": "failed", "crash": "failed", "pass": "finished"}
    assert "1 of ours failed, see" in done.output and "exit code 5" in done.output
    assert done.output.count("accept with") == 1
    assert desk.ask().exit_code == FAILED and desk.calls() == ["crash"]  # a failed run is not made again
    assert desk.ask("--only", "pass").exit_code == PASSED


def test_what_cannot_be_begun(desk: Desk) -> None:
    desk.write(xpass=1, **{"pass": 1})
    done = desk.ask("--minutes", "0")
    assert done.exit_code == NOTHING and desk.calls() == [] and not desk.runs.exists()
    assert statuses(done) == {"xpass": "missing", "pass": "missing"}
    assert "needs 1 GPUs, there are 0" in done.output and "not started" in done.output
    done = desk.ask()
    assert done.exit_code == INTERRUPTED and desk.calls() == ["pass"]  # not 0: a run is missing
    done = desk.ask("--only", "none")
    assert isinstance(done.exception, UsageError) and str(done.exception) == "--only 'none' is unknown; allowed are xpass, pass"


def test_runs_of_other_code_another_box_or_edited_sources_do_not_count(desk: Desk) -> None:
    desk.write(**{"pass": 1})
    box = environment.describe("cpu")
    edited = box | {"git": {"commit": "c" * 40, "dirty": True}}
    others = box | {"fingerprints": box["fingerprints"] | {"fused": "0" * 64}}, box | {"cpu": "another"}, edited
    for other in others:
        (desk.folder / "box.json").write_text(json.dumps(other))
        assert desk.ask().exit_code == FAILED  # its command passed, and yet there is no run of this code
    (desk.folder / "box.json").write_text(json.dumps(box))
    assert desk.ask().exit_code == PASSED and len(desk.calls()) == len(list(desk.runs.iterdir())) == 4


def test_sources_without_a_commit_are_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.write(**{"pass": 1})
    monkeypatch.setattr(environment, "git", lambda: {"commit": "c" * 40, "dirty": True})
    assert "commit first" in str(desk.ask().exception) and desk.calls() == []
    done = desk.ask("--dry-run")
    assert done.exit_code == PASSED and "1 of 1 runs are to be made, about 1 minutes" in done.output and desk.calls() == []


@pytest.mark.parametrize("changed", [(), ("fused/a.py",), None])
def test_an_accepted_run_counts_if_it_is_of_this_code(
    desk: Desk, changed: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.write(**{"pass": 1})
    assert desk.ask().exit_code == PASSED
    [run] = desk.runs.iterdir()
    (desk.folder / "accepted" / "cpu").mkdir(parents=True)
    run.rename(desk.folder / "accepted" / "cpu" / "a")
    monkeypatch.setattr(freshness, "changed_since", lambda run: changed)
    done = desk.ask("--dry-run")
    assert statuses(done)["pass"] == ("accepted" if changed == () else "missing")
    assert f"accepted run a: {freshness.in_words(changed)}" in done.output
    desk.calls()
    assert desk.ask().exit_code == PASSED and desk.calls() == ["pass"] * (changed != ())


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_under_way_ends_with_the_command(desk: Desk, end: signal.Signals) -> None:
    """It keeps what it has, and another call goes on."""
    desk.write(wait=1, **{"pass": 1})
    done = desk.ask_and_interrupt(end)
    assert done.exit_code == INTERRUPTED and statuses(done) == {"wait": "cut", "pass": "missing"}
    assert desk.calls() == ["wait"] and desk.status() == "interrupted"
    assert desk.ask().exit_code == PASSED and desk.calls() == ["wait --resume", "pass"]


def test_a_run_that_is_under_way_ends_with_the_command_that_is_killed(desk: Desk) -> None:
    """By kill -9: else another call would write into a run that still goes on."""
    folder = desk.runs / "20260101-wait"
    text = f"from harness.cli import evidence\nevidence.run_until(['python', {str(desk.folder / 'fake.py')!r}, 'wait', "
    text += f"'--out', {str(folder)!r}], float('inf'))"
    environ = os.environ | {"PYTHONPATH": str(environment.ROOT)}
    process = subprocess.Popen([sys.executable, "-c", text], env=environ)
    while desk.status() != "running":
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    begun = time.monotonic()
    while desk.status() != "interrupted":
        assert time.monotonic() - begun < 60, desk.status()
        time.sleep(0.02)


def test_a_run_that_does_not_stop_is_killed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PATIENCE", 0.1)
    deaf = [sys.executable, "-c", "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"]
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert command.run_until(deaf, time.monotonic() + 1.0) == INTERRUPTED
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_of_the_harness_itself(desk: Desk) -> None:
    """Its record of the command is what the list says."""
    words = "python -m harness parity --device cpu --subject norm --check forward --impl fused:torch --case '*-D192-*'"
    (desk.folder / "list.toml").write_text(f'[norm]\ncommand = "{words}"\nminutes = 1\ngpus = 0\nclaim = "norm"\n')
    done = desk.ask()
    [run] = evidence.runs_in(desk.runs.glob("*"))
    assert done.exit_code == PASSED and statuses(done) == {"norm": "finished"}, done.output
    assert run.about["command"] == words and run.folder.name.endswith("-norm") and run.counts()["passed"]


def test_what_a_cut_run_has_used_is_not_needed_again(desk: Desk) -> None:
    run = Run(desk.folder)
    begun = datetime(2026, 1, 1, 12)
    minutes = (0, 3), (60, 63), (0, -600)  # of the beginning and the end; in the last session the clock was set back
    times = [[(begun + timedelta(minutes=n)).isoformat() for n in both] for both in minutes]
    run.about = {"sessions": [{"started": start, "ended": end} for start, end in times] + [{"started": begun.isoformat()}]}
    entry = evidence.Entry("a", "b", 10, 1, "c")
    assert evidence.minutes_left(entry, evidence.State(evidence.CUT, run)) == 4
    assert evidence.minutes_left(entry, evidence.State(evidence.MISSING)) == 10


ENTRY = 'command = "a"\nminutes = 1\ngpus = 1\nclaim = "c"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a", "is no readable list of runs"), ("a = 1", "a is a int, not a table of command, minutes, gpus, claim, measured"),
        ("[a]\nminutes = 1", "a lacks claim, command, gpus"),
        (f"[a]\n{ENTRY}more = 1", "a has an unknown key 'more'; allowed are"),
        (f"[a]\n{ENTRY}".replace("= 1", '= "1"'), "minutes of a is '1'; it must be a number, 0 or more"),
        (f"[a]\n{ENTRY}".replace("minutes = 1", "minutes = -1"), "minutes of a is -1; it must be a number, 0 or more"),
        (f"[a]\n{ENTRY}".replace("gpus = 1", "gpus = true"), "gpus of a is True; it must be a number, 0 or more"),
        (f"[a]\n{ENTRY}".replace('"a"', "[1]"), "command of a is [1]; it must be a text"),
        (f"[a]\n{ENTRY}".replace('"a"', '" "'), "command of a is empty"),
        (f'["a/b"]\n{ENTRY}', "the name 'a/b' is not made of"),
    ],
)  # fmt: skip
def test_a_wrong_list_is_named(text: str, said: str, desk: Desk) -> None:
    (desk.folder / "list.toml").write_text(text)
    done = desk.ask()
    assert isinstance(done.exception, UsageError) and said in str(done.exception) and "list.toml" in str(done.exception)


@pytest.mark.parametrize("entry", evidence.read(), ids=lambda entry: entry.name)
def test_the_list_has_commands_of_the_harness(entry: evidence.Entry) -> None:
    words = shlex.split(entry.command)
    assert words[:3] == ["python", "-m", "harness"] and entry.gpus > 0
    assert shlex.join(words) == entry.command
    if words[3] in ("parity", "bench"):
        done = CliRunner().invoke(app, [*words[3:], "--device", "cpu", "--dry-run"])
        assert done.exit_code == PASSED and done.output.count("\n") > (words[3] == "parity"), done.output
    else:
        assert words[3:] in (["sanitize"], ["mutants", "--device", "cuda"])


@pytest.mark.parametrize("entry", [entry for entry in evidence.read() if entry.measured], ids=lambda entry: entry.name)
def test_measured_minutes_are_those_of_the_accepted_run(entry: evidence.Entry) -> None:
    [run] = evidence.runs_in((environment.ROOT / "reports" / "accepted").glob(f"*/{entry.measured}"))
    begun, ended = (datetime.fromisoformat(run.about[key]) for key in ("started", "ended"))
    assert run.about["command"] == entry.command
    assert math.ceil((ended - begun).total_seconds() / 60) == entry.minutes
