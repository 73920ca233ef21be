"""The native convolution against the loop: through Triton's interpreter, or on a GPU where there is one."""

import functools

import naive
import pytest
import torch
from planted import KERNELS, plant
from rule import assert_rule, double, outcome

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

import compiled  # noqa: E402

from fused import backends  # noqa: E402
from fused.ops.causal_conv1d import backward_kernels, kernels  # noqa: E402
from fused.ops.causal_conv1d import launch as conv  # noqa: E402
from fused.ops.causal_conv1d.api import causal_conv1d  # noqa: E402
from fused.ops.causal_conv1d.eager import causal_conv1d_eager  # noqa: E402
from fused.ops.causal_conv1d.native import causal_conv1d_native  # noqa: E402
from fused.ops.causal_conv1d.packed import causal_conv1d_packed  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6's interpreter
SEEDS = range(2)  # one finds each planted wrongness; the interpreter takes seconds for each
FORWARD, REVERSE, BOTH = (False,), (True,), (False, True)
# B, L, E, K, directions, states, bias, activated; 53 tokens are two programs of the backward, 65 channels two blocks
CASES = [
    (2, 9, 5, 4, BOTH, False, True, True),
    (1, 9, 65, 3, FORWARD, True, True, True),
    (1, 53, 3, 3, (True, False), True, True, True),
    (1, 2, 33, 4, BOTH, True, False, False),
    (1, 13, 5, 2, REVERSE, True, True, True),
    (1, 5, 3, 1, FORWARD, False, False, True),
]


def draw(seed, case, dtype=torch.float32):
    """Named tensors, x the first half of a projection, and cotangents of every y and every state."""
    B, L, E, K, directions, states, bias, _ = case
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g).to(dtype).to(DEVICE)

    tensors = {"x": normal(B, L, 2 * E)}
    for i, _ in enumerate(directions):
        tensors[f"weight{i}"] = normal(E, K).float()
        if bias:
            tensors[f"bias{i}"] = normal(E).float()
        if states:
            tensors[f"state{i}"] = normal(B, E, K - 1)
    n = len(directions)
    return tensors, [normal(B, L, E) for _ in range(n)] + [normal(B, E, K - 1) if states else None for _ in range(n)]


def lists(tensors, case):
    n = len(case[4])
    return ([tensors.get(f"{name}{i}") for i in range(n)] for name in ("weight", "bias", "state"))


def sequences(case):
    """Numbers (B, L) of ever longer sequences, other ones in every row."""
    tokens = torch.arange(case[0], device=DEVICE)[:, None] + torch.arange(case[1], device=DEVICE)
    return 3 + (tokens + 0.5).sqrt().long()


class Native(torch.autograd.Function):
    """forward and backward of the kernels, as a mixer calls them."""

    @staticmethod
    def forward(ctx, case, ids, names, x, *rest):
        ctx.case, ctx.ids, ctx.names = case, ids, names
        ctx.save_for_backward(x, *rest)
        x = x[..., : case[2]]
        weights, biases, states = lists(dict(zip(names, rest, strict=True)), case)
        y, finals = conv.forward(x, weights, biases, states, case[4], case[7], seq_idx=ids)
        return *y.clone().unbind(0), *finals

    @staticmethod
    def backward(ctx, *grads):
        (x, *rest), case, n = ctx.saved_tensors, ctx.case, len(ctx.case[4])
        weights, biases, states = lists(dict(zip(ctx.names, rest, strict=True)), case)
        guarded = torch.full_like(x, torch.nan)
        finals = grads[n:] if case[5] else None
        _, *found = conv.backward(
            grads[:n], finals, x[..., : case[2]], weights, biases, states, case[4], case[7], guarded[..., : case[2]], ctx.ids
        )
        assert guarded[..., case[2] :].isnan().all(), "written beside dx"
        guarded[..., case[2] :] = 0
        lookup = {
            f"{name}{i}": g for name, gs in zip(("weight", "bias", "state"), found, strict=True) for i, g in enumerate(gs)
        }
        return None, None, None, guarded, *(lookup[name] for name in ctx.names)


def native(case, ids=None):
    def op(**tensors):
        names = [k for k in tensors if k != "x"]
        return Native.apply(case, ids, names, tensors["x"], *(tensors[k] for k in names))

    return op


def plain(case, ids=None):
    convolve = naive.conv if ids is None else functools.partial(causal_conv1d_packed, seq_idx=ids)

    def op(**tensors):
        x, ys, finals = tensors["x"][..., : case[2]], [], []
        for weight, bias, state, reverse in zip(*lists(tensors, case), case[4], strict=True):
            activation = "silu" if case[7] else None
            y, final = convolve(x, weight, bias, activation=activation, initial_state=state, reverse=reverse)
            ys, finals = [*ys, y], [*finals, final]
        return *ys, *finals

    return op


