"""The scan's CUDA kernels, emulated on the CPU, against the loop: through the public operators with backend "native"."""

import compilers
import naive
import pytest
import torch
from rule import assert_rule, double, outcome
from scans import draw, sample

import fused.ops.selective_scan.native  # noqa: F401 (registers the operators)
from fused import backends, bidirectional_scan, selective_scan
from fused.ops.selective_scan import kernel_source, schedule
from fused.ops.selective_scan import launch as scan
from fused.runtime import nvrtc

pytestmark = pytest.mark.usefixtures("emulated")
SEEDS = range(4)
PAIRED = ("u", "delta", "A", "B", "C", "D", "delta_bias")
EVERYTHING, BARE = (True, True), (False, False)  # D, z and delta_bias; a state


@pytest.fixture
def always_split(monkeypatch):
    """Sequences are split even if that does not pay, as on a GPU with many free multiprocessors."""
    monkeypatch.setattr(schedule, "multiprocessors", lambda device: 1000)
    shapes = schedule.kernel_configs
    monkeypatch.setattr(schedule, "kernel_configs", lambda N: tuple(shape._replace(min_blocks_per_sm=3) for shape in shapes(N)))
    for name, value in {"MIN_TILES_PER_SPLIT": 2, "SPLIT_START": 0}.items():
        monkeypatch.setattr(schedule, name, value)
    schedule.make_schedule.cache_clear()
    yield
    schedule.make_schedule.cache_clear()


@pytest.mark.parametrize(
    ("shape", "given", "options"),
    [
        ((1, 1, 1, 1), EVERYTHING, {}),
        ((2, 15, 3, 4), BARE, {}),
        ((1, 16, 8, 16), EVERYTHING, {"reverse": True}),
        ((2, 33, 36, 16), EVERYTHING, {}),
        ((2, 17, 5, 3), EVERYTHING, {"reverse": True}),
        ((1, 18, 6, 20), (False, True), {"softplus": False}),
        ((1, 17, 4, 4), EVERYTHING, {"softplus": False}),
        ((1, 17, 4, 4), EVERYTHING, {"softplus": False, "reverse": True}),
        ((1, 17, 5, 40), EVERYTHING, {}),
        ((1, 18, 8, 48), EVERYTHING, {"reverse": True}),
        ((1, 19, 12, 64), EVERYTHING, {}),
        ((1, 18, 64, 16), EVERYTHING, {}),
        ((1, 21, 8, 4, 2), EVERYTHING, {"reverse": True}),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else "".join(x),
)
def test_equals_the_loop(shape, given, options):
    draws = [draw(seed, shape, *given) for seed in SEEDS]
    if "softplus" in options:
        for tensors, _ in draws:
            tensors["delta"] = tensors["delta"].abs()
    assert_rule(sample(*d, "native", **options) for d in draws)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(
    ("clips", "multiprocessors", "split_schedule"),
    [(1, 6, (1, 0, 3, 3)), (13, 2, (13, 12, 3, 3))],
    ids=["every sequence", "the last sequence"],
)
def test_sequences_are_split(clips, multiprocessors, split_schedule, reverse, always_split, monkeypatch):
    monkeypatch.setattr(schedule, "multiprocessors", lambda device: multiprocessors)
    assert schedule.make_schedule(clips, 130, 2, 4, 1, multiprocessors).fwd_schedule == split_schedule
    assert_rule(sample(*draw(seed, (clips, 130, 2, 4)), "native", reverse=reverse) for seed in SEEDS)


@pytest.mark.parametrize("num_unsplit", [1, 2])
def test_a_backward_of_split_and_unsplit_sequences(num_unsplit, always_split, monkeypatch):
    """The model of costs chooses it for more sequences than can be emulated."""
    chosen = schedule.make_schedule.__wrapped__
    splits = schedule.SplitSchedule(3, num_unsplit, 3, 3)
    with monkeypatch.context() as patch:
        patch.setattr(schedule, "make_schedule", lambda *a, **k: chosen(*a, **k)._replace(bwd_schedule=splits))
        assert_rule(sample(*draw(seed, (3, 130, 2, 4)), "native") for seed in SEEDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", [(2, 19, 8, 16), (2, 19, 9, 16), (2, 19, 11, 16), (2, 63, 24, 1)], ids=str)
def test_half_precision_rounds_once(dtype, shape):
    draws = [draw(seed, shape, dtype=dtype) for seed in SEEDS]
    samples = [sample(*d, "native") for d in draws]
    assert_rule(samples)
    got, tensors = samples[0][0], draws[0][0]
    assert got["out0"].dtype == dtype and got["out1"].dtype == torch.float32
    assert all(got[f"d{name}"].dtype == x.dtype and got[f"d{name}"].shape == x.shape for name, x in tensors.items())


def test_inputs_of_unlike_dtypes_are_those_in_float32():
    tensors, _ = draw(0, (1, 17, 4, 4))
    tensors |= {"u": tensors["u"].half(), "B": tensors["B"].bfloat16(), "z": tensors["z"].bfloat16()}
    y, state = selective_scan(**tensors, backend="native")
    due, due_state = selective_scan(**{name: x.float() for name, x in tensors.items()}, backend="native")
    assert y.dtype == torch.float16 and torch.equal(y, due.half()) and torch.equal(state, due_state)


def test_a_result_that_is_not_used_has_a_gradient_of_zeros():
    tensors, (dy, dstate) = draw(0, (1, 17, 4, 4))
    run = lambda *seeds: outcome(lambda **x: selective_scan(**x, backend="native"), tensors, seeds, None)  # noqa: E731
    for seeds in ((None, dstate), (dy, None)):
        zeros = [torch.zeros_like(x) if seed is None else seed for x, seed in zip((dy, dstate), seeds, strict=True)]
        found, due = run(*seeds), run(*zeros)
        assert all(torch.equal(found[name], due[name]) for name in due)


def both(tensors, op):
    pairs = {k: (tensors[k], tensors[k + "_b"]) for k in PAIRED if k in tensors}
    return [op(pairs, tensors.get("z"))]


def two_loops(pairs, z):
    first, second = ({k: v[i] for k, v in pairs.items()} for i in range(2))
    return naive.scan(**first, z=z)[0] + naive.scan(**second, z=z, reverse=True)[0]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 40, 49, 90])
