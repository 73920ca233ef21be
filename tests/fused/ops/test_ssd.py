"""The SSD scan of the `torch` backend against the loop, and what the operator refuses."""

import math

import naive
import pytest
import torch
from rule import assert_rule, double, outcome

import fused
from fused.ops.ssd import eager

SEEDS = range(4)
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 7, 6, 3, 3, 5), (2, 65, 4, 8, 2, 16)]  # B L H P G N
IDS = "B{}-L{}-H{}-P{}-G{}-N{}".format


def draw(seed, shape, full=True, dtype=torch.float32, D_per_channel=False):
    batch, length, heads, channels, groups, states = shape
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g).to(dtype)

    tensors = {
        "x": normal(batch, length, heads, channels), "dt": 0.5 * normal(batch, length, heads),
        "A": -torch.arange(1.0, heads + 1), "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
    }  # fmt: skip
    if full:
        tensors |= {
            "D": normal(heads, channels).float() if D_per_channel else normal(heads).float(),
            "z": normal(batch, length, heads, channels), "dt_bias": normal(heads).float() - 1,
            "initial_state": normal(batch, heads, channels, states).float(),
        }  # fmt: skip
    return tensors, [normal(batch, length, heads, channels), normal(batch, heads, channels, states).float()]


def segments(shape):
    """Return ascending numbers that do not begin with 0, another division in every row."""
    batch, length = shape[:2]
    return torch.stack([(torch.arange(length) * (2 + b) // max(length, 5)) + 3 + b for b in range(batch)])


def sample(tensors, cotangents, **options):
    dtype = torch.promote_types(tensors["x"].dtype, torch.float32)
    return (
        outcome(lambda **x: fused.ssd(**x, **options), tensors, cotangents, None),
        outcome(lambda **x: naive.ssd(**x, **options), double(tensors), cotangents, torch.float64),
        outcome(lambda **x: naive.ssd(**x, **options), tensors, cotangents, dtype),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: IDS(*s))
@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("kind", ["bare", "everything", "segments"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_follows_the_loop(shape, reverse, kind, dtype):
    options = {"reverse": reverse, "softplus": kind != "bare"}
    options |= {"seq_idx": segments(shape), "dt_limit": (0.05, 0.8)} if kind == "segments" else {}
    assert_rule(sample(*draw(s, shape, kind != "bare", dtype, kind == "segments"), **options) for s in SEEDS)


def test_a_batch_invariant_clip_is_independent_of_its_batch():
    """Of these sizes products of matrices have other bits in a batch."""
    tensors, cotangents = draw(0, (5, 33, 3, 5, 1, 7))
    shared = ("A", "D", "dt_bias")
    run = lambda tensors, seeds: outcome(lambda **x: fused.ssd(**x, backend="torch"), tensors, seeds, None)  # noqa: E731
    with fused.backends.batch_invariant():
        whole = run(tensors, cotangents)
        for i in range(5):
            clip = slice(i, i + 1)
            alone = run({k: x if k in shared else x[clip] for k, x in tensors.items()}, [x[clip] for x in cotangents])
            assert all(torch.equal(whole[k][clip], x) for k, x in alone.items() if k[1:] not in shared)


@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
def test_gradients_by_finite_differences(reverse, monkeypatch):
    monkeypatch.setattr(eager, "CHUNK", 4)
    shape = (2, 6, 2, 3, 1, 2)
    tensors, _ = draw(0, shape)
    names, values = list(tensors), [x.double().requires_grad_() for x in tensors.values()]
    op = lambda *x: fused.ssd(**dict(zip(names, x, strict=True)), reverse=reverse, seq_idx=segments(shape))  # noqa: E731
    assert torch.autograd.gradcheck(op, values)


def test_a_decay_that_underflows_a_chunk():
    tensors, _ = draw(0, (1, 70, 2, 3, 1, 4), full=False)
    tensors |= {"dt": tensors["dt"].abs() * 1e4, "A": torch.tensor([-100.0, -1e-9])}
    got, want = fused.ssd(**tensors, softplus=False), naive.ssd(**double(tensors), softplus=False)
    for g, w in zip(got, want, strict=True):
        assert (g - w).abs().max() <= 1e-6 * w.abs().max()


def test_the_steps_are_clamped_after_their_softplus():
    x = torch.ones(1, 1, 1, 1)
    options = {"A": -torch.ones(1), "B": x, "C": x}
    y = [fused.ssd(x, torch.tensor([[[dt]]]), dt_limit=(0.1, 0.5), **options)[0].item() for dt in (-9.0, -1.0, 9.0)]
    assert y == pytest.approx([0.1, math.log1p(math.exp(-1)), 0.5])
    assert fused.ssd(x, x[..., 0], dt_limit=[0.1, 0.5], **options)[0].item() == 0.5  # a list, as JSON gives it


BAD = {
    "x": (torch.ones(2, 3, 4), ValueError, r"ssd: x must have shape \(B, L, H, P\), got \(2, 3, 4\)"),
    "dt": (torch.ones(1, 3, 3), ValueError, r"ssd: dt must have shape \(B=1, L=3, H=2\), got \(1, 3, 3\)"),
    "A": (torch.ones(2, dtype=torch.int32), TypeError, "ssd: A must be real floating point .*, got torch.int32"),
    "B": (torch.ones(1, 3, 3, 4), ValueError, "groups of B and C must divide H=2, got G=3"),
    "C": (None, TypeError, r"ssd: C must be a tensor of shape \(B=1, L=3, G=1, N=4\), got NoneType"),
    "D": (torch.ones(3), ValueError, r"ssd: D must have shape \(H=2\) or \(H=2, P=5\), got \(3,\)"),
    "dt_limit": ((0.5, 0.1), ValueError, r"dt_limit must be \(low, high\) with low <= high, got \(0.5, 0.1\)"),
    "dt_limit ": (0.5, TypeError, r"dt_limit must be a pair of numbers \(low, high\), got 0.5"),
    "seq_idx": (torch.tensor([[0, 2, 1]]), ValueError, "must ascend in every row, got 2 and then 1 at token 2 of row 0"),
    "seq_idx ": (torch.tensor([[0, 1]]), ValueError, r"seq_idx must have shape \(B=1, L=3\), got \(1, 2\)"),
    "seq_idx  ": (torch.ones(1, 3), TypeError, "seq_idx must be int32 or int64, got torch.float32"),
    "seq_idx   ": ([0, 0, 1], TypeError, r"seq_idx must be an int32 or int64 tensor \(B=1, L=3\), got list"),
    "initial_state": (torch.ones(1, 2, 5, 3), ValueError, "initial_state must have shape .*N=4"),
    "backend": ("fast", ValueError, "backend must be one of"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(name):
    tensors, _ = draw(0, (1, 3, 2, 5, 1, 4))
    value, error, message = BAD[name]
    with pytest.raises(error, match=message):
        fused.ssd(**tensors | {name.strip(): value})


@pytest.mark.usefixtures("unchecked")
def test_no_token_is_refused():
    tensors, _ = draw(0, (1, 0, 2, 5, 1, 4), full=False)
    with pytest.raises(ValueError, match=r"at least one token \(L\), got x \(1, 0, 2, 5\)"):
        fused.ssd(**tensors)


def test_nan_in_gives_nan_out_of_later_tokens():
    tensors, _ = draw(0, (1, 9, 2, 5, 1, 4))
    tensors["x"][0, 4, 1, 2] = math.nan
    y, state = fused.ssd(**tensors)
    assert y[0, 4:, 1, 2].isnan().all() and state[0, 1, 2].isnan().all() and not y[0, :, 0].isnan().any()
