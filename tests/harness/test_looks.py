"""The looks of the races of video language models: names in words, of which no two share a colour and a marker."""

import pytest

from harness.bench import grids
from harness.report import things


@pytest.mark.parametrize("race", ["vamba", "bimba"])
def test_every_contender_has_a_look_of_its_own(race: str) -> None:
    entries = grids.entries(race, "cpu", "sdpa")
    looks = [things.of(entry) for entry in entries]
    pairs = zip(looks, entries, strict=True)
    assert all(look.label != entry.implementation or entry.implementation == "pooling" for look, entry in pairs)
    assert not any(look[1:] in things.SPARE for look in looks)
    assert len({look.colour for look in looks}) == len({look.label for look in looks}) == len(entries)
    assert not any("ViT" in look.label for look in looks)


def test_slow_points_of_a_race_are_not_timed_out() -> None:
    """A prefill of 28 stock layers takes some 10 s, more than the 2 s that a call may usually take."""
    assert grids.races()["vamba"].slowest >= 20
    points = grids.races()["vamba"].points("full")
    assert {grids.race_of(p).fewest(p) for p in points if p["V"] == 153_088} == {2}
    points = grids.races()["bimba"].points("full")
    timed = {e.implementation: sum(grids.runs(e, p, "full") for p in points) for e in grids.entries("bimba", "cpu", "sdpa")}
    assert timed["fused:torch"] == 0 and timed["pooling"] == timed["attention-sdpa"] == len(points) == 10
    assert timed["attention-naive"] == 6  # inference and training at three sizes
