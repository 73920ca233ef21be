"""CUDA C++ through NVRTC: compiled here for every architecture, kept on disk, launched on a driver that only listens."""

import ctypes
import logging
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import emulation
import pytest
import torch

import fused
from fused.errors import BackendError
from fused.runtime import cubin_cache as cubins
from fused.runtime import nvrtc

DEVICE = (Path(nvrtc.__file__).parent / "device.cuh").read_text()
THREADS = (("THREADS", 128),)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
compiles = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
gpu = pytest.mark.skipif(nvrtc.unavailable("cuda") is not None, reason=str(nvrtc.unavailable("cuda")))


@compiles
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_a_gpu(arch):
    assert nvrtc.compile(DEVICE + emulation.EXAMPLE, THREADS, arch).startswith(b"\x7fELF")
    assert set(nvrtc.resources(DEVICE + emulation.EXAMPLE, THREADS, arch)) == {"row_sum"}


@compiles
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_resources(arch):
    """Registers, static shared memory, spills and stack of each kernel, where each is known or must be there."""
    source = """extern "C" __global__ void a(float* x) {
      __shared__ float s[100];
      s[threadIdx.x] = x[0];
      __syncthreads();
      x[1] = s[5];
    }
    extern "C" __global__ void __launch_bounds__(1024, 2) b(float* x) {
      float v[64];
      for (int k = 0; k < 64; k++) v[k] = x[k];
      for (int i = 0; i < 99; i++) for (int k = 0; k < 64; k++) v[k] = v[k] * v[(k + 1) % 64] + x[0];
      for (int k = 0; k < 64; k++) x[k] = v[k];
    }"""
    found = nvrtc.resources(source, (), arch)
    assert 0 < found["a"].registers < 32 and found["a"].shared == 400 and found["a"].spills == found["a"].stack == 0
    assert found["b"].registers <= 32 and found["b"].shared == 0 and found["b"].spills > 0 and found["b"].stack > 0


@compiles
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_of_device_compiles(arch):
    """Every name of device.cuh on the GPU's side; the same source compiles for the CPU."""
    source = """extern "C" __global__ void k(float* x, unsigned short* h, unsigned* p) {
      SHARED(s)
      x[0] = ex2(x[0]) + select_less(x[1], x[2], x[3], x[4]) + rcp(x[2]) + from_bf16(h[0]) + from_fp16(h[1]);
      h[2] = to_bf16(x[3]), h[3] = to_fp16(x[4]), p[0] = pack_bf16(x[5], x[6]), p[1] = pack_fp16(x[7], x[8]);
      copy_async<16>(s, x), copy_async<8>(s + 16, x, x[0] > 0), copy_async<4>(s + 24, x);
      copy_commit(), copy_wait<1>(), copy_wait();
      int* counter = reinterpret_cast<int*>(p);
      p[1] = take_ticket(counter), p[2] = multiprocessor(), p[3] = scheduler(), announce(counter), wait_until(counter, 2);
      x[9] = *reinterpret_cast<float*>(s);
    }"""
    assert nvrtc.compile(DEVICE + source, (), arch)
    if emulation.unavailable() is None:
        emulation.module(DEVICE + source)


@compiles
def test_errors_of_the_compiler_are_told():
    with pytest.raises(nvrtc.KernelError, match=r'(?s)sm_90 with THREADS=128.*kernels.cu\(2\).*"nonsense" is undefined'):
        nvrtc.compile('extern "C" __global__ void k(float* x) {\nx[0] = nonsense;}', THREADS, "sm_90")
    with pytest.raises(nvrtc.KernelError, match="sm_42"):
        nvrtc.compile('extern "C" __global__ void k(float* x) {}', (), "sm_42")


