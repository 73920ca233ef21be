"""Modules of a mixer with adapters, hooks, prunings and parametrizations compute what the merged weights compute."""

import copy
import logging

import emulation
import pytest
import torch
import upstream_stand_ins
from rule import assert_rule
from torch import nn
from torch.nn.utils import parametrize
from wrappers import CPU, NAMES, WRAPS, Adapter, merged_weights, wrap

pytest.importorskip("triton", reason="the convolution's kernels are Triton's")

from fused.modules import mamba, wrapped  # noqa: E402
from fused.modules.mamba import Mamba  # noqa: E402
from fused.runtime import nvrtc  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6's interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "native", "native_kept", "mamba_ssm", "mamba_ssm_inner", *CPU)
SEEDS = range(3)
LENGTH = 19  # tokens


@pytest.fixture(autouse=True)
def every_backend(monkeypatch):
    """Native kernels run emulated where there is no GPU, and loops stand for mamba-ssm."""
    upstream_stand_ins.install(monkeypatch)
    if DEVICE == "cpu":
        if reason := emulation.unavailable():
            pytest.skip(reason)
        monkeypatch.setattr(nvrtc, "module", emulation.module)


@pytest.fixture
def logged(caplog, monkeypatch):
    """Return what was logged, from a fresh start."""
    monkeypatch.setattr(wrapped, "_noted", {})
    monkeypatch.setattr(wrapped, "_logged", set())
    caplog.set_level(logging.WARNING, "fused")
    return lambda: [record.getMessage() for record in caplog.records]


def build(seed=0, **options):
    """A small mixer whose backward direction is not at its initial values either."""
    torch.manual_seed(seed)
    mixer = Mamba(8, **{"d_state": 4, "dt_rank": 3, **options})
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return mixer.to(DEVICE)


def normal(*size):
    return torch.randn(*size).to(DEVICE)


def outcome(run, tokens, module, cotangent):
    """Output and gradients of run(tokens), those of the module's trainable parameters by name."""
    tokens = tokens.clone().requires_grad_()
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    out = run(tokens)
    leaves = [tokens, *parameters.values()]
    grads = torch.autograd.grad(out, leaves, cotangent.to(out.dtype), allow_unused=True, materialize_grads=True)
    return {"out": out.detach()} | {f"d{k}": g for k, g in zip(("tokens", *parameters), grads, strict=True)}


def sample(seed, names, kind, backend, **options):
    """(the wrapped mixer, merged weights in float64, merged weights in float32), with the gradients of the same parameters."""
    plain = build(seed, **options)

    def make(dtype):  # old weight_norm cannot be copied
        torch.manual_seed(100 + seed)
        return wrap(copy.deepcopy(plain), names, kind).to(DEVICE, dtype)

    mixer = make(torch.float32)
    tokens, cotangent = (normal(2, LENGTH, 8) for _ in range(2))

    def run_merged(dtype):
        held, shell = make(dtype), copy.deepcopy(plain).to(dtype)

        def run(x):
            return torch.func.functional_call(shell, merged_weights(held, names, kind), (x,), {"backend": "torch"})

        return outcome(run, tokens.to(dtype), held, cotangent)

    got = outcome(lambda x: mixer(x, backend=backend), tokens, mixer, cotangent)
    return got, run_merged(torch.float64), run_merged(torch.float32)


@pytest.mark.parametrize("kind", WRAPS)
@pytest.mark.parametrize("backend", ["torch", "native", "mamba_ssm", *CPU])
def test_wrapped_modules_compute_what_their_merged_weights_do(backend, kind):
    assert_rule(sample(seed, NAMES, kind, backend) for seed in SEEDS)


@pytest.mark.parametrize("backend", ["torch", "native", "mamba_ssm", *CPU])
def test_lora_of_peft_computes_and_trains_its_merged_weights(backend):
    names = [name for name in NAMES if not name.startswith("conv")]
    assert_rule(sample(seed, names, "lora", backend) for seed in SEEDS)


@pytest.mark.parametrize("backend", ["native_kept", "mamba_ssm_inner"])
def test_other_mixers_over_the_same_operators(backend):
    assert_rule(sample(seed, NAMES, "adapter", backend) for seed in SEEDS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["torch", "native", "mamba_ssm", *CPU])
def test_one_wrapped_module_of_a_mixer(backend, name):
    assert_rule(sample(seed, (name,), "adapter", backend) for seed in SEEDS)


@pytest.mark.parametrize("options", [{"bimamba": False}, {"bias": True, "conv_bias": False, "d_conv": 3}], ids=str)
@pytest.mark.parametrize("backend", ["torch", "native", "mamba_ssm", *CPU])
def test_mixers_with_other_options(backend, options):
    names = NAMES if options.get("bimamba", True) else NAMES[:5]
    for kind in ("adapter", "hook"):
        assert_rule(sample(seed, names, kind, backend, **options) for seed in SEEDS)


