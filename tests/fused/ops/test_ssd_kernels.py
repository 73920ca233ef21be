"""The native SSD scan against the loop: through Triton's interpreter, or on a GPU where there is one."""

import itertools

import naive
import numpy as np
import pytest
import torch
from rule import assert_rule, double, outcome
from test_ssd import draw, segments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

import compiled  # noqa: E402

import fused  # noqa: E402
from fused import backends  # noqa: E402
from fused.ops.ssd import launch  # noqa: E402
from fused.ops.ssd.eager import ssd_eager  # noqa: E402
from fused.ops.ssd.native import ssd_native  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6's interpreter
SEEDS = range(2)
LOW = torch.bfloat16
# B L H P G N, options
CASES = {
    "one token": ((1, 1, 1, 1, 1, 1), "everything"),
    "one chunk": ((2, 7, 3, 3, 3, 5), "bare"),
    "chunks": ((1, 35, 4, 5, 2, 6), "everything"),
    "reverse": ((1, 35, 2, 3, 1, 4), "reverse"),
    "segments": ((2, 35, 2, 3, 1, 4), "segments"),
    "reverse segments": ((2, 20, 2, 3, 1, 4), "reverse segments"),
    "two blocks of channels, two of states": ((1, 20, 1, 70, 1, 70), "no gate"),
}


def inputs(seed, shape, kind, dtype=torch.float32):
    tensors, cotangents = draw(seed, shape, kind != "bare", dtype, D_per_channel="segments" in kind)
    if kind == "no gate":
        del tensors["z"]
    options = {"reverse": "reverse" in kind, "softplus": kind != "bare"}
    if "segments" in kind:
        options |= {"seq_idx": segments(shape).to(DEVICE, torch.int32), "dt_limit": (0.05, 0.8)}
    return {k: v.to(DEVICE) for k, v in tensors.items()}, [c.to(DEVICE) for c in cotangents], options


def sample(seed, shape, kind):
    tensors, cotangents, options = inputs(seed, shape, kind)
    return (
        outcome(lambda **x: ssd_native(**x, **options), tensors, cotangents, None),
        outcome(lambda **x: naive.ssd(**x, **options), double(tensors), cotangents, torch.float64),
        outcome(lambda **x: naive.ssd(**x, **options), tensors, cotangents, torch.float32),
    )


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("case", CASES)
def test_follows_the_loop(case):
    shape, kind = CASES[case]
    assert_rule(sample(seed, shape, kind) for seed in SEEDS)


@pytest.mark.usefixtures("nan_filled")
def test_without_the_states_of_chunks_it_loses_few_digits(monkeypatch):  # as in bfloat16
    config = launch.choose_config(launch.Sizes(1, 35, 2, 3, 1, 4), torch.float32)
    tensors, cotangents, options = inputs(0, (1, 35, 2, 3, 1, 4), "no gate")
    want = outcome(lambda **x: ssd_native(**x, **options), tensors, cotangents, None)
    monkeypatch.setattr(launch, "choose_config", lambda *_: config._replace(EXACT=False))
    got = outcome(lambda **x: ssd_native(**x, **options), tensors, cotangents, None)
    assert all((got[k] - want[k]).abs().max() <= 1e-4 * want[k].abs().max() for k in want)


@pytest.mark.usefixtures("nan_filled")
def test_low_precision_is_near(monkeypatch):  # no more than near: the interpreter truncates where a GPU rounds
    tensors, cotangents, options = inputs(0, (1, 35, 2, 3, 1, 4), "segments", LOW)
    got = outcome(lambda **x: ssd_native(**x, **options), tensors, cotangents, None)
    truth = outcome(lambda **x: naive.ssd(**x, **options), double(tensors), cotangents, torch.float64)
    want = outcome(lambda **x: ssd_eager(**x, **options), tensors, cotangents, None)
    assert all((got[k].double() - truth[k]).norm() <= 2**-6 * truth[k].norm() for k in got)
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in want.items()}


