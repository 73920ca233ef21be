"""The timed call of race `bimba-hour`: the tokens of a long video lie on the host, and a compressor reads them from there."""

from typing import Any

import torch
from torch import Tensor

from harness.bench.clock import Call
from harness.bench.workloads import OnDevice
from harness.fixtures import functional_modules as modules
from harness.judge.registry import subjects
from harness.records.speed import Entry, Point
from harness.subjects import bimba

CHUNK = 64  # frames


def make(point: Point, entry: Entry, device: str) -> Call:
    """Return the call of an entry at a point: ours by `forward_chunked`; what carries no state has all tokens on the device."""
    case, dtype = OnDevice("bimba", point.dims, (), point.dtype, device=device), getattr(torch, point.dtype)
    implementation = next(i for i in subjects()["bimba"].implementations() if i.name == entry.implementation)
    with torch.device("meta"):
        module: Any = bimba.build(implementation.call, case)
    with torch.device(device):
        values = modules.parameters(module, case, 0)
        queries = torch.randn(*(point[letter] for letter in "BGQD"), dtype=dtype)
    module.load_state_dict({name: value.to(dtype) for name, value in values.items()}, assign=True)
    chunks = [_on_host(point, min(CHUNK, point["F"] - first), dtype, device) for first in range(0, point["F"], CHUNK)]
    abilities = implementation.abilities
    chunked = abilities is not None and abilities.initial_state

    @torch.no_grad()
    def run() -> Tensor:
        if chunked:
            return module.forward_chunked(iter(chunks), queries)
        return module(torch.cat([chunk.to(device, non_blocking=True) for chunk in chunks], dim=1), queries)

    return Call(run)


def _on_host(point: Point, frames: int, dtype: torch.dtype, device: str) -> Tensor:
    """Return random tokens of some frames, in pinned memory where a GPU reads them."""
    tokens = torch.randn(point["B"], frames, point["H"], point["W"], point["D"], dtype=dtype, device=device).cpu()
    return tokens.pin_memory() if device.startswith("cuda") else tokens