def test_says_what_is_missing(monkeypatch):
    def gone(name):
        raise ModuleNotFoundError(f"No module named 'cuda.bindings.{name}'")

    monkeypatch.setattr(nvrtc, "_bindings", gone)
    nvrtc.missing.cache_clear()
    try:
        assert 'pip install "cuda-bindings==' in nvrtc.missing()
        with pytest.raises(BackendError, match="cuda.bindings.driver.*pip install"):
            nvrtc.compile("", (), "sm_90")
    finally:
        nvrtc.missing.cache_clear()
    assert "NVIDIA GPUs only" in nvrtc.unavailable("cpu")
    with pytest.raises(BackendError, match="NVIDIA GPUs only"):
        nvrtc.module("", (), torch.device("cpu"))


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """An empty place for compiled kernels, and how often one was made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []
    return SimpleNamespace(made=made, get=lambda *parts: cubins.kept(parts, lambda: made.append(parts) or repr(parts).encode()))


def test_machine_code_is_kept(disk):
    """Made once for the same source, macros, architecture and versions; again where any of them differs."""
    for _ in range(2):
        assert disk.get("source", THREADS, "sm_90") == repr(("source", THREADS, "sm_90")).encode()
    assert len(disk.made) == 1
    disk.get("source", THREADS, "sm_80")
    assert len(disk.made) == len(list(cubins.folder().iterdir())) == 2


@pytest.mark.parametrize(
    "harm", [lambda b: b[:-3], lambda b: b[:20], lambda b: b"", lambda b: b[:-1] + b"?", lambda b: b + b"?"]
)
def test_damaged_files_are_made_again(disk, harm):
    disk.get("source")
    (file,) = cubins.folder().iterdir()
    file.write_bytes(harm(file.read_bytes()))
    assert disk.get("source") == disk.get("source") == repr(("source",)).encode()
    assert len(disk.made) == 2


def test_folder_that_cannot_be_written(tmp_path, monkeypatch, disk, caplog):
    """Kernels are compiled all the same, and it is said once."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "fused"):
        for part in ("one", "two"):
            assert disk.get(part) == repr((part,)).encode()
    assert [record.name for record in caplog.records] == ["fused"]


def test_many_processes_at_once(disk):
    """All make the same file at the same time, over and over: none ever reads half of one, nothing is left beside it."""
    script = f"""
import sys, types
sys.modules["fused"] = package = types.ModuleType("fused")  # without its imports, PyTorch for one, it starts at once
package.__path__ = {list(fused.__path__)!r}
from fused.runtime import cubin_cache as cubins
code, path = bytes(range(256)) * 4000, cubins.folder() / "one.cubin"
for _ in range(50):
    cubins._write(path, code)
    assert cubins._read(path) == code
assert cubins.kept(("two",), lambda: code) == code
"""
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert sorted(file.suffix for file in cubins.folder().iterdir()) == [".cubin"] * 2


class Listener:
    """The driver's calls as cuda-bindings has them, for one kernel with parameters (pointer, long long, float, pointer)."""

    CUresult = SimpleNamespace(CUDA_ERROR_INVALID_CONTEXT=201)
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_NUM_REGS=4, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)

    class Error(int):
        name = "CUDA_ERROR"

    def __init__(self):
        self.launches, self.limits, self.contexts, self.answers = [], [], ["PyTorch's own"], []

    def __getattr__(self, name):  # whatever else is asked succeeds
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *args: (0, name)

    def cuCtxPushCurrent(self, context):
        self.contexts.append(context)
        return (0,)

    def cuCtxPopCurrent(self):
        return 0, self.contexts.pop()

    def cuModuleGetFunction(self, module, name):
        return (0, "function") if name == b"k" else (self.Error(500), None)

    def cuFuncGetParamInfo(self, function, index):
        return (0, 8 * index, (8, 8, 4, 8)[index]) if index < 4 else (self.Error(1), 0, 0)

    def cuFuncSetAttribute(self, function, attribute, value):
        self.limits.append(value)
        return (self.Error(1) if value > 232448 else 0,)

    def cuCtxSetCurrent(self, context):
        self.contexts[-1] = context
        return (0,)

    def cuGetErrorString(self, error):
        return 0, b"in the driver's words"

    def cuLaunchKernel(self, function, *numbers):
        *shape, stream, pointers, extra = numbers
        places = (ctypes.c_void_p * 4).from_address(pointers)
        kinds = (ctypes.c_uint64, ctypes.c_int64, ctypes.c_float, ctypes.c_uint64)
        values = [kind.from_address(place).value for kind, place in zip(kinds, places, strict=True)]
        self.launches.append((shape, stream, values))
        return (self.answers.pop() if self.answers else 0,)


@pytest.fixture
def listener(monkeypatch):
    """A module on the device of CPU tensors, whose index is -1, and the driver that it speaks to."""
    driver = Listener()
    monkeypatch.setattr(nvrtc, "_bindings", lambda name: driver)
    monkeypatch.setattr(nvrtc, "_stream", lambda index: 77)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    return nvrtc.Module(b"code", -1), driver


