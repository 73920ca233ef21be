"""What the native scan's state passes do with each kind of a mixer's inputs."""

import emulation
import naive
import pytest
import torch
from rule import assert_rule

import reference
from fused.ops.selective_scan import launch, schedule
from fused.ops.selective_scan.inputs import ScanInputs
from fused.ops.selective_scan.kernel_source import SOFTPLUS_BY_CALLER
from fused.runtime import nvrtc
from harness.bench import grids
from harness.fixtures import state_passes
from harness.judge.case import Case
from harness.judge.registry import subjects
from reference.modules import mamba

LOG2E = 1.4426950408889634
H200 = 132  # multiprocessors
DRAWS = ("fresh", "long-memory", "worst-case", "rescan")
TILE = schedule.TILE


def scanned_by_mixer(option, L, D, channels):
    """Return (u, delta, A, B, C, D, z) of both scans of a mixer by its first channels, in bfloat16 as the kernels read them."""
    case = Case("mixer", (("B", 1), ("L", L), ("D", D)), (option, "infer", "cast"), "bfloat16")
    subject, seen = subjects()["mixer"], []

    def noted(u, delta, A, B, C, D, z, delta_bias, **_):
        delta = torch.nn.functional.softplus(delta + delta_bias)
        streams = (x[..., :channels].bfloat16() for x in (u, delta, z))
        seen.append((*streams, B.bfloat16(), C.bfloat16(), A[:channels].float(), D[:channels].float()))
        return torch.zeros_like(u), u.new_zeros(0)

    leaves = {name: leaf.bfloat16().float() for name, leaf in subject.draw(case, 0).items()}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(mamba, "selective_scan", noted)
        subject.evaluate(reference.Mamba, case, leaves)
    return seen


def tiles_by_moments(delta, A, splits, reverse):
    """Return how many tiles of state passes are summed by moments, and how many state passes may exit, by the rules that
    moments.cu states: a block's tile is walked token by token where a state forgets exp(-5) within it and is not forgotten."""
    tiles = -(-delta.shape[1] // TILE)
    sums = torch.nn.functional.pad(delta[0].float(), (0, 0, 0, -delta.shape[1] % TILE)).view(tiles, TILE, -1).sum(1)
    by_moments, exits = 0, 0
    for split in range(1, splits.num_splits) if reverse else range(splits.num_splits - 1):
        first = split * splits.tiles_per_split
        own = sums[first : first + splits.tiles_per_split]
        own = own if reverse else own.flip(0)  # as the state pass walks
        within, behind = (x[:, :, None] * A * LOG2E for x in (own, own.cumsum(0) - own))
        far = ((within < -7.2) & (behind > -29)).view(len(own), -1, state_passes.CHANNELS, 16).any(-1).any(-1)
        by_moments += int((~far).sum())
        left = (own.sum(0)[:, None] * A * LOG2E).amax(1).view(-1, state_passes.CHANNELS)
        exits += int((left < -60).all(1).sum())
    return by_moments, exits


@pytest.mark.parametrize("of", ["race", "licence"])
def test_no_tile_is_summed_by_moments_and_no_state_pass_exits_at_the_sizes_that_are_timed_and_judged(of):
    race = grids.races()["mixer-worst-case"]
    if of == "race":
        sizes = {(p["L"], p["D"]) for p in race.points("full")}
    else:
        named = race.licence("bfloat16")
        sizes = {(c["L"], c["D"]) for c in subjects()["mixer"].cases("full") if c.name in named}
    [(L, D)] = sizes
    splits = schedule.make_schedule(1, L, 2 * D, 16, 2, H200).moments_schedule
    assert splits is not None and 1 < splits.tiles_per_split <= state_passes.CHANNELS * state_passes.TURN
    for i, (_, delta, _, _, _, A, _) in enumerate(scanned_by_mixer("worst-case", L, D, 2 * D)):
        assert tiles_by_moments(delta, A, splits, reverse=i == 1) == (0, 0)


@pytest.fixture
def emulated(monkeypatch):
    """The kernels run on the CPU."""
    if reason := emulation.unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(nvrtc, "module", emulation.module)


@pytest.mark.parametrize("option", DRAWS)
def test_each_draw_takes_its_own_path(option, emulated):
    """Three splits of 20 tiles; states tell moments, by their error of bfloat16 products, from a walk token by token."""
    tiles, num_splits, E = 20, 3, 64
    L = TILE * tiles * num_splits - 5
    first, second = scanned_by_mixer(option, L, 256, E)
    u, delta, _, B, C, A, D = map(list, zip(first, second, strict=True))
    s = ScanInputs((False, True), u, delta, A, B, C, D, [None, None], first[2], SOFTPLUS_BY_CALLER)
    splits = schedule.SplitSchedule(E // 16, 0, num_splits, tiles)
    plan = schedule.make_schedule.__wrapped__(1, L, E, 16, 2, 2)._replace(fwd_schedule=splits, moments_schedule=splits)
    got, exact = (launch.forward(s, None, plan, keep=False, only_y=only_y) for only_y in (True, False))
    assert got.by_moments and not exact.by_moments
    count, exited, rescanned = got.state_passing.exits()
    error = ((got.split_initial_states - exact.split_initial_states).norm() / exact.split_initial_states.norm()).item()
    by_rule = [tiles_by_moments(delta[i], A[i], splits, reverse=i == 1) for i in range(2)]
    assert count == E // 16 * (num_splits - 1) and rescanned == (option == "rescan")
    assert exited == sum(exits for _, exits in by_rule)
    assert_rule([({"y": got.y}, *(naive.scan_of_mixer(s, precision) for precision in (torch.float64, torch.float32)))])
    if option == "worst-case":
        assert exited == 0 and [n for n, _ in by_rule] == [0, 0] and error < 1e-5
    elif option in ("fresh", "rescan"):
        assert exited == 2 * count
    else:
        assert exited == 0 and all(n > 0 for n, _ in by_rule) and 1e-5 < error < 2**-8
