"""Launches of Triton's kernels: by this project's launcher on a mock driver, and compilation ahead of them."""

import ctypes
import threading
from types import SimpleNamespace

import pytest
import torch
from mock_driver import MockDriver

from fused.runtime import ahead, cuda_module, recording, triton_code, triton_launch
from fused.runtime.recording import Recorder

DEVICE = torch.device("cuda", 3)
GPU = SimpleNamespace(type="cuda", index=-1)  # the index of CPU tensors


class Compiled:
    """A kernel k(x, n, one, BLOCK) as Triton compiles it: without n = 1 and BLOCK, with two pointers to scratch memory."""

    def __init__(self, **metadata):
        self.metadata = SimpleNamespace(name="k", num_warps=2, shared=60_000, **metadata)
        self.src = SimpleNamespace(signature={"x": "*fp32", "n": "i32", "one": "constexpr", "BLOCK": "constexpr"})
        self.asm = {"cubin": b"code"}


class Kernel:
    """A kernel of Triton's that tells what it was asked for."""

    def __init__(self, **metadata):
        self.compiled, self.asked, self.launched = Compiled(**metadata), [], []

    def warmup(self, *args, grid, **constants):
        self.asked.append((args, constants, threading.current_thread()))
        return self.compiled

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launched.append((grid, args, constants))


@pytest.fixture
def driver(monkeypatch):
    driver = MockDriver((ctypes.c_uint64, ctypes.c_int32, ctypes.c_uint64, ctypes.c_uint64))
    monkeypatch.setattr(cuda_module, "bindings", lambda name: driver)
    monkeypatch.setattr(cuda_module, "current_stream", lambda index: 77)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(triton_launch, "_capability", lambda device: 90)
    return driver


def test_a_kernel_is_launched_without_tritons_launcher(driver):
    kernel, x = Kernel(), torch.zeros(4)
    for n in (-5, 7):
        triton_launch.launch(kernel, GPU, (3, 2), x[1:], n, 1, BLOCK=16)
    numbers = [3, 2, 1, 64, 1, 1, 60_000]
    assert driver.launches == [(numbers, 77, [x.data_ptr() + 4, n, 0, 0]) for n in (-5, 7)]
    assert not kernel.launched and driver.limits == [60_000]


def test_a_record_has_what_the_driver_was_told(driver):
    kernel, x = Kernel(), torch.zeros(4)
    with Recorder([x]) as recorder:
        triton_launch.launch(kernel, GPU, (3,), x, 5, 1, BLOCK=16)
    (step,) = recorder.steps
    assert isinstance(step, recording.Launch) and step.function.parameter_sizes == [8, 4, 8, 8]
    assert step.function.arguments == (recorder.view(x), 5, None, None) and step.function.grid == (3, 1, 1)


@pytest.mark.parametrize("grid", [(0,), (3, 0), (0, 1, 2)])
def test_a_grid_without_programs_is_not_launched(driver, grid):
    """As by Triton's launcher: the driver calls it an invalid value."""
    kernel, x = Kernel(), torch.zeros(4)
    with Recorder([x]) as recorder:
        triton_launch.launch(kernel, GPU, grid, x, 5, 1, BLOCK=16)
    assert not driver.launches and not kernel.launched and not recorder.steps


@pytest.mark.parametrize("metadata", [{"num_ctas": 2}, {"launch_pdl": True}, {"global_scratch_size": 8}])
def test_what_needs_more_is_left_to_triton(driver, metadata):
    kernel, x = Kernel(**metadata), torch.zeros(4)
    with Recorder([x]) as recorder:
        triton_launch.launch(kernel, GPU, (3,), x, 5, 1, BLOCK=16)
    assert kernel.launched == [((3,), (x, 5, 1), {"BLOCK": 16})] and not driver.launches
    assert recorder.steps[0].function is None


