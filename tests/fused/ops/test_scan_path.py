"""What `doctor` says of a scan's path: it is the one that the launch takes."""

import pytest
import torch

from fused import backends
from fused.ops.selective_scan import launch, schedule
from fused.ops.selective_scan.inputs import ScanInputs
from fused.ops.selective_scan.kernel_source import SOFTPLUS_BY_CALLER
from fused.ops.selective_scan.path import path_of
from harness.cli import inspect

H200 = 132  # multiprocessors
SIZES = [(1, 1569, 128), (8, 1569, 1152), (64, 197, 1152), (1, 9409, 64), (1, 8191, 128), (1, 8192, 128), (1, 9409, 72)]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_path_is_that_of_the_launch(sizes, dtype, gradients, monkeypatch):
    B, L, E = sizes
    monkeypatch.setattr(launch, "_launch_forward", lambda *arguments: None)
    stream, row, A = torch.empty(B, L, E, dtype=dtype), torch.empty(B, L, 16, dtype=dtype), torch.empty(E, 16)
    two = ([x, x] for x in (stream, stream, A, row, row))
    s = ScanInputs((False, True), *two, [None] * 2, [None] * 2, stream, SOFTPLUS_BY_CALLER)
    plan = schedule.make_schedule(B, L, E, 16, 2, H200)
    done = launch.forward(s, None, plan, keep=False, only_y=not gradients)
    said = path_of(B, L, E, dtype, H200, gradients=gradients)
    assert ("by moments, which may exit" in said) is done.by_moments
    assert (said == "not split") is (done.state_passing.num_state_passes == 0)
    if said != "not split":
        assert done.split_initial_states.shape[2] == int(said.split(" splits")[0])
        assert said.endswith("state passes by moments, which may exit" if done.by_moments else "state passes exact")


def test_paths_in_words():
    assert path_of(1, 9409, 1152, torch.bfloat16, H200) == "10 splits, state passes by moments, which may exit"
    assert path_of(1, 9409, 1152, torch.bfloat16, H200, gradients=True) == "22 splits, state passes exact"
    assert path_of(8, 1569, 1152, torch.bfloat16, H200) == "11 splits of 48 of 576 sequences, state passes exact"
    assert path_of(64, 197, 1152, torch.bfloat16, H200) == "not split"


def test_doctor_says_it_where_the_kernels_run(monkeypatch):
    assert inspect.scan_paths("cpu") == []
    monkeypatch.setattr(backends, "unavailable", lambda backend, device: None)
    monkeypatch.setattr(schedule, "multiprocessors", lambda device: H200)
    lines = inspect.scan_paths("cuda")
    assert len(lines) == 2 * len(inspect.SCANNED)
    assert "VideoMamba-M, inference, bfloat16, 1 x 9,409 tokens: 10 splits, state passes by moments, which may exit" in lines
    assert "VideoMamba-M, training, bfloat16, 1 x 9,409 tokens: 22 splits, state passes exact" in lines
