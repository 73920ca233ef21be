"""A limit on registers or spills decides for the compiler that it was measured with, and is reported for others."""

import re
import warnings
from pathlib import Path

import compilers
import pytest

from fused.runtime import nvrtc

ROOT = Path(__file__).resolve().parents[2]
OVER = ["backward_kernel on sm_90: 24 bytes of stack", "scan_forward on sm_100: 16 bytes spilt"]


@pytest.mark.parametrize("compiler", compilers.MEASURED_WITH)
def test_the_measured_version_fails(compiler, monkeypatch):
    monkeypatch.setattr(compilers, "version", lambda compiler: compilers.MEASURED_WITH[compiler])
    with pytest.raises(pytest.fail.Exception, match=f"limits of {compiler}.*sm_90: 24 bytes of stack; scan_forward"):
        compilers.fail_or_warn(compiler, OVER)


@pytest.mark.parametrize("other", ["3.6.1", "3.8.0", "13.0", "13.50", "12.8"])
@pytest.mark.parametrize("compiler", compilers.MEASURED_WITH)
def test_another_version_warns(compiler, other, monkeypatch):
    monkeypatch.setattr(compilers, "version", lambda compiler: other)
    with pytest.warns(UserWarning, match=f"^{compiler} {other} goes over .*sm_90: 24 bytes of stack; scan_forward"):
        compilers.fail_or_warn(compiler, OVER)


@pytest.mark.parametrize("other", ["3.6.0", "3.8.0"])
def test_within_the_limits_nothing_is_said(other, monkeypatch):
    monkeypatch.setattr(compilers, "version", lambda compiler: other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compilers.fail_or_warn("Triton", [])


def test_versions_are_those_that_compile_here():
    assert re.fullmatch(r"3\.\d+\.\d+\S*", compilers.version("Triton"))
    if reason := nvrtc.compiler_unavailable():
        pytest.skip(reason)
    assert re.fullmatch(r"1\d\.\d+", compilers.version("NVRTC"))


def test_the_pins_install_the_measured_versions():
    """So that the limits decide in CI. NVRTC has a ceiling only, because a CUDA build of PyTorch brings an older one."""
    pins = (ROOT / "constraints-cpu.txt").read_text()
    assert f"triton=={compilers.MEASURED_WITH['Triton']} " in pins
    major, minor = compilers.MEASURED_WITH["NVRTC"].split(".")
    assert f"nvidia-cuda-nvrtc<{major}.{int(minor) + 1} " in pins and f"cuda-bindings<{major}.{int(minor) + 1}\n" in pins
