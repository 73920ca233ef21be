"""Memory that a layer frees stays with the process."""

import platform
import subprocess
import sys

import pytest

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
