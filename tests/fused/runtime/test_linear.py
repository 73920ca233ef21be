"""Products with weights by oneDNN on a CPU."""

import pytest
import torch
import torch.nn.functional as F
from rule import assert_rule
from torch import nn

from fused.runtime import linear as module
from fused.runtime.linear import linear

needs_onednn = pytest.mark.skipif(not module.AVAILABLE, reason="this PyTorch has no oneDNN")


@pytest.fixture
def small(monkeypatch):
    """The smallest products go to oneDNN; the list of the products that went there."""
    monkeypatch.setattr(module, "SMALLEST", 0)
    calls, original = [], module.multiply
    monkeypatch.setattr(module, "multiply", lambda *arguments: calls.append(arguments) or original(*arguments))
    return calls


def outcome(call, x, layer, dy):
    leaves = [x.detach().clone().requires_grad_(), *layer.parameters()]
    y = call(leaves[0])
    grads = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{i}": g for i, g in enumerate(grads)}


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 17, 24), (5, 24)], ids=str)
def test_follows_the_layer(small, bias, shape):
    def sample(seed):
        torch.manual_seed(seed)
        layer, x, dy = nn.Linear(24, 40, bias), torch.randn(shape), torch.randn(*shape[:-1], 40)
        exact = nn.Linear(24, 40, bias).double()
        exact.load_state_dict(layer.state_dict())
        return (
            outcome(lambda t: linear(t, layer), x, layer, dy),
            outcome(exact, x.double(), exact, dy),
            outcome(layer, x, layer, dy),
        )

    assert_rule(sample(seed) for seed in range(4))
    assert len(small) == 4 * 3


@needs_onednn
def test_takes_a_view_and_leaves_out_gradients_that_nobody_wants(small):
    layer, x = nn.Linear(8, 6), torch.randn(5, 16)[:, ::2].requires_grad_(False)
    torch.testing.assert_close(linear(x, layer), layer(x))
    layer.requires_grad_(False)
    x = x.clone().requires_grad_()
    linear(x, layer).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(5, 6) @ layer.weight)
    assert layer.weight.grad is None and layer.bias.grad is None


def test_other_dtypes_autocast_and_small_products_are_pytorch_own(small, monkeypatch):
    layer, x = nn.Linear(8, 6), torch.randn(5, 8)
    for dtype in (torch.float64, torch.bfloat16):
        low = x.to(dtype)
        assert torch.equal(linear(low, layer.to(dtype)), F.linear(low, layer.weight, layer.bias))
        assert torch.equal(module.product(low, layer.weight.T), torch.mm(low, layer.weight.T))
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, layer).dtype == torch.bfloat16
    monkeypatch.setattr(module, "SMALLEST", 2**20)
    assert torch.equal(linear(x, layer), layer(x))
    assert not small
