"""Which backend runs, what it refuses, and mamba-ssm's layout, with stand-ins for the packages that need a GPU."""

import logging
import sys
from unittest import mock

import naive
import pytest
import torch
import torch.nn.functional as F
import upstream_stand_ins
from rule import assert_rule, double, outcome

from fused import backends
from fused.backends import BACKENDS, choose, declared, unavailable
from fused.errors import BackendError
from fused.modules import mamba
from fused.ops import mamba_ssm as upstream
from fused.ops.add_norm import api as norm
from fused.ops.add_norm import api as norm_api
from fused.ops.causal_conv1d import api as conv
from fused.ops.causal_conv1d import api as conv_api
from fused.ops.selective_scan import api as scan
from fused.ops.selective_scan import api as scan_api
from fused.ops.shapes import DirectionWeights
from fused.runtime import cpu_library

SEEDS = range(4)


@pytest.fixture
def chosen(caplog):
    """What automatic choices say, from a fresh start."""
    backends._announce.cache_clear()
    caplog.set_level(logging.INFO, "fused")
    yield lambda: [record.getMessage() for record in caplog.records]
    backends._announce.cache_clear()


def test_auto_on_a_cpu_is_cpu_and_says_so_once(chosen, monkeypatch):
    monkeypatch.delenv(backends.SWITCH, raising=False)
    assert [choose("auto", "cpu") for _ in range(3)] == ["cpu"] * 3
    assert chosen()[-1] == "backend 'auto' chose 'cpu': the input is on cpu"


def test_where_the_cpu_has_no_kernels_auto_is_torch_and_warns_once(chosen, monkeypatch, caplog):
    monkeypatch.delenv(backends.SWITCH, raising=False)
    monkeypatch.setattr(cpu_library, "unavailable", lambda: "there is no C++ compiler: install one.")
    assert [choose("auto", "cpu") for _ in range(3)] == ["torch"] * 3
    assert chosen() == ["backend 'auto' chose 'torch': there is no C++ compiler: install one."]
    assert caplog.records[0].levelno == logging.WARNING
    with pytest.raises(BackendError, match="backend 'cpu' cannot run here. there is no C.. compiler: install one"):
        choose("cpu", "cpu")


def test_other_devices_have_no_kernels_for_cpus(chosen, monkeypatch):
    monkeypatch.delenv(backends.SWITCH, raising=False)
    with pytest.raises(BackendError, match="cpu runs on CPUs only and the input is on meta.*use 'auto'"):
        choose("cpu", "meta")
    assert choose("auto", "meta") == "torch" and chosen() == ["backend 'auto' chose 'torch': the input is on meta"]


def test_auto_on_cuda_takes_native_where_it_runs(chosen, monkeypatch):
    monkeypatch.delenv(backends.SWITCH, raising=False)
    assert choose("auto", "cuda") == "torch"
    with mock.patch.object(backends, "unavailable", return_value=None):
        assert choose("auto", "cuda") == "native"
        assert choose("auto", "cuda", use_fast_path=False) == "torch"
    assert "use_fast_path is False" in chosen()[-1]


@pytest.mark.parametrize("value", ["1", "true", "YES", "y", "on"])
def test_the_switch_turns_auto_to_torch(chosen, monkeypatch, value):
    monkeypatch.setenv(backends.SWITCH, value)
    with mock.patch.object(backends, "unavailable", return_value=None):
        assert choose("auto", "cuda") == "torch"
        assert choose("mamba_ssm", "cuda") == "mamba_ssm"
        assert choose("native", "cuda", use_fast_path=False) == "native"
    assert chosen() == ["backend 'auto' chose 'torch': VIDEOMAMBA_DISABLE_FUSED is set"]


@pytest.mark.parametrize("value", ["", "0", "false", "off"])
def test_the_switch_has_an_off(chosen, monkeypatch, value):
    monkeypatch.setenv(backends.SWITCH, value)
    with mock.patch.object(backends, "unavailable", return_value=None):
        assert choose("auto", "cuda") == "native"


