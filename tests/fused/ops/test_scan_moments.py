"""State passes by moments: the kernels, emulated on the CPU, against the loop and the exact state passes."""

import math
from functools import partial

import naive
import pytest
import torch
from rule import assert_rule

from fused import backends
from fused.models.bimba.interleave import places_of
from fused.models.bimba.query_mixer import mix_at_queries
from fused.modules.mamba import Mamba
from fused.ops.selective_scan import launch as scan
from fused.ops.selective_scan import schedule
from fused.ops.selective_scan.kernel_source import SOFTPLUS_BY_CALLER, SOFTPLUS_NONE

pytestmark = [
    pytest.mark.usefixtures("emulated"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton 3.6's interpreter
]

TILES, SPLITS, E, N = 4, 3, 64, 16  # tiles of a split, splits of a sequence
LENGTH = 16 * TILES * SPLITS - 5


def drawn(seed=0, steps=(1e-3, 1e-1), directions=2, dtype=torch.bfloat16, clips=1):
    """Inputs as a mixer's, with steps log-uniform over channels and A of -1 to -16; C of long sequences has z."""
    g = torch.Generator().manual_seed(seed)

    def pair(*size, to=dtype):
        return [torch.randn(*size, generator=g).to(to) for _ in range(directions)]

    low, high = (math.log(x) for x in steps)
    delta = []
    for _ in range(directions):
        size = (low + (high - low) * torch.rand(E, generator=g)).exp()
        delta.append((size * (0.8 + 0.4 * torch.rand(clips, LENGTH, E, generator=g))).to(dtype))
    A = [-torch.arange(1.0, N + 1).repeat(E, 1) for _ in range(directions)]
    rows = [x.split((N, N), dim=2) for x in pair(clips, LENGTH, 2 * N)]
    return scan.ScanInputs(
        (False, True)[:directions], pair(clips, LENGTH, E), delta, A, *map(list, zip(*rows, strict=True)),
        pair(E, to=torch.float32), [None] * directions, pair(clips, LENGTH, E)[0], SOFTPLUS_BY_CALLER,
    )  # fmt: skip


def plan_of(s):
    B, L, E, N = s.sizes
    plan = schedule.make_schedule.__wrapped__(B, L, E, N, len(s.reverses), 2)
    splits = schedule.SplitSchedule(B * E // plan.fwd_config.channels, 0, SPLITS, TILES)
    return plan._replace(fwd_schedule=splits, moments_schedule=splits)


def scanned(s, only_y=True, **options):
    return scan.forward(s, None, plan_of(s), keep=False, only_y=only_y, **options)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(
    "steps", [(1e-3, 1e-1), (1e-3, 1e-2), (0.05, 2.0), (0.69, 0.7), (1e-5, 1e-4)], ids=str
)
def test_y_follows_the_loop(steps, directions):
    samples = []
    for seed in range(4):
        s = drawn(seed, steps, directions)
        got = scanned(s)
        assert got.by_moments
        samples.append(({"y": got.y}, naive.scan_of_mixer(s, torch.float64), naive.scan_of_mixer(s, torch.float32)))
    assert_rule(samples)


def test_states_have_the_error_of_bfloat16_products_and_no_more():
    errors = []
    for seed in range(4):
        s = drawn(seed, (1e-3, 1e-2))
        got, exact = (scanned(s, only_y).split_initial_states for only_y in (True, False))
        errors.append(((got - exact).norm() / exact.norm()).item())
    assert 2e-4 < min(errors) and max(errors) < 2**-8, errors


@pytest.mark.parametrize("steps", [(1e-3, 1e-1), (0.02, 0.1), (0.02, 1.0)], ids=str)
def test_no_state_is_further_off(steps):
    """By state: the fastest ones, of tiles which the polynomial cannot give, too."""
    got, exact = (scanned(drawn(0, steps), only_y).split_initial_states for only_y in (True, False))
    for n in range(N):
        assert (got - exact)[..., n].norm() < 2**-8 * exact[..., n].norm(), n


@pytest.mark.parametrize("steps", [(0.4, 2.0), (1.0, 1.1)], ids=str)
def test_tiles_that_forget_fast_are_walked_token_by_token(steps):
    """|A| G is above 5 in every tile, or the tile is forgotten: states are exact to float32's rounding."""
    got, exact = (scanned(drawn(0, steps), only_y).split_initial_states for only_y in (True, False))
    assert (got - exact).norm() < 1e-5 * exact.norm()


def fast(delta=2.7, seed=0):
    """Inputs whose slowest state, with A = -1, is below 2^-60 after 42 / delta tokens."""
    s = drawn(seed)
    for x in s.delta:
        x.fill_(delta)
    return s


@pytest.mark.parametrize(("delta", "read"), [(2.7, 1), (1.4, 2), (0.9, 3), (0.6, TILES)])
def test_a_state_pass_reads_what_is_remembered_and_no_more(delta, read):
    passing, passes = scanned(fast(delta)).state_passing, SPLITS - 1
    exited = 2 * E // 16 * passes if read < TILES else 0
    assert passing.exits() == (E // 16 * passes, exited, 0)
    forward, backward = passing.unvisited_tiles[:, 0]  # (splits, blocks of channels); the last split has no state pass
    assert (forward[:-1] == TILES - read).all() and (forward[-1] == 0).all()
    assert (backward[1:-1] == TILES - read).all() and (backward[0] == 0).all()


def test_operators_never_exit():
    for result in (scanned(fast(), only_y=False), scan.forward(fast(), None, plan_of(fast()), keep=True)):
        assert result.state_passing.exits() == (E // 16 * (SPLITS - 1), 0, 0)


def spiked(value, behind=18):
    """One value in the first split of each direction, `behind` tokens before its end: the state passes read 16."""
    s = fast()
    s.u[0][:, 16 * TILES - behind, 3] = value
    s.u[1][:, 16 * TILES * (SPLITS - 1) + behind - 1, 3] = value
    return s


def test_a_wrong_exit_is_found_and_the_sequence_scanned_as_if_it_were_not_split():
    s = spiked(1e36)
    got = scanned(s)
    assert got.state_passing.exits()[1:] == (2 * E // 16 * (SPLITS - 1), 1)  # the sequence of channel 3
    once = scan.forward(s, None, schedule.make_schedule(1, LENGTH, E, N, 2, 1), keep=True)
    own = slice(0, 16)
    assert torch.equal(got.y[..., own], once.y[..., own])
    assert torch.equal(got.final_states[:, :, own], once.final_states[:, :, own])
    entering = got.split_initial_states[0, :, :, own]  # by split
    assert torch.equal(entering[:, 1:], once.tile_states[0, :, TILES::TILES, own])
    behind = naive.scan_of_mixer(s, torch.float64)["y"][:, 16 * TILES : 16 * TILES + 4, 3].abs()
    assert (behind > 1e6).all()  # the state of the spike can be seen behind the split


@pytest.mark.parametrize("behind", [18, 40])
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_a_spike_that_is_forgotten_is_no_reason_to_scan_again(value, behind):
    s = spiked(value, behind)
    got = scanned(s)
    assert got.state_passing.exits().rescanned == 0
    assert_rule([({"y": got.y}, naive.scan_of_mixer(s, torch.float64), naive.scan_of_mixer(s, torch.float32))])


def test_a_split_without_inputs_hands_on_what_was_before():
    """u is 0 in the tiles that are read first: the state is small there, but not nothing."""
    samples = []
    for seed in range(4):
        s = fast(seed=seed)
        s.u[0][:, 16 * TILES - 17 : 16 * TILES], s.u[1][:, 16 * TILES * 2 : 16 * TILES * 2 + 17] = 0, 0
        got = scanned(s)
        assert got.state_passing.exits().rescanned == 0
        samples.append(({"y": got.y}, naive.scan_of_mixer(s, torch.float64), naive.scan_of_mixer(s, torch.float32)))
    assert_rule(samples)


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("name", ["u", "delta", "B"])
def test_what_is_not_finite_goes_on(name, value):
    for s in (drawn(), fast()):
        for x in getattr(s, name):
            x[0, 20, 1] = float(value)
        got, exact = (scanned(s, only_y) for only_y in (True, False))
        assert torch.equal(got.y.isfinite(), exact.y.isfinite())
        assert torch.equal(got.final_states.isfinite(), exact.final_states.isfinite())


MIDDLE = slice(16 * TILES, 32 * TILES)  # the second split


def _spike(s, i):
    s.u[i][:, [50, 130], 3] = 1e4


def _step(s, i):
    """u is constant, of one sign before and of another after the middle."""
    s.u[i][:, :90], s.u[i][:, 90:] = -1, 1


def _fill(name, where, value):
    def change(s, i):
        getattr(s, name)[i][:, where] = value

    return change


EXTREMES = {
    "spike": _spike, "step": _step, "delta 0 in a split": _fill("delta", MIDDLE, 0), "u 0 in a split": _fill("u", MIDDLE, 0),
    "u 0": _fill("u", slice(None), 0), "u 1e4": _fill("u", slice(None), 1e4), "B 0 in a split": _fill("B", MIDDLE, 0),
}  # fmt: skip


@pytest.mark.parametrize("steps", [(0.6, 0.8), (1e-3, 1e-1)], ids=["fresh", "long-memory"])
@pytest.mark.parametrize("which", EXTREMES)
def test_extremes_follow_the_loop(which, steps):
    samples = []
    for seed in range(4):
        s = drawn(seed, steps)
        for i in range(2):
            EXTREMES[which](s, i)
        got = scanned(s)
        assert got.by_moments and got.state_passing.exits().rescanned == 0
        samples.append(({"y": got.y}, naive.scan_of_mixer(s, torch.float64), naive.scan_of_mixer(s, torch.float32)))
    assert_rule(samples)


def test_only_calls_whose_states_nobody_reads_sum_by_moments():
    s = drawn()
    half, narrow = drawn(dtype=torch.float16), drawn()
    narrow = narrow._replace(
        **{name: [x[..., :24].contiguous() for x in getattr(s, name)] for name in ("u", "delta")},
        A=[x[:24].contiguous() for x in s.A], D=[x[:24].contiguous() for x in s.D], z=s.z[..., :24].contiguous(),
    )  # fmt: skip
    shifted = s._replace(B=[torch.nn.functional.pad(x, (4, 4))[..., 4:20] for x in s.B])
    assert scanned(s).by_moments
    given = scanned(s).split_initial_states
    others = [
        scanned(s, only_y=False), scan.forward(s, None, plan_of(s), keep=True, only_y=True), scanned(half),
        scanned(narrow), scanned(shifted), scanned(s._replace(softplus=SOFTPLUS_NONE)), scanned(s, split_initial_states=given),
        scan.forward(s, None, schedule.make_schedule(1, LENGTH, E, N, 2, 1), keep=False, only_y=True),
    ]  # fmt: skip
    assert not any(other.by_moments for other in others)


@pytest.mark.parametrize("order", ["reverse", "random:1"])
def test_order_of_threads_changes_nothing(order, monkeypatch):
    first = scanned(drawn(steps=(1e-2, 1.0))).y
    monkeypatch.setenv("EMULATION_ORDER", order)
    assert torch.equal(scanned(drawn(steps=(1e-2, 1.0))).y, first)


def test_a_mixer_sums_by_moments_where_no_gradient_is_wanted(monkeypatch):
    """The whole mixer and one at query rows; what comes out is hardly different."""
    pytest.importorskip("triton", reason="the convolution's kernels are Triton's")
    monkeypatch.setattr(backends, "unavailable", lambda backend, device: None)
    monkeypatch.setattr(schedule, "make_schedule", partial(schedule.make_schedule.__wrapped__, num_splits=2))
    by_moments, forward = [], scan.forward

    def spied(*arguments, **options):
        result = forward(*arguments, **options)
        by_moments.append(result.by_moments)
        return result

    monkeypatch.setattr(scan, "forward", spied)
    torch.manual_seed(0)
    mixer = Mamba(32, d_state=N).bfloat16()
    tokens, places = torch.randn(1, 260, 32).bfloat16(), places_of(250, 10, torch.device("cpu"))
    outs = {}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            rows = mix_at_queries(mixer, tokens, tokens[:, places.queries], places, "native")
            outs[grad] = rows, mixer(tokens, backend="native")
    assert by_moments == [True, True, False, False]
    for got, exact in zip(*outs.values(), strict=True):
        assert (got.double() - exact.double()).norm() < 2**-8 * exact.double().norm()
