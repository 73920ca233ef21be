"""How the scan is shared out: what is chosen against what was measured, and that everything is walked once."""

from pathlib import Path

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from fused.ops.selective_scan import schedule as cuts

MEASURED = Path(__file__).parents[2] / "data/cuts.csv"
PROCESSORS = 132  # of an H200


def test_what_is_chosen_takes_hardly_longer_than_the_fastest_that_was_measured():
    lost = []
    for (_, B, L, E, kernel), taken in pd.read_csv(MEASURED).groupby(["sweep", "B", "L", "E", "kernel"]):
        plan = cuts.plan(B, L, E, 16, 2, PROCESSORS)
        cut = plan.ahead if kernel == "forward" else plan.back
        found = taken.us[(taken.whole == cut.whole) & (taken.pieces == cut.pieces)]
        lost += [*(found / taken.us.min() - 1)]
    assert len(lost) >= 130 and sum(lost) / len(lost) <= 0.006 and max(lost) <= 0.1


sizes = st.integers(1, 40)


@given(sizes, st.integers(1, 100_000), sizes, st.sampled_from([1, 16, 33, 64]), st.sampled_from([1, 2]), sizes, st.booleans())
def test_every_tile_of_every_chain_is_walked_once(B, L, E, N, directions, processors, invariant):
    plan = cuts.plan(B, L, E, N, directions, processors, invariant=invariant)
    for cut in (plan.ahead, plan.back):
        tiles = -(-L // cuts.TILE)
        assert 0 <= cut.whole <= cut.chains and (cut.pieces - 1) * cut.span < tiles <= cut.pieces * cut.span
        assert cut.pieces > 1 or cut.whole == cut.chains
    if invariant:
        alone = cuts.plan(1, L, E, N, directions, processors, invariant=True)
        assert [cut[2:] for cut in (plan.ahead, plan.back)] == [cut[2:] for cut in (alone.ahead, alone.back)]  # pieces, span