def test_the_tests_see_a_mixer_that_reads_weights_only(monkeypatch):
    monkeypatch.setattr(mamba, "modules_to_call", lambda *arguments: ())
    for backend in ("torch", "native", *CPU):
        with pytest.raises(AssertionError, match="error"):
            assert_rule(sample(seed, ("dt_proj",), "hook", backend) for seed in SEEDS)


@pytest.mark.parametrize("name", ["in_proj", "out_proj", "conv1d_b", "x_proj", "dt_proj"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hook_changes_the_result_for_as_long_as_it_is_there(backend, name):
    mixer, tokens = build(), normal(1, 9, 8)
    with torch.no_grad():
        before = mixer(tokens, backend=backend)
        handle = getattr(mixer, name).register_forward_hook(lambda m, inputs, y: y * 1.5)
        assert not torch.allclose(mixer(tokens, backend=backend), before, rtol=1e-4)
        handle.remove()
        assert torch.equal(mixer(tokens, backend=backend), before)


@pytest.mark.parametrize("backend", ["torch", "native", "mamba_ssm", *CPU])
def test_backward_hooks_run(backend):
    mixer, tokens = build(), normal(1, 9, 8).requires_grad_()
    called = []
    for name in NAMES:
        module = getattr(mixer, name)
        module.register_full_backward_hook(lambda m, grads, dys, name=name: called.append(name))
        module.register_full_backward_pre_hook(lambda m, dys, name=name: called.append(name))
    mixer(tokens, backend=backend).sum().backward()
    assert sorted(called) == sorted(2 * NAMES)


@pytest.mark.parametrize("backend", ["torch", "native", *CPU])
def test_a_scaled_backward_scales_the_gradients_behind_it(backend):
    mixer, tokens = build(), normal(1, 9, 8)
    plain = torch.autograd.grad(mixer(tokens, backend=backend).sum(), mixer.x_proj.weight)[0]
    mixer.x_proj.register_full_backward_pre_hook(lambda m, dys: (3 * dys[0],))
    got = torch.autograd.grad(mixer(tokens, backend=backend).sum(), mixer.x_proj.weight)[0]
    torch.testing.assert_close(got, 3 * plain)


@pytest.mark.parametrize("backend", ["torch", "native", *CPU])
@pytest.mark.parametrize("kind", ["adapter", "pre_hook", "weight_norm"])
def test_a_wrapped_mixer_streams(backend, kind):
    """Chunks chained by their states give the whole, of lengths below and above the width of the convolution."""
    mixer, tokens = wrap(build(bimamba=False), NAMES[:5], kind).to(DEVICE), normal(2, 14, 8)
    whole = mixer(tokens, backend=backend)
    state, outs = mixer.init_state(2), []
    for chunk in tokens.split((1, 2, 5, 6), dim=1):
        out, state = mixer(chunk, state, True, backend=backend)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-5, atol=1e-6)
    parameters = list(mixer.parameters())
    grads = (torch.autograd.grad(y.square().sum(), parameters) for y in (torch.cat(outs, 1), whole))
    for got, due in zip(*grads, strict=True):
        torch.testing.assert_close(got, due, rtol=1e-4, atol=1e-5)


def test_a_parametrization_of_the_mixer_itself():
    mixer, tokens = build(), normal(1, 9, 8)

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(0.3))

        def forward(self, A_log):
            return A_log + self.shift

    moved = copy.deepcopy(mixer)
    with torch.no_grad():
        moved.A_b_log.add_(0.3)
    parametrize.register_parametrization(mixer, "A_b_log", Shifted().to(DEVICE))
    for backend in ("torch", "native", *CPU):
        out = mixer(tokens, backend=backend)
        torch.testing.assert_close(out, moved(tokens, backend=backend))
        assert torch.autograd.grad(out.sum(), mixer.parametrizations.A_b_log[0].shift)[0] != 0


def test_a_parametrization_is_computed_once_a_forward():
    """Spectral norm takes a step of its power iteration each time."""
    mixer, tokens, times = build(), normal(1, 9, 8), []

    class Counted(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, weight):
            times.append(self.name)
            return weight

    for name in NAMES:
        parametrize.register_parametrization(getattr(mixer, name), "weight", Counted(name), unsafe=True)
    for backend in ("torch", "native", *CPU):
        times.clear()
        mixer(tokens, backend=backend)
        assert sorted(times) == sorted(NAMES), backend


def test_dropout_in_an_adapter_is_drawn_in_training_only():
    mixer, tokens = build(), normal(1, 9, 8)
    for name in NAMES:
        setattr(mixer, name, Adapter(getattr(mixer, name), dropout=0.5).to(DEVICE))
    for backend in ("torch", "native", *CPU):
        assert not torch.equal(mixer(tokens, backend=backend), mixer(tokens, backend=backend))
    mixer.eval()
    assert torch.equal(mixer(tokens, backend="native"), mixer(tokens, backend="native"))


