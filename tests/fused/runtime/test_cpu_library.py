"""The library of the CPU kernels: how it is found, made and kept, and what is said where it cannot be."""

import ctypes
import logging
import mmap
import os
import shutil

import pytest
import torch

from fused import VideoMamba, VideoMambaConfig, backends
from fused.errors import BackendError
from fused.runtime import cpu_library, cubin_cache

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=str(cpu_library.unavailable()))


@pytest.fixture
def made(tmp_path, monkeypatch, caplog):
    """A process that has loaded nothing, with an empty cache, and a compiler that is quick: it counts its calls."""
    compiled = cpu_library.path()
    if not compiled.exists():
        pytest.skip(f"{compiled} was not kept")
    calls = []

    def compile_quickly(out):
        calls.append(out)
        shutil.copyfile(compiled, out)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_library, "_compile", compile_quickly)
    caplog.set_level(logging.INFO, "fused")
    forget()
    yield calls
    forget()


def forget():
    for function in (cpu_library._load_once, cpu_library._function, backends._announce, cpu_library.source):
        function.cache_clear()


def works():
    """Run a kernel."""
    u, A, B = torch.ones(1, 3, 2), -torch.ones(2, 1), torch.ones(1, 3, 1)
    from fused import selective_scan

    y, _ = selective_scan(u, u, A, B, B, softplus=False, backend="cpu")
    return torch.allclose(y[0, :, 0], torch.tensor([1, 1 + 1 / torch.e, 1 + 1 / torch.e + 1 / torch.e**2]))


def test_is_compiled_once_and_kept(made, caplog):
    assert works() and len(made) == 1
    assert [r.getMessage().split(" were")[0] for r in caplog.records if r.levelno == logging.INFO] == ["kernels for the CPU"]
    forget()
    assert works() and len(made) == 1


def test_a_damaged_file_is_compiled_again(made):
    assert works()
    file = cpu_library.path()
    for damage in (lambda x: x[:-1], lambda x: x[: len(x) // 2], lambda x: b"", lambda x: x[:99] + b"?" + x[100:]):
        content = file.read_bytes()
        file.unlink()  # the process maps it
        file.write_bytes(damage(content))
        forget()
        calls = len(made)
        assert works() and len(made) == calls + 1


def test_a_folder_that_cannot_be_written_is_said(made, tmp_path, caplog):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "videomamba-bench").write_text("a file where the folder should be")
    assert works()
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "every process compiles its own" in warnings[0] and "videomamba-bench" in warnings[0]


def test_the_name_is_made_from_sources_flags_and_cpu(made, monkeypatch):
    names = {cpu_library.path().name}
    for change in ("source", "_cpu", "_c_library"):
        with monkeypatch.context() as patch:
            patch.setattr(cpu_library, change, lambda: "another")
            names.add(cpu_library.path().name)
    monkeypatch.setattr(cpu_library, "FLAGS", (*cpu_library.FLAGS, "-O1"))
    names.add(cpu_library.path().name)
    assert len(names) == 5


@pytest.mark.parametrize("reason", ["the folder", "the home"])
def test_a_file_system_without_a_place_for_code(reason, made, tmp_path, monkeypatch, caplog):
    """A folder that is mounted without execution, and a user without a home: every process compiles its own, and says so."""
    if reason == "the folder":
        load = ctypes.CDLL

        def refuse(name, *args, **kwargs):
            if str(tmp_path) in str(name):
                raise OSError(f"{name}: failed to map segment from shared object")
            return load(name, *args, **kwargs)

        monkeypatch.setattr(ctypes, "CDLL", refuse)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for calls in (1, 2):
        cubin_cache.warn_once.cache_clear()
        assert works() and len(made) == calls
        forget()
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2 and "every process compiles its own" in warnings[0]


@pytest.mark.parametrize("wrapper", ["env", "env LC_ALL=C"])
def test_the_compiler_that_the_environment_names(wrapper, monkeypatch, tmp_path):
    """CXX may hold a wrapper such as ccache, and options; a name that is no program is said."""
    [program] = cpu_library.compiler()
    monkeypatch.setenv("CXX", f"{wrapper} {program} -DANSWER=7")
    monkeypatch.setattr(cpu_library, "source", lambda: 'extern "C" int answer() { return ANSWER; }')
    cpu_library._compile(tmp_path / "answer.so")
    assert ctypes.CDLL(str(tmp_path / "answer.so")).answer() == 7
    monkeypatch.setenv("CXX", "nonesuch -O2")
    with pytest.raises(cpu_library.CompilerError, match="no C.. compiler named nonesuch -O2, as CXX in the environment says"):
        cpu_library._compile(tmp_path / "other.so")


def test_a_mapped_file_whose_name_is_no_utf8(tmp_path):
    name = bytes(tmp_path) + b"/lib\xff"
    with open(name, "wb") as file:
        file.write(bytes(4096))
    with open(name, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        assert cpu_library._parallel_region() is not None


def model_and_clip():
    config = VideoMambaConfig(embed_dim=16, depth=1, img_size=32, num_frames=2, num_classes=3)
    return VideoMamba(config).eval(), torch.zeros(1, 3, 2, 32, 32)


def test_without_a_compiler_models_run_in_pytorch_operations(made, monkeypatch, caplog):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(backends.SWITCH, raising=False)
    forget()
    model, clip = model_and_clip()
    assert torch.equal(model(clip), model(clip)) and model.backend == "torch"
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    reason = "there is no C++ compiler: install a C++ compiler such as g++, or use backend='torch'."
    assert said == [f"backend 'auto' chose 'torch': {reason}"]
    with pytest.raises(BackendError, match="there is no C.. compiler: install"):
        works()


def test_what_the_compiler_says_is_said(made, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")
    monkeypatch.setattr(cpu_library, "source", lambda: "this is no C++;")
    forget_source = cpu_library._load_once
    forget_source.cache_clear()
    cpu_library._function.cache_clear()
    try:
        assert "cannot compile the kernels for the CPU (" in cpu_library.unavailable()
    finally:
        monkeypatch.undo()
        forget()


def test_a_kept_library_needs_no_compiler(made, monkeypatch):
    assert works()
    forget()
    monkeypatch.setenv("PATH", "/nonexistent")
    assert works() and len(made) == 1