def test_a_decay_that_underflows_a_chunk():
    tensors, cotangents, _ = inputs(0, (1, 35, 2, 3, 1, 4), "bare")
    tensors |= {"dt": tensors["dt"].abs() * 1e4, "A": torch.tensor([-100.0, -1e-9], device=DEVICE)}
    got = outcome(lambda **x: ssd_native(**x, softplus=False), tensors, cotangents, None)
    want = outcome(lambda **x: naive.ssd(**x, softplus=False), double(tensors), cotangents, torch.float64)
    for name, exact in want.items():
        assert (got[name] - exact).abs().max() <= 1e-5 * exact.abs().max(), name


def test_states_may_grow():  # A above 0, and steps below
    tensors, cotangents, _ = inputs(0, (1, 35, 2, 3, 1, 4), "bare")
    tensors |= {"dt": tensors["dt"].clamp(-0.3, 0.3), "A": torch.tensor([0.7, -0.9], device=DEVICE)}
    options = {"softplus": False, "dt_limit": (-1.0, 1.0)}
    got = outcome(lambda **x: ssd_native(**x, **options), tensors, cotangents, None)
    want = outcome(lambda **x: naive.ssd(**x, **options), double(tensors), cotangents, torch.float64)
    for name, exact in want.items():
        assert (got[name] - exact).abs().max() <= 1e-5 * exact.abs().max(), name


@pytest.fixture
def fused_multiply_add(monkeypatch):
    """The interpreter rounds a product before it adds; a GPU does not."""
    if DEVICE == "cpu":
        from triton.runtime import interpreter

        def fma(_, x, y, z):
            exact = x.data.astype(np.float64) * y.data + z.data
            return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)


@pytest.mark.usefixtures("fused_multiply_add")
def test_small_steps_keep_their_digits():
    x, A = torch.ones(1, 1, 1, 1, device=DEVICE), -torch.ones(1, device=DEVICE)
    for raw in (-80.0, -30.0, -17.0, -5.0, 0.0, 5.0, 19.9, 20.1, 500.0):
        dt = torch.tensor([[[raw]]], device=DEVICE)
        want = torch.nn.functional.softplus(dt.double()).item()
        assert ssd_native(x, dt, A, x, x)[0].item() == pytest.approx(want, rel=4e-7, abs=0), raw


@pytest.mark.usefixtures("fused_multiply_add")
def test_the_gradient_of_small_steps_keeps_their_digits():
    """It is a logistic function of them, whose exponent, rounded as a power of 2, would be off by a hundred of them."""
    one, A = torch.ones(1, 1, 1, 1, device=DEVICE), -torch.ones(1, device=DEVICE)
    for raw in (-80.0, -43.3, -30.7, -25.1, -17.3, -5.2, 0.0, 5.1, 19.9, 500.0):
        dt = torch.tensor([[[raw]]], device=DEVICE, requires_grad=True)
        [found] = torch.autograd.grad(ssd_native(one, dt, A, one, one)[0].sum(), dt)
        assert found.item() == pytest.approx(torch.sigmoid(dt.double()).item(), rel=4e-7, abs=0), raw


@pytest.mark.parametrize("op", [ssd_native, ssd_eager, naive.ssd], ids=["native", "eager", "loop"])
def test_steps_of_minus_infinity_leave_their_tokens_out(op):
    """Their softplus is 0: nothing enters the state and nothing decays, whatever the token holds."""
    tensors, cotangents, _ = inputs(0, (1, 5, 2, 3, 1, 4), "bare")
    tensors["dt"][:, [0, 3]] = -torch.inf
    got = outcome(lambda **x: op(**x), tensors, cotangents, None)
    kept = [1, 2, 4]
    assert all(value.isfinite().all() for value in got.values())
    assert not got["ddt"][:, [0, 3]].any() and not got["dx"][:, [0, 3]].any() and not got["dB"][:, [0, 3]].any()
    short = {k: v if k == "A" else v[:, kept] for k, v in tensors.items()}
    want = outcome(lambda **x: op(**x), short, [cotangents[0][:, kept], cotangents[1]], None)
    torch.testing.assert_close(got["out1"], want["out1"])
    torch.testing.assert_close(got["out0"][:, kept], want["out0"])


