"""Native add and norm against the formula: through Triton's interpreter, or on a GPU where there is one."""

import naive
import pytest
import torch
from planted import KERNELS, plant
from rule import assert_rule, double, outcome

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

import compiled  # noqa: E402

from fused import backends  # noqa: E402
from fused.ops.add_norm import kernels, launch  # noqa: E402
from fused.ops.add_norm.api import add_norm  # noqa: E402
from fused.ops.add_norm.eager import add_norm_eager  # noqa: E402
from fused.ops.add_norm.native import add_norm_native  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6's interpreter
SEEDS = range(4)
LOW, FULL = torch.bfloat16, torch.float32
# shape, kind, dtype of x, dtype of the residual, prenorm, residual_in_fp32
CASES = [
    ((2, 9, 5), "rms", FULL, FULL, True, True),
    ((2, 17, 33), "layer", FULL, FULL, True, True),
    ((3, 48), "rms", FULL, None, True, True),
    ((3, 600), "layer", FULL, None, False, True),
    ((9,), "layer", FULL, FULL, True, True),
]
LOW_CASES = [
    ((3, 7, 13), "rms", LOW, FULL, True, True),
    ((3, 7, 16), "layer", LOW, None, True, True),
    ((20, 5), "rms", LOW, None, True, False),
    ((2, 5), "layer", FULL, LOW, True, True),
]


def draw(seed, case):
    """Rows with a mean far from zero, and cotangents of y and residual_out."""
    shape, kind, dtype, residual, prenorm, wide = case
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g).to(DEVICE)

    tensors = {"x": (2 + normal(*shape)).to(dtype), "weight": normal(shape[-1])}
    if residual is not None:
        tensors["residual"] = (3 * normal(*shape)).to(residual)
    if kind == "layer":
        tensors["bias"] = normal(shape[-1])
    stored = residual or (FULL if wide else dtype)
    return tensors, [normal(*shape).to(dtype)] + ([normal(*shape).to(stored)] if prenorm else [])


def run(op, case):
    def one(**tensors):
        out = op(**tensors, kind=case[1], prenorm=case[4], residual_in_fp32=case[5])
        return out if case[4] else (out,)

    return one


def loop(case):
    def one(**tensors):
        return naive.norm(**tensors, kind=case[1])[: 2 if case[4] else 1]

    return one


def sample(seed, case):
    tensors, cotangents = draw(seed, case)
    return (
        outcome(run(add_norm_native, case), tensors, cotangents, None),
        outcome(loop(case), double(tensors), cotangents, torch.float64),
        outcome(loop(case), tensors, cotangents, FULL),
    )


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def test_follows_the_formula(case):
    assert_rule(sample(seed, case) for seed in SEEDS)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("case", LOW_CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def test_low_precision_is_near(case):  # no more than near: the interpreter truncates where a GPU rounds
    got, truth, _ = sample(0, case)
    assert all((got[k].double() - truth[k]).norm() <= 2**-6 * truth[k].norm() for k in got)
    tensors, cotangents = draw(0, case)
    want = outcome(run(add_norm_eager, case), tensors, cotangents, None)
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in want.items()}


def test_more_rows_than_programs(monkeypatch):  # each program then has several tiles
    monkeypatch.setattr(launch, "PROGRAMS", 3)
    case = ((5, 27, 33), "layer", FULL, FULL, True, True)
    assert launch.tile_of_rows(33, 8, 8)["BLOCK_ROWS"] * 3 < 5 * 27
    honest, grids = launch.launch, {}
    monkeypatch.setattr(launch, "launch", lambda *a, **k: grids.setdefault(a[0], a[2]) and honest(*a, **k))
    assert_rule(sample(seed, case) for seed in SEEDS)
    assert grids[kernels.backward_kernel] <= (3,)


