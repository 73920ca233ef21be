"""`python -m fused.compile`: what it fills is what a launch finds, without a GPU; its lines, its choices and its errors."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from fused.compile import __main__ as cli
from fused.compile import triton_kernels
from fused.compile.programs import Compiled, programs_of
from fused.models.videomamba.config import VideoMambaConfig
from fused.ops.selective_scan.kernel_source import source
from fused.runtime import cubin_cache, nvrtc
from fused.runtime.cache_folder import cache_folder

ROOT = pathlib.Path(__file__).resolve().parents[3]
compiles = pytest.mark.skipif(nvrtc.compiler_unavailable() is not None, reason=str(nvrtc.compiler_unavailable()))
has_triton = importlib.util.find_spec("triton") is not None


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """An empty cache, and what is compiled into it: macros and architectures; there is no Triton."""
    log = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "compile", lambda source, macros, arch: log.append((macros, arch)) or b"code")
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    return log


@compiles
def test_what_it_fills_is_what_a_launch_finds(compiled, capsys):
    assert cli.main(["--arch", "sm_80", "sm_90", "--dtype", "float16", "--model", "tiny", "base"]) == 0
    programs = programs_of(VideoMambaConfig.base(num_frames=64), torch.float16, 3)  # another clip, which has the same kernels
    paths = {
        cubin_cache.path_of(nvrtc.cache_key(source(p.name), p.defines, arch)) for p in programs for arch in ("sm_80", "sm_90")
    }
    assert set(cubin_cache.folder().iterdir()) == paths and len(compiled) == len(paths) == 6
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("]")[0] for line in lines[:6]] == [f"[{i}/6" for i in range(1, 7)]
    assert sum("sm_80 float16 scan forward for training (CUDA C++): compiled in" in line for line in lines) == 1
    assert lines[6].startswith("6 compiled, 0 from the cache, 0 failed, in ")
    assert lines[7:] == [
        f"kernels are in {cubin_cache.folder()}", "no Triton here: its kernels wait for first use",
    ]  # fmt: skip

    assert cli.main(["--arch", "sm_90", "--dtype", "float16", "bfloat16", "--model", "middle"]) == 0
    assert "3 compiled, 3 from the cache, 0 failed" in capsys.readouterr().out and len(compiled) == 9


@compiles
def test_the_architecture_is_that_of_the_gpu_here(compiled, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert cli.main([]) == 0
    assert {arch for _, arch in compiled} == {"sm_100"} and len(compiled) == 3


WRONG = {
    "no GPU": ([], "there is no GPU here .* give --arch, such as --arch sm_80"),
    "too old": (["--arch", "sm_75"], "--arch is 'sm_75'; allowed: sm_80, .*sm_90"),
    "no name": (["--arch", "sm_90", "hopper"], "--arch is 'hopper'; allowed: sm_80"),
    "frames": (["--arch", "sm_90", "--frames", "0"], "num_frames.*0"),
    "size": (["--arch", "sm_90", "--size", "100"], "img_size is 100.* such as 96 or 112"),
    "batch": (["--arch", "sm_90", "--batch", "0"], "--batch is 0; allowed: 1 or more"),
    "dtype": (["--dtype", "float64"], "argument --dtype: invalid choice: 'float64' .*bfloat16"),
    "model": (["--model", "huge"], "argument --model: invalid choice: 'huge' .*middle"),
}


@compiles
@pytest.mark.parametrize("arguments, message", WRONG.values(), ids=WRONG)
def test_wrong_options(arguments, message, compiled, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        code = cli.main(arguments)
    except SystemExit as stopped:  # of argparse
        code = stopped.code
    captured = capsys.readouterr()
    assert code == 2 and not compiled and not captured.out
    assert re.search(message, captured.err)


def test_without_a_compiler(monkeypatch, capsys):
    monkeypatch.setattr(nvrtc, "compiler_unavailable", lambda: "NVRTC cannot be used: pip install it")
    assert cli.main(["--arch", "sm_90"]) == 2
    assert capsys.readouterr().err == "fused.compile: NVRTC cannot be used: pip install it\n"


@compiles
def test_a_failure_names_the_kernel_and_the_rest_is_kept(compiled, monkeypatch, capsys):
    def compile(source, macros, arch):
        if "scan_backward_reduce" in source:
            raise nvrtc.KernelError("no registers left")
        return b"code"

    monkeypatch.setattr(nvrtc, "compile", compile)
    assert cli.main(["--arch", "sm_90", "--model", "tiny"]) == 1
    out = capsys.readouterr().out
    assert "sm_90 bfloat16 scan backward (CUDA C++): failed: KernelError: no registers left" in out
    assert "2 compiled, 0 from the cache, 1 failed" in out and len(list(cubin_cache.folder().iterdir())) == 2


@compiles
def test_a_folder_that_cannot_be_written(compiled, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cli.main(["--arch", "sm_90", "--model", "tiny"]) == 1
    assert f"OSError: {cubin_cache.folder()} cannot be written" in capsys.readouterr().out


@compiles
def test_triton_kernels_have_their_lines(compiled, monkeypatch, capsys):
    name = "add_norm forward_kernel (Triton)"
    kernels = [Compiled(name, False, 1.25), Compiled(name, True, 0.0)]
    asked = []
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(cli, "_in_own_process", lambda work, *arguments: asked.append((work, *arguments)) or kernels)
    monkeypatch.setattr(cli, "_triton_folder", lambda: "/somewhere")
    assert cli.main(["--arch", "sm_100", "--model", "tiny"]) == 0
    assert asked == [(triton_kernels.compile_triton_kernels, 100, torch.bfloat16, [VideoMambaConfig.tiny(num_frames=8)])]
    out = capsys.readouterr().out
    assert "/4] sm_100 bfloat16 add_norm forward_kernel (Triton): compiled in 1.2 s" in out
    assert "sm_100 bfloat16 add_norm forward_kernel (Triton): from the cache\n" in out
    assert "4 compiled, 1 from the cache, 0 failed" in out and "Triton keeps its own in /somewhere" in out


def in_a_process(script, **environment):
    """Return what a script prints, as JSON, in a process that compiles Triton kernels."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=kept, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