def test_decays_of_short_memory_keep_their_digits():
    """The gradient of a decay is small beside what tokens put into a state whose gradient is large: no sum may hold both."""

    def one(seed, reverse):
        tensors, (dy, dfinal), _ = inputs(seed, (1, 9, 2, 4, 1, 4), "no gate")
        tensors |= {"A": 10 * tensors["A"], "dt": tensors["dt"] + 2}
        cotangents, options = [dy, 100 * dfinal], {"reverse": reverse}
        return (
            outcome(lambda **x: ssd_native(**x, **options), tensors, cotangents, None),
            outcome(lambda **x: naive.ssd(**x, **options), double(tensors), cotangents, torch.float64),
            outcome(lambda **x: naive.ssd(**x, **options), tensors, cotangents, torch.float32),
        )

    for reverse in (False, True):
        assert_rule(one(seed, reverse) for seed in range(4))


def test_repeats_and_ignores_its_neighbours(monkeypatch):
    tensors, cotangents, options = inputs(0, (3, 20, 2, 3, 1, 4), "segments")
    del tensors["z"]  # the gate's gradient is PyTorch's, whose rounding depends on the place on a CPU
    shared = ("A", "D", "dt_bias")
    run = lambda ids: lambda **x: ssd_native(**x, **options | {"seq_idx": ids})  # noqa: E731
    ids = options["seq_idx"]
    first, again = (outcome(run(ids), tensors, cotangents, None) for _ in range(2))
    alone = {k: v if k in shared else v[1:2] for k, v in tensors.items()}
    single = outcome(run(ids[1:2]), alone, [c[1:2] for c in cotangents], None)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert all(torch.equal(first[k][1:2], single[k]) for k in first if k[1:] not in shared)


def test_any_strides():
    tensors, _, _ = inputs(0, (2, 9, 2, 4, 2, 4), "everything")
    want = ssd_native(**tensors)
    strange = dict(tensors)
    rows = torch.cat([tensors[k].flatten(2) for k in ("x", "B", "C")], 2)  # as a convolution leaves them
    strange |= zip("xBC", (m.unflatten(2, (2, 4)) for m in rows.split(8, 2)), strict=True)
    strange["z"] = tensors["z"].permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    strange["A"] = tensors["A"].repeat_interleave(2)[::2]
    assert all(map(torch.equal, want, ssd_native(**strange)))


def test_without_clips():
    tensors, _, _ = inputs(0, (1, 3, 2, 4, 1, 4), "everything")
    shared = ("A", "D", "dt_bias")
    leaves = {k: (v if k in shared else v[:0]).requires_grad_() for k, v in tensors.items()}
    y, state = ssd_native(**leaves)
    (y.sum() + state.sum()).backward()
    assert y.shape == (0, 3, 2, 4) and not leaves["A"].grad.any() and not leaves["D"].grad.any()


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("reverse", [False, True])
def test_without_tokens_the_state_and_its_gradient_stay(reverse):  # a mixer may get none; `fused.ssd` refuses that
    tensors, (_, cotangent), _ = inputs(0, (2, 0, 2, 4, 1, 4), "everything")
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    y, state = ssd_native(**leaves, reverse=reverse)
    grads = dict(zip(leaves, torch.autograd.grad(state, list(leaves.values()), cotangent), strict=True))
    assert torch.equal(state, tensors["initial_state"]) and torch.equal(grads["initial_state"], cotangent)
    assert y.shape == (2, 0, 2, 4) and not any(grads[k].any() for k in ("A", "D", "dt_bias"))
    del tensors["initial_state"]
    assert not ssd_native(**tensors, reverse=reverse)[1].any()


