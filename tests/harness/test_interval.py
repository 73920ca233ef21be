"""Intervals and verdicts on samples whose answers are known."""

import numpy as np
import pytest

from harness.records import interval


def noisy(middle: float, seed: int, count: int = 60, noise: float = 0.01) -> list[float]:
    return list(middle * np.exp(noise * np.random.default_rng(seed).standard_normal(count)))


@pytest.mark.parametrize(("slowdown", "said"), [(1.05, "SLOWER"), (1.0, "SAME"), (0.95, "FASTER"), (1.01, "SAME")])
def test_verdict_of_a_known_change(slowdown: float, said: str) -> None:
    given = [interval.verdict(interval.ratio(noisy(1e-3, 2 * s), noisy(1e-3 * slowdown, 2 * s + 1))) for s in range(20)]
    assert given.count(said) >= 19 and set(given) <= {said, "UNSURE"}


def test_few_noisy_samples_leave_it_open() -> None:
    change = interval.ratio(noisy(1.0, 0, count=5, noise=0.1), noisy(1.03, 1, count=5, noise=0.1))
    assert interval.verdict(change) == "UNSURE"


def test_interval_covers_the_true_median_as_often_as_it_says() -> None:
    held = [interval.median(noisy(1.0, seed, count=40, noise=0.05)) for seed in range(300)]
    covered = sum(i.low <= 1.0 <= i.high for i in held) / len(held)
    assert 0.90 <= covered <= 0.99
    assert all(i.low <= i.middle <= i.high for i in held)


def test_one_outlier_moves_neither_median_nor_interval() -> None:
    clean = noisy(1.0, 3)
    assert abs(interval.median([*clean, 50.0]).middle - interval.median(clean).middle) < 0.005
    assert interval.median([*clean, 50.0]).high < 1.02


def test_is_repeatable_and_narrows_with_samples() -> None:
    assert interval.median(noisy(1.0, 4)) == interval.median(noisy(1.0, 4))
    assert interval.median(noisy(1.0, 4, count=400)).spread < interval.median(noisy(1.0, 4, count=20)).spread


@pytest.mark.parametrize("wrong", [[], [1.0, -1.0], [float("nan")], [0.0], [[1.0]]])
def test_what_is_no_time_is_refused(wrong: list) -> None:
    with pytest.raises(ValueError, match="positive finite"):
        interval.median(wrong)
