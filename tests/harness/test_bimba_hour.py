"""The race of an hour of video: every entry compresses the same tokens, ours by chunks; its full size is an hour, 16 to 1."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fused import BimbaCompressor
from harness.bench import grids
from harness.bench.hour import make
from harness.bench.roofline import bound
from harness.records.ceilings import Ceilings
from harness.records.speed import Entry

RACE = grids.races()["bimba-hour"]


def compressed(name: str) -> Tensor:
    """Return the queries that an entry's call gives."""
    [point] = RACE.points("cpu")
    torch.manual_seed(0)
    found = make(point, Entry("bimba", name, "ours"), "cpu").run()
    assert isinstance(found, Tensor)
    return found


def test_chunks_give_what_all_tokens_give(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compressed("reference")  # has no chunks
    seen: list[int] = []
    in_chunks = BimbaCompressor.forward_chunked

    def counting(module: Any, chunks: Any, queries: Tensor) -> Tensor:
        held = list(chunks)
        seen.extend(chunk.shape[1] for chunk in held)
        return in_chunks(module, iter(held), queries)

    monkeypatch.setattr(BimbaCompressor, "forward_chunked", counting)
    torch.testing.assert_close(compressed("fused:torch"), whole, rtol=1e-4, atol=1e-4)
    assert seen == [64, 16] and whole.shape == (1, 20, 1, 64)


def test_the_full_size() -> None:
    [point] = RACE.points("full")
    assert point["F"] * point["H"] * point["W"] == 705_600 == 16 * point["G"] * point["Q"] and point["D"] == 3584
    ceilings = Ceilings(copy=4e12, matmul=5e14, exp=1e13, issue=1e14)
    assert point.mode == "infer" and 20 * bound(point, "bimba", "", ceilings) < RACE.slowest
    names = {e.implementation for e in grids.entries("bimba-hour", "cpu", "sdpa") if grids.runs(e, point, "full")}
    assert names <= {"fused:native", "fused:cpu", "fused:mamba_ssm"}
