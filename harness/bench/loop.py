"""The timed calls of race `loop`: a user's step of training, and a user's call of a classifier, the host's time included."""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.bench.clock import Call
from harness.bench.workloads import graphed, network
from harness.instruments import cuda_graphs
from harness.records.speed import Entry, Point

BATCHES = 4  # that lie on the device and take turns
WARM = 3  # steps before the clock starts: a compiled step is recorded in its second
WINDOW = 0.1  # seconds between two synchronisations, or more
FEWEST_CALLS, MOST_CALLS = 2, 32  # in a window
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 1e-5, 0.05, 1.0

Forward = Callable[[Tensor], Tensor]


class Loop(NamedTuple):
    """A loop: its step, which is timed, and a call that returns the host's seconds of forward, or of forward and backward."""

    step: Callable[[], object]
    host: Callable[[], tuple[float, ...]]


def make(point: Point, entry: Entry, device: str) -> Call:
    """Return the call of a loop at a point. A point's way is the form in which the model runs; "graph" is the whole step as
    one CUDA graph, without the host, in which no form of the same kernels can be faster."""
    gpu = device.startswith("cuda")
    training = point.mode == "train"
    model = network(replace(point, dtype="float32") if training else point, entry, device).train(training)
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    loop = train(model, point, device) if training else infer(model, point, device, entry.role == "ours")
    step = graphed(Call(loop.step)).run if point.way == "graph" else loop.step
    taken = [_timed(step, device) for _ in range(WARM)]
    window = min(max(round(WINDOW / max(taken[-1], 1e-6)), FEWEST_CALLS), MOST_CALLS)
    host = functools.partial(host_seconds, loop, model.config.depth, device)
    peak = (torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)) if gpu else None
    return Call(step, window=window, host=host if gpu and point.way != "graph" else None, peak=peak)


def host_seconds(loop: Loop, layers: int, device: str) -> tuple[float, ...]:
    """Return a sample of the host's seconds of a layer, on an idle device."""
    _synchronize(device)
    return tuple(part / layers for part in loop.host())


def train(model: nn.Module, point: Point, device: str) -> Loop:
    """Return the loop of a training under autocast: a new batch, forward, loss, backward, clipping, AdamW."""
    batches = _batches(point, torch.float32, device)
    parameters = list(model.parameters())
    whole = point.way == "graph"
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True, capturable=whole)
    low = getattr(torch, point.dtype)
    autocast = functools.partial(torch.autocast, device.partition(":")[0], low, enabled=low != torch.float32)
    forward = formed(model, point.way)
    if point.way == "graphed":
        with autocast():
            forward = cuda_graphs.for_training(model, (next(batches)[0],))
    fixed = next(batches) if whole else None

    def loss() -> Tensor:
        clip, labels = fixed or next(batches)
        with autocast():
            return F.cross_entropy(forward(clip), labels)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()

    def host() -> tuple[float, float]:
        optimizer.zero_grad(set_to_none=True)
        begin = time.perf_counter()
        value = loss()
        middle = time.perf_counter()
        value.backward()
        return middle - begin, time.perf_counter() - begin

    return Loop(step, host)


def infer(model: nn.Module, point: Point, device: str, ours: bool) -> Loop:
    """Return the loop of a classifier with parameters in the point's dtype, a new batch in every call; ours is graphed by
    `fused.graphed`."""
    batches = _batches(point, getattr(torch, point.dtype), device)
    forward = formed(model, point.way)
    if point.way == "graphed":
        with torch.inference_mode():
            own = cuda_graphs.by_product(model) if ours else None
            forward = own or cuda_graphs.for_inference(model, (next(batches)[0],))
    fixed = next(batches) if point.way == "graph" else None

    @torch.inference_mode()
    def step() -> Tensor:
        return forward((fixed or next(batches))[0])

    def host() -> tuple[float]:
        begin = time.perf_counter()
        step()
        return (time.perf_counter() - begin,)

    return Loop(step, host)


def formed(model: nn.Module, way: str) -> Forward:
    """Return the model as it is called, compiled where the way says so."""
    torch.compiler.reset()  # what was compiled for the points before counts against the limit of recompilations
    if way == "compiled":
        return torch.compile(model, dynamic=False)
    if way == "reduce-overhead":
        return torch.compile(model, dynamic=False, mode="reduce-overhead")
    return model


def _batches(point: Point, dtype: torch.dtype, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Return clips of random pixels with labels, on the device, without end."""
    shape = point["B"], 3, point["T"], point["S"], point["S"]
    with torch.device(device):
        clips = [torch.randn(shape, dtype=dtype) for _ in range(BATCHES)]
        labels = torch.arange(point["B"]) % 10
    return cycle([(clip, labels) for clip in clips])


def _timed(step: Callable[[], object], device: str) -> float:
    """Return the seconds of a step that begins on an idle device, to its end there."""
    _synchronize(device)
    begin = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - begin


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
