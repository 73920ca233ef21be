"""The timed calls: operators as the judge calls them, models as a user does."""

import functools
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.bench import grids
from harness.bench.clock import Call
from harness.fixtures import functional_modules as modules
from harness.judge.case import Case
from harness.judge.protocols import TimedModel
from harness.judge.registry import subjects
from harness.records.speed import Entry, Point
from reference.ops.dtypes import accumulation_dtype

ROTATED_BYTES = 160 * 2**20  # of inputs: three times an H200's L2 cache
ROTATIONS = 16


@dataclass(frozen=True)
class OnDevice(Case):
    """A case whose numbers are drawn where they are used: a long one has gigabytes of them."""

    device: str = "cpu"

    def generator(self, seed: int, name: str) -> torch.Generator:
        """Return the random numbers of one tensor, on the device."""
        return torch.Generator(self.device).manual_seed(super().generator(seed, name).initial_seed())

    def normal(self, seed: int, name: str, *shape: int) -> Tensor:
        """Draw standard normal numbers, float32."""
        return torch.randn(shape, generator=self.generator(seed, name), device=self.device)

    def log_uniform(self, seed: int, name: str, low: float, high: float, *shape: int) -> Tensor:
        """Draw numbers between low and high, uniform in their logarithm."""
        u = torch.rand(*shape, generator=self.generator(seed, name), device=self.device)
        return torch.exp(u * math.log(high / low) + math.log(low))


def make(point: Point, entry: Entry, device: str) -> Call:
    """Return the call of an entry at a point."""
    built = model(point, entry, device) if entry.variant else operator(point, entry, device)
    return graphed(built) if point.way == "graph" else built


def operator(point: Point, entry: Entry, device: str) -> Call:
    """Return the call of an operator on inputs that are not in the cache: every call takes another set of them."""
    subject, race = subjects()[entry.subject], grids.race_of(point)
    case = OnDevice(entry.subject, point.dims, race.options, point.dtype, device=device)
    implementation = next(i for i in subject.implementations() if i.name == entry.implementation)
    low, precise = case.torch_dtype, subject.precise(case)
    wide = accumulation_dtype(low)
    sets: list[dict[str, Tensor]] = []
    while len(sets) < ROTATIONS and sum(t.nbytes for leaves in sets for t in leaves.values()) < ROTATED_BYTES:
        with torch.device(device):
            drawn = subject.draw(case, len(sets))
        drawn = {k: v.to(wide if k in precise else low) for k, v in drawn.items()}
        if entry.implementation in race.channels_first:
            drawn = {k: v.transpose(1, 2).contiguous().transpose(1, 2) if v.dim() == 3 else v for k, v in drawn.items()}
        sets.append({k: v.requires_grad_(point.mode == "train") for k, v in drawn.items()})
    cotangents: dict[str, Tensor] = {}
    calls = 0

    def run() -> object:
        nonlocal calls
        leaves, calls = sets[calls % len(sets)], calls + 1
        with torch.set_grad_enabled(point.mode == "train"):
            results = subject.evaluate(implementation.call, case, leaves)
        if point.mode == "infer":
            return results
        differentiated = {k: v for k, v in results.items() if k not in subject.no_cotangent(case)}
        for name, value in differentiated.items():
            if name not in cotangents:
                cotangents[name] = torch.randn_like(value)
        outputs, inputs = list(differentiated.values()), list(leaves.values())
        return torch.autograd.grad(outputs, inputs, list(cotangents.values()), allow_unused=True)

    return Call(run, queued=True)


def timed_model(entry: Entry) -> TimedModel:
    """Return the subject of an entry. Raises TypeError if it does not say which model is timed."""
    subject = subjects()[entry.subject]
    if not isinstance(subject, TimedModel):
        raise TypeError(f"subject {entry.subject!r} lacks network and blocks: see TimedModel in harness/judge/protocols.py")
    return subject


def network(point: Point, entry: Entry, device: str) -> Any:
    """Return the model of an entry, with parameters in the point's dtype, in a trained model's range, and drawn where they are
    used: initial values take seconds."""
    dtype = getattr(torch, point.dtype)
    with torch.device("meta"):
        built = timed_model(entry).network(point, entry)
    case = OnDevice(entry.subject, point.dims, grids.race_of(point).options, point.dtype, device=device)
    with torch.device(device):
        values = modules.parameters(built, case, seed=0)
        built.load_state_dict({name: value.to(dtype) for name, value in values.items()}, assign=True)
    return built


def model(point: Point, entry: Entry, device: str) -> Call:
    """Return the call of a classifier in the point's dtype, parameters too, on clips of random pixels, or of its blocks on
    random tokens."""
    dtype, built = getattr(torch, point.dtype), network(point, entry, device)
    with torch.device(device):
        inputs, labels = _inputs(point, built.config.embed_dim, dtype), torch.arange(point["B"]) % 10
    head = built if point.clips else timed_model(entry).blocks(built)
    forward = torch.compile(head, dynamic=False) if point.way == "compiled" else head
    if point.way == "chunked":
        forward = functools.partial(built.forward_chunked, chunk_frames=point["F"])
    if point.mode == "infer":
        built.eval()
        return Call(torch.no_grad()(lambda: forward(inputs)))

    def forget() -> None:
        built.zero_grad(set_to_none=True)

    def step() -> None:
        out = forward(inputs).float()
        (nn.functional.cross_entropy(out, labels) if point.clips else out.square().mean()).backward()

    return Call(step, forget)


def _inputs(point: Point, width: int, dtype: torch.dtype) -> Tensor:
    shape = (3, point["T"], point["S"], point["S"]) if point.clips else (point["L"], width)
    return torch.randn(point["B"], *shape, dtype=dtype)


def graphed(call: Call) -> Call:
    """Return the call as a replay of a CUDA graph; gradients are made anew inside of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    start = time.perf_counter()
    with torch.cuda.stream(stream):
        for _ in range(3):
            if call.before:
                call.before()
            call.run()
            stream.synchronize()
            if time.perf_counter() - start > 1:  # the first compiles and fills caches
                break
    torch.cuda.current_stream().wait_stream(stream)
    if call.before:
        call.before()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run()
    peak = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()  # a replay allocates nothing
    return replace(call, run=graph.replay, before=None, queued=False, peak=peak)
