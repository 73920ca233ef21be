"""The mixer as one native operator against the same mixer in PyTorch: on a GPU, or emulated and interpreted on the CPU."""

import copy
from functools import partial

import emulation
import pytest
import torch
from rule import assert_rule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="the convolution's kernels are Triton's")

from fused import backends  # noqa: E402
from fused.kernels import cuts, nvrtc  # noqa: E402
from fused.mixer import Mamba  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6's interpreter


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Backend "native" runs on the CPU, where there is no GPU."""
    if DEVICE == "cuda":
        return
    if reason := emulation.unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(nvrtc, "module", emulation.module)
    monkeypatch.setattr(backends, "unavailable", lambda backend, device: None)


def outcome(mixer, tokens, cotangent, backend):
    leaves = [tokens.detach().clone().requires_grad_(), *mixer.parameters()]
    out = mixer(leaves[0], backend=backend)
    grads = torch.autograd.grad(out, leaves, cotangent.to(out.dtype))
    return {"out": out.detach()} | {f"d{i}": g for i, g in enumerate(grads)}


def sample(seed, clips, length, **options):
    """(native in float32, PyTorch in float64, PyTorch in float32) of one draw."""
    torch.manual_seed(seed)
    mixer = Mamba(8, **{"d_state": 4, **options}).to(DEVICE)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.05 * torch.randn_like(p))
    tokens, cotangent = (torch.randn(clips, length, 8).to(DEVICE) for _ in range(2))
    truth = outcome(copy.deepcopy(mixer).double(), tokens.double(), cotangent, "torch")
    return outcome(mixer, tokens, cotangent, "native"), truth, outcome(mixer, tokens, cotangent, "torch")


@pytest.mark.parametrize("options", [{}, {"bimamba": False}, {"bias": True, "conv_bias": False, "d_conv": 3}], ids=str)
def test_follows_the_mixer_in_pytorch(options):
    assert_rule(sample(seed, 2, 19, **options) for seed in range(4))


def test_time_is_cut(monkeypatch):
    monkeypatch.setattr(cuts, "SHORTEST", 2)  # else 16 tiles are needed, which the interpreter walks for half a minute
    monkeypatch.setattr(cuts, "plan", partial(cuts.plan.__wrapped__, pieces=2))
    assert cuts.plan(1, 65, 16, 4, 2, 1).ahead.pieces == 2
    assert_rule(sample(seed, 1, 65) for seed in range(4))


def test_a_state_goes_through_the_operators_of_the_mixer():
    torch.manual_seed(0)
    mixer, tokens = Mamba(8, d_state=4, bimamba=False).to(DEVICE), torch.randn(2, 19, 8).to(DEVICE)
    whole = mixer(tokens, backend="native")
    first, state = mixer(tokens[:, :7], return_state=True, backend="native")
    rest, _ = mixer(tokens[:, 7:], state=state, return_state=True, backend="native")
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, rtol=1e-5, atol=1e-6)