@pytest.mark.usefixtures("unchecked")
def test_what_native_has_not_is_named(monkeypatch):
    monkeypatch.setattr(backends, "choose", lambda *_, **__: "native")
    x, B = torch.ones(1, 1, 1, 129, device=DEVICE), torch.ones(1, 1, 1, 4, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match=r"P of at most 128 and N of at most 256, got x of shape \(1, 1, 1, 129\)"):
        fused.ssd(x, B[..., 0], one, B, B, backend="native")
    with pytest.raises(ValueError, match="got A in torch.float64; use backend='torch'"):
        fused.ssd(x[..., :4], B[..., 0], one.double(), B, B, backend="native")


def test_is_an_op_that_compiles_and_recomputes():
    tensors, cotangents, options = inputs(0, (2, 5, 2, 3, 1, 4), "segments")
    leaves = [v.requires_grad_() for v in tensors.values()]
    ops, rest = torch.ops.videomamba, (options["seq_idx"], True, 0.05, 0.8, False, False, True)
    torch.library.opcheck(ops.ssd.default, (*leaves, *rest))
    fixed = [v.detach() for v in leaves]
    torch.library.opcheck(ops.ssd_backward.default, (*fixed, *rest, *cotangents))
    torch.library.opcheck(ops.ssd_backward.default, (*fixed[:5], None, None, None, None, None, *rest[1:], cotangents[0], None))

    def op(*leaves):
        y, state = ops.ssd(*leaves, *rest)
        return (y.square().sum(-1) + state.sum()).sum()

    want = torch.autograd.grad(op(*leaves), leaves)
    compiled_op = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, want, torch.autograd.grad(compiled_op(*leaves), leaves)))


def test_no_block_of_16_bit_products_is_below_64(monkeypatch):
    monkeypatch.setattr(launch, "NATIVE", True)
    for P in range(1, 129):
        for N in (1, 40, 64, 65, 128, 129, 256):
            for capability, backward in itertools.product((80, 90, 100), (False, True)):
                config = launch.choose_config(launch.Sizes(1, 99, 2, P, 1, N), LOW, capability, backward)
                sizes = {config.BLOCK_P, config.BLOCK_N, config.STATE_P, config.STATE_N}
                assert sizes <= {64, 128}, (P, N)


def test_compiles_and_prints_its_resources(capsys):
    lines = compiled.compile_in_subprocess("ssd")
    with capsys.disabled():
        print("", *lines, sep="\n")
    names = {
        "steps_kernel", "states_kernel", "scan_kernel", "both_states_kernel", "state_gradient_kernel", "input_gradient_kernel",
        "steps_backward_kernel", "reduce_kernel",
    }  # fmt: skip
    assert {(line["kernel"], line["sm"]) for line in lines} == {(name, sm) for name in names for sm in (80, 90, 100)}
    kib = {80: 163, 90: 227, 100: 227}  # of shared memory that a block may have
    assert all(line["shared"] <= kib[line["sm"]] << 10 for line in lines)
    compiled.assert_no_spills(line for line in lines if line["sm"] == 90 and line["case"].startswith(("H112", "plain")))
    assert all(line["stack"] <= 256 for line in lines if line["sm"] == 80)  # bytes


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("L", [20, 70], ids=["one span", "spans"])
def test_y_and_its_gradients_do_not_need_the_final_state(L):
    tensors, cotangents, options = inputs(0, (1, L, 2, 3, 1, 4), "no gate")
    want, got = (
        outcome(lambda final=final, **x: ssd_native(**x, **options, final=final), tensors, [cotangents[0], None], None)
        for final in (True, False)
    )
    assert want.pop("out1").shape == (1, 2, 3, 4) and got.pop("out1").shape == (0,)
    assert all(torch.equal(got[k], want[k]) for k in want)
