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