PLANTED = {
    "no mean(g u)": ("g - u * (tl.sum(g * u, axis=1) / D)[:, None]", "g"),
    "mean over the padding too": ("tl.sum(v * v, axis=1) / D", "tl.sum(v * v, axis=1) / BLOCK_COLUMNS"),
    "the padding of a centred row": ("v = tl.where((columns < D)[None, :], v - mean[:, None], 0.0)", "v -= mean[:, None]"),
    "a row unwritten": ("inside = (rows < M)[:, None]", "inside = (rows < M - 1)[:, None]"),
    "a program's sums lost": ("for i in range(0, programs, BLOCK_ROWS)", "for i in range(0, programs - 1, BLOCK_ROWS)"),
    "dout dropped": ("dv += _load(dout", "dv += 0 * _load(dout"),
}


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("right, wrong", PLANTED.values(), ids=PLANTED)
def test_planted_wrongness_is_seen(right, wrong, tmp_path, monkeypatch):
    plant(monkeypatch, tmp_path, kernels, launch, right, wrong)
    monkeypatch.setitem(launch.REDUCE, "BLOCK_ROWS", 1)
    with pytest.raises(AssertionError):
        assert_rule(sample(seed, CASES[1]) for seed in SEEDS[:1])


@pytest.mark.parametrize("width", [13, 32])
def test_repeats_and_ignores_its_neighbours(width):
    case = ((3, 7, width), "layer", FULL, FULL, True, True)
    tensors, cotangents = draw(0, case)
    shared = ("weight", "bias")
    alone = {k: v if k in shared else v[1:2] for k, v in tensors.items()}
    first, again = (outcome(run(add_norm_native, case), tensors, cotangents, None) for _ in range(2))
    single = outcome(run(add_norm_native, case), alone, [x[1:2] for x in cotangents], None)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert all(torch.equal(first[k][1:2], single[k]) for k in first if k[1:] not in shared)


@pytest.mark.parametrize("residual_in", [FULL, torch.bfloat16])
def test_stochastic_depth_is_a_factor_of_x(residual_in):
    """Twice a number is exact, so the kernel has the bits of a norm over the product. A residual in 16 bits is not saved."""
    kept = torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    outs = []
    for inside in (True, False):
        torch.manual_seed(0)
        x, residual, *cotangents = (torch.randn(3, 7, 13, device=DEVICE) for _ in range(4))
        residual, weight = residual.to(residual_in).requires_grad_(), torch.rand(13, device=DEVICE).requires_grad_()
        x.requires_grad_()
        given = x if inside else x * (2 * kept)[:, None, None]
        y, out = add_norm_native(given, weight, residual=residual, **({"kept": kept, "scale": 2.0} if inside else {}))
        leaves = (x, weight, residual)
        cotangents = [c.to(t.dtype) for c, t in zip(cotangents, (y, out), strict=True)]
        grads = torch.autograd.grad((y, out), leaves, cotangents, retain_graph=True)
        lone = torch.autograd.grad(out, x, cotangents[1])
        outs.append((y, out, *grads, *lone))
    assert all(map(torch.equal, *outs)) and outs[0][2][0].any() and not outs[0][2][1].any()


@pytest.mark.usefixtures("unchecked")
def test_stochastic_depth_of_another_batch_is_refused():
    x = torch.ones(2, 3, 4, device=DEVICE)
    for kept, residual in ((torch.ones(3, device=DEVICE), x), (torch.ones(2, device=DEVICE).half(), x), (x[:, 0, 0], None)):
        with pytest.raises(ValueError, match="kept must be \\(2,\\) in float32 beside a residual"):
            add_norm_native(x, x[0, 0], residual=residual, kept=kept)