def test_a_backend_that_cannot_run_raises_with_the_fix():
    with pytest.raises(BackendError, match="native runs on CUDA only and the input is on cpu.*use 'torch'"):
        choose("native", "cpu")
    with pytest.raises(BackendError, match="mamba_ssm runs on CUDA only and the input is on cpu.*use 'torch'"):
        choose("mamba_ssm", "cpu")
    with pytest.raises(ValueError, match="backend must be one of auto, native, .*got 'triton'"):
        choose("triton", "cpu")
    with pytest.raises(BackendError, match="on CUDA only"):
        scan.selective_scan(**draw(0)[0], backend="mamba_ssm_inner")


def test_a_missing_package_is_named_with_its_install_command(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    assert unavailable("torch", "cuda") is None
    assert "mamba_ssm cannot be imported" in unavailable("mamba_ssm", "cuda")
    assert "nox -s upstream" in unavailable("mamba_ssm_inner", "cuda")


def test_a_missing_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert all("no CUDA device" in unavailable(name, "cuda:0") for name in BACKENDS)


def test_abilities_are_known_for_every_operator():
    scans, mixers = scan_api.BACKENDS, mamba.BACKENDS
    assert declared("scan", scans, "torch").initial_state and torch.float64 in declared("scan", scans, "torch").dtypes
    assert not declared("scan", scans, "mamba_ssm").initial_state
    assert not declared("mixer", mixers, "mamba_ssm_inner").final_state_grad
    for table in (scans, conv_api.BACKENDS, norm_api.BACKENDS, mixers):
        assert all(declared("op", table, name).devices for name in BACKENDS)
    with pytest.raises(ValueError, match="backend must be one of native"):
        declared("scan", scans, "fast")
    assert declared("attention", {"torch": scans["torch"]}, "cpu") == scans["torch"]  # it has no kernels for CPUs
    with pytest.raises(ValueError, match="attention: backend 'native_kept' does not have it; allowed are torch"):
        declared("attention", {"torch": scans["torch"]}, "native_kept")


@pytest.mark.parametrize("backend", ["mamba_ssm", "mamba_ssm_inner"])
def test_asking_for_too_much_raises_before_anything_runs(backend):
    tensors, _ = draw(0)
    state = torch.zeros(2, 8, 3)
    with pytest.raises(ValueError, match=f"scan: backend '{backend}' does not support initial_state.*'torch'"):
        scan.selective_scan(**tensors, initial_state=state, backend=backend)
    with pytest.raises(ValueError, match=f"scan: backend '{backend}' supports .*got torch.float64.*'torch'"):
        scan.selective_scan(**double(tensors), backend=backend)
    with pytest.raises(ValueError, match=f"causal_conv1d: backend '{backend}' does not support initial_state"):
        conv.causal_conv1d(tensors["u"], torch.ones(8, 4), initial_state=state, backend=backend)
    with pytest.raises(ValueError, match=f"add_norm: backend '{backend}' supports"):
        norm.add_norm(torch.ones(2, 4).double(), torch.ones(4), backend=backend)


def draw(seed, groups=None, dtype=torch.float32, length=9):
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g).to(dtype)

    mixing = (2, length, 3) if groups is None else (2, length, groups, 3)
    tensors = {
        "u": normal(2, length, 8),
        "delta": normal(2, length, 8),
        "A": -torch.rand(8, 3, generator=g) - 0.1,
        "B": normal(*mixing),
        "C": normal(*mixing),
        "D": normal(8),
        "z": normal(2, length, 8),
        "delta_bias": normal(8),
    }
    return tensors, [normal(2, length, 8), None]


@pytest.fixture
def stand_ins(monkeypatch):
    upstream_stand_ins.install(monkeypatch)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_scan_in_upstreams_layout(stand_ins, groups, reverse, dtype):
    def one(seed):
        tensors, cotangents = draw(seed, groups, dtype)
        run = lambda **x: scan.selective_scan(**x, reverse=reverse, backend="mamba_ssm")  # noqa: E731
        loop = lambda **x: naive.scan(**x, reverse=reverse)  # noqa: E731
        return (
            outcome(run, tensors, cotangents, None),
            outcome(loop, double(tensors), cotangents, torch.float64),
            outcome(loop, tensors, cotangents, torch.float32),
        )

    assert_rule(one(seed) for seed in SEEDS)