def test_launch_hands_over_what_it_is_given(listener):
    module, driver = listener
    x = torch.zeros(4)
    module.launch("k", (3, 2, 1), 64, 100, x[1:], -(2**40), 0.1, None)
    shape, stream, values = driver.launches[0]
    assert shape == [3, 2, 1, 64, 1, 1, 100] and stream == 77
    assert values == [x.data_ptr() + 4, -(2**40), torch.tensor(0.1).item(), 0]
    assert driver.contexts == ["PyTorch's own"]


def test_launch_refuses_what_the_kernel_does_not_take(listener):
    module, driver = listener
    x = torch.zeros(4)
    for args in [(x, 1, 1.0), (x, 1, 1, x), (x, 1.0, 1.0, x), (x, 1, None, x)]:
        with pytest.raises(TypeError, match="argument"):
            module.launch("k", (1, 1, 1), 64, 0, *args)
    with pytest.raises(nvrtc.KernelError, match="no kernel 'j'.*CUDA_ERROR, in the driver's words"):
        module.launch("j", (1, 1, 1), 64, 0, x)
    module.index = 0
    with pytest.raises(TypeError, match="argument 0 must be on cuda:0, is on cpu"):
        module.launch("k", (1, 1, 1), 64, 0, x, 1, 1.0, x)
    assert not driver.launches and driver.contexts == ["PyTorch's own"]


def test_shared_memory_is_asked_for_once(listener):
    module, driver = listener
    x = torch.zeros(4)
    for shared in (49152, 100000, 60000, 100000, 120000):
        module.launch("k", (1, 1, 1), 64, shared, x, 1, 1.0, x)
    assert driver.limits == [100000, 120000]
    with pytest.raises(nvrtc.KernelError, match="k cannot have 240000 bytes of shared memory"):
        module.launch("k", (1, 1, 1), 64, 240000, x, 1, 1.0, x)


def test_launch_in_a_thread_without_a_context_and_failure(listener):
    """A thread that has not used the device gets PyTorch's context; any other failure is told with the launch."""
    module, driver = listener
    x = torch.zeros(4)
    driver.answers = [0, Listener.Error(201)]
    module.launch("k", (1, 1, 1), 64, 0, x, 1, 1.0, x)
    assert len(driver.launches) == 2 and driver.contexts == ["cuDevicePrimaryCtxRetain"]
    driver.answers = [Listener.Error(1)]
    with pytest.raises(nvrtc.KernelError, match=r"k does not start with grid \(1, 1, 1\), 2048 threads, 0 bytes"):
        module.launch("k", (1, 1, 1), 2048, 0, x, 1, 1.0, x)


def test_threads_have_arguments_of_their_own(listener):
    module, driver = listener
    x = torch.zeros(4)

    def launch(number):
        for _ in range(200):
            module.launch("k", (number, 1, 1), 64, 0, x, number, float(number), None)

    threads = [threading.Thread(target=launch, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(driver.launches) == 800
    assert all(values == [x.data_ptr(), shape[0], float(shape[0]), 0] for shape, _, values in driver.launches)


@gpu
@pytest.mark.parametrize("way", ["plainly", "stream", "graph", "graph at first use", "thread", "last device"])
def test_example_on_a_gpu(way, disk):
    """On any device, on the current stream, in a captured graph and in another thread."""
    device = torch.device("cuda", torch.cuda.device_count() - 1 if way == "last device" else 0)
    source = f"// {way}\n{DEVICE}{emulation.EXAMPLE}"  # another module for each
    x = torch.randn(5, 1001, device=device).bfloat16()
    y = torch.full((5,), torch.nan, dtype=torch.bfloat16, device=device)

    def launch():
        nvrtc.module(source, THREADS, x.device).launch("row_sum", (5, 1, 1), 128, 16, x, y, 1001)

    if way.startswith("graph"):
        if way == "graph":
            launch()
            y.fill_(torch.nan)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        assert y.isnan().all()
        graph.replay()
    elif way == "thread":
        thread = threading.Thread(target=launch)
        thread.start()
        thread.join()
    elif way == "stream":
        launch()  # compiled before, since that takes longer than the stream sleeps
        y.fill_(torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10_000_000)
            launch()
            assert not torch.cuda.current_stream().query()
        torch.cuda.synchronize()
    else:
        launch()
    assert torch.allclose(y.double(), x.double().sum(1), rtol=2**-8, atol=0)
    assert torch.cuda.current_device() == 0 and len(list(cubins.folder().iterdir())) == 1