def test_directions_meet_in_the_middle(length, always_split):
    samples = []
    for seed in SEEDS:
        tensors, (dy, _) = draw(seed, (2, length, 4, 16), everything=length != 40, state=False)
        other, _ = draw(seed + 100, (2, length, 4, 16), everything=length != 40, state=False)
        tensors |= {k + "_b": v for k, v in other.items() if k in PAIRED}
        native = lambda **x: both(x, lambda pairs, z: bidirectional_scan(**pairs, z=z, backend="native"))  # noqa: E731
        loops = lambda **x: both(x, two_loops)  # noqa: E731
        samples.append(
            (outcome(native, tensors, [dy], None), outcome(loops, double(tensors), [dy], torch.float64),
             outcome(loops, tensors, [dy], torch.float32))
        )  # fmt: skip
    assert_rule(samples)


@pytest.mark.parametrize("order", ["reverse", "random:1"])
def test_order_of_threads_changes_nothing(order, monkeypatch):
    tensors, cotangents = draw(0, (1, 40, 40, 16))
    run = lambda: outcome(lambda **x: selective_scan(**x, backend="native"), tensors, cotangents, None)  # noqa: E731
    first = run()
    monkeypatch.setenv("EMULATION_ORDER", order)
    assert all(torch.equal(x, first[name]) for name, x in run().items())


