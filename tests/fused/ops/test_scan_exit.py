"""State passes that stop where all is forgotten: the kernels, emulated on the CPU, against the loop and the unsplit scan."""

import emulation
import naive
import pytest
import torch
from rule import NORMS, assert_rule

from fused.ops.selective_scan import launch as scan
from fused.ops.selective_scan import schedule
from fused.ops.selective_scan.kernel_source import SOFTPLUS_NONE
from fused.runtime import nvrtc

TILES, SPLITS = 4, 3  # of a split; of a sequence
LENGTH = 16 * TILES * SPLITS - 5
NAMES = ("u", "delta", "A", "B", "C", "D")


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """The kernels run on the CPU."""
    if reason := emulation.unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(nvrtc, "module", emulation.module)


def drawn(seed=0, clips=1, E=8, N=4, dtype=torch.float32, directions=2, delta=2.0):
    """Inputs that are forgotten after 2^-60 / exp(-delta) tokens: A is -1 or less, and delta is near `delta`."""
    g = torch.Generator().manual_seed(seed)

    def pair(*size, to=dtype):
        return [torch.randn(*size, generator=g).to(to) for _ in range(directions)]

    steps = [(delta * (0.8 + 0.4 * torch.rand(clips, LENGTH, E, generator=g))).to(dtype) for _ in range(directions)]
    A = [-1 - 3 * torch.rand(E, N, generator=g) for _ in range(directions)]
    B, C = pair(clips, LENGTH, N), pair(clips, LENGTH, N)
    return scan.ScanInputs(
        (False, True)[:directions], pair(clips, LENGTH, E), steps, A, B, C, pair(E, to=torch.float32), [None] * directions,
        pair(clips, LENGTH, E)[0], SOFTPLUS_NONE,
    )  # fmt: skip


