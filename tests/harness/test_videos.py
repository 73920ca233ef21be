"""Videos that come in parts: the checks `long` and `stream`, the races `stream` and `chunks`, and their pages."""

import re
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import sweeps
from answers import failing, ours

import fused
from harness.bench import grids, roofline, workloads
from harness.bench.run import licence_requests, points_here, refusal, time_points
from harness.bench.worker import LoadedCall
from harness.checks import long
from harness.judge.case import Case
from harness.judge.check import CannotAsk
from harness.judge.registry import mutants
from harness.judge.trial import Trial
from harness.records.ceilings import BoxCeilings
from harness.records.finding import Finding
from harness.records.record import Record
from harness.records.speed import Entry, Point, Speed
from harness.report import bench, chunking, streaming
from harness.runs.store import Run
from harness.subjects import videomamba
from harness.subjects.videomamba.timing import CHUNKED
from harness.subjects.videomamba.timing import STREAMED as STREAMED_SIZES

OURS = Entry("videomamba", "fused:torch", "ours", variant="tiny")
VIDEOS = {"stream": STREAMED_SIZES, "chunks": CHUNKED}
STREAMED = replace(OURS, maker="harness.bench.streaming:make")


pytestmark = pytest.mark.usefixtures("prepared")


def asked_long(frames: int = 30, side: int = 16) -> set[str]:
    """What fails."""
    sizes = {"B": 1, "T": frames, "S": side, "D": 32, "L": 1 + frames * (side // 16) ** 2}
    case = Case("videomamba", tuple(sizes.items()), ("readout=tokens", "infer", "for=long"))
    return failing(long.run(Trial(case, "cpu"), ours("videomamba")))


def test_long_finds_nothing_in_an_honest_pass() -> None:
    assert asked_long() == set()


def test_long_finds_what_goes_wrong_between_chunks() -> None:
    with mutants()["restart_backward"].plant():
        assert asked_long() == {"logits[30 frames]"}


def test_long_finds_what_is_wrong_everywhere_alike() -> None:
    """Chunks and whole agree, and the reference does not."""
    with mutants()["drop_skip"].plant():
        assert asked_long() == {"logits[8 frames, plain]", "logits[8 frames, truth]"}


def test_long_leaves_hours_to_a_gpu() -> None:
    [hour, _] = videomamba.special_cases("long", "long")
    assert hour["T"] == 3600 and hour["L"] == 705601 and not videomamba.special_cases("long", "full")
    with pytest.raises(CannotAsk, match="705601 tokens.*on a GPU"):
        long.run(Trial(hour, "cpu"), ours("videomamba"))


@pytest.mark.parametrize("grid", grids.GRIDS)
def test_points(grid: str) -> None:
    points = [p for p in grids.points(grid) if p.race in VIDEOS]
    assert len({p.name for p in points}) == len(points)
    ways = {(p.race, p.mode, p.way) for p in points}
    chunks = {("chunks", "infer", "chunked"), ("chunks", "train", "chunked")}
    assert ways >= chunks | {("chunks", "infer", "eager"), ("chunks", "train", "checkpointed"), ("stream", "infer", "eager")}
    graph = [p for p in points if p.race == "stream" and p.way == "graph"]
    assert (len({p["A"] for p in graph}) > 1) == (grid != "cpu")
    hours = [p for p in points if p.race == "chunks" and p["L"] == 705601 and p.mode == "infer"]
    assert bool(hours) == (grid != "cpu")
    if grid == "cpu":
        assert {p.name for p in points} == {p.name for p in points_here(grid, "cpu", tuple(VIDEOS))}


def test_who_runs() -> None:
    for race in VIDEOS:
        found = grids.entries(race, "cpu", "sdpa")
        assert {e.implementation for e in found} == {"fused:cpu", "fused:torch"}  # mamba-ssm cannot carry a state
        [point, *_] = [p for p in grids.points("cpu") if p.race == race]
        assert [e.variant for e in found if grids.runs(e, point, "cpu")] == ["tiny", "tiny"]
        found = [e for e in found if e.implementation == "fused:torch"]
        native = [replace(e, implementation="fused:native") for e in found]
        there = [e.variant for e in (*found, *native) if grids.runs(e, point, "full")]
        assert there == list(VIDEOS[race])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_licences_ask_something(dtype: str) -> None:
    requests = licence_requests([("stream", OURS), ("chunks", OURS), ("tiny", OURS)], "cpu", dtype, 1)
    assert [r.checks for r in requests] == [("chunks", "stream"), ("forward_chunked",), ("forward", "backward")]
    for request in requests:
        asked = [name for case in request.selected_cases() for name, _, _ in request.questions(case)]
        assert set(asked) == set(request.checks) and len(request.selected_cases()) >= len(request.cases)


def record(check: str, error: float = 0.5) -> Record:
    status = "pass" if error <= 1 else "fail"
    found = (Finding("y", "l2", error, 1.0),)
    return Record("videomamba", "fused:torch", "ours", check, "case", "float32", status, findings=found)


def test_every_race_needs_its_own_licence() -> None:
    def why(race: str, mode: str, *records: Record) -> str:
        return refusal(OURS, Point(race, (("B", 1), ("L", 16)), mode, dtype="float32"), list(records))[0]

    good = [record("forward"), record("backward")]
    assert "asked it nothing" in why("stream", "infer", *good) and "asked it nothing" in why("chunks", "train", *good)
    assert why("stream", "infer", record("chunks"), record("stream"), record("forward", 3.0)) == ""
    assert "parity stream failed" in why("stream", "infer", record("chunks"), record("stream", 3.0))
    assert "parity forward_chunked failed" in why("chunks", "infer", record("forward_chunked", 3.0), *good)
    assert why("tiny", "train", *good, record("stream", 3.0), record("forward_chunked", 3.0)) == ""
    assert "parity backward failed" in why("tiny", "train", record("forward"), record("backward", 3.0))


def clip(way: str, mode: str, frames: int = 3, **more: int) -> Point:
    sizes = {"B": 1, "T": frames, "S": 16, "L": 1 + frames} | more
    return Point("chunks", tuple(sizes.items()), mode, way, "float32")


def test_chunked_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, asked = fused.VideoMamba.forward_chunked, []

    def noted(model, clip, *, chunk_frames):
        asked.append((tuple(clip.shape), chunk_frames, model.training))
        return honest(model, clip, chunk_frames=chunk_frames)

    monkeypatch.setattr(fused.VideoMamba, "forward_chunked", noted)
    for mode in ("infer", "train"):
        workloads.make(clip("chunked", mode, F=2), OURS, "cpu").run()
    assert asked == [((1, 3, 3, 16, 16), 2, False), ((1, 3, 3, 16, 16), 2, True)]
    build = videomamba.network
    assert all(layer.recompute for layer in build(clip("checkpointed", "train"), OURS).layers)
    assert not any(layer.recompute for layer in build(clip("eager", "infer"), OURS).layers)
    workloads.make(clip("checkpointed", "train"), OURS, "cpu").run()
    assert len(asked) == 2


def test_a_stream_is_timed(tmp_path: Path) -> None:
    """In a worker: a stream goes on frame by frame, and has enough samples for its tail."""
    run = Run.create(tmp_path, {"kind": "bench", "plan": {"budget": 0.01}, "box": {}})
    for check in ("chunks", "stream"):
        run.add(record(check))
    point = Point("stream", (("B", 1), ("T", 1), ("S", 16), ("L", 1), ("A", 2)), "infer", dtype="float32")
    best = BoxCeilings(((0, 4e12),), {"float32": 8e14}, exp=4e12)
    time_points(run, [point], lambda p: [STREAMED], best, 0.01, 10.0, "cpu", 1, lambda speed: None)
    [speed] = Run.open(tmp_path).speeds
    assert speed.status == "ok" and len(speed.seconds) >= grids.race_of(point).fewest(point) == 20 and speed.allocated > 0
    both = roofline.bound(replace(point, race="tiny"), "videomamba", "tiny", best.at("float32", 0))
    assert 0 < speed.bound < both < 2 * speed.bound  # one direction


def test_a_call_of_very_many_tokens_may_take_longer() -> None:
    loaded = LoadedCall(Entry("dawdler", "fake", "ours", "fakes:sleeper"), "cpu", 0.001)
    for tokens, slow in ((5, True), (1000, False)):
        loaded.load(Point("fake", (("B", tokens), ("L", 5)), "infer", dtype="float32"))
        if slow:
            with pytest.raises(TimeoutError):
                loaded.time(0.01, 1)
        else:
            loaded.time(0.01, 1)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = sweeps.made(tmp_path_factory.mktemp("pieces") / "run", sweeps.pieces())
    bench.write(run)
    return run


def rows(run: Run, pattern: str) -> list[str]:
    return [line for line in (run.folder / "report.md").read_text().splitlines() if fnmatchcase(line, pattern)]


def test_the_page_tells_a_frames_cost(told: Run) -> None:
    [row] = rows(told, "| VideoMamba-M, ours | CUDA graph | 224 px | bfloat16 | 1,000 |*")
    samples = next(s.seconds for s in told.speeds if s.entry.variant == "middle" and dict(s.point.dims).get("A") == 1000)
    assert f"| {1e3 * float(np.quantile(samples, 0.99)):.3g} (n = 9) | 526 | 240 |" in row
    assert len(rows(told, "| VideoMamba-*, ours | eager | 224 px |*| 8 |*")) == 3


def test_the_page_tells_what_chunks_cost(told: Run) -> None:
    [row] = rows(told, "| 1 clip of 512 frames | 100,353 | bfloat16 | inference | 32 |*")
    assert "| 1,470 | 2.5 | 1.39 | 0.312 |" in row
    [row] = rows(told, "*| training | all at once, checkpointed |*")
    assert "**out of memory**" in row and row.count("| - |") >= 1
    [row] = rows(told, "| 1 clip of 3,600 frames | 705,601 | bfloat16 | inference | 64 |*")
    assert re.search(r"\| 1,570 \| 9 \| - \| - \|", row)


def test_the_plots(told: Run) -> None:
    drawn = {path.stem: path.read_text() for path in told.folder.glob("*.svg")}
    assert {"stream-graph-time", "stream-graph-memory"} <= drawn.keys()
    assert "stream-eager-time" not in drawn, "one length is no line"
    for word in ("VideoMamba-Ti,", "ms a frame", "frames that came before"):
        assert word in drawn["stream-graph-time"]
    assert "peak memory (MiB)" in drawn["stream-graph-memory"]
    assert {"chunks-infer-T512", "chunks-train-T512"} <= drawn.keys()
    assert "chunks-infer-T3600" not in drawn, "one pass over an hour is no line, and shares no axis with shorter videos"
    assert ">128<" in drawn["chunks-infer-T512"] and ">whole<" in drawn["chunks-infer-T512"]
    assert "frames/s" in drawn["chunks-infer-T512"] and ">whole<" not in drawn["chunks-train-T512"]
    assert rows(told, "*A video of 512 frames, training: *all at once, checkpointed: out of memory*")
    assert rows(told, "| *for the next frame of a stream after 1,000 others: VideoMamba-Ti, by a CUDA graph*")
    before = {f.name: f.read_bytes() for f in told.folder.iterdir()}
    bench.write(Run.open(told.folder))
    assert {f.name: f.read_bytes() for f in told.folder.iterdir()} == before


def test_nothing_timed_is_not_drawn(tmp_path: Path) -> None:
    ended = [Speed(s.entry, s.point, "gated", reason="wrong") for s in sweeps.pieces()]
    assert streaming.draw(ended, tmp_path) == chunking.draw(ended, tmp_path) == []
    assert "**not timed**: wrong" in streaming.frames([s for s in ended if s.point.race == "stream"])
    assert "**not timed**: wrong" in chunking.passes([s for s in ended if s.point.race == "chunks"])
