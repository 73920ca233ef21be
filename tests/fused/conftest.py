"""Backend "native" on the CPU: its kernels in CUDA C++ are emulated."""

import emulation
import pytest
import torch


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backend "native" runs on the CPU."""
    emulation.stand_in(monkeypatch)


@pytest.fixture
def native_somewhere(request: pytest.FixtureRequest) -> None:
    """Backend "native" runs on the GPU, or on the CPU where there is none."""
    if not torch.cuda.is_available():
        pytest.importorskip("triton", reason="the convolution's kernels are Triton's")
        request.getfixturevalue("emulated")