def test_half_precision_and_autocast():
    mixer, tokens = wrap(build(), NAMES, "adapter").to(DEVICE), normal(2, 19, 8)
    due = mixer(tokens, backend="torch")
    for backend in ("torch", "native", *CPU):
        with torch.autocast(DEVICE, torch.bfloat16):
            y = mixer(tokens, backend=backend)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), due, rtol=0.1, atol=0.05)
    half = mixer.bfloat16()
    for backend in ("torch", "native", *CPU):
        y = half(tokens.bfloat16(), backend=backend)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), due, rtol=0.1, atol=0.05)


def test_the_slow_path_is_said_once_a_mixer_with_the_modules_that_want_it(logged):
    tokens = normal(1, 5, 8)
    mixer = Mamba(8, d_state=4, layer_idx=3).to(DEVICE)
    mixer.in_proj.register_forward_hook(lambda m, inputs, y: None)
    mixer(tokens, backend="native")
    mixer(tokens, backend="torch")
    assert logged() == []  # in_proj is a module of its own there, and "torch" has no fused operator
    mixer.x_proj_b = Adapter(mixer.x_proj_b).to(DEVICE)
    for _ in range(2):
        mixer(tokens, backend="native")
    (message,) = logged()
    assert message.startswith("layers.3.mixer runs outside of the fused operator, which is slower")
    assert "in_proj has 1 forward hook" in message and "x_proj_b is a wrappers.Adapter" in message


@pytest.mark.skipif(not CPU, reason="the backend cpu cannot run here")
def test_the_slow_path_on_a_cpu(logged):
    """It is said where the same mixer without the hook runs as one operator, in float32 and without autocast."""
    mixer, tokens = Mamba(8, d_state=4, layer_idx=5, bimamba=False), normal(1, 5, 8)
    mixer(tokens, backend="cpu")
    mixer.in_proj.register_forward_hook(lambda m, inputs, y: None)
    mixer(tokens, None, True, backend="cpu")
    mixer(tokens, backend="torch")
    with torch.autocast("cpu", torch.bfloat16):
        mixer(tokens, backend="cpu")
    assert logged() == []
    for _ in range(2):
        mixer(tokens, backend="cpu")
    (message,) = logged()
    assert message.startswith("layers.5.mixer runs outside of the fused operator") and "in_proj has 1 forward hook" in message


def test_a_plain_mixer_does_not_leave_its_operator(logged, monkeypatch):
    from fused.ops.mamba_inner import native

    calls, run = [], native.mamba_inner
    monkeypatch.setattr(native, "mamba_inner", lambda *a, **k: calls.append(a) or run(*a, **k))
    mixer, tokens = wrap(build(), NAMES, "parametrized").to(DEVICE), normal(1, 5, 8)
    mixer(tokens, backend="native")
    mixer.dt_proj.__class__ = type("Mine", (type(mixer.dt_proj),), {})
    mixer(tokens, backend="native")
    assert len(calls) == 2 and logged() == []


@pytest.mark.usefixtures("unchecked")  # a checked signature is more than a graph can hold
@pytest.mark.parametrize("names", [(), ("x_proj", "conv1d"), ("in_proj", "out_proj")], ids=str)
def test_a_native_mixer_compiles_as_one_graph(names):
    mixer, tokens = wrap(build(), names, "adapter").to(DEVICE), normal(1, 9, 8)
    for name in names[:1]:
        getattr(mixer, name).register_forward_hook(lambda m, inputs, y: y * 1.5)
    due = mixer(tokens, backend="native")
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, backend="native"), due)
    torch._dynamo.reset()


class Packed(nn.Linear):
    """A weight of integers, as bitsandbytes has it."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter(linear.weight.detach().mul(100).to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 100)


def quantised(kind):
    mixer = Mamba(8, d_state=4, layer_idx=3)
    if kind == "torch.ao":
        return torch.ao.quantization.quantize_dynamic(mixer, {nn.Linear}, dtype=torch.qint8)
    if kind == "packed":
        mixer.in_proj = Packed(mixer.in_proj)
    elif kind == "packed, within an adapter":
        adapter = Adapter(mixer.in_proj)
        adapter.base, mixer.in_proj = Packed(adapter.base), adapter
    else:  # as torchao's
        from torch.testing._internal.two_tensor import TwoTensor

        weight = mixer.in_proj.weight.detach()
        mixer.in_proj.weight = nn.Parameter(TwoTensor(weight, weight))
    return mixer


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("torch.ao", "weight of layers.3.mixer.in_proj, a torch.ao.nn.quantized.dynamic.*Linear, is no tensor"),
        ("packed", "weight of layers.3.mixer.in_proj, a .*Packed, is torch.int8"),
        ("packed, within an adapter", "weight of layers.3.mixer.in_proj.base, a .*Packed, is torch.int8"),
        ("tensor of tensors", "weight of layers.3.mixer.in_proj, a torch.nn.modules.linear.Linear, is a .*TwoTensor"),
    ],
)
def test_a_quantised_module_is_refused_by_name(kind, words):
    mixer = quantised(kind)
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=words + "; allowed in a Mamba mixer: plain tensors .*cannot be quantised"):
            mixer(normal(1, 5, 8), backend=backend)
