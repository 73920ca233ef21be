"""The race of retrieval: both entries give the same scores of the same pairs; its full size has a bound, and time enough."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness.bench import grids
from harness.bench.clock import Call
from harness.bench.retrieval import asked_pairs, make
from harness.bench.roofline import bound
from harness.records.ceilings import Ceilings
from harness.records.speed import Entry, Point

RACE = grids.races()["retrieval"]
OURS, WHOLE = "fused:torch", "whole-bert"


def entry(name: str) -> Entry:
    return next(e for e in grids.entries("retrieval", "cpu", "sdpa") if e.implementation == name)


def scores(point: Point, name: str) -> Tensor:
    """Return the scores that an entry's call computes."""
    torch.manual_seed(0)
    call: Call = make(point, entry(name), "cpu")
    found = call.run()
    assert isinstance(found, Tensor)
    return found


def test_both_entries_score_the_same_pairs() -> None:
    """Only pairs that are among the best of their video or text have a score; each has at least K of every row and column."""
    [point] = RACE.points("cpu")
    point = replace(point, dims=tuple(({**dict(point.dims), "K": 2}).items()))
    ours, whole = scores(point, OURS), scores(point, WHOLE)
    asked = ours != -100
    assert torch.equal(asked, whole != -100) and 16 <= int(asked.sum()) < 64
    assert int(asked.sum(0).min()) >= 2 and int(asked.sum(1).min()) >= 2
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)


def test_the_full_size_is_bound_by_the_fewest_pairs() -> None:
    """A call may take longer than the bound of all layers on a GPU that reaches a tenth of 500 TFLOP/s."""
    points = RACE.points("full")
    assert [(p["B"], p["M"], p["K"]) for p in points] == [(100, 100, 128), (1000, 1000, 128)]
    ceilings = Ceilings(copy=4e12, exp=1e13, issue=1e14, matmul=5e14)
    few, many = (bound(p, "retrieval", "", ceilings) for p in points)
    assert 1000 * 128 <= int(asked_pairs(torch.randn(1000, 1000), 128).sum()) < 2 * 1000 * 128
    assert many / few == pytest.approx(1000 * 128 / 100**2, rel=0.1) and 10 * many * 12 / 3 < RACE.slowest
    small = RACE.points("cpu")[0]
    none = bound(replace(small, dims=tuple(({**dict(small.dims), "K": 8}).items())), "retrieval", "", ceilings)
    assert bound(small, "retrieval", "", ceilings) < none
