"""The causal convolution of the `torch` backend against the loop."""

import naive
import pytest
import torch
from rule import assert_rule, double, outcome

from fused.ops.causal_conv1d.api import causal_conv1d

SEEDS = range(4)


@pytest.fixture(autouse=True, params=["cpu", "torch"])
def backend(request, monkeypatch):
    """The backend that "auto" chooses on a CPU."""
    monkeypatch.setenv("VIDEOMAMBA_DISABLE_FUSED", "1" if request.param == "torch" else "")
    return request.param
SHAPES = [(1, 1, 1, 1), (1, 1, 1, 4), (2, 2, 3, 4), (2, 7, 5, 1), (3, 17, 6, 2), (2, 63, 4, 5)]


def draw(seed, shape, state=True, bias=True, dtype=torch.float32):
    batch, length, width, taps = shape
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g).to(dtype)

    tensors = {"x": normal(batch, length, width), "weight": normal(width, taps).float()}
    if bias:
        tensors["bias"] = normal(width).float()
    if state:
        tensors["initial_state"] = normal(batch, width, taps - 1)
    return tensors, [normal(batch, length, width), normal(batch, width, taps - 1)]


def sample(tensors, cotangents, **options):
    cotangents = cotangents if cotangents[1].numel() else [cotangents[0], None]  # no state with one tap
    tensors = {k: v for k, v in tensors.items() if v.numel()}
    dtype = torch.promote_types(tensors["x"].dtype, torch.float32)
    return (
        outcome(lambda **x: causal_conv1d(**x, **options), tensors, cotangents, None),
        outcome(lambda **x: naive.conv(**x, **options), double(tensors), cotangents, torch.float64),
        outcome(lambda **x: naive.conv(**x, **options), tensors, cotangents, dtype),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-L{}-E{}-K{}".format(*s))
@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("full", [False, True], ids=["bare", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_follows_the_loop(shape, reverse, full, dtype):
    options = {"reverse": reverse, "activation": "silu" if full else None}
    assert_rule(sample(*draw(seed, shape, full, full, dtype), **options) for seed in SEEDS)


@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
def test_gradients_by_finite_differences(reverse):
    tensors, _ = draw(0, (2, 5, 3, 4))
    names, values = list(tensors), [x.double().requires_grad_() for x in tensors.values()]
    op = lambda *x: causal_conv1d(**dict(zip(names, x, strict=True)), reverse=reverse)  # noqa: E731
    assert torch.autograd.gradcheck(op, values, nondet_tol=0)


def test_state_is_the_raw_inputs_in_time_order():
    x = torch.arange(1.0, 6.0).view(1, 5, 1)
    before, weight = torch.tensor([[[7.0, 8.0, 9.0]]]), torch.ones(1, 4)
    assert causal_conv1d(x, weight)[1].flatten().tolist() == [3, 4, 5]
    assert causal_conv1d(x, weight, reverse=True)[1].flatten().tolist() == [1, 2, 3]
    assert causal_conv1d(x[:, :1], weight)[1].flatten().tolist() == [0, 0, 1]
    assert causal_conv1d(x[:, :1], weight, initial_state=before)[1].flatten().tolist() == [8, 9, 1]
    assert causal_conv1d(x[:, :1], weight, initial_state=before, reverse=True)[1].flatten().tolist() == [1, 7, 8]


@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_pieces_chained_by_state_are_the_whole(reverse, dtype):
    tensors, _ = draw(0, (2, 23, 6, 4), dtype=dtype)
    x, state, ys = tensors["x"], tensors["initial_state"], []
    spans = [(0, 1), (1, 2), (2, 9), (9, 23)]
    for start, stop in reversed(spans) if reverse else spans:
        y, state = causal_conv1d(**{**tensors, "x": x[:, start:stop], "initial_state": state}, reverse=reverse)
        ys.append(y)
    whole, final = causal_conv1d(**tensors, reverse=reverse)
    unit = torch.finfo(dtype).eps
    assert (torch.cat(ys[::-1] if reverse else ys, dim=1) - whole).abs().max() <= unit * whole.abs().max()
    assert torch.equal(state, final)


def test_repeats_and_ignores_its_neighbours():
    tensors, cotangents = draw(0, (3, 33, 5, 4))
    shared = {"weight", "bias"}
    alone = {k: v if k in shared else v[1:2] for k, v in tensors.items()}
    first, again = (outcome(causal_conv1d, tensors, cotangents, None) for _ in range(2))
    single = outcome(causal_conv1d, alone, [x[1:2] for x in cotangents], None)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert all(torch.equal(first[k][1:2], single[k]) for k in first if k[1:] not in shared)


def test_the_state_is_no_view_of_the_input():
    x = torch.randn(1, 5, 1)
    _, state = causal_conv1d(x, torch.ones(1, 4))
    before = state.clone()
    x.zero_()
    assert torch.equal(state, before)


def test_autocast_changes_nothing():
    tensors, cotangents = draw(0, (2, 9, 4, 4))
    plain = outcome(causal_conv1d, tensors, cotangents, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = outcome(causal_conv1d, tensors, cotangents, None)
    assert all(torch.equal(plain[k], cast[k]) and plain[k].dtype == cast[k].dtype for k in plain)


BAD = {
    "x without batch": ({"x": torch.ones(5, 4)}, ValueError, r"x must have shape \(B, L, E\), got \(5, 4\)"),
    "x of integers": ({"x": torch.ones(2, 5, 4, dtype=torch.int32)}, TypeError, "x must be real floating point"),
    "weight of nn.Conv1d": ({"weight": torch.ones(4, 1, 3)}, ValueError, r"weight must have shape \(E=4, K\)"),
    "no weights": ({"weight": torch.ones(4, 0)}, ValueError, "K of at least 1"),
    "bias": ({"bias": torch.ones(3)}, ValueError, r"bias must have shape \(E=4\), got \(3,\)"),
    "state too long": ({"initial_state": torch.ones(2, 4, 3)}, ValueError, r"K-1=2\), got \(2, 4, 3\)"),
    "activation": ({"activation": "relu"}, ValueError, "activation must be one of 'silu', 'swish', None, got 'relu'"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("change, error, words", BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, words):
    tensors, _ = draw(0, (2, 5, 4, 3))
    with pytest.raises(error, match=words):
        causal_conv1d(**{**tensors, **change})
