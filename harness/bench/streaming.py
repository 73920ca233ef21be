"""What a worker times of a stream: the next frame, after so many others."""

import torch

import fused
from harness.bench.clock import Call
from harness.bench.interleave import MOST
from harness.bench.workloads import drawn
from harness.records.speed import Entry, Point

SPARE = 2 * MOST  # frames of the video beyond those before the clock starts


def make(point: Point, entry: Entry, device: str) -> Call:
    """`FrameStream` behind point["A"] frames of random pixels, of a causal model that reads a running mean."""

    def build(point: Point, entry: Entry) -> fused.VideoMamba:
        config = getattr(fused.VideoMambaConfig, entry.variant)(
            img_size=point["S"], num_frames=64, num_classes=10, bimamba=False, readout="mean"
        )
        return fused.VideoMamba(config, backend=entry.implementation.removeprefix("fused:"))

    model = drawn(build, point, entry, device).eval()
    frame = torch.randn(point["B"], 3, point["S"], point["S"], dtype=model.cls_token.dtype, device=device)
    gpu = device.startswith("cuda")
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    stream = fused.FrameStream(model, point["B"], total=point["A"] + SPARE, graph=point.way == "graph")
    capture, begin = (torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)) if gpu else (0, 0)
    for _ in range(point["A"]):
        stream(frame)
    # A replay allocates but its output: its peak is that of the capture, and what came to stay with the frames since.
    grown = torch.cuda.memory_allocated(device) - begin if gpu else 0
    peak = (capture + grown, torch.cuda.max_memory_reserved(device)) if gpu else None
    return Call(lambda: stream(frame), peak=peak)
