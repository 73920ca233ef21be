"""The selective scan of the `torch` backend against the loop, in every route that its blocks can take."""

import naive
import pytest
import torch
from rule import assert_rule, double, outcome
from scans import draw, sample

import reference
from fused.ops.selective_scan import recurrence
from fused.ops.selective_scan.api import selective_scan

SEEDS = range(4)
SHAPES = [(1, 1, 1, 1, None), (2, 2, 3, 1, None), (2, 17, 6, 4, 3), (1, 63, 5, 4, None)]
# the kernels for CPUs; PyTorch operations by (CPU_STEP, CPU_BLOCK): steps over the whole, in blocks of a few tokens, and
# chunks in one block, in several blocks
ROUTES = {"cpu": None, "steps": (0, 2**20), "blocks": (0, 500), "chunks": (10**6, 2**20), "chunk-blocks": (10**6, 500)}


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    """The implementation that "auto" takes on a CPU."""
    monkeypatch.setenv("VIDEOMAMBA_DISABLE_FUSED", "" if request.param == "cpu" else "1")
    step, block = ROUTES[request.param] or (0, 2**20)
    monkeypatch.setattr(recurrence, "CPU_STEP", step)
    monkeypatch.setattr(recurrence, "CPU_BLOCK", block)
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-L{}-E{}-N{}-G{}".format(*s))
@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("everything", [False, True], ids=["bare", "everything"])
def test_follows_the_loop(route, shape, reverse, everything):
    draws = (draw(seed, shape, everything, state=everything) for seed in SEEDS)
    assert_rule(sample(*d, reverse=reverse, softplus=True) for d in draws)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
def test_rounds_once(route, dtype, reverse):
    draws = [draw(seed, (2, 19, 4, 3, 2), dtype=dtype) for seed in SEEDS]
    samples = [sample(*d, reverse=reverse) for d in draws]
    assert_rule(samples)
    got, tensors = samples[0][0], draws[0][0]
    assert got["out0"].dtype == dtype and got["out1"].dtype == torch.float32
    assert all(got[f"d{name}"].dtype == x.dtype and got[f"d{name}"].shape == x.shape for name, x in tensors.items())


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"softplus": False}], ids=["forth", "back", "linear"])
def test_gradients_by_finite_differences(route, options):
    tensors, _ = draw(0, (2, 9, 4, 2, 2))
    names, values = list(tensors), [x.double().requires_grad_() for x in tensors.values()]
    op = lambda *x: selective_scan(**dict(zip(names, x, strict=True)), **options)  # noqa: E731
    assert torch.autograd.gradcheck(op, values, nondet_tol=0, fast_mode=True)


@pytest.mark.parametrize("lost", [0, 1], ids=["state only", "y only"])
def test_gradient_of_one_result(route, lost):
    draws = [draw(seed, (2, 19, 4, 3, None)) for seed in SEEDS]
    kept = "initial_state u delta A B".split() if lost == 0 else list(draws[0][0])

    def one(tensors, cotangents):
        cotangents[lost] = None
        wanted = {k: tensors[k] for k in kept}
        rest = {k: v for k, v in tensors.items() if k not in kept}
        up = {k: v.double() for k, v in rest.items()}
        return (
            outcome(lambda **x: selective_scan(**x, **rest), wanted, cotangents, None),
            outcome(lambda **x: naive.scan(**x, **up), double(wanted), cotangents, torch.float64),
            outcome(lambda **x: naive.scan(**x, **rest), wanted, cotangents, torch.float32),
        )

    assert_rule(one(*d) for d in draws)


