"""CUDA C++ through NVRTC: compilation for every architecture, the cache on disk, launches on a mock driver."""

import hashlib
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import emulation
import pytest
import torch
from mock_driver import MockDriver

import fused
from fused.errors import BackendError
from fused.runtime import cubin_cache, cuda_module, nvrtc

DEVICE = (Path(nvrtc.__file__).parent / "device.cuh").read_text()
THREADS = (("THREADS", 128),)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
compiles = pytest.mark.skipif(nvrtc.compiler_unavailable() is not None, reason=str(nvrtc.compiler_unavailable()))
gpu = pytest.mark.skipif(nvrtc.unavailable("cuda") is not None, reason=str(nvrtc.unavailable("cuda")))


@compiles
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_a_gpu(arch):
    assert nvrtc.compile(DEVICE + emulation.EXAMPLE, THREADS, arch).startswith(b"\x7fELF")
    assert set(nvrtc.resources(DEVICE + emulation.EXAMPLE, THREADS, arch)) == {"row_sum"}


@compiles
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_resources(arch):
    """Registers, static shared memory, spills and stack of each kernel, where they are known or must be above 0."""
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
    """Every function of device.cuh compiles for the GPU, and the same source for the CPU."""
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
def test_compiler_errors_are_reported():
    with pytest.raises(cuda_module.KernelError, match=r'(?s)sm_90 with THREADS=128.*kernels.cu\(2\).*"nonsense" is undefined'):
        nvrtc.compile('extern "C" __global__ void k(float* x) {\nx[0] = nonsense;}', THREADS, "sm_90")
    with pytest.raises(cuda_module.KernelError, match="sm_42"):
        nvrtc.compile('extern "C" __global__ void k(float* x) {}', (), "sm_42")


def test_missing_packages_are_reported(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named 'cuda.bindings.{name}'")

    monkeypatch.setattr(cuda_module, "bindings", missing)
    nvrtc.compiler_unavailable.cache_clear()
    try:
        assert 'pip install "cuda-bindings==' in nvrtc.compiler_unavailable()
        with pytest.raises(BackendError, match="cuda.bindings.driver.*pip install"):
            nvrtc.compile("", (), "sm_90")
    finally:
        nvrtc.compiler_unavailable.cache_clear()
    assert "NVIDIA GPUs only" in nvrtc.unavailable("cpu")
    with pytest.raises(BackendError, match="NVIDIA GPUs only"):
        nvrtc.module("", (), torch.device("cpu"))


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """An empty cache folder, and the keys that were compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled = []

    def get(*key):
        return cubin_cache.cached(key, lambda: compiled.append(key) or repr(key).encode())

    return SimpleNamespace(compiled=compiled, get=get)


def test_machine_code_is_kept(disk):
    """The same source, macros, architecture and versions compile once; others compile again."""
    for _ in range(2):
        assert disk.get("source", THREADS, "sm_90") == repr(("source", THREADS, "sm_90")).encode()
    assert len(disk.compiled) == 1
    disk.get("source", THREADS, "sm_80")
    assert len(disk.compiled) == len(list(cubin_cache.folder().iterdir())) == 2


@compiles
def test_another_version_of_the_compiler_has_files_of_its_own(monkeypatch):
    key = nvrtc.cache_key("source", THREADS, "sm_90")
    monkeypatch.setattr(cuda_module.bindings("nvrtc"), "nvrtcVersion", lambda: (0, 1, 2))
    assert nvrtc.cache_key("source", THREADS, "sm_90") != key


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-3], lambda b: b[:20], lambda b: b"", lambda b: b[:-1] + b"?", lambda b: b + b"?",
               lambda b: hashlib.sha256(b"").digest()]  # fmt: skip
)
def test_damaged_files_are_compiled_again(disk, damage):
    disk.get("source")
    (file,) = cubin_cache.folder().iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert disk.get("source") == disk.get("source") == repr(("source",)).encode()
    assert len(disk.compiled) == 2


def test_folder_that_cannot_be_written(tmp_path, monkeypatch, disk, caplog):
    """Kernels are compiled all the same, with one warning."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "fused"):
        for part in ("one", "two"):
            assert disk.get(part) == repr((part,)).encode()
    assert [record.name for record in caplog.records] == ["fused"]


def test_many_processes_at_once(disk):
    """All write the same file over and over: none reads half of one, and no draft is left."""
    script = f"""
import sys, types
sys.modules["fused"] = package = types.ModuleType("fused")  # without its imports, PyTorch for one, it starts at once
package.__path__ = {list(fused.__path__)!r}
from fused.runtime import cubin_cache
code, path = bytes(range(256)) * 4000, cubin_cache.folder() / "one.cubin"
for _ in range(50):
    cubin_cache.write(path, code)
    assert cubin_cache.read(path) == code
assert cubin_cache.cached(("two",), lambda: code) == code
"""
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert sorted(file.suffix for file in cubin_cache.folder().iterdir()) == [".cubin"] * 2


class Loaded(cuda_module.Module):
    """A module that was loaded on no GPU."""

    def __init__(self, cubin, index):
        self.is_elf = cubin.startswith(b"\x7fELF")


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """A GPU sm_90 that runs nothing, an empty cache, and the architectures of all that is compiled."""
    compiled, compile = [], nvrtc.compile
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "unavailable", lambda device: None)
    monkeypatch.setattr(nvrtc, "arch_of", lambda device=None: "sm_90")
    monkeypatch.setattr(nvrtc, "Module", Loaded)
    monkeypatch.setattr(nvrtc, "_modules", {})
    monkeypatch.setattr(nvrtc, "compile", lambda *key: compiled.append(key[2]) or compile(*key))
    return SimpleNamespace(compiled=compiled, device=torch.device("cuda", 0))


