"""The Mamba-2 mixer on native kernels, through Triton's interpreter, against the same on PyTorch operations."""

import pytest
import torch

import fused
from fused import backends

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6's interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(module, backend, u, state, **options):
    leaves = [*module.parameters(), u.requires_grad_()]
    y, after = module(u, state=state, return_state=True, backend=backend, **options)
    loss = y.square().sum() + after[1].square().sum()
    return [y, *after, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("segments", [False, True], ids=["one", "segments"])
def test_equals_the_torch_backend(segments, monkeypatch):
    monkeypatch.setattr(backends, "check_abilities", lambda *_: None)
    torch.manual_seed(0)
    module = fused.Mamba2(8, d_state=4, headdim=4, ngroups=2, device=DEVICE)
    u = torch.randn(1, 19, 8, device=DEVICE)
    ids = torch.tensor([[4] * 10 + [6] * 9], device=DEVICE) if segments else None
    state = tuple(torch.randn_like(s) for s in module.init_state(1))
    want, got = (run(module, backend, u, state, seq_idx=ids) for backend in ("torch", "native"))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-5, atol=2e-5)