@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("cuts", [(1,), (15, 16, 30)], ids=str)
def test_pieces_chained_by_state_are_the_whole(route, reverse, cuts):
    def chained(initial_state, A, D, delta_bias, **tokens):
        edges = [0, *cuts, 31]
        spans = list(zip(edges, edges[1:], strict=False))
        state, ys = initial_state, []
        for start, stop in reversed(spans) if reverse else spans:
            piece = {k: v[:, start:stop] for k, v in tokens.items()}
            y, state = selective_scan(A=A, D=D, delta_bias=delta_bias, initial_state=state, reverse=reverse, **piece)
            ys.append(y)
        return torch.cat(ys[::-1] if reverse else ys, dim=1), state

    def one(seed):
        tensors, cotangents = draw(seed, (1, 31, 4, 3, None))
        _, truth, plain = sample(tensors, cotangents, reverse=reverse)
        return outcome(chained, tensors, cotangents, None), truth, plain

    assert_rule(one(seed) for seed in SEEDS)


EXTREMES = {
    "delta 60": {"delta": 60.0},
    "delta -100": {"delta": -100.0},
    "delta +-30": {"delta": 30.0, "alternate": True},
    "A -1000": {"A": -1e3},
    "A -1e-7": {"A": -1e-7},
    "A 0": {"A": 0.0},
}


@pytest.mark.parametrize("extreme", EXTREMES.values(), ids=EXTREMES)
def test_any_decay(route, extreme):
    def one(seed):
        tensors, cotangents = draw(seed, (1, 25, 3, 2, None))
        if "A" in extreme:
            tensors["A"] = torch.full_like(tensors["A"], extreme["A"])
        if "delta" in extreme:
            tensors["delta"] += extreme["delta"]
        if "alternate" in extreme:
            tensors["delta"][:, ::2] -= 2 * extreme["delta"]
        return sample(tensors, cotangents)

    assert_rule(one(seed) for seed in SEEDS)


@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
def test_repeats_and_ignores_its_neighbours(route, reverse):
    tensors, cotangents = draw(0, (3, 63, 5, 4, None))
    shared = {"A", "D", "delta_bias"}
    alone = {k: v if k in shared else v[1:2] for k, v in tensors.items()}

    def run(tensors, cotangents):
        return outcome(lambda **x: selective_scan(**x, reverse=reverse), tensors, cotangents, None)

    first, again, single = run(tensors, cotangents), run(tensors, cotangents), run(alone, [x[1:2] for x in cotangents])
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert all(torch.equal(first[k][1:2], single[k]) for k in first if k[1:] not in shared)


def test_a_retained_graph_gives_the_same_gradients_again(route):
    tensors, cotangents = draw(0, (2, 17, 4, 3, None))
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    results, inputs = selective_scan(**leaves), list(leaves.values())
    first = torch.autograd.grad(results, inputs, cotangents, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(results, inputs, cotangents)))


def test_takes_any_strides(route):
    def one(seed):
        tensors, cotangents = draw(seed, (2, 19, 4, 3, 2))
        strided = {k: x.mT.contiguous().mT if x.dim() > 1 else x for k, x in tensors.items()}
        return sample(strided, [x.mT.contiguous().mT for x in cotangents])

    assert_rule(one(seed) for seed in SEEDS)


