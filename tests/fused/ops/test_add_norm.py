"""Add and norm of the `torch` backend against the formula."""

import naive
import pytest
import torch
from rule import assert_rule, double, outcome

from fused.ops.add_norm.api import add_norm

SEEDS = range(4)


@pytest.fixture(autouse=True, params=["cpu", "torch"])
def backend(request, monkeypatch):
    """The backend that "auto" chooses on a CPU."""
    monkeypatch.setenv("VIDEOMAMBA_DISABLE_FUSED", "1" if request.param == "torch" else "")
    return request.param
LOW, FULL = torch.bfloat16, torch.float32


def draw(seed, shape, dtype, residual=None, bias=False):
    """Rows with a mean far from zero, a weight, and the cotangents of y and residual_out."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g)

    tensors = {"x": (2 + normal(*shape)).to(dtype), "weight": normal(shape[-1])}
    if residual is not None:
        tensors["residual"] = (3 * normal(*shape)).to(residual)
    if bias:
        tensors["bias"] = normal(shape[-1])
    return tensors, [normal(*shape).to(dtype), normal(*shape)]


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5), (2, 63, 24), (9,)], ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtypes", [(FULL, None), (FULL, FULL), (LOW, None), (LOW, FULL), (LOW, LOW)], ids=str)
@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
def test_follows_the_formula(shape, kind, dtypes, wide):
    dtype, residual = dtypes
    stored = residual or (torch.float32 if wide else dtype)

    def one(seed):
        tensors, cotangents = draw(seed, shape, dtype, residual, bias=kind == "layer")
        cotangents[1] = cotangents[1].to(stored)
        return (
            outcome(lambda **x: add_norm(**x, kind=kind, residual_in_fp32=wide), tensors, cotangents, None),
            outcome(lambda **x: naive.norm(**x, kind=kind), double(tensors), cotangents, torch.float64),
            outcome(lambda **x: naive.norm(**x, kind=kind), tensors, cotangents, torch.float32),
        )

    samples = [one(seed) for seed in SEEDS]
    if shape[-1] > 1 or kind == "rms":  # one channel less its mean is zero, and its gradient rounding only
        assert_rule(samples)
    assert samples[0][0]["out0"].dtype == dtype and samples[0][0]["out1"].dtype == stored


def test_y_comes_from_the_unrounded_sum():
    x, residual = torch.full((1, 4), 2.0**-9, dtype=LOW), torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=LOW)
    weight = torch.full((4,), 2.0**12)
    y, out = add_norm(x, weight, residual=residual, kind="layer")
    assert torch.equal(out, residual)
    exact = (x.double() + residual.double() - 2.0**-9) * 2.0**12
    assert (y - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("prenorm", [True, False])
def test_gradients_by_finite_differences(kind, prenorm):
    tensors, _ = draw(0, (3, 5), torch.float64, torch.float64, bias=True)
    names, values = list(tensors), [x.double().requires_grad_() for x in tensors.values()]
    op = lambda *x: add_norm(**dict(zip(names, x, strict=True)), kind=kind, prenorm=prenorm)  # noqa: E731
    assert torch.autograd.gradcheck(op, values, nondet_tol=0)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_gradient_of_one_result(kind):
    tensors, _ = draw(0, (3, 5), torch.float64, torch.float64)
    leaves = {k: v.double().requires_grad_() for k, v in tensors.items()}
    for lost in (0, 1):
        got = torch.autograd.grad(add_norm(**leaves, kind=kind)[1 - lost].sum(), leaves["x"])[0]
        want = torch.autograd.grad(naive.norm(**leaves, kind=kind)[1 - lost].sum(), leaves["x"])[0]
        assert torch.allclose(got, want)


def test_without_residual_float32_streams_are_the_input():
    x = torch.randn(2, 5, requires_grad=True)
    y, out = add_norm(x, torch.ones(5))
    assert torch.equal(out, x)
    (y.sum() + 2 * out.sum()).backward()
    assert torch.isfinite(x.grad).all()


def test_repeats_and_ignores_its_neighbours():
    tensors, cotangents = draw(0, (3, 7, 13), LOW, FULL)
    alone = {k: v if k == "weight" else v[1:2] for k, v in tensors.items()}
    first, again = (outcome(add_norm, tensors, cotangents, None) for _ in range(2))
    single = outcome(add_norm, alone, [x[1:2] for x in cotangents], None)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert all(torch.equal(first[k][1:2], single[k]) for k in first if k != "dweight")


def test_autocast_changes_nothing():
    tensors, cotangents = draw(0, (2, 7, 12), LOW, FULL)
    plain = outcome(add_norm, tensors, cotangents, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = outcome(add_norm, tensors, cotangents, None)
    assert all(torch.equal(plain[k], cast[k]) and plain[k].dtype == cast[k].dtype for k in plain)


BAD = {
    "scalar": ({"x": torch.tensor(1.0)}, ValueError, "x must have at least one dimension"),
    "list": ({"x": [1.0]}, TypeError, "x must be a tensor"),
    "weight": ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \(D=4\), got \(3,\)"),
    "bias of integers": ({"bias": torch.ones(4, dtype=torch.long)}, TypeError, "bias must be real floating point"),
    "residual": ({"residual": torch.ones(3, 4)}, ValueError, r"residual must have x's shape \(2, 4\), got \(3, 4\)"),
    "kind": ({"kind": "batch"}, ValueError, "kind must be one of 'rms', 'layer', got 'batch'"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("change, error, words", BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, words):
    with pytest.raises(error, match=words):
        add_norm(**{"x": torch.ones(2, 4), "weight": torch.ones(4), **change})
