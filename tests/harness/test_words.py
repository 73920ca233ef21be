"""Points, entries and races as pages name them: every race has words, and no two points of a grid have the same ones."""

import pytest

from harness.bench import grids
from harness.judge.race import VIDEOS, Race, rows
from harness.records.speed import Entry, Point
from harness.report import words

SPLIT = {*grids.races("loops"), *grids.races("videos"), *grids.races("data")}  # whose tables have their sizes in columns


@pytest.mark.parametrize("grid", grids.GRIDS)
def test_every_point_has_words_of_its_own(grid: str) -> None:
    seen: dict[tuple[str, ...], str] = {}
    for p in grids.points(grid):
        if p.race not in SPLIT:
            said = words.point(p)
            assert said != words.letters(p), f"race {p.race} has no words"
            assert seen.setdefault((said, p.mode, p.way, p.dtype), p.name) == p.name
        assert words.race(p.race) != p.race


def test_sizes_in_words() -> None:
    clip = (("B", 1), ("T", 64), ("S", 224), ("L", 12545))
    assert words.point(Point("middle", clip, "infer")) == "VideoMamba-M, 1 clip of 64 frames"
    assert words.point(Point("middle-long-memory", clip, "infer")) == "VideoMamba-M (long memory), 1 clip of 64 frames"
    small = (("B", 8), ("T", 1), ("S", 64), ("L", 17))
    assert words.point(Point("tiny", small, "infer"), with_dtype=True) == "VideoMamba-Ti, 8 clips of 1 frame, 64 px, bfloat16"
    assert words.point(Point("middle", (("B", 8), ("L", 2048)), "train")) == "VideoMamba-M, 8 x 2,048 tokens"
    one = (("B", 1), ("L", 1), ("V", 76544), ("K", 28), ("D", 3584))
    assert words.point(Point("vamba", one, "infer")) == "Vamba, next token after 76,544 of video, 28 layers"
    assert words.point(Point("mine", (("B", 1), ("Z", 2)), "infer")) == "mine B1 Z2" and words.race("mine") == "mine"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (Entry("videomamba", "fused:native", "ours", variant="middle"), "VideoMamba-M, ours"),
        (Entry("videomamba", "fused:mamba_ssm", "rival", variant="tiny"), "VideoMamba-Ti, upstream"),
        (Entry("vit", "cudnn", "rival", variant="base"), "ViT-B, cuDNN attention"),
        (Entry("scan", "fused:native", "ours"), "ours"),
        (Entry("qwen2", "sdpa", "rival"), "Qwen2 with the video as tokens"),
        (Entry("scan", "mine", "rival"), "mine"),
    ],
)
def test_entries_in_words(entry: Entry, said: str) -> None:
    assert words.entry(entry) == said
    assert words.implementation("fused:mamba_ssm", role="rival") == "upstream (fused:mamba_ssm), rival"
    assert words.implementation("mine") == "mine"


def test_a_race_without_words_is_refused_where_it_is_made() -> None:
    with pytest.raises(TypeError, match="title"):
        Race("new", words=rows)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="race 'new' has no words; allowed: a function that says a point's sizes"):
        Race("new", title="the new one")
    assert Race("new", VIDEOS, title="the new one").words is None  # its table has the sizes in columns


def test_no_two_races_are_called_the_same() -> None:
    names = list(grids.races())
    assert len({words.race(name) for name in names}) == len(names)