@pytest.mark.parametrize("route", ["cpu", "steps"], indirect=True)
def test_autocast_changes_nothing(route):
    tensors, cotangents = draw(0, (2, 33, 4, 3, None))
    plain = outcome(selective_scan, tensors, cotangents, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = outcome(selective_scan, tensors, cotangents, None)
    assert all(torch.equal(plain[k], cast[k]) and plain[k].dtype == cast[k].dtype for k in plain)


@pytest.mark.parametrize("route", ["cpu", "steps"], indirect=True)
def test_float64_stays_float64(route):
    tensors, cotangents = draw(0, (1, 9, 4, 3, None))
    got = outcome(selective_scan, double(tensors), cotangents, None)
    want = outcome(naive.scan, double(tensors), cotangents, None)
    assert all(x.dtype == torch.float64 for x in got.values())
    assert all((got[k] - want[k]).norm() <= 1e-14 * want[k].norm() for k in got)


@pytest.mark.parametrize("route", ["cpu", "steps"], indirect=True)
def test_keeps_no_state_of_every_token(route):
    tensors, _ = draw(0, (1, 1000, 512, 16, None), state=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        selective_scan(**{k: v.requires_grad_() for k, v in tensors.items()})
    assert sum(kept) < 1000 * 512 * 16 / 2


def test_few_operations_where_each_one_is_a_launch(monkeypatch):
    """The GPU's blocks, counted on the CPU."""
    from torch.utils._python_dispatch import TorchDispatchMode

    views = ("view", "select", "slice", "unbind", "permute", "transpose", "expand", "unsqueeze", "alias", "detach")

    class Count(TorchDispatchMode):
        launches = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.launches += not any(name in str(function) for name in (*views, "empty", "unflatten"))
            return function(*args, **kwargs or {})

    monkeypatch.setattr(recurrence, "CPU_STEP", 10**9)
    monkeypatch.setattr(recurrence, "CPU_BLOCK", recurrence.GPU_BLOCK)
    tensors, _ = draw(0, (1, 1569, 1, 1, None), state=False)
    with Count() as count, torch.no_grad():
        selective_scan(**tensors)
    assert count.launches <= 250


@pytest.mark.parametrize("route", ["cpu", "steps"], indirect=True)
def test_no_tokens_give_back_the_state(route):
    tensors, _ = draw(0, (2, 0, 4, 3, None))
    for scan in (selective_scan, reference.selective_scan):
        y, state = scan(**tensors)
        assert y.shape == (2, 0, 4) and torch.equal(state, tensors["initial_state"])


@pytest.mark.usefixtures("unchecked")  # the signature has groups of both or of none
@pytest.mark.parametrize("name", ["B", "C"])
def test_groups_of_one_of_B_and_C_alone(route, name):
    """The other is for all groups, whose gradients add up."""
    tensors, cotangents = draw(0, (2, 9, 4, 3, 2))
    tensors[name] = tensors[name][:, :, 0]
    run = lambda x: outcome(lambda **x: selective_scan(**x), x, cotangents, None)  # noqa: E731
    got, due = run(tensors), run(tensors | {name: tensors[name].unsqueeze(2).repeat(1, 1, 2, 1)})
    assert torch.equal(got["out0"], due["out0"])
    torch.testing.assert_close(got[f"d{name}"], due[f"d{name}"].sum(2))


BAD = {
    "u is no tensor": ({"u": [1.0]}, TypeError, "u must be a tensor"),
    "u of integers": ({"u": torch.ones(2, 5, 4, dtype=torch.long)}, TypeError, "u must be real floating point.*int64"),
    "complex A": ({"A": torch.ones(4, 3, dtype=torch.complex64)}, TypeError, "A must be real floating point"),
    "delta too short": ({"delta": torch.ones(2, 4, 4)}, ValueError, r"delta must have shape .*L=5.*got \(2, 4, 4\)"),
    "no states": (
        {"A": torch.ones(4, 0), "B": torch.ones(2, 5, 0), "C": torch.ones(2, 5, 0), "initial_state": torch.ones(2, 4, 0)},
        ValueError, r"A must have at least one state a channel \(N\), got \(4, 0\)",
    ),
    "A transposed": ({"A": torch.ones(3, 4)}, ValueError, r"A must have shape \(E=4, N\), got \(3, 4\)"),
    "B without tokens": ({"B": torch.ones(2, 3)}, ValueError, r"B must have shape .* or .*got \(2, 3\)"),
    "groups do not divide": ({"B": torch.ones(2, 5, 3, 3)}, ValueError, "groups of B must divide E=4, got G=3"),
    "groups differ": ({"B": torch.ones(2, 5, 2, 3), "C": torch.ones(2, 5, 4, 3)}, ValueError, "same number of groups"),
    "state transposed": ({"initial_state": torch.ones(2, 3, 4)}, ValueError, "initial_state must have shape"),
    "other device": ({"z": torch.ones(2, 5, 4, device="meta")}, ValueError, "z is on meta"),
    "unknown backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("change, error, words", BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, words):
    tensors, _ = draw(0, (2, 5, 4, 3, None))
    with pytest.raises(error, match=words):
        selective_scan(**{**tensors, **change})