FILL = """
import json, sys, torch
from fused.compile.triton_kernels import compile_triton_kernels
from fused.models.videomamba.config import VideoMambaConfig
found = compile_triton_kernels({capability}, torch.bfloat16, [VideoMambaConfig.tiny(embed_dim=64, num_frames=8)])
import triton
print(json.dumps([[kernel.name for kernel in found], str(triton.knobs.cache.dir)]))
"""
USE = """
import json, torch, triton
from fused import VideoMamba, VideoMambaConfig
model, found = VideoMamba(VideoMambaConfig.tiny(embed_dim=64, num_frames=8, img_size=64), backend="native").cuda(), []
triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: found.append([src.name, cache_hit])
clip = torch.randn(4, 3, 8, 64, 64, device="cuda")
for autocast in (True, False):
    model = model if autocast else model.bfloat16()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            model(clip if autocast else clip.bfloat16())
        model(clip if autocast else clip.bfloat16()).float().sum().backward()
print(json.dumps(found))
"""
KERNELS = {
    "add_norm forward_kernel", "add_norm backward_kernel", "add_norm reduce_kernel", "causal_conv1d forward_kernel",
    "causal_conv1d backward_kernel", "causal_conv1d reduce_kernel", "mamba_inner dt_proj_softplus_kernel",
    "mamba_inner pack_weights_kernel", "mamba_inner unpack_gradients_kernel",
}  # fmt: skip


@pytest.mark.skipif(not has_triton, reason="no Triton here")
def test_triton_kernels_are_compiled_without_a_gpu():
    """All that inference and training launch, with the options of that architecture; the cache is kept between runs."""
    folder = cache_folder("compiled_ahead")
    names, used = in_a_process(FILL.format(capability=90), TRITON_CACHE_DIR=str(folder))
    assert {name.removesuffix(" (Triton)") for name in names} == KERNELS and used == str(folder)
    assert len([name for name in names if name == "add_norm forward_kernel (Triton)"]) >= 3 * 2  # dtypes and stochastic depth
    options = [json.loads(path.read_text()) for path in folder.glob("*/dt_proj_softplus_kernel.json")]
    assert options and all(found["target"]["arch"] == 90 and found["maxnreg"] == 128 for found in options)


@pytest.mark.skipif(not (has_triton and torch.cuda.is_available()), reason="needs a GPU")
def test_a_gpu_finds_its_triton_kernels(tmp_path):
    major, minor = torch.cuda.get_device_capability()
    names, _ = in_a_process(FILL.format(capability=10 * major + minor), TRITON_CACHE_DIR=str(tmp_path))
    found = in_a_process(USE, TRITON_CACHE_DIR=str(tmp_path))
    assert found and [name for name, hit in found if not hit] == [] and len(found) <= len(names)


FIRST_USE = """
import json, threading, torch, triton
from fused import VideoMamba, VideoMambaConfig
config = VideoMambaConfig.tiny(embed_dim=64, num_frames=8, img_size=64, drop_path_rate=0.1)
model, found = VideoMamba(config, backend="native").cuda(), []
triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: cache_hit or found.append(
    [src.hash(), threading.current_thread() is threading.main_thread()])
state = torch.get_rng_state()
with torch.autocast("cuda", torch.bfloat16):
    model(torch.randn(4, 3, 8, 64, 64, device="cuda")).float().sum().backward()
print(json.dumps([found, torch.equal(state, torch.get_rng_state())]))
"""


@pytest.mark.skipif(not (has_triton and torch.cuda.is_available()), reason="needs a GPU")
def test_a_gpu_compiles_in_parallel_at_first_use(tmp_path):
    """No kernel is compiled twice, most of them beside the thread that launches them, and no random numbers are drawn."""
    found, same_random_numbers = in_a_process(FIRST_USE, TRITON_CACHE_DIR=str(tmp_path))
    names = [name for name, _ in found]
    assert len(names) >= 12 and len(set(names)) == len(names) and same_random_numbers
    assert sum(in_main_thread for _, in_main_thread in found) <= len(names) / 2
