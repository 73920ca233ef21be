"""What a process does about a model's kernels at its first use, by what an earlier process left."""

import os
from types import SimpleNamespace

import pytest
import torch

from fused import VideoMambaConfig
from fused.models.videomamba import first_use
from fused.runtime import ahead, cubin_cache, triton_code, triton_launch

CONFIG = VideoMambaConfig(embed_dim=32, depth=1, num_classes=3)


def kernel(name):
    parameters = (SimpleNamespace(num=0, do_not_specialize=False, is_constexpr=False),)
    return SimpleNamespace(name=name, cache_key=f"source of {name}", params=parameters)


FORWARD, BACKWARD = kernel("forward"), kernel("backward")


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The names of the kernels that start to be compiled; layers launch two, the second where a gradient is wanted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(triton_launch, "capability", lambda device: 90)
    names = []

    def in_background(device, compile):
        return lambda kernel, args, constants: names.append(kernel.name)

    def run(config, tokens_dtype, dtype, backend, gradients):
        for which in (FORWARD, BACKWARD)[: 1 + gradients]:
            ahead.compiler()(which, (torch.zeros(8, dtype=dtype),), {"BLOCK": config.embed_dim})

    monkeypatch.setattr(ahead, "compile_in_background", in_background)
    monkeypatch.setattr(first_use, "run_on_cpu", run)
    return names


def start(dtype=torch.float32, gradients=True, config=CONFIG):
    with torch.set_grad_enabled(gradients):
        first_use.start_compiling(config, torch.empty(1, 9, 32), dtype, "native")


def keep(which, dtype=torch.float32):
    cubin_cache.keep(triton_code.path_of(which, (torch.zeros(8, dtype=dtype),), {"BLOCK": 32}, 90), b"code")


def test_layers_are_run_only_for_kernels_that_are_not_kept(started):
    both = ["forward", "backward"]
    start()
    start()
    assert started == 2 * both  # they were started, and are not kept yet
    keep(FORWARD)
    start()
    assert started == 3 * both
    keep(BACKWARD)
    start()
    assert started == 3 * both
    start(gradients=False)
    assert started == [*3 * both, "forward"]
    start(gradients=False)
    assert started == [*3 * both, "forward"]
    start(torch.bfloat16)
    start(config=VideoMambaConfig(embed_dim=64, depth=1, num_classes=3))
    torch.set_autocast_enabled("cuda", True)  # torch.autocast does nothing without a GPU
    try:
        start()
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert started[7:] == 3 * both


def test_changed_sources_are_compiled(started, monkeypatch):
    for which in (FORWARD, BACKWARD):
        keep(which)
    start()
    start()
    assert started == ["forward", "backward"]
    monkeypatch.setattr(first_use, "sources", lambda package: ["changed"])
    start()
    assert started == 2 * ["forward", "backward"]


@pytest.mark.parametrize("change", ["edited", "touched", "renamed", "added", "removed"])
def test_sources_are_told_apart(change, tmp_path):
    (tmp_path / "ops").mkdir()
    first, second = tmp_path / "a.py", tmp_path / "ops" / "b.py"
    for path in (first, second, tmp_path / "README.md"):
        path.write_text("x = 1\n")
        os.utime(path, (0, 0))
    before = first_use.sources(tmp_path)
    assert before == first_use.sources(tmp_path) and [os.path.basename(name) for name, *_ in before] == ["b.py", "a.py"]
    (tmp_path / "README.md").unlink()
    (tmp_path / "ops" / "__pycache__").mkdir()
    assert before == first_use.sources(tmp_path)
    changes = {
        "edited": lambda: (second.write_text("x = 10\n"), os.utime(second, (0, 0))), "touched": second.touch,
        "renamed": lambda: second.rename(tmp_path / "ops" / "c.py"), "removed": first.unlink,
        "added": lambda: (tmp_path / "ops" / "c.py").touch(),
    }  # fmt: skip
    changes[change]()
    assert before != first_use.sources(tmp_path)
