"""The cells of reports, literally: of batches of several clips, so that no unit, ratio or choice can be another's."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import sweeps

from harness.bench import benchmark_json
from harness.records.finding import Finding
from harness.records.record import Record
from harness.records.speed import Entry, Point, Speed
from harness.report import (
    accepted,
    bench,
    chunking,
    curves,
    learning,
    loop,
    margins,
    measurement,
    overview,
    paper,
    reading,
    speed_tables,
    streaming,
    tables,
)
from harness.report import parity as page
from harness.runs.store import Run

GIB, MIB = 2**30, 2**20
OURS = Entry("videomamba", "fused:native", "ours", variant="tiny")
UPSTREAM = Entry("videomamba", "fused:mamba_ssm", "rival", variant="tiny")
VIT, NAIVE = Entry("vit", "sdpa", "rival", variant="tiny"), Entry("vit", "reference", "rival", variant="tiny")


def clip(mode: str = "infer", way: str = "eager", race: str = "tiny", **sizes: int) -> Point:
    return Point(race, tuple(({"B": 4, "T": 8, "S": 224, "L": 1569} | sizes).items()), mode, way)


def at(entry: Entry, point: Point, seconds: float, gib: float = 3.0, **more: object) -> Speed:
    return Speed(entry, point, "ok", (seconds,) * 3, allocated=int(gib * GIB), reserved=int(7 * gib * GIB), **more)


def rows(text: str) -> list[list[str]]:
    """The cells of a table's rows, its head first."""
    lines = [re.split(r" ?\| ", line[2:-2] + " ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines if any(cell.strip("- ") for cell in line)]


def test_a_model() -> None:
    speeds = [at(OURS, clip(), 0.5), at(VIT, clip(), 0.2, 1.5), at(NAIVE, clip(), 0.8, wrong=2.5), at(UPSTREAM, clip(), 0.1)]
    _, ours, vit, naive, _ = rows(speed_tables.models(speeds))
    assert ours[:4] == ["4 x 8 x 224 px", "1,569", "eager", "videomamba tiny fused:native"]
    assert ours[4:] == ["500 [500, 500]", "8", "12,600", "3", "2.5", ""]
    assert vit[3:9] == ["vit tiny sdpa (rival)", "200 [200, 200]", "20", "31,400", "1.5", "1"]
    assert naive[8:] == ["4", "**error 2.5 times its budget**"], "against the fastest ViT"
    lost = Speed(OURS, clip(), "oom", reason="CUDA out of memory")
    assert rows(speed_tables.models([lost]))[1][4:] == ["**out of memory**", "-", "-", "-", "-", ""]


def test_an_operator() -> None:
    point = Point("norm", (("B", 2), ("L", 10), ("D", 192)), "train")
    mine, theirs = Entry("norm", "fused:native", "ours"), Entry("norm", "theirs", "rival")
    speeds = [at(mine, point, 0.002, 0.5, bound=0.0005, alone=True), at(theirs, point, 0.004), at(theirs, point, 0.008)]
    ours = rows(speed_tables.operators(speeds))[1]
    assert ours == ["norm B2 L10 D192", "train", "norm fused:native", "2 [2, 2]", "25 %", "512", "0.5", "timed alone"]
    few = Speed(mine, point, "ok", (0.001, 0.003))
    assert speed_tables.milliseconds(few) == "2 [1, 3, n = 2]"
    assert [speed_tables.number(x) for x in (1234.5, 0.00012345, 12.0, 99.96)] == ["1,230", "0.000123", "12", "100"]
    shares = [speed_tables.percent(replace(speeds[0], bound=b)) for b in (0.00199, 0.001989, 0.0, None)]
    assert shares == ["100 %", "99 %", "-", "-"]


def test_a_stream() -> None:
    point = Point("stream", (("B", 2), ("T", 1), ("S", 224), ("L", 196), ("A", 1000)), "infer", "graph")
    samples = tuple(0.001 * (1 + i) for i in range(100))
    speed = Speed(OURS, point, "ok", samples, allocated=40 * MIB, reserved=99 * MIB)
    cells = rows(streaming.frames([speed]))[1]
    assert cells[:5] == ["VideoMamba-Ti, ours", "CUDA graph", "224 px", "bfloat16", "1,000"]
    assert cells[5].startswith("50.5 [") and cells[6:9] == ["99 (n = 100)", "39.6", "40"]
    assert streaming.tail(speed) == pytest.approx(0.09901)


def test_a_video_in_chunks() -> None:
    sizes = {"T": 512, "L": 100353}
    whole, cut = clip(race="chunks", **sizes), clip(way="chunked", race="chunks", F=32, **sizes)
    speeds = [at(OURS, whole, 2.0, 8.0), at(OURS, cut, 4.0, 2.0), at(UPSTREAM, cut, 4.0, 2.0)]
    _, one, part, other = rows(chunking.passes(speeds))
    what = ["4 clips of 512 frames", "100,353", "bfloat16", "inference"]
    assert one[:6] == [*what, "all at once", "VideoMamba-Ti, ours"] and one[7:] == ["1,020", "8", "-", "-"]
    assert part[4:] == ["32", part[5], "4,000 [4,000, 4,000]", "512", "2", "2", "0.25"]
    assert other[9:] == ["-", "-"], "another's whole is not its own"


def loops(**seconds: float) -> list[Speed]:
    """A place of race `loop`: eager times, and those of the whole step as one graph, which are half as long."""
    sizes = {"D": 192, "B": 4, "T": 8, "S": 224, "L": 1569}
    who = {"ours": OURS, "upstream": UPSTREAM, "vit": VIT}
    forms = [(who[name.partition("_")[0]], name.partition("_")[2], s) for name, s in seconds.items()]
    return [at(e, Point("loop", tuple(sizes.items()), "train", way), s, host=(0.001, 0.0025)) for e, way, s in forms]


def test_a_users_loop() -> None:
    speeds = loops(ours_eager=0.3, ours_graphed=0.2, ours_graph=0.1, upstream_eager=0.6, upstream_graph=0.5)
    speeds += loops(vit_eager=0.1, vit_graph=0.08)
    best = rows(loop.section(speeds))[1]
    assert best[0] == "VideoMamba-Ti, training, 4 clips of 8 frames, bfloat16"
    assert best[1:7] == ["200 (graphed)", "100", "600 (eager)", "500", "100 (eager)", "80"]
    assert best[7:] == ["3", "5", "0.6", "0.5", "0.625"], "upstream / ours, of graphs, share; ViT / ours, share"
    forms = [r for r in rows(loop.section(speeds)) if len(r) == 8 and r[1] == "VideoMamba-Ti, ours"]
    assert [r[2:8] for r in forms] == [
        ["eager", "300 [300, 300]", "3", "13.3", "1.000 / 2.500", "3"],
        ["graphed", "200 [200, 200]", "2", "20", "1.000 / 2.500", "3"],
        ["graph", "100 [100, 100]", "1", "40", "1.000 / 2.500", "3"],
    ]  # fmt: skip


def reader(name: str, T: int, gop: int, seconds: float) -> Speed:
    point = Point("data", (("B", 1), ("T", T), ("S", 224), ("G", gop), ("L", T)), "infer", "read", "float32")
    return Speed(Entry("clips", name, "ours"), point, "ok", (seconds,) * 3, allocated=600 * MIB, reserved=600 * MIB)


def test_readers_and_the_cores_that_feed_a_gpu(tmp_path: Path) -> None:
    speeds = [reader("decode_frames", 8, 12, 0.05), reader("read_clip", 8, 12, 0.1), reader("read_clip", 8, 250, 0.2)]
    _, frames, resized, _ = rows(reading.readers(speeds))
    assert frames[:2] == ["12", "8"] and frames[3:7] == ["50 [50, 50]", "20", "1", "600"]
    assert resized[3:6] == ["100 [100, 100]", "10", "2"]
    steps = [at(OURS, clip("train"), 0.1), at(OURS, clip("train"), 0.05), at(OURS, clip("train", "graph"), 0.02)]
    steps += [at(OURS, clip("infer"), 0.01), at(UPSTREAM, clip("train"), 0.01)]  # no training, not ours
    steps += [at(OURS, clip("train", T=16, L=3137), 0.01), at(OURS, clip("train"), 1e-3, wrong=9.0)]
    old = sweeps.made(tmp_path / "old", [at(OURS, clip("train"), 0.001)], started="2026-01-01")
    new = sweeps.made(tmp_path / "new", steps, started="2026-02-01")
    found = reading.trained([old, new], speeds)
    assert [(t.run, t.rate, t.speed.point.way) for t in found] == [("new", 80.0, "eager"), ("new", 200.0, "graph")]
    table = rows(reading.cores(speeds, found))
    assert table[1] == ["VideoMamba-Ti, ours", "8", "4", "eager", "80", "8", "16", "new, NVIDIA H200"]


def test_the_papers_factors() -> None:
    small = [at(OURS, clip(B=2), 0.3), at(VIT, clip(B=2), 0.1)]
    large = [at(OURS, clip(B=64), 0.2, 2.0), at(VIT, clip(B=64), 0.5, 3.0), at(NAIVE, clip(B=64), 1.0, 8.0)]
    others = [at(OURS, clip("train", B=128), 0.2), at(VIT, clip("train", B=128), 0.5), at(OURS, clip(way="graph", B=128), 1.0)]
    found = paper.pairs([*small, *large, *others, at(VIT, clip(B=128), 1.0)])
    factors = [(p.against, p.mamba.point["B"], p.throughput, p.memory) for p in found]
    assert factors == [("naive", 64, 5.0, 4.0), ("best SDPA", 64, 2.5, 1.5)]
    assert rows(paper.factors(found))[1][:6] == ["8", "64", "fused:native", "naive (reference)", "5x", "4x"]
    fast = paper.pairs([*large[:2], at(NAIVE, clip(B=64), 0.25)])
    assert [(p.against, p.throughput) for p in fast] == [("naive", 1.25), ("best SDPA", 2.5)]
    lost = paper.pairs([*large[:2], Speed(NAIVE, clip(B=64), "oom", reason="x")])
    assert rows(paper.factors(lost))[1][4:6] == ["oom", "oom"]


def test_the_overview() -> None:
    points = {mode: clip(mode, "graph") for mode in ("infer", "train")}
    kept = replace(OURS, implementation="fused:native_kept")
    speeds = [at(OURS, points["infer"], 0.010), at(OURS, points["train"], 0.040), at(kept, points["train"], 0.030)]
    speeds += [at(UPSTREAM, p, s, wrong=w) for p, s, w in ((points["infer"], 0.02, 0.0), (points["train"], 0.1, 3.0))]
    speeds += [at(VIT, points["infer"], 0.005), at(VIT, points["train"], 0.02), at(NAIVE, points["infer"], 0.004)]
    cells = rows(overview.overview([*speeds, at(OURS, clip(), 1.0)]))[-1]
    assert cells[0] == "VideoMamba-Ti, 4 clips of 8 frames" and cells[1:4] == ["10", "20 (2.00x)", "4 (0.40x)"]
    assert cells[4:] == ["40", "30 (0.75x)", "100 (2.50x)*", "20 (0.50x)"]
    longer, longest = clip("train", T=8, L=1569), clip("train", T=16, L=3137)
    eager = [at(OURS, longer, 0.1, 2.0), at(OURS, longest, 0.1, 5.0), at(VIT, longer, 0.1, 1.0), at(kept, longer, 0.1, 8.0)]
    eager += [at(UPSTREAM, longer, 0.1, 9.0)]
    eager += [at(entry, clip("train", T=1, L=197), 0.1, 0.1) for entry in (OURS, VIT, UPSTREAM, kept)]
    [said] = overview.most_memory(eager)
    assert said.startswith("- Peak memory of an eager training step, VideoMamba-Ti, 4 clips of 8 frames: ours 2 GiB; ")
    assert said.endswith("ours, states kept 8 GiB; upstream 9 GiB; ViT, PyTorch's attention 1 GiB.")


def test_where_curves_meet() -> None:
    """Straight in logarithms: from twice the time to half of it over a hundredfold length, at ten times the first."""
    assert curves.crossing([100, 10_000], [2.0, 1.0], [1.0, 2.0]) == pytest.approx(1000)
    assert curves.crossing([100, 10_000], [4.0, 1.0], [1.0, 2.0]) == pytest.approx(100 * 100 ** (2 / 3))
    assert curves.crossing([1, 2, 3], [2.0, 1.0, 0.5], [1.0, 1.0, 1.0]) == 2.0
    assert curves.crossing([1, 2, 3, 4], [2, 0.5, 2, 0.5], [1, 1, 1, 1]) == pytest.approx(3 * (4 / 3) ** 0.5), "the last"
    assert curves.crossing([1, 2], [2.0, 3.0], [1.0, 1.0]) is None and curves.crossing([], [], []) is None
    short, long = {"T": 8, "L": 100}, {"T": 64, "L": 10_000}
    lines = [at(OURS, clip(**short), 2.0), at(OURS, clip(**long), 1.0), at(VIT, clip(**short), 1.0), at(VIT, clip(**long), 2.0)]
    slow = [at(NAIVE, clip(**size), 50.0) for size in (short, long)]
    graphs = [at(VIT, clip(way="graph", **size), 0.001) for size in (short, long)]
    [family] = curves.families([*lines, *slow, *graphs])
    met = curves.meeting(family, family.of("videomamba")[0])
    assert (met.lengths, met.ratios, met.at) == ((100, 10_000), (2.0, 0.5), pytest.approx(1000))
    said = speed_tables.meetings(family)
    assert "meets the fastest ViT at **1,000 tokens** a clip and is faster from there on" in said
    assert "its time over the ViT's is 2 at the shortest and 0.5 at the longest" in said


def test_ceilings_in_their_units(tmp_path: Path) -> None:
    run = sweeps.made(tmp_path, [])
    run.about["ceilings"] = {"copies": [[2**20, 3e11], [2**28, 2.5e10]], "matmuls": {"float32": 1.5e12}, "exp": 7e9}
    assert rows(measurement.ceilings(run))[1:] == [
        ["memory, 1 MiB moved again and again", "300 GB/s"], ["memory, 256 MiB moved again and again", "25 GB/s"],
        ["matrix product in float32", "1.5 TFLOP/s"], ["exponentials, float32", "7 G/s"],
    ]  # fmt: skip


def test_a_bench_counts_what_failed(tmp_path: Path) -> None:
    statuses = ("error", "timeout", "gated", "oom", "implied")
    lost = [Speed(OURS, clip(B=n), status, reason="x") for n, status in enumerate(statuses, 1)]
    said = bench.verdict(sweeps.made(tmp_path, [at(OURS, clip(B=9), 1.0), *lost]))
    assert "3 of 6 points of ours failed." in said


def test_the_newest_accepted_numbers_are_shown(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("\n".join(accepted.MARKERS))
    times = {"old": (0.5, "2026-01-01"), "new": (0.25, "2026-02-01"), "older": (0.75, "2025-01-01")}
    runs = {Path(name): sweeps.made(tmp_path / name, [at(OURS, clip(), s)], started=when) for name, (s, when) in times.items()}
    accepted.write(tmp_path / "README.md", runs)
    text = (tmp_path / "README.md").read_text()
    assert "| 250 |" in text and "| 500 |" not in text and "| 750 |" not in text and "(new/report.md)" in text


def test_a_share_of_right_answers() -> None:
    found = Finding("held out", "wrong", 3.0, 5.0, 10.0, note="bar 50 %")
    record = Record("digits", "fused:torch", "ours", "learn", "steps1", "", "pass", 2.0, findings=(found,))
    assert "70.0 % of 10 right, bar 50 %" in learning.one_line(record)


def test_speeds_for_another_tool(tmp_path: Path) -> None:
    """Samples in seconds; what was not timed is left out."""
    point = clip()
    run = sweeps.made(tmp_path, [Speed(OURS, point, "ok", (0.5, 1.5)), Speed(VIT, point, "oom", reason="x")])
    [found] = json.loads(benchmark_json.write(run).read_text())["benchmarks"]
    assert found["stats"]["data"] == [0.5, 1.5] and found["stats"]["median"] == 1.0 and found["group"] == point.name
    assert found["params"]["B"] == 4 and found["name"] == "videomamba tiny fused:native"


def parity(folder: Path, *records: Record, status: str = "finished", **about: object) -> Run:
    run = Run.create(folder, {"kind": "parity", "plan": {"grid": "full"}, "box": sweeps.BOX, "filtered": False} | about)
    for record in records:
        run.add(record)
    run.finish(status)
    return run


def answer(status: str, check: str = "forward", case: str = "c", ratio: float = 0.5, theirs: bool = False) -> Record:
    who = ("theirs", "rival") if theirs else ("fused:native", "ours")
    found = (Finding("y", "l2", ratio * 4.0, 4.0), Finding("final_state", "max", ratio * 50.0, 100.0))
    given = () if status not in ("pass", "fail") else found
    return Record("scan", *who, check, case, "float32", status, 90.0, "" if given else "why", given, "again")


def test_a_page_of_parity(tmp_path: Path) -> None:
    records = [answer("pass"), answer("pass", case="d", ratio=0.75), answer("fail", "backward", ratio=3.0)]
    records += [answer("skip", "chunks"), answer("error", "chunks", case="e"), answer("fail", ratio=5.0, theirs=True)]
    run = parity(tmp_path, *records)
    text = page.write(run).read_text()
    assert "2 of 4 answers of our implementations failed: 1 outside the budget (at most 3 budgets, " in text
    assert "| 2 of 4 | 3 budgets | 0 of 1 | 1 |" in text
    matrix = rows(tables.matrix(records))
    assert matrix == [
        ["check", "fused:native", "theirs (rival)"], ["forward", "2 pass", "**1 FAILED** of 1"],
        ["backward", "**1 FAILED** of 1", "-"],
        ["chunks", "**1 FAILED** of 1, 1 skip", "-"],
    ]  # fmt: skip
    tight = rows(margins.tightest(records))
    assert [line[:6] for line in tight[1:4]] == [
        ["5", "y (l2)", "-", "forward", "theirs (rival)", "scan c"],
        ["3", "y (l2)", "-", "backward", "fused:native", "scan c"],
        ["2.5", "final_state (max)", "-", "forward", "theirs (rival)", "scan c"],
    ]  # fmt: skip
    assert tight[2][6:9] == ["12", "4", "-"]
    assert "So far: the run is interrupted." in page.verdict(parity(tmp_path / "a", *records, status="interrupted"))
    assert page.verdict(parity(tmp_path / "b", records[-1])) == "Nothing of ours was judged."


def test_what_a_page_owns_up_to(tmp_path: Path) -> None:
    plan = {"grid": "full", "checks": ["forward", "chunks"], "cases": ["B3*"]}
    filtered = page.write(parity(tmp_path / "a", answer("pass"), plan=plan, filtered=True)).read_text()
    assert "**A part of the questions** (grid full; checks forward, chunks; cases B3\\*). It speaks for these alone" in filtered
    whole = page.write(parity(tmp_path / "b", answer("pass"))).read_text()
    assert "A part of" not in whole and "Every implementation ran." in whole
    for status, said in (("pass", "it was not caught"), ("fail", "(it was caught)")):
        record = answer(status, ratio=3.0 if status == "fail" else 0.5)
        planted = page.write(parity(tmp_path / status, record, plan={"grid": "full", "mutant": "drop_skip"})).read_text()
        assert "A bug was planted in fused: drop_skip" in re.sub(r"\\", "", planted) and said in planted
    dirty = parity(tmp_path / "c", answer("pass"), box=sweeps.BOX | {"git": {"commit": "f00d", "dirty": True}})
    assert "| git | f00d, WITH CHANGES |" in page.box(dirty) and "| git | f00d, clean |" in page.box(parity(tmp_path / "d"))
    changed = parity(tmp_path / "e", answer("pass"))
    changed.about["sessions"][0]["changed"] = ["fingerprints of fused 1, then 2"]
    assert "| SOURCES CHANGED DURING THE RUN | fingerprints of fused 1, then 2 (session 1) |" in page.box(changed)


def test_the_wall_time_is_that_of_all_sessions(tmp_path: Path) -> None:
    run = parity(tmp_path, answer("pass"), answer("pass", case="d"))
    run.about["sessions"] = [
        {"started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T00:01:30+00:00", "status": "interrupted"},
        {"started": "2026-01-01T01:00:00+00:00", "status": "killed"},
        {"started": "2026-01-01T02:00:00+00:00", "ended": "2026-01-01T02:00:15+00:00", "status": "finished"},
    ]
    assert "105 s from start to end, and those of 1 killed, 180 s of them in questions" in page.box(run)