def test_any_strides():
    weight, wide = torch.randn(16, device=DEVICE), torch.randn(4, 3, 48, device=DEVICE)
    x = wide[..., 16:32]
    want = add_norm_native(x.contiguous(), weight)[0]
    for strange in (x, wide[..., 15:31].roll(-1, 0), x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(add_norm_native(strange, weight)[0], add_norm_native(strange.contiguous(), weight)[0])
    assert torch.equal(add_norm_native(x, weight)[0], want)
    assert torch.equal(add_norm_native(x[:1].expand(3, 3, 16), weight)[0], want[:1].expand(3, 3, 16))


def test_the_public_operator(monkeypatch):
    monkeypatch.setattr(backends, "choose", lambda *_, **__: "native")
    case = ((2, 3, 5), "rms", FULL, FULL, True, True)
    tensors, cotangents = draw(0, case)
    for seeds in (cotangents, [cotangents[0], None]):
        got, want = (outcome(f, tensors, seeds, None) for f in (lambda **x: add_norm(**x, backend="native"), add_norm_eager))
        assert all(torch.allclose(got[k], want[k], rtol=1e-5, atol=1e-5) and got[k].dtype == want[k].dtype for k in want)
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(got["out0"], add_norm(**tensors, prenorm=False, backend="native"))
    x = tensors["x"].requires_grad_()
    (lone,) = torch.autograd.grad(add_norm(**tensors, backend="native")[1], x, cotangents[1])
    assert torch.equal(lone, cotangents[1])


def test_no_rows():
    x, weight = torch.empty(0, 4, 5, device=DEVICE, requires_grad=True), torch.ones(5, device=DEVICE, requires_grad=True)
    y, out = add_norm_native(x, weight)
    (y.sum() + out.sum()).backward()
    assert y.shape == out.shape == x.grad.shape and not weight.grad.any()


@pytest.mark.usefixtures("unchecked")
def test_what_native_has_not_is_named():
    with pytest.raises(ValueError, match=r"'native' has D of at most 8192, got x of shape \(1, 8193\)"):
        add_norm_native(torch.ones(1, 8193, device=DEVICE), torch.ones(8193, device=DEVICE))
    with pytest.raises(ValueError, match="got residual in torch.float64; use backend='torch'"):
        x = torch.ones(1, 4, device=DEVICE)
        add_norm_native(x, x[0], residual=x.double())


def test_is_an_op_that_compiles_and_recomputes():
    case = ((2, 3, 5), "layer", FULL, FULL, True, True)
    tensors, cotangents = draw(0, case)
    leaves = [tensors[k].requires_grad_() for k in ("x", "weight", "bias", "residual")]
    ops, fixed = torch.ops.videomamba, [t.detach() for t in leaves]
    kept = torch.tensor([1.0, 0.0], device=leaves[0].device)
    torch.library.opcheck(ops.add_norm.default, (*leaves, None, 1.0, 1e-5, True, FULL))
    torch.library.opcheck(ops.add_norm.default, (*leaves, kept, 1.25, 1e-5, True, FULL))
    torch.library.opcheck(ops.add_norm.default, (leaves[0], leaves[1], None, None, None, 1.0, 1e-5, False, None))
    _, out, mean, rstd = ops.add_norm(*fixed, None, 1.0, 1e-5, True, FULL)
    gradient = (out, None, fixed[1], fixed[2], None, mean, rstd, 1.0, cotangents[0], None, FULL, FULL)
    torch.library.opcheck(ops.add_norm_backward.default, gradient)

    def op(*leaves):
        y, out, *_ = ops.add_norm(*leaves, None, 1.0, 1e-5, True, FULL)
        return (y.square() + out).sum()

    def recomputed(*leaves):
        return torch.utils.checkpoint.checkpoint(op, *leaves, use_reentrant=False)

    want = torch.autograd.grad(op(*leaves), leaves)
    for other in (torch.compile(op, fullgraph=True, backend="aot_eager"), recomputed):
        assert all(map(torch.equal, want, torch.autograd.grad(other(*leaves), leaves)))


def test_compiles_without_spills(capsys):
    lines = compiled.compile_in_subprocess("norm")
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert {(line["kernel"], line["sm"]) for line in lines} == {(k, sm) for k in KERNELS for sm in (80, 90, 100)}
    compiled.assert_no_spills(lines)