def results(s, splits=SPLITS, forward_only=False, cotangent=None):
    """Return named results and gradients of a scan in so many splits, and how its state passes exited."""
    B, L, E, N = s.sizes
    plan = schedule.make_schedule.__wrapped__(B, L, E, N, len(s.reverses), 2)
    plan = plan._replace(
        fwd_schedule=cut(B * -(-E // plan.fwd_config.channels), splits),
        bwd_schedule=cut(B * len(s.reverses) * -(-E // plan.bwd_config.channels), splits),
    )  # fmt: skip
    lean, kept = (scan.forward(s, None, plan, keep=keep) for keep in (False, True))
    found = {"y": lean.y, "kept y": kept.y, "final states": lean.final_states, "tile states": kept.tile_states}
    found |= {} if lean.split_initial_states is None or splits == 1 else {"entering": lean.split_initial_states}
    exits = [lean.state_passing.exits(), kept.state_passing.exits()]
    if not forward_only:
        dB, dC = ([torch.empty_like(x) for x in pair] for pair in (s.B, s.C))
        dy = torch.ones_like(s.u[0]) if cotangent is None else cotangent
        g = scan.backward(s, dy, None, kept.tile_states, kept.y_pre_gate, plan, dB, dC)
        found |= {"dz": g.z, "dinitial": g.initial_states}
        for name, pair in zip(NAMES, (g.u, g.delta, g.A, dB, dC, g.D), strict=True):
            found |= {f"d{name}{i}": x for i, x in enumerate(pair)}
        exits.append(g.state_passing.exits())
    return found, exits


def cut(sequences, splits):
    if splits == 1:
        return schedule.SplitSchedule(sequences, sequences, 1, TILES * SPLITS)
    return schedule.SplitSchedule(sequences, 0, splits, TILES)


def loops(s, precision, cotangent=None):
    """Return results and gradients of the loop in a precision."""
    leaves = {f"{name}{i}": x.to(precision).requires_grad_() for name in NAMES for i, x in enumerate(getattr(s, name))}
    z = s.z.to(precision).requires_grad_()
    states = []
    y = 0
    for i, reverse in enumerate(s.reverses):
        own = {name: leaves[f"{name}{i}"] for name in NAMES}
        part, state = naive.scan(**own, softplus=False, reverse=reverse)
        y, states = y + part, [*states, state]
    y = y * torch.nn.functional.silu(z)
    dy = torch.ones_like(y) if cotangent is None else cotangent.to(precision)
    grads = torch.autograd.grad(y, [z, *leaves.values()], dy)
    named = {f"d{name}": x for name, x in zip(leaves, grads[1:], strict=True)}
    return {"y": y.detach(), "final states": torch.stack(states).detach(), "dz": grads[0]} | named


def assert_follows_the_loop(draws, exited=True, rescanned=0, cotangent=None):
    """Split scans keep the rule; their state passes exit, and none is wrong unless `rescanned` says how many."""
    samples = []
    for s in draws:
        got, exits = results(s, cotangent=cotangent)
        truth, plain = loops(s, torch.float64, cotangent), loops(s, torch.float32, cotangent)
        samples.append(({k: v for k, v in got.items() if k in truth}, truth, plain))
        for e in exits:
            assert (e.exited > 0) == exited and e.rescanned <= rescanned, e
    assert_rule(samples)


@pytest.mark.parametrize(
    ("options", "exited"),
    [
        ({}, True),
        ({"directions": 1, "clips": 2}, True),
        ({"N": 16, "E": 64}, True),
        ({"N": 3, "E": 5}, True),
        ({"N": 20}, True),
        ({"N": 16, "E": 24, "dtype": torch.bfloat16}, True),
        ({"dtype": torch.float16}, True),
        ({"delta": 0.01}, False),
    ],
    ids=str,
)
def test_follows_the_loop(options, exited):
    assert_follows_the_loop([drawn(seed, **options) for seed in range(4)], exited)


def test_a_state_pass_reads_what_is_remembered_and_no_more():
    plan_of = lambda delta: results(drawn(delta=delta), forward_only=True)[1][0]  # noqa: E731
    passes = SPLITS - 1
    assert [plan_of(delta).exited for delta in (0.01, 0.5, 2.0)] == [0, 0, 2 * passes]
    assert all(plan_of(delta).state_passes == passes for delta in (0.01, 2.0))


def spike(value, where="u", token=16 * TILES - 40):
    """One value far before the end of the first split, and after the start of the last one, of both directions."""
    s = drawn(N=16)
    for x in getattr(s, where):
        x[:, token, 1] = value
        x[:, LENGTH - token, 1] = value
    return s


@pytest.mark.parametrize("where", ["u", "B"])
@pytest.mark.parametrize("value", [1e4, 1e10])
def test_a_spike_that_is_forgotten_is_forgotten(value, where):
    assert_follows_the_loop([spike(value, where)])


def visible_spike():
    """One value before what the state passes read, so large that it can be seen behind that."""
    s = spike(1e36, token=16 * TILES - 18)
    for delta, A in zip(s.delta, s.A, strict=True):
        delta.fill_(2.7), A.fill_(-1)
    return s


def test_a_spike_that_is_still_visible_is_not_forgotten():
    s = visible_spike()
    got, exits = results(s, forward_only=True)
    assert exits[0].exited and exits[0].rescanned
    once, _ = results(s, 1, forward_only=True)
    assert all(torch.equal(x, once[name]) for name, x in got.items() if name != "entering")
    tiles = once["tile states"]
    assert torch.equal(got["entering"][0, :, 1:], tiles[0, :, TILES::TILES])
    truth = loops(s, torch.float64)
    after = slice(16 * TILES, 16 * TILES + 4)
    for norm in NORMS.values():
        size = norm(truth["y"][:, after])
        assert size > 1e6 and norm(got["y"][:, after] - truth["y"][:, after]) < 1e-4 * size


@pytest.mark.parametrize(("name", "value"), [("u", "nan"), ("u", "-inf"), ("delta", "nan"), ("B", "inf")])
@pytest.mark.parametrize("token", [2, 16 * TILES - 3, 16 * TILES + 20])
def test_what_is_not_finite_goes_on_as_without_splits(name, value, token):
    s = drawn(N=16)
    for x in getattr(s, name):
        x[0, token, 1] = float(value)
    got, _ = results(s)
    once, _ = results(s, 1)
    for key, x in got.items():
        if key != "entering":
            assert torch.equal(x.isfinite(), once[key].isfinite()), key
    assert not got["final states"].isfinite().all()


def test_a_cotangent_that_is_not_finite_goes_on_as_without_splits():
    s = drawn()
    dy = torch.ones_like(s.u[0])
    dy[0, [40, LENGTH - 40]] = float("nan")
    got, exits = results(s, cotangent=dy)
    once, _ = results(s, 1, cotangent=dy)
    assert exits[2].rescanned == 2
    assert all(torch.equal(x.isfinite(), once[key].isfinite()) for key, x in got.items() if key != "entering")


@pytest.mark.parametrize("which", ["u", "delta", "one channel's delta", "A"])
def test_zeros_keep_what_was_before(which):
    """For a whole split nothing enters, or nothing is forgotten."""
    draws = []
    for seed in range(4):
        s = drawn(seed, delta=0.7)
        middle = slice(16 * TILES, 32 * TILES)
        for i in range(2):
            if which == "A":
                s.A[i][1, 2] = 0
            else:
                x = s.u[i] if which == "u" else s.delta[i]
                x[:, middle, slice(1, 2) if which == "one channel's delta" else slice(None)] = 0
        draws.append(s)
    samples = []
    for s in draws:
        got, exits = results(s)
        truth, plain = loops(s, torch.float64), loops(s, torch.float32)
        samples.append(({k: v for k, v in got.items() if k in truth}, truth, plain))
        assert all(e.rescanned == 0 for e in exits)
    assert_rule(samples)


def test_negative_steps_recall_what_was_forgotten():
    draws = []
    for seed in range(4):
        s = drawn(seed)
        for i, at in enumerate((16 * TILES - 30, LENGTH - 16 * TILES + 5)):
            s.delta[i][:, at : at + 2] *= -1
        draws.append(s)
    samples = []
    for s in draws:
        got, _ = results(s)
        truth, plain = loops(s, torch.float64), loops(s, torch.float32)
        samples.append(({k: v for k, v in got.items() if k in truth}, truth, plain))
    assert_rule(samples)


@pytest.mark.parametrize("order", ["reverse", "random:1"])
def test_order_of_threads_changes_nothing(order, monkeypatch):
    s = visible_spike()
    first, exits = results(s)
    assert exits[0].rescanned
    monkeypatch.setenv("EMULATION_ORDER", order)
    again, _ = results(s)
    assert all(torch.equal(x.nan_to_num(), first[name].nan_to_num()) for name, x in again.items())
