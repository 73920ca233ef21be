"""How the scan is shared out: what is chosen against what was measured, and that everything is walked once."""

from pathlib import Path

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from fused.ops.selective_scan import schedule

MEASURED = Path(__file__).parents[2] / "data/cuts.csv"
PROCESSORS = 132  # of an H200


def test_what_is_chosen_takes_hardly_longer_than_the_fastest_that_was_measured():
    lost = []
    for (_, B, L, E, kernel), taken in pd.read_csv(MEASURED).groupby(["sweep", "B", "L", "E", "kernel"]):
        plan = schedule.make_schedule(B, L, E, 16, 2, PROCESSORS)
        cut = plan.fwd_schedule if kernel == "forward" else plan.bwd_schedule
        found = taken.us[(taken.whole == cut.num_unsplit) & (taken.pieces == cut.num_splits)]
        lost += [*(found / taken.us.min() - 1)]
    assert len(lost) >= 130 and sum(lost) / len(lost) <= 0.006 and max(lost) <= 0.1


sizes = st.integers(1, 40)


@given(sizes, st.integers(1, 100_000), sizes, st.sampled_from([1, 16, 33, 64]), st.sampled_from([1, 2]), sizes, st.booleans())
def test_every_tile_of_every_chain_is_walked_once(B, L, E, N, directions, processors, invariant):
    plan = schedule.make_schedule(B, L, E, N, directions, processors, batch_invariant=invariant)
    for cut in (plan.fwd_schedule, plan.bwd_schedule):
        tiles = -(-L // schedule.TILE)
        assert 0 <= cut.num_unsplit <= cut.num_sequences
        assert (cut.num_splits - 1) * cut.tiles_per_split < tiles <= cut.num_splits * cut.tiles_per_split
        assert cut.num_splits > 1 or cut.num_unsplit == cut.num_sequences
    if invariant:
        alone = schedule.make_schedule(1, L, E, N, directions, processors, batch_invariant=True)
        for own, other in ((plan.fwd_schedule, alone.fwd_schedule), (plan.bwd_schedule, alone.bwd_schedule)):
            assert own[2:] == other[2:]  # num_splits, tiles_per_split


@given(sizes, st.integers(1, 100_000), sizes, st.booleans())
def test_splits_of_moments_take_nearly_one_wave(B, L, E, invariant):
    """Or they are the splits of the exact state passes, where these split every sequence."""
    E, tiles = 16 * E, -(-L // schedule.TILE)
    plan = schedule.make_schedule(B, L, E, 16, 2, PROCESSORS, batch_invariant=invariant)
    cut, slots = plan.moments_schedule, PROCESSORS * plan.fwd_config.min_blocks_per_sm
    if cut in (None, plan.fwd_schedule):
        assert cut is None or cut.num_unsplit in (0, cut.num_sequences)
        return
    assert cut.num_unsplit == 0 and (cut.num_splits - 1) * cut.tiles_per_split < tiles <= cut.num_splits * cut.tiles_per_split
    assert cut.num_splits * (cut.num_sequences // (B if invariant else 1)) <= 0.98 * slots


def test_splits_of_moments_are_those_that_were_fastest():
    """Of one clip of 9,409 tokens and more, on an H200; 11 splits of 72 sequences would fill it."""
    for L, E, splits in ((9409, 1152, 10), (12545, 1152, 10), (25089, 768, 16)):
        assert schedule.make_schedule(1, L, E, 16, 2, PROCESSORS).moments_schedule.num_splits == splits
    for B, L in ((8, 1569), (1, 1569), (1, 8176)):
        assert schedule.make_schedule(B, L, 1152, 16, 2, PROCESSORS).moments_schedule is None
