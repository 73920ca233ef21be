"""The figures of BIMBA's compressor over frames, from speeds that nobody measured."""

import sweeps

from harness.bench import grids
from harness.records.speed import Entry, Speed
from harness.report import bench, frame_curves

OURS, UPSTREAM = Entry("bimba", "fused:native", "ours"), Entry("bimba", "fused:mamba_ssm", "rival")
NAIVE = Entry("resamplers", "attention-naive", "rival")


def paper(mode: str = "infer") -> list:
    points = [p for p in grids.races()["bimba"].points("full") if (p["H"], p["D"], p.mode) == (24, 3584, mode)]
    return sorted(points, key=lambda p: p["F"])


def swept(mode: str = "infer") -> list[Speed]:
    """Ours and upstream at every number of frames; self-attention written out ends at 64."""
    points = paper(mode)
    assert [p["F"] for p in points] == [4, 16, 64, 256] and {p["F"] // p["G"] for p in points} == {4}
    found = [sweeps.speed(e, p, k * p["F"], 0.01 * k * p["F"]) for p in points for e, k in ((OURS, 1.0), (UPSTREAM, 3.0))]
    found += [sweeps.speed(NAIVE, p, 2.0 * p["F"] ** 2) for p in points[:2]]
    return [*found, Speed(NAIVE, points[2], "oom", reason="out of memory")]


def test_time_and_memory_are_drawn_over_frames_with_the_end_of_what_runs_out(tmp_path) -> None:
    time, memory = frame_curves.draw(swept(), tmp_path)
    assert time.path.name == "frames-infer-bimba-B1-H24-W24-Q144-D3584-bfloat16.svg"
    assert memory.path.stem == time.path.stem + "-memory"
    said = "BIMBA's compressor over frames, inference: ms a call; 16 tokens to one, width 3,584, bfloat16; x: out of memory at "
    assert time.caption.startswith(said + "64 frames (self-attention written out)")
    drawn = time.path.read_text()
    assert all(f">{word}<" in drawn for word in ("ours", "upstream", "4", "16", "64", "256", "frames of 24 x 24 tokens"))
    assert "peak memory of a call (GiB)" in memory.caption and memory.path.is_file()


def test_a_panel_is_of_one_mode_and_one_recipe_of_several_frames(tmp_path) -> None:
    """The released model's grid and another width are other recipes; frames of one number are a row of the other figure."""
    both = frame_curves.draw([*swept(), *swept("train")], tmp_path)
    assert [d.path.stem.split("-")[1] for d in both] == ["infer", "infer", "train", "train"]
    others = [p for p in grids.races()["bimba"].points("full") if p.mode == "infer" and p not in paper()]
    assert len(others) == 4 and frame_curves.draw([sweeps.speed(OURS, p, 1.0) for p in others], tmp_path) == []
    assert frame_curves.draw(swept()[:2], tmp_path) == []
    assert frame_curves.draw([sweeps.speed(OURS, sweeps.clip(n), 1.0) for n in (8, 16)], tmp_path) == []


def test_a_run_shows_them(tmp_path) -> None:
    text = bench.write(sweeps.made(tmp_path / "run", swept())).read_text()
    fast, held = text.index("frames-infer-bimba-B1-H24-W24-Q144-D3584-bfloat16.svg"), text.index("bfloat16-memory.svg")
    assert text.index("## How fast") < fast < text.index("## How much memory") < held