def test_reads_in_place_through_strides():
    tensors, cotangents = draw(0, (2, 20, 8, 4))
    whole = outcome(lambda **x: selective_scan(**x, backend="native"), tensors, cotangents, None)
    xz = torch.cat((tensors["u"], tensors["z"]), 2)
    rows = torch.cat((torch.zeros(2, 20, 3), tensors["B"], tensors["C"]), 2)
    strided = tensors | {"u": xz[..., :8], "z": xz[..., 8:], "B": rows[..., 3:7], "C": rows[..., 7:]}
    strided["delta"] = tensors["delta"].transpose(1, 2).contiguous().transpose(1, 2)
    y, state = selective_scan(**strided, backend="native")
    assert torch.equal(y, whole["out0"]) and torch.equal(state, whole["out1"])


def test_batch_invariant_clip_is_independent_of_its_batch(always_split, monkeypatch):
    monkeypatch.setattr(schedule, "multiprocessors", lambda device: 3)
    for clips, splits in ((1, 3), (3, 1)):
        found = schedule.make_schedule(clips, 130, 4, 16, 1, 3)
        assert found.fwd_schedule.num_splits == found.bwd_schedule.num_splits == splits
    tensors, (dy, dstate) = draw(0, (3, 130, 4, 16))
    run = lambda part: outcome(lambda **x: selective_scan(**x, backend="native"), part, seeds, None)  # noqa: E731
    per_clip = ("u", "delta", "B", "C", "z", "initial_state")
    with backends.batch_invariant():
        seeds = [dy, dstate]
        whole = run(tensors)
        seeds = [dy[1:2], dstate[1:2]]
        alone = run({k: v[1:2] if k in per_clip else v for k, v in tensors.items()})
    for name in ("out0", "out1", *(f"d{k}" for k in per_clip)):
        assert torch.equal(whole[name][1:2], alone[name]), name


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "z"])
def test_nan_propagates(name):
    tensors, _ = draw(0, (1, 20, 5, 4), state=False)
    tensors[name].view(-1)[0] = float("nan")
    y, state = selective_scan(**tensors, backend="native")
    assert y[0, 0].isnan().any() and (name == "z" or state.isnan().any())


def test_empty_inputs():
    tensors, _ = draw(0, (0, 7, 3, 4))
    y, state = selective_scan(**tensors, backend="native")
    assert y.shape == (0, 7, 3) and state.shape == (0, 3, 4)
    tensors, _ = draw(0, (2, 0, 3, 4))
    y, state = selective_scan(**tensors, backend="native")
    assert y.shape == (2, 0, 3) and torch.equal(state, tensors["initial_state"])


def test_unsupported_inputs_raise():
    with pytest.raises(ValueError, match="N up to 64, got N=65"):
        selective_scan(**draw(0, (1, 2, 3, 65))[0], backend="native")
    with pytest.raises(ValueError, match="supports float16, bfloat16, float32, got torch.float64"):
        selective_scan(**double(draw(0, (1, 2, 3, 4))[0]), backend="native")


