"""The race of readers: only right frames get a time, it is CPU time, and the page says how many cores feed a GPU."""

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import sweeps
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from fused.io.video_file import VideoFile
from harness.bench import grids, run
from harness.bench.clock import Call, Clock
from harness.cli.app import app
from harness.fixtures import encoded_film
from harness.judge.case import Case
from harness.judge.registry import subjects
from harness.judge.trial import Trial
from harness.records.speed import Entry, Point, Speed
from harness.report import accepted, bench, reading
from harness.runs.store import Run
from harness.subjects import clips

FRAMES, GOP, T = 24, 12, 8
CASE = Case("clips", (("T", T), ("G", GOP)), ("for=frames", "infer"), "float32")
READERS = {i.name: i for i in clips.implementations()}
CEILINGS = {"copies": [[0, 1e10]], "matmuls": {"float32": 1e11}, "exp": 1e9, "issue": None, "uncertainty": 0.0}


@pytest.fixture(autouse=True)
def small_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A short and small film, for worker processes too: they find it in the cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in (("FRAMES", FRAMES), ("HEIGHT", 64), ("WIDTH", 80)):
        monkeypatch.setattr(encoded_film, name, value)
    monkeypatch.setattr(clips, "GOPS", (GOP,))
    monkeypatch.setattr(clips, "CLIPS", (T,))
    cached = encoded_film.encoded_film, clips.full_decode, clips.missing_package
    for function in cached:
        function.cache_clear()
    encoded_film.encoded_film(GOP)
    yield
    for function in cached:
        function.cache_clear()


