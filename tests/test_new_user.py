"""The way of a new user, from the guide's commands alone, in its short form; `python tests/new_user.py --long` is the other."""

import signal
from pathlib import Path

import pytest
from new_user import SHORT, STOP_BEHIND, walk
from trainings import signal_at_step, train


def test_new_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def run(words: list[str]) -> tuple[int, str]:
        return train(words[1:], folder=tmp_path, module=words[0])

    def run_and_stop(words: list[str]) -> tuple[int, str]:
        output = tmp_path / "stopped.txt"
        code = signal_at_step(words[1:], Path("runs/first"), STOP_BEHIND, signal.SIGINT, output)
        return code, output.read_text()

    found = walk(SHORT, run, run_and_stop)
    assert found == {"top1": 1, "class": "dark", "features": 12}