def test_operators_pass_opcheck():
    tensors, _ = draw(0, (1, 18, 4, 4))
    pairs = [[tensors[k].requires_grad_()] for k in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    z, state = tensors["z"].requires_grad_(), tensors["initial_state"].requires_grad_()
    operator = torch.ops.videomamba.selective_scan.default
    torch.library.opcheck(operator, (*pairs, z, state, True, [False], False, True))
    torch.library.opcheck(operator, (*pairs[:5], [None], [None], None, None, True, [True], False, True))
    both = [[*pair, pair[0].detach().clone().requires_grad_()] for pair in pairs]
    torch.library.opcheck(operator, (*both, z, None, True, [False, True], False, True))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_tuned_kernels_do_not_spill(arch, capsys):
    if reason := nvrtc.compiler_unavailable():
        pytest.skip(reason)
    over = []
    tuned = ((1, 2, 1, 0), (2, 1, 1, 1), (2, 2, 1, 0), (2, 2, 1, 1))
    for directions, softplus, gated, keeps in tuned if arch == "sm_90" else tuned[-1:]:
        chosen_schedule = schedule.make_schedule(1, 16, 64, 16, directions, 1)
        macros = kernel_source.defines(
            io_dtype=torch.bfloat16, schedule=chosen_schedule, directions=directions,
            vectorized=True, vectorized_bc=True, no_padding=True,
            softplus=softplus, has_z=bool(gated), store_tile_states=bool(keeps),
        )  # fmt: skip
        found = {}
        for program in ("forward", "backward") if keeps else ("forward",):
            found |= nvrtc.resources(kernel_source.source(program), macros, arch)
        with capsys.disabled():
            for name, r in found.items():
                which = f"{arch} {directions} {softplus} {keeps} {name}"
                print(f"\n{which}: {r.registers} registers, {r.spills} bytes spilt, {r.stack} of stack", end="")
        assert {"scan_forward", *(["scan_backward"] if keeps else [])} <= set(found)
        for name, r in found.items():
            # the backward keeps three blocks of 168 registers on a multiprocessor: fewer blocks without a spill were slower
            if r.spills > (160 if name == "scan_backward" else 0):
                over.append(f"{name} on {arch}, {directions} directions: {r.spills} bytes spilt")
    compilers.fail_or_warn("NVRTC", over)


@pytest.mark.parametrize("num_unsplit", [0, 12])
def test_given_split_initial_states_change_no_bit(num_unsplit):
    g = torch.Generator().manual_seed(0)
    B, L, E, N = 13, 130, 2, 4

    def normal(*size):
        return torch.randn(*size, generator=g)

    A, D, (u, delta, z) = -normal(E, N).exp(), normal(E), (normal(B, L, E) for _ in range(3))
    s = scan.ScanInputs((False,), (u,), (delta,), (A,), (normal(B, L, N),), (normal(B, L, N),), (D,), (D,), z)
    plan = schedule.make_schedule(B, L, E, N, 1, 2)._replace(fwd_schedule=schedule.SplitSchedule(B, num_unsplit, 3, 3))
    first = scan.forward(s, None, plan, keep=True)
    again = scan.forward(s, None, plan, keep=True, split_initial_states=first.split_initial_states)
    for name in ("y", "final_states", "y_pre_gate", "tile_states"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name


def test_second_derivatives_raise():
    u, delta, B, C = (torch.randn(1, 5, 4, requires_grad=True) for _ in range(4))
    A = -torch.rand(4, 4)
    for y in (
        selective_scan(u, delta, A, B, C, backend="native")[0],
        bidirectional_scan((u, u), (delta, delta), (A, A), (B, B), (C, C), backend="native"),
    ):
        (du,) = torch.autograd.grad(y.square().sum(), u, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            du.sum().backward()


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"u": torch.randn(2, 3, 4)}, r"u must be alike in both directions, got \(2, 5, 4\) .* and \(2, 3, 4\)"),
        ({"u": torch.randn(2, 5, 4).bfloat16()}, "u must be alike .* of torch.float32 .* torch.bfloat16"),
        ({"A": -torch.rand(4, 8)}, r"A must be alike in both directions, got \(4, 3\) .* and \(4, 8\)"),
    ],
    ids=["tokens", "dtypes", "states"],
)
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_directions_that_differ_raise(backend, second, words):
    first = {"u": torch.randn(2, 5, 4), "A": -torch.rand(4, 3)}
    pairs = [first, first | second]
    own = [one["u"].shape[:2] + (one["A"].shape[1],) for one in pairs]
    u, A = (tuple(one[name] for one in pairs) for name in ("u", "A"))
    B, C = (tuple(torch.randn(*size) for size in own) for _ in range(2))
    with pytest.raises(ValueError, match=words):
        bidirectional_scan(u, u, A, B, C, backend=backend)


def test_groups_in_another_half_precision_than_autocast():
    u, delta = (torch.randn(1, 5, 4).half() for _ in range(2))
    B, C = (torch.randn(1, 5, 2, 4).half() for _ in range(2))
    due, state = selective_scan(u, delta, -torch.ones(4, 4), B, C, backend="native")
    with torch.autocast("cpu", torch.bfloat16):
        got, other = selective_scan(u, delta, -torch.ones(4, 4), B, C, backend="native")
    assert got.dtype == torch.float16 and torch.equal(got, due) and torch.equal(state, other)