def benched(out: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> tuple[Result, Run]:
    """The command and its run, on a box whose ceilings are known."""
    measured = {"ceilings": CEILINGS, "attention": {"sdpa": 1.0}}
    monkeypatch.setattr(run, "measure_box", lambda run, dtypes, threads: run.about.update(measured))
    words = ["bench", "--race", "data", "--budget", "0.01", "--device", "cpu", "--out", str(out)]
    done = CliRunner().invoke(app, [*words, *(word for name in names for word in ("--impl", name))])
    return done, Run.open(out)


def test_readers_are_timed_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, made = benched(tmp_path / "run", monkeypatch, "read_clip", "pyav")
    assert done.exit_code == 0, (done.output, done.exception)
    assert [(s.entry.name, s.status) for s in made.speeds] == [("clips read_clip", "ok"), ("clips pyav", "ok")]
    assert all(len(s.seconds) >= clips.FEWEST and s.allocated > 2**20 and s.share for s in made.speeds)
    asked = [(r.implementation, r.check, r.status) for r in made.records]
    assert asked == [("read_clip", "frames", "pass"), ("pyav", "frames", "pass")]
    text = (tmp_path / "run" / "report.md").read_text()
    assert "| 12 | 8 | ours, resized (read_clip) |" in text and "cores, GOP 12" in text and "On a CPU" not in text
    assert (tmp_path / "run" / "data-T8.svg").exists()
    assert "frames read by one core" in (tmp_path / "run" / "report.html").read_text()


def test_a_wrong_frame_gates_the_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = VideoFile.frames
    monkeypatch.setattr(VideoFile, "frames", lambda self, indices: right(self, [*indices[:-1], indices[-1] + 1]))
    done, made = benched(tmp_path / "run", monkeypatch, "decode_frames", "read_clip")
    assert done.exit_code == 1
    assert [s.status for s in made.speeds] == ["gated", "gated"] and "parity frames failed" in made.speeds[0].reason
    assert "GATED (ours) clips decode_frames" in done.output


def test_readers_are_timed_only_where_they_are_named() -> None:
    assert "data" in grids.races() and "data" not in grids.chosen_races(())
    for grid in grids.GRIDS:
        assert not any(p.race == "data" for p in run.points_here(grid, "cuda", ()))
        assert [p["G"] for p in run.points_here(grid, "cuda", ("data",))] == [GOP]
    about = run.describe("cpu", "cpu", (), (), (), 1.0, {})
    assert not any(a["subject"] == "clips" for a in about["absent"])
    listed = CliRunner().invoke(app, ["bench", "--dry-run", "--race", "data", "--grid", "cpu", "--device", "cpu"])
    assert f"data-B1-T{T}-S224-L1569-G{GOP}-infer-read-float32" in listed.output and "clips read_clip" in listed.output


def found(reader: clips.Reader, case: Case = CASE) -> list[float]:
    """The errors that the check finds."""
    trial = Trial(case, "cpu")
    return [f.error for f in subjects()["clips"].frame_findings(reader, case, trial.got(reader, 0, False).outputs["clip"])]


def as_reader(clip: Tensor, **more) -> clips.Reader:
    return clips.Reader("mine", lambda path, T: clip, **more)


def test_one_byte_is_an_error_where_colours_are_the_same() -> None:
    due = READERS["reference"].call(encoded_film.encoded_film(GOP), T)
    assert found(READERS["pyav"]) == found(READERS["decode_frames"]) == found(READERS["read_clip"]) == [0.0]
    off = due.clone()
    off[3, 5, 7, 1] ^= 1
    assert found(as_reader(off)) == [1.0]
    assert found(as_reader(due.float())) == found(as_reader(due[1:])) == [math.inf]
    clip = clips.as_clip(due)
    assert found(as_reader(clip, prepare=clips.as_clip)) == [0.0]
    assert found(as_reader(clip.nextafter(torch.tensor(9.0)), prepare=clips.as_clip))[0] > 0


def test_readers_with_other_colours_must_find_the_frames() -> None:
    film = clips.full_decode(encoded_film.encoded_film(GOP))
    numbers = clips.clip_numbers(len(film), T)
    tinted = (film[numbers].int() + torch.tensor([2, -1, 1])).clamp(0, 255).byte()
    assert found(as_reader(tinted, own_colours=True)) == [0.0]
    late = film[[n + (i == 2) for i, n in enumerate(numbers)]]
    assert found(as_reader(late, own_colours=True)) == [1.0]
    assert found(as_reader(tinted[1:], own_colours=True)) == [math.inf]


def test_the_film_has_its_key_frames_at_their_distance_and_no_two_frames_alike() -> None:
    path = encoded_film.encoded_film(GOP)
    with av.open(str(path)) as container:
        keys = [i for i, p in enumerate(p for p in container.demux(video=0) if p.size) if p.is_keyframe]
    assert keys == list(range(0, FRAMES, GOP))
    film = clips.full_decode(path)
    assert film.shape == (FRAMES, 64, 80, 3) and len({image.numpy().tobytes() for image in film}) == FRAMES


def test_a_package_that_does_not_load_is_absent_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(package: str) -> None:
        raise RuntimeError(f"no library for {package}\nand much more")

    monkeypatch.setattr(clips, "importlib", SimpleNamespace(import_module=broken))
    monkeypatch.setattr(clips, "missing_encoder", lambda: None)
    reason = READERS["torchcodec"].absent("cpu")
    assert reason == (
        "torchcodec cannot be imported (RuntimeError: no library for torchcodec): pip install torchcodec, which needs FFmpeg's"
        " shared libraries"
    )


def test_cpu_time_leaves_out_waiting() -> None:
    clock = Clock("cpu")
    assert clock.time(Call(lambda: time.sleep(0.05), cpu_time=True)) < 0.03 < clock.time(Call(lambda: time.sleep(0.05)))


def read(frames: int, gop: int, ms: float, name: str = "read_clip") -> Speed:
    sizes = ("B", 1), ("T", frames), ("S", 224), ("L", 1 + 196 * frames), ("G", gop)
    return sweeps.speed(Entry("clips", name, "ours"), Point("data", sizes, "infer", "read", "float32"), ms)


def step(race: str, ms: float, way: str = "eager", batch: int = 8, name: str = "native", role: str = "ours", **more) -> Speed:
    entry = Entry("videomamba", f"fused:{name}", role, variant=race)
    return sweeps.speed(entry, sweeps.clip(8, race, "train", way, batch), ms, **more)


def test_cores_are_those_of_the_newest_training(tmp_path: Path) -> None:
    old = [step("tiny", 20.0), step("middle", 50.0)]
    longer = dataclasses.replace(step("middle", 1.0), point=sweeps.clip(64, mode="train"))
    new = [step("middle", 40.0), step("middle", 80.0, batch=1), step("middle", 16.0, "graph"), longer]
    new += [step("middle", 1.0, role="rival"), step("middle", 1.0, wrong=3.0)]
    runs = [
        sweeps.made(tmp_path / "old", old, started="2026-01-01"), sweeps.made(tmp_path / "new", new, started="2026-01-02"),
        sweeps.made(tmp_path / "cpu", [step("middle", 1.0)], started="2026-01-03", box=sweeps.BOX | {"gpu": None}),
    ]  # fmt: skip
    mine = [read(8, 12, 25.0), read(8, 60, 50.0), read(16, 12, 50.0), read(8, 12, 10.0, "decode_frames")]
    table = reading.cores(mine, reading.trained(runs, mine)).splitlines()
    assert table[0].startswith("| model | frames | batch | way | clips/s in training | cores, GOP 12 | cores, GOP 60 |")
    assert table[2:5] == [
        "| VideoMamba-Ti, ours | 8 | 8 | eager | 400 | 10 | 20 | old, NVIDIA H200 |",
        "| VideoMamba-M, ours | 8 | 8 | eager | 200 | 5 | 10 | new, NVIDIA H200 |",
        "| VideoMamba-M, ours | 8 | 8 | CUDA graph | 500 | 12.5 | 25 | new, NVIDIA H200 |",
    ]
    assert table[-1] == "No accepted run has a training step of ours with 16 frames: their cores are not known."
    assert reading.cores(mine, []).startswith("No accepted run has a training step of ours with 8 or 16 frames")
    assert "`read_clip` has no time" in reading.cores(mine[3:], [])


def test_the_page_and_that_of_accepted_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gated = Speed(Entry("clips", "decode_frames", "ours"), read(8, 60, 1.0).point, "gated", reason="parity frames failed")
    speeds = [read(8, 12, 10.0, "decode_frames"), gated, read(8, 12, 25.0), read(8, 60, 50.0), step("middle", 40.0)]
    monkeypatch.setattr(reading, "accepted_runs", lambda folder: [])
    made = sweeps.made(tmp_path / "run", speeds)
    text = bench.write(made).read_text()
    assert "| 12 | 8 | ours, resized (read_clip) | 25 [24.8, 25.2] | 40 | 2.5 | 1,020 |" in text
    assert "| 60 | 8 | ours, frames of full size (decode_frames) | **not timed**: parity frames failed | - |" in text
    assert "| VideoMamba-M, ours | 8 | 8 | eager | 200 | 5 | 10 | run, NVIDIA H200 |" in text  # of the run itself
    assert "not timed: failed parity" in (tmp_path / "run" / "data-T8.svg").read_text()
    assert "## Video files" not in bench.write(sweeps.made(tmp_path / "other", [step("middle", 40.0)])).read_text()
    page = tmp_path / "README.md"
    page.write_text("\n".join(accepted.MARKERS))
    accepted.write(page, {Path("accepted/h200/run"): made})
    assert "### Clips read from video files\n\nFrom [run](accepted/h200/run/report.md):\n\n| GOP |" in page.read_text()
    assert reading.draw([gated], tmp_path) == []