@compiles
@pytest.mark.parametrize("ahead", ["thread", "cache", "not"])
def test_a_module_takes_what_was_compiled_ahead(ahead, pretended):
    key = (f"// {ahead}\n{DEVICE}{emulation.EXAMPLE}", THREADS)
    if ahead == "thread":
        nvrtc.start(*key, pretended.device)
    elif ahead == "cache":  # without a driver, so that its version cannot be in the file's name
        nvrtc.cubin(*key, "sm_90")
    for _ in range(2):
        assert nvrtc.module(*key, pretended.device).is_elf
        nvrtc.start(*key, pretended.device)
    assert pretended.compiled == ["sm_90"]
    assert list(cubin_cache.folder().iterdir()) == [cubin_cache.path_of(nvrtc.cache_key(*key, "sm_90"))]


@compiles
def test_errors_of_a_background_compilation_are_raised_at_use(pretended):
    key = ('extern "C" __global__ void k(float* x) { x[0] = nonsense; }', THREADS)
    nvrtc.start(*key, pretended.device)
    for _ in range(2):
        with pytest.raises(cuda_module.KernelError, match='"nonsense" is undefined'):
            nvrtc.module(*key, pretended.device)


@compiles
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_compiles(pretended):
    """A worker that loads data is forked while the kernels of the first step are compiled."""
    nvrtc.start(DEVICE + emulation.EXAMPLE, THREADS, pretended.device)
    child = os.fork()
    if not child:
        try:
            signal.alarm(60)
            sources = (DEVICE + emulation.EXAMPLE + end for end in ("", "// another"))
            os._exit(0 if all(nvrtc.module(source, THREADS, pretended.device).is_elf for source in sources) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_nothing_is_started_where_kernels_cannot_run(monkeypatch):
    monkeypatch.setattr(nvrtc.background, "start", lambda *arguments: pytest.fail("started"))
    nvrtc.start("source", THREADS, torch.device("cpu"))


@pytest.fixture
def mocked(monkeypatch):
    """A module on the device of CPU tensors, whose index is -1, and its driver."""
    driver = MockDriver()
    monkeypatch.setattr(cuda_module, "bindings", lambda name: driver)
    monkeypatch.setattr(cuda_module, "current_stream", lambda index: 77)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    return cuda_module.Module(b"code", -1), driver


def test_launch_passes_its_arguments(mocked):
    module, driver = mocked
    x = torch.zeros(4)
    module.launch("k", (3, 2, 1), 64, 100, x[1:], -(2**40), 0.1, None)
    shape, stream, values = driver.launches[0]
    assert shape == [3, 2, 1, 64, 1, 1, 100] and stream == 77
    assert values == [x.data_ptr() + 4, -(2**40), torch.tensor(0.1).item(), 0]
    assert driver.contexts == ["PyTorch's own"]


def test_launch_refuses_arguments_of_other_kinds(mocked):
    module, driver = mocked
    x = torch.zeros(4)
    for args in [(x, 1, 1.0), (x, 1, 1, x), (x, 1.0, 1.0, x), (x, 1, None, x)]:
        with pytest.raises(TypeError, match="argument"):
            module.launch("k", (1, 1, 1), 64, 0, *args)
    with pytest.raises(cuda_module.KernelError, match="no kernel 'j'.*CUDA_ERROR, the driver's message"):
        module.launch("j", (1, 1, 1), 64, 0, x)
    module.index = 0
    with pytest.raises(TypeError, match="argument 0 must be on cuda:0, is on cpu"):
        module.launch("k", (1, 1, 1), 64, 0, x, 1, 1.0, x)
    assert not driver.launches and driver.contexts == ["PyTorch's own"]


def test_shared_memory_limit_is_raised_once(mocked):
    module, driver = mocked
    x = torch.zeros(4)
    for shared in (49152, 100000, 60000, 100000, 120000):
        module.launch("k", (1, 1, 1), 64, shared, x, 1, 1.0, x)
    assert driver.limits == [100000, 120000]
    with pytest.raises(cuda_module.KernelError, match="k cannot have 240000 bytes of shared memory"):
        module.launch("k", (1, 1, 1), 64, 240000, x, 1, 1.0, x)


def test_launch_in_a_thread_without_a_context_and_failure(mocked):
    """A thread that has not used the device gets PyTorch's context; any other failure is reported with the launch."""
    module, driver = mocked
    x = torch.zeros(4)
    driver.results = [0, MockDriver.Error(201)]
    module.launch("k", (1, 1, 1), 64, 0, x, 1, 1.0, x)
    assert len(driver.launches) == 2 and driver.contexts == ["cuDevicePrimaryCtxRetain"]
    driver.results = [MockDriver.Error(1)]
    with pytest.raises(cuda_module.KernelError, match=r"k does not start with grid \(1, 1, 1\), 2048 threads, 0 bytes"):
        module.launch("k", (1, 1, 1), 2048, 0, x, 1, 1.0, x)


def test_another_thread_may_launch_before_the_driver_has_read_the_arguments(mocked):
    module, driver = mocked
    kinds, x = driver.kinds, torch.zeros(4)

    def launch(number):
        module.launch("k", (number, 1, 1), 64, 0, x, number, float(number), None)

    class Overtaken(tuple):
        """The kinds of the arguments, by which the driver reads them; before it does, another thread launches."""

        def __iter__(self):
            driver.kinds = kinds
            other = threading.Thread(target=launch, args=(2,))
            other.start()
            other.join()
            return iter(kinds)

    driver.kinds = Overtaken(kinds)
    launch(1)
    assert [values[1:3] for _, _, values in driver.launches] == [[2, 2.0], [1, 1.0]]


def test_threads_have_their_own_arguments(mocked):
    module, driver = mocked
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
@pytest.mark.parametrize("way", ["default stream", "stream", "graph", "graph at first use", "thread", "last device"])
def test_example_on_a_gpu(way, disk):
    """On any device, on the current stream, in a captured graph and in another thread."""
    device = torch.device("cuda", torch.cuda.device_count() - 1 if way == "last device" else 0)
    source = f"// {way}\n{DEVICE}{emulation.EXAMPLE}"  # another module for each way
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
    assert torch.cuda.current_device() == 0 and len(list(cubin_cache.folder().iterdir())) == 1
