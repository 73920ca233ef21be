"""The kernels for CPUs at the edges of blocks of channels, parts, chunks and tiles, and what does not change their bits."""

import copy
import itertools
from functools import partial

import naive
import pytest
import torch
from rule import assert_rule, double, outcome
from scans import draw, draw_pair, loops, sample, split

from fused import Mamba, bidirectional_scan, selective_scan
from fused.ops.add_norm.api import add_norm
from fused.ops.causal_conv1d.api import causal_conv1d
from fused.ops.mamba_inner import cpu as mixer_kernels
from fused.runtime import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=str(cpu_library.unavailable()))
SEEDS = range(2)
# blocks have 16 channels in float32, parts 6 blocks, chunks 32 tokens; states go through in fours, twos and ones
SHAPES = [
    (1, 31, 15, 8, None), (1, 32, 16, 16, None), (2, 33, 17, 15, None), (1, 64, 64, 3, None), (1, 65, 65, 4, None),
    (2, 5, 130, 11, None), (1, 97, 70, 5, 2), (2, 40, 34, 2, 17), (1, 33, 144, 40, 2),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-L{}-E{}-N{}-G{}".format(*s))
@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
def test_the_scan_follows_the_loop(shape, reverse):
    assert_rule(sample(*draw(seed, shape), reverse=reverse, backend="cpu") for seed in SEEDS)


def both(**tensors):
    first, second, z = split(tensors)
    return (bidirectional_scan(**{k: (first[k], second[k]) for k in first}, z=z, backend="cpu"),)


def sample_pair(seed, shape):
    tensors, cotangents = draw_pair(seed, shape)
    return (
        outcome(both, tensors, cotangents, None),
        outcome(loops, double(tensors), cotangents, torch.float64),
        outcome(loops, tensors, cotangents, torch.float32),
    )


@pytest.mark.parametrize("shape", SHAPES[2:7], ids=lambda s: "B{}-L{}-E{}-N{}-G{}".format(*s))
def test_both_directions_follow_two_loops(shape):
    assert_rule(sample_pair(seed, shape) for seed in SEEDS)


def rule_of(op, plain, tensors, cotangents):
    return (
        outcome(op, tensors, cotangents, None),
        outcome(plain, double(tensors), cotangents, torch.float64),
        outcome(plain, tensors, cotangents, torch.float32),
    )


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("width", [1, 2, 4, 5])
def test_the_convolution_follows_the_loop(length, width):
    E, sizes = 37, {"x": (2, length, 37), "weight": (37, width), "bias": (37,), "initial_state": (2, 37, width - 1)}
    g = torch.Generator().manual_seed(length)
    for reverse, activation in itertools.product((False, True), ("silu", None)):
        tensors = {k: torch.randn(size, generator=g) for k, size in sizes.items() if 0 not in size}
        cotangents = [torch.randn(2, length, E, generator=g), torch.randn(2, E, width - 1, generator=g) if width > 1 else None]
        options = {"reverse": reverse, "activation": activation}
        run, plain = partial(causal_conv1d, **options, backend="cpu"), partial(naive.conv, **options)
        assert_rule([rule_of(run, plain, tensors, cotangents)])


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("width", [5, 15, 16, 50])
def test_the_norm_follows_the_formula(rows, kind, width):
    g = torch.Generator().manual_seed(rows)
    sizes = {"x": (rows, width), "residual": (rows, width), "weight": (width,), "bias": (width,)}
    tensors = {name: torch.randn(size, generator=g) for name, size in sizes.items()}
    cotangents = [torch.randn(rows, width, generator=g) for _ in range(2)]
    run, plain = partial(add_norm, kind=kind, backend="cpu"), partial(naive.norm, kind=kind)
    assert_rule([rule_of(run, plain, tensors, cotangents)])


def mixer_outcome(mixer, tokens, backend, dtype):
    mixer, tokens = copy.deepcopy(mixer).to(dtype), tokens.to(dtype).requires_grad_()
    out = mixer(tokens, backend=backend)
    grads = torch.autograd.grad(out, [tokens, *mixer.parameters()], torch.ones_like(out) / 3)
    names = ["tokens", *(name for name, _ in mixer.named_parameters())]
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


MIXERS = {
    "plain": {}, "causal": {"bimamba": False}, "biases": {"bias": True}, "without conv bias": {"conv_bias": False},
    "other sizes": {"d_state": 5, "d_conv": 3, "expand": 1, "dt_rank": 7},
}  # fmt: skip


@pytest.mark.parametrize("options", MIXERS.values(), ids=MIXERS)
@pytest.mark.parametrize("tokens", [(1, 1), (2, 33)], ids=str)
def test_a_mixer_follows_that_of_pytorch_operations(options, tokens):
    def one(seed):
        torch.manual_seed(seed)
        mixer, x = Mamba(36, **options), torch.randn(*tokens, 36)
        kinds = ("cpu", torch.float32), ("torch", torch.float64), ("torch", torch.float32)
        return tuple(mixer_outcome(mixer, x, *kind) for kind in kinds)

    assert_rule(one(seed) for seed in range(4))


def test_a_mixer_is_one_operator_in_float32_and_float64(monkeypatch):
    ran, run = [], mixer_kernels._mamba_inner
    monkeypatch.setattr(mixer_kernels, "_mamba_inner", lambda u, *rest: (ran.append(u.dtype), run(u, *rest))[1])
    mixer = Mamba(16, backend="cpu")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        mixer.to(dtype)(torch.ones(1, 3, 16, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        mixer.float()(torch.ones(1, 3, 16))
    assert ran == [torch.float32, torch.float64]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_bits_do_not_depend_on_the_number_of_threads(threads):
    tensors, cotangents = draw_pair(0, (2, 70, 150, 9, 2))
    results = []
    for number in (1, 2, 5):
        threads(number)
        results += [outcome(both, tensors, cotangents, None) for _ in range(2)]
    assert all(torch.equal(first[k], x) for first in results[:1] for other in results for k, x in other.items())


def test_a_lane_without_a_channel_adds_nothing():
    """Where B is infinite, so are the states and what they give C, and a lane without a channel holds no number."""
    tensors, _ = draw(0, (1, 3, 5, 4, None), everything=False, state=False)
    tensors["u"], tensors["B"][:, 1] = tensors["u"].abs(), torch.inf
    leaves = [x.requires_grad_() for x in tensors.values()]
    y, _ = selective_scan(*leaves, backend="cpu")
    dC = torch.autograd.grad(y, leaves[4], torch.ones_like(y))[0]
    assert torch.isfinite(dC[:, 0]).all() and torch.equal(dC[:, 1:], torch.full((1, 2, 4), torch.inf))


def test_operators_are_well_formed():
    tensors, _ = draw(0, (2, 5, 4, 3, 2))
    leaves = {k: [x.requires_grad_()] for k, x in tensors.items()}
    pairs = (leaves[k] for k in ("u", "delta", "A", "B", "C", "D", "delta_bias"))
    z, state = leaves["z"][0], leaves["initial_state"][0]
    ops = torch.ops.videomamba
    torch.library.opcheck(ops.selective_scan_cpu.default, (*pairs, z, state, True, [False], True))
    x, weight, bias = (torch.randn(size, requires_grad=True) for size in ((2, 5, 4), (4, 3), (4,)))
    torch.library.opcheck(ops.causal_conv1d_cpu.default, (x, [weight] * 2, [bias] * 2, None, True, [False, True]))
    torch.library.opcheck(ops.add_norm_cpu.default, (x, x.detach(), bias, bias, 1e-5, True))
    mixer = Mamba(4, d_state=2)
    first, second = (list(w) for w in mixer.directions())
    linears = mixer.in_proj.weight, None, mixer.out_proj.weight, None
    torch.library.opcheck(ops.mamba_inner_cpu.default, (x, first, second, *linears, True))


def test_an_export_takes_pytorch_operations():
    mixer, tokens = Mamba(8, d_state=2, backend="cpu").eval(), torch.randn(1, 5, 8)
    program = torch.export.export(mixer, (tokens,))
    assert not [n for n in program.graph.nodes if "videomamba" in str(n.target)]
    assert torch.allclose(program.module()(tokens), mixer(tokens), atol=1e-6)
