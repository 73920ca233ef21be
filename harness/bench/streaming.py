"""The timed call of a stream: the next frame, after others."""

import torch

import fused
from harness.bench.clock import Call
from harness.bench.interleave import MOST
from harness.bench.workloads import network
from harness.records.speed import Entry, Point

SPARE = 2 * MOST  # frames of the video beyond those before the clock starts


def make(point: Point, entry: Entry, device: str) -> Call:
    """Return the call of a `FrameStream` after point["A"] frames of random pixels."""
    model = network(point, entry, device).eval()
    frame = torch.randn(point["B"], 3, point["S"], point["S"], dtype=model.cls_token.dtype, device=device)
    gpu = device.startswith("cuda")
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    stream = fused.FrameStream(model, point["B"], total=point["A"] + SPARE, graph=point.way == "graph")
    capture, start = (torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)) if gpu else (0, 0)
    for _ in range(point["A"]):
        stream(frame)
    # A replay allocates only its output: its peak is that of the capture, and what the frames since have kept.
    grown = torch.cuda.memory_allocated(device) - start if gpu else 0
    peak = (capture + grown, torch.cuda.max_memory_reserved(device)) if gpu else None
    return Call(lambda: stream(frame), peak=peak)
