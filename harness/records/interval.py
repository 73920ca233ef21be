"""Medians of timings with bootstrap intervals, and verdicts on the ratio of two.

A median's 95 % interval holds the middle 95 % of the medians of RESAMPLES resamples with replacement (percentile bootstrap,
Efron 1979). Resampling is seeded: the same samples give the same interval, to the last digit, anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
BAND = 0.02  # a change within this is none: the same code timed twice differs by about half of it
VERDICTS = ("FASTER", "SAME", "SLOWER", "UNSURE")


@dataclass(frozen=True)
class Interval:
    """A middle value and the ends of its 95 % interval, in the unit of the samples."""

    middle: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Return half the interval's width, relative to the middle."""
        return (self.high - self.low) / (2 * self.middle) if self.middle else float("inf")


def median(samples: Sequence[float]) -> Interval:
    """Return the median of one or more samples. Of fewer than three the interval is their range."""
    x = _checked(samples)
    if len(x) < 3:
        return Interval(float(np.median(x)), float(x.min()), float(x.max()))
    return _interval(float(np.median(x)), _resampled(x, seed=0))


def ratio(base: Sequence[float], new: Sequence[float]) -> Interval:
    """Return median(new) / median(base): above 1 is slower where the samples are times."""
    one, other = _checked(base), _checked(new)
    return _interval(float(np.median(other) / np.median(one)), _resampled(other, seed=1) / _resampled(one, seed=0))


def verdict(change: Interval) -> str:
    """Return the verdict on a ratio of times: FASTER and SLOWER if all of the interval is beyond the band, SAME if within."""
    if change.high < 1 - BAND:
        return "FASTER"
    if change.low > 1 + BAND:
        return "SLOWER"
    return "SAME" if 1 - BAND <= change.low and change.high <= 1 + BAND else "UNSURE"


def _checked(samples: Sequence[float]) -> np.ndarray:
    x = np.asarray(samples, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all() or (x <= 0).any():
        raise ValueError(f"samples are one or more positive finite times, got {samples!r:.80}")
    return x


def _resampled(x: np.ndarray, seed: int) -> np.ndarray:
    draws = np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))
    return np.median(x[draws], axis=1)


def _interval(middle: float, medians: np.ndarray) -> Interval:
    low, high = np.quantile(medians, [0.025, 0.975])
    return Interval(middle, float(low), float(high))