def test_scan_refuses_the_gradient_that_upstream_would_lose(stand_ins):
    tensors, _ = draw(0)
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    y, state = scan.selective_scan(**leaves, backend="mamba_ssm")
    torch.autograd.grad(y.sum() + state.detach().sum(), leaves["u"], retain_graph=True)
    with pytest.raises(RuntimeError, match="ignores the gradient of the scan's final state.*backend='torch'"):
        torch.autograd.grad(state.sum(), leaves["u"])


@pytest.mark.parametrize("width, length", [(8, 9), (8, 1), (5, 9), (1, 3)])
@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
def test_conv_in_upstreams_layout(stand_ins, width, length, reverse):
    def one(seed):
        g = torch.Generator().manual_seed(seed)
        x, weight, bias = (torch.randn(s, generator=g) for s in ((2, length, 2 * width), (width, 4), (width,)))
        tensors = {"x": x, "weight": weight, "bias": bias}
        cotangents = [torch.randn(2, length, width, generator=g), torch.randn(2, width, 3, generator=g)]

        def run(x, **rest):  # half of a wider tensor, as in a mixer
            return conv.causal_conv1d(x[..., :width], **rest, reverse=reverse, backend="mamba_ssm")

        def loop(x, **rest):
            return naive.conv(x[..., :width], **rest, reverse=reverse)

        return (
            outcome(run, tensors, cotangents, None),
            outcome(loop, double(tensors), cotangents, torch.float64),
            outcome(loop, tensors, cotangents, torch.float32),
        )

    assert_rule(one(seed) for seed in SEEDS)


def test_conv_names_the_widths_that_have_kernels(stand_ins):
    with pytest.raises(ValueError, match="K of 2 to 4 only, got K=5"):
        conv.causal_conv1d(torch.ones(1, 3, 8), torch.ones(8, 5), backend="mamba_ssm")


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prenorm", [True, False])
def test_norm_as_upstream(stand_ins, kind, residual, prenorm):
    x = torch.randn(2, 5, 8).bfloat16()
    stream = None if residual is None else torch.randn(2, 5, 8).to(residual)
    weight = torch.randn(8)
    options = {"residual": stream, "kind": kind, "prenorm": prenorm}
    got = norm.add_norm(x, weight, **options, backend="mamba_ssm")
    want = norm.add_norm(x, weight, **options, backend="torch")
    for a, b in zip(got, want, strict=True) if prenorm else [(got, want)]:
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("bimamba", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_mixer_runs_each_direction_once_and_adds_the_bias_once(stand_ins, inner, bimamba, bias):
    torch.manual_seed(0)
    in_proj, out_proj = torch.nn.Linear(4, 12, bias=bias), torch.nn.Linear(6, 4, bias=bias)
    sizes = {"conv": (6, 4), "conv_bias": (6,), "x_proj": (8, 6), "dt_proj": (6, 2), "dt_bias": (6,), "A": (6, 3), "D": (6,)}
    scale = {"conv": 0.5, "x_proj": 0.4, "dt_proj": 0.7}
    directions = [
        DirectionWeights(**{name: scale.get(name, 1) * torch.randn(size) for name, size in sizes.items()})
        for _ in range(1 + bimamba)
    ]
    hidden = torch.randn(2, 7, 4)
    x, z = in_proj(hidden).chunk(2, dim=-1)
    total = 0
    for i, w in enumerate(directions):
        c, _ = naive.conv(x, w.conv, w.conv_bias, reverse=bool(i))
        dt, B, C = F.linear(c, w.x_proj).split([2, 3, 3], dim=-1)
        delta = F.linear(dt, w.dt_proj)
        total = total + naive.scan(c, delta, -w.A.exp(), B, C, w.D, z, w.dt_bias, reverse=bool(i))[0]
    got = upstream.mamba_mixer(hidden, in_proj, out_proj, directions, inner=inner)
    torch.testing.assert_close(got, out_proj(total))