def test_kernels_are_compiled_ahead(driver, monkeypatch):
    """Once for each kind of arguments, in other threads; a launch waits for its own kernel."""
    devices, begun, go_on = [], threading.Event(), threading.Event()
    monkeypatch.setattr(torch.cuda, "device", lambda device: devices.append(device) or triton_launch.launching_on(GPU))
    slow, fast, x = Kernel(), Kernel(), torch.zeros(4)
    warmup = slow.warmup

    def wait(*args, **options):
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go_on.wait(30)
        return warmup(*args, **options)

    slow.warmup = wait
    with ahead.compiling(90, ahead.compile_in_background(DEVICE, triton_code.of)):
        assert triton_launch.capability(torch.device("cpu")) == 90
        for kernel, n in ((slow, 5), (fast, 5), (slow, 5), (fast, 7)):
            triton_launch.launch(kernel, GPU, (1,), x, n, 1, BLOCK=16)
    assert triton_launch.capability(torch.device("cpu")) == 0
    assert begun.wait(30) and not driver.launches and not slow.launched
    triton_launch.launch(fast, GPU, (1,), x, 9, 1, BLOCK=16)
    triton_launch.launch(fast, GPU, (1,), x.double(), 9, 1, BLOCK=16)
    dtypes = [args[0].dtype for args, _, thread in fast.asked if thread is threading.main_thread()]
    assert dtypes == [torch.float32, torch.float64] and len(fast.asked) <= 3 and len(driver.launches) == 2
    threading.Timer(0.05, go_on.set).start()
    triton_launch.launch(slow, GPU, (1,), x, 5, 1, BLOCK=16)
    assert [thread is threading.main_thread() for *_, thread in slow.asked] == [False, True] and set(devices) == {DEVICE}


def test_an_error_ahead_is_raised_where_the_kernel_is_needed(driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: triton_launch.launching_on(GPU))
    kernel = Kernel()

    def fail(*args, **options):
        raise RuntimeError("no registers left")

    kernel.warmup = fail
    with ahead.compiling(90, ahead.compile_in_background(DEVICE, triton_code.of)):
        triton_launch.launch(kernel, GPU, (1,), torch.zeros(4), 5, 1, BLOCK=16)
    with pytest.raises(RuntimeError, match="no registers left"):
        triton_launch.launch(kernel, GPU, (1,), torch.zeros(4), 5, 1, BLOCK=16)


class Kept(Kernel):
    """A kernel k(x, n, one, BLOCK) whose code can be kept: its n is free of specialisation, BLOCK is compiled into it."""

    params = tuple(
        SimpleNamespace(num=i, do_not_specialize=name == "n", is_constexpr=name == "BLOCK")
        for i, name in enumerate(("x", "n", "one", "BLOCK"))
    )
    cache_key = "source"


def test_code_is_found_without_triton_in_another_process(driver, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x = torch.zeros(8)

    def asked(*args, kernel=None, **constants):
        kernel = kernel or Kept()
        monkeypatch.setattr(triton_launch, "_loaded", {})  # another process
        triton_launch.launch(kernel, GPU, (3,), *args, **(constants or {"BLOCK": 16}))
        return len(kernel.asked)

    assert asked(x, 5, 1) == 1 and asked(x, 5, 1) == 0 and asked(x, 7, 1) == 0
    assert driver.launches[-1] == ([3, 1, 1, 64, 1, 1, 60_000], 77, [x.data_ptr(), 7, 0, 0])
    thirds = (2, 16, 1.0, None, True)
    for other in ((x.double(), 5, 1), (x[1:], 5, 1), (x, 2**31, 1), *((x, 5, third) for third in thirds)):
        assert asked(*other) == 1 and asked(*other) == 0
    assert asked(x, 5, 1, BLOCK=32) == 1 and asked(x, 5, 1, num_warps=4) == 1
    for block in (48, 64, 80):  # a constant by its place: all are multiples of 16
        assert asked(x, 5, 1, block, num_warps=4) == 1 and asked(x, 5, 1, block, num_warps=4) == 0
    changed = Kept()
    changed.cache_key = "other source"
    assert asked(x, 5, 1, kernel=changed) == 1
    monkeypatch.setattr(triton_launch, "_capability", lambda device: 100)
    assert asked(x, 5, 1) == 1
    for file in tmp_path.rglob("*.cubin"):
        file.write_bytes(file.read_bytes()[:-1])
    assert asked(x, 5, 1) == 1 and asked(x, 5, 1) == 0