def sample(seed, case, dtype=torch.float32, ids=None):
    tensors, cotangents = draw(seed, case, dtype)
    return (
        outcome(native(case, ids), tensors, cotangents, None),
        outcome(plain(case, ids), double(tensors), cotangents, torch.float64),
        outcome(plain(case, ids), tensors, cotangents, torch.float32),
    )


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-L{}-E{}-K{}".format(*c))
def test_follows_the_loop(case):
    assert_rule(sample(seed, case) for seed in SEEDS)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-L{}-E{}-K{}".format(*c))
def test_segments_follow_pytorch(case):
    assert_rule(sample(seed, case, ids=sequences(case)) for seed in SEEDS)


@pytest.mark.parametrize("reverse", BOTH, ids=["forward", "reverse"])
def test_the_public_operator_runs_segments_in_kernels(reverse, monkeypatch):
    case = (2, 7, 5, 4, (reverse,), True, True, True)
    tensors, cotangents = draw(0, case)
    tensors = {k.rstrip("0"): v for k, v in tensors.items()}
    tensors["initial_state"] = tensors.pop("state")
    tensors["x"] = tensors["x"][..., :5]
    ids = sequences(case)
    want = outcome(lambda **x: causal_conv1d_packed(**x, seq_idx=ids, reverse=reverse), tensors, cotangents, None)
    monkeypatch.setattr(backends, "choose", lambda *_, **__: "native")
    monkeypatch.setattr("fused.ops.causal_conv1d.api.causal_conv1d_packed", None)
    for numbers in (ids, ids.int(), ids.T.contiguous().T):
        op = lambda numbers=numbers, **x: causal_conv1d(**x, seq_idx=numbers, reverse=reverse, backend="native")  # noqa: E731
        got = outcome(op, tensors, cotangents, None)
        assert all(torch.allclose(got[k], want[k], rtol=1e-5, atol=1e-5) for k in want)


def test_low_precision_is_near():  # no more than near: the interpreter truncates where a GPU rounds
    got, truth, _ = sample(0, CASES[0], torch.bfloat16)
    assert all((got[k].double() - truth[k]).norm() <= 2**-6 * truth[k].norm() for k in got)
    assert got["out0"].dtype == got["dx"].dtype == torch.bfloat16 and got["dweight0"].dtype == torch.float32


PLANTED = {
    "a token counted by two segments": (backward_kernels, "t + (K - 1) < end", "t + (K - 1) < end + 1"),
    "the other direction's order of weights": (
        kernels,
        "convolve(rev_inputs, rev_weights, rev_bias, True, K)",
        "convolve(rev_inputs, rev_weights, rev_bias, False, K)",
    ),
    "the state a token late": (kernels, "rev_initial_state_ptr, t, L, clip", "rev_initial_state_ptr, t, L + 1, clip"),
    "the last token unwritten": (kernels, "inside = ((t >= 0) & (t < L))", "inside = ((t >= 0) & (t < L - 1))"),
    "derivative of the sigmoid only": (
        backward_kernels,
        "sigmoid * tl.fma(pre_activation, 1.0 - sigmoid, 1.0)",
        "sigmoid * (1.0 - sigmoid)",
    ),
    "no halo of ds": (backward_kernels, "rev_ds_window = rev_ds_window[1:]", "rev_ds_window = _fill_tuple(zero, K - 1)"),
}


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("module, right, wrong", PLANTED.values(), ids=PLANTED)
def test_planted_wrongness_is_seen(module, right, wrong, tmp_path, monkeypatch):
    plant(monkeypatch, tmp_path, module, conv, right, wrong)
    with pytest.raises(AssertionError):
        assert_rule(sample(seed, CASES[2]) for seed in SEEDS[:1])


def test_repeats_and_ignores_its_neighbours():
    case = (2, 11, 5, 4, BOTH, True, True, True)
    tensors, cotangents = draw(0, case)
    shared = [k for k in tensors if k.startswith(("weight", "bias"))]
    alone = {k: v if k in shared else v[1:2] for k, v in tensors.items()}
    first, again = (outcome(native(case), tensors, cotangents, None) for _ in range(2))
    single = outcome(native((1, *case[1:])), alone, [x[1:2] for x in cotangents], None)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert all(torch.equal(first[k][1:2], single[k]) for k in first if k[1:] not in shared)


