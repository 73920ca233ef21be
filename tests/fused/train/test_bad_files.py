"""A training over files that give no clip: each is named once with its reason, on any terminal, and they are counted."""

import json
import os
import sys
from pathlib import Path

import pytest
from trainings import SMALL, class_folders, train
from videos import write_video

LATIN = os.fsdecode(b"caf\xe9.avi")  # no valid UTF-8
SUMMARY = "2 of 11 files could not be read and 1 of 11 files is too short"


def strict_ascii() -> None:
    """Make standard output refuse what is not ASCII, as PYTHONIOENCODING=ascii:strict does."""
    sys.stdout = open(1, "w", encoding="ascii", errors="strict", closefd=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_named_once(tmp_path: Path, workers: int) -> None:
    videos = class_folders(tmp_path / "videos", 4)
    for name in (LATIN, "broken.avi"):
        (videos / "side0" / name).write_bytes(b"no video")
    write_video(videos / "side20" / "short.avi", frames=1)
    run = tmp_path / "run"
    words = [*SMALL, "task=finetune", "batch_size=11", f"data.workers={workers}", f"data.train={videos}", f"data.val={videos}"]
    words.append(f"out={run}")
    code, output = train([*words, "epochs=3"], fault=strict_ascii, folder=tmp_path)
    assert code == 0, output
    told = [line for line in output.splitlines() if "left out" in line]
    assert len(told) == 3 and all(sum(name in line for line in told) == 1 for name in (r"caf\udce9.avi", "broken", "short"))
    assert all("too short: it has 1 frame" in line for line in told if "short.avi" in line)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    bad = {Path(line["file"]).name: line for line in lines if "bad" in line}
    assert len([line for line in lines if "bad" in line]) == 3 and Path(bad[LATIN]["file"]).is_file()
    assert {name: line["too_short"] for name, line in bad.items()} == {LATIN: False, "broken.avi": False, "short.avi": True}
    assert f"epoch 0: {SUMMARY}" in output and f"epoch 1: {SUMMARY}" not in output
    assert "of 8 videos that were read; top-1" in output and f"of all 11: {SUMMARY}" in output
    assert f"the model is in {run / 'model'}; {SUMMARY}, log.jsonl names them" in output
    code, output = train([*words, "epochs=4"], fault=strict_ascii, folder=tmp_path)  # resumed: named before, counted again
    assert code == 0 and "left out" not in output and f"{SUMMARY}, log.jsonl names them" in output, output
