"""What memory is free, and memory that a layer frees, which stays with the process."""

import platform
import subprocess
import sys

import pytest
import torch

from fused.runtime import memory

CALLS = 3
PROGRAM = f"""
import resource, torch
from fused.modules.mamba import Mamba
torch.set_num_threads(1)
mixer, tokens = Mamba(192, backend="torch"), torch.randn(1, 400, 192)
with torch.no_grad():
    for _ in range(8):  # until the heap has grown
        mixer(tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({CALLS}):
        mixer(tokens)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="page faults are counted for glibc's malloc")
def test_a_second_call_gets_its_memory_without_page_faults():
    """A call uses 3 MB outside of scratch memory, 700 pages."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(run.stdout) <= 50 * CALLS


def test_files_that_the_system_caches_count_as_free_memory(tmp_path, monkeypatch):
    """They are most of the memory of a machine that runs for long."""
    said = tmp_path / "meminfo"
    said.write_text("MemTotal:       32000000 kB\nMemFree:         1000000 kB\nMemAvailable:   30000000 kB\n")
    monkeypatch.setattr(memory, "MEMORY", said)
    assert memory.free_bytes(torch.device("cpu")) == 30_000_000 * 1024
    for text in ("MemFree: 1 kB\n", ""):  # of an old kernel, and of another system
        said.write_text(text)
        assert memory.free_bytes(torch.device("cpu")) > 0