def test_any_strides_of_x():
    case = (2, 9, 5, 4, BOTH, False, True, True)
    tensors, _ = draw(0, case)
    weights, biases, _ = lists(tensors, case)
    x = tensors["x"][..., :5].contiguous()
    want = conv.forward(x, weights, biases, None, BOTH, True, False)[0]
    assert torch.equal(want, conv.forward(tensors["x"][..., :5], weights, biases, None, BOTH, True, False)[0])
    for strange in (x.transpose(0, 1).contiguous().transpose(0, 1), x.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(want, conv.forward(strange, weights, biases, None, BOTH, True, False)[0])
    expanded = conv.forward(x[:1].expand(3, 9, 5), weights, biases, None, BOTH, True, False)[0]
    assert torch.equal(expanded, want[:, :1].expand(2, 3, 9, 5))


def test_no_clips_and_no_tokens():
    weight, state = torch.randn(5, 4, device=DEVICE), torch.randn(2, 5, 3, device=DEVICE)
    empty = torch.empty(0, 9, 5, device=DEVICE)
    y, finals = conv.forward(empty, (weight,), None, None, FORWARD, True)
    assert y.shape == (1, 0, 9, 5) and finals[0].shape == (0, 5, 3)
    dx, dweights, _, _ = conv.backward(y, None, empty, (weight,), None, None, FORWARD, True)
    assert dx.shape == empty.shape and not dweights[0].any()
    for reverse in BOTH:
        leaf = state.clone().requires_grad_()
        _, final = causal_conv1d_native(torch.empty(2, 0, 5, device=DEVICE), weight, initial_state=leaf, reverse=reverse)
        assert torch.equal(final, state)
        assert torch.equal(torch.autograd.grad(final, leaf, 2 * state)[0], 2 * state)


@pytest.mark.parametrize("reverse", BOTH, ids=["forward", "reverse"])
def test_the_public_operator(reverse, monkeypatch):
    monkeypatch.setattr(backends, "choose", lambda *_, **__: "native")
    case = (2, 7, 5, 4, (reverse,), True, True, True)
    tensors, (dy, dstate) = draw(0, case)
    tensors = {k.rstrip("0"): v for k, v in tensors.items()}
    tensors["initial_state"] = tensors.pop("state")
    tensors["x"] = tensors["x"][..., :5]
    for seeds in ([dy, dstate], [dy, None], [torch.zeros_like(dy), dstate]):
        got, want = (
            outcome(lambda f=f, **x: f(**x, reverse=reverse), tensors, seeds, None)
            for f in (lambda **x: causal_conv1d(**x, backend="native"), causal_conv1d_eager)
        )
        assert all(torch.allclose(got[k], want[k], rtol=1e-5, atol=1e-5) and got[k].dtype == want[k].dtype for k in want)
    x = tensors["x"].requires_grad_()
    _, state = causal_conv1d(**tensors, reverse=reverse, backend="native")
    assert state.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert torch.equal(
        torch.autograd.grad(state, x, dstate)[0],
        torch.autograd.grad(causal_conv1d_eager(**tensors, reverse=reverse)[1], x, dstate)[0],
    )
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(got["out0"], causal_conv1d(**tensors, reverse=reverse, backend="native")[0])


@pytest.mark.usefixtures("unchecked")
def test_what_native_has_not_is_named():
    x = torch.ones(1, 3, 2, device=DEVICE)
    with pytest.raises(ValueError, match=r"'native' has K of 1 to 8, got weight of shape \(2, 9\)"):
        causal_conv1d_native(x, torch.ones(2, 9, device=DEVICE))
    with pytest.raises(ValueError, match="got weight in torch.float64; use backend='torch'"):
        causal_conv1d_native(x, torch.ones(2, 4, device=DEVICE).double())
    with pytest.raises(ValueError, match="each direction once"):
        conv.forward(x, [torch.ones(2, 4, device=DEVICE)] * 2, None, None, (True, True), True)


def test_is_an_op_that_compiles_and_recomputes():
    tensors, _ = draw(0, (2, 5, 3, 3, FORWARD, True, True, True))
    leaves = [tensors[k][..., :3] if k == "x" else tensors[k] for k in ("x", "weight0", "bias0", "state0")]
    leaves = [t.detach().requires_grad_() for t in leaves]
    ids = torch.tensor([[0, 0, 1, 1, 1], [4, 5, 6, 6, 6]], device=DEVICE)
    torch.library.opcheck(torch.ops.videomamba.causal_conv1d.default, (*leaves, ids, True, True))
    fixed = [t.detach() for t in leaves]
    dy = torch.ones_like(fixed[0])
    torch.library.opcheck(torch.ops.videomamba.causal_conv1d_backward.default, (*fixed, ids, True, False, dy, None))

    def op(*leaves):
        return torch.ops.videomamba.causal_conv1d(*leaves, None, True, False)[0].square().sum()

    def recomputed(*leaves):
        return torch.utils.checkpoint.checkpoint(op, *leaves, use_reentrant=False)

    want = torch.autograd.grad(op(*leaves), leaves)
    for other in (torch.compile(op, fullgraph=True, backend="aot_eager"), recomputed):
        assert all(map(torch.equal, want, torch.autograd.grad(other(*leaves), leaves)))


def test_compiles_without_spills(capsys):
    lines = compiled.compile_in_subprocess("conv")
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert {(line["kernel"], line["sm"]) for line in lines} == {(k, sm) for k in KERNELS for sm in (80, 90, 100)}
    compiled.assert_no_spills(lines)
