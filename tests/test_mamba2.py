"""The Mamba-2 mixer of both packages: chunks, segments, directions, and what it refuses."""


import pytest
import torch
from golden import golden

import fused

SIZES = {"d_state": 5, "headdim": 4, "ngroups": 2}
LENGTH = 11
OPTIONS = [{}, {"norm_before_gate": True, "D_has_hdim": True}, {"rmsnorm": False, "d_ssm": 8, "dt_limit": (0.02, 0.4)}]


def mixer(package, **options):
    torch.manual_seed(0)
    module = package.Mamba2(8, **SIZES, **options).double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module


def tokens(batch=2, seed=1):
    return torch.randn(batch, LENGTH, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def carried(module, u, cuts, seq_idx=None):
    """Run the chunks between cuts, each from the state that the one before left."""
    state, outputs = module.init_state(len(u)), []
    for start, stop in zip(cuts, [*cuts[1:], u.shape[1]], strict=True):
        ids = None if seq_idx is None else seq_idx[:, start:stop]
        y, state = module(u[:, start:stop], seq_idx=ids, state=state, return_state=True)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def gradients(module, loss, *others):
    return torch.autograd.grad(loss, [*module.parameters(), *others])


@pytest.mark.parametrize("cuts", [[0, 1, 2, 3, 7], list(range(LENGTH)), [0, LENGTH - 1]], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chunks_equal_the_whole(package, options, cuts):
    module, u = mixer(package, **options), tokens().requires_grad_()
    whole, state = module(u, return_state=True)
    chunks, last = carried(module, u, cuts)
    torch.testing.assert_close(chunks, whole)
    for got, want in zip(last, state, strict=True):
        torch.testing.assert_close(got, want)
    losses = (y.square().sum() + s[0].sum() + s[1].square().sum() for y, s in ((whole, state), (chunks, last)))
    for got, want in zip(*(gradients(module, loss, u) for loss in losses), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["d_model", "d_state", "d_conv", "expand", "headdim", "d_ssm", "ngroups"])
@pytest.mark.parametrize("value", [0, -4, 1.5, True, "4", [4], torch.zeros(2)], ids=str)
def test_sizes_that_are_none_are_refused_with_their_name(package, name, value):
    with pytest.raises(ValueError, match=name):
        package.Mamba2(**{"d_model": 8, **SIZES, name: value})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("A_init_range", (16, 1)), ("A_init_range", (0, 1)), ("A_init_range", (-1, 1)), ("A_init_range", 3),
        ("A_init_range", (1, 2, 3)), ("A_init_range", ("1", 2)), ("A_init_range", (1, float("nan"))), ("dt_min", 0),
        ("dt_min", "x"), ("dt_max", float("inf")), ("dt_max", None), ("dt_init_floor", -1), ("dt_init_floor", True),
        ("dt_limit", (1, 0)), ("dt_limit", (0,)), ("dt_limit", 3), ("dt_limit", (0, float("nan"))),
    ],
    ids=str,
)  # fmt: skip
def test_ranges_that_are_none_are_refused_with_their_name(package, name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        package.Mamba2(**{"d_model": 8, **SIZES, name: value})


def test_flags_and_steps_that_are_none_are_refused_by_the_production_mixer(unchecked):
    for name, value in (("rmsnorm", "x"), ("bimamba", torch.zeros(2)), ("conv_init", -1), ("layer_idx", -1), ("chunk_size", 0)):
        with pytest.raises(ValueError, match=f"{name} is "):
            fused.Mamba2(8, **SIZES, **{name: value})
    with pytest.raises(ValueError, match=r"dt_min is 0.2; allowed: up to dt_max \(0.1\)"):
        fused.Mamba2(8, **SIZES, dt_min=0.2)


def test_without_tokens_the_state_stays(package):
    module, u = mixer(package), tokens()[:, :0].requires_grad_()
    state = tuple(torch.randn_like(s).requires_grad_() for s in module.init_state(2))
    out, after = module(u, state=state, return_state=True)
    grads = torch.autograd.grad([out.sum(), *(s.sum() for s in after)], [u, *state])
    assert out.shape == u.shape and all(map(torch.equal, after, state))
    assert grads[0].shape == u.shape and all(bool((g == 1).all()) for g in grads[1:])


@pytest.mark.parametrize("bimamba", [False, True], ids=["causal", "bidirectional"])
def test_segments_equal_each_alone(package, bimamba):
    module, u = mixer(package, bimamba=bimamba), tokens(1).requires_grad_()
    lengths = (1, 2, 5, 3)  # shorter and longer than the convolution is wide
    ids = torch.repeat_interleave(torch.tensor([3, 4, 9, 10]), torch.tensor(lengths))[None]
    packed = module(u, seq_idx=ids)
    alone = torch.cat([module(part) for part in u.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone)
    for got, want in zip(*(gradients(module, y.square().sum(), u) for y in (packed, alone)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("cut", [2, 3, 6, 9])
def test_a_state_continues_the_first_segment_whatever_its_number(package, cut):
    module, u = mixer(package), tokens()
    ids = torch.tensor([[5] * 10 + [7], [0, 1] + [2] * 9], dtype=torch.int32)
    whole = module(u, seq_idx=ids)
    if cut == 2:  # the second row begins a segment there, and gets no state
        _, state = carried(module, u[:, :2], [0], ids[:, :2])
        state = tuple(torch.cat((s[:1], torch.zeros_like(s[1:]))) for s in state)
        got = torch.cat((whole[:, :2], module(u[:, 2:], seq_idx=ids[:, 2:], state=state)), 1)
    else:
        got, _ = carried(module, u, [0, cut], ids)
    torch.testing.assert_close(got, whole)


def test_directions_add_up(package):
    both, one = mixer(package, bimamba=True, rmsnorm=False), mixer(package, rmsnorm=False)
    u, weights = tokens(), both.state_dict()
    names = {"dt_bias_b": "dt_bias", "A_b_log": "A_log", "D_b": "D"}
    names |= {f"conv1d_b.{leaf}": f"conv1d.{leaf}" for leaf in ("weight", "bias")}
    forward = {k: v for k, v in weights.items() if k not in names}
    one.load_state_dict(forward)
    first = one(u)
    one.load_state_dict(forward | {name: weights[k] for k, name in names.items()})
    torch.testing.assert_close(both(u), first + one(u.flip(1)).flip(1))


def test_initial_values_are_upstreams(package):
    module = package.Mamba2(64, headdim=8, conv_init=0.01, dtype=torch.bfloat16)
    assert {p.dtype for n, p in module.named_parameters() if n in ("A_log", "D")} == {torch.float32}
    assert module.dt_bias.dtype == module.norm.weight.dtype == torch.bfloat16
    assert ((module.A_log.exp() >= 1) & (module.A_log.exp() <= 16)).all() and (module.D == 1).all()
    step = torch.nn.functional.softplus(package.Mamba2(64, headdim=1).dt_bias)
    assert 0.99e-3 <= step.min() and step.max() <= 0.101 and step.log().std() > 1
    assert module.conv1d.weight.abs().max() <= 0.0101
    assert module.in_proj.out_features == 2 * 128 + 2 * 128 + 16
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"extra"'):
        module.load_state_dict(module.state_dict() | {"extra": torch.ones(1)})


def test_golden_weights_load_strictly(package):
    names = set(golden(package.Mamba2(8, **SIZES)).state_dict())
    assert names == {
        "in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight", "out_proj.weight",
    }  # fmt: skip


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_named(package):
    module, u = mixer(package), tokens()
    with pytest.raises(ValueError, match="d_ssm is 6; allowed.* multiples of headdim=4 up to expand"):
        package.Mamba2(8, d_ssm=6, headdim=4)
    with pytest.raises(ValueError, match="ngroups is 3; allowed.* divisors of the 4 heads"):
        package.Mamba2(8, headdim=4, ngroups=3)
    with pytest.raises(ValueError, match="bidirectional mixer"):
        mixer(package, bimamba=True)(u, return_state=True)
    conv_state, ssm_state = module.init_state(2)
    with pytest.raises(ValueError, match=r"ssm_state has shape \(2, 4, 4\); allowed: \(2, 4, 4, 5\)"):
        module(u, state=(conv_state, ssm_state[..., 0]))
    with pytest.raises(TypeError, match="conv_state is torch.float32; allowed: torch.float64"):
        module(u, state=(conv_state.float(), ssm_state))
