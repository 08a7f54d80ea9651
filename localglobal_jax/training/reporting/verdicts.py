# SPDX-License-Identifier: Apache-2.0
"""Means with intervals, and verdicts from paired differences. Pure functions of numbers.

The intervals are Student's: of n numbers with mean m and standard deviation s (with n - 1), the
interval is m ± t(0.975, n - 1) · s / √n. Differences are paired by a key that two sets of runs
share, such as the seed: what the two have in common cancels.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

LEVEL = 0.95

Side = Literal["better", "worse", "undecided"]


class Estimate(NamedTuple):
    """The mean of `n` numbers. `sd` and the interval are nan for fewer than two numbers."""

    n: int
    mean: float
    sd: float  # with n - 1
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half of the width of the interval."""
        return (self.high - self.low) / 2


class Verdict(NamedTuple):
    """The mean of `n` paired differences to a baseline, with its interval.

    `side`: "better" or "worse" if the interval does not hold 0, else "undecided".
    """

    n: int
    difference: float
    low: float
    high: float
    side: Side


def estimate(numbers: Sequence[float], level: float = LEVEL) -> Estimate:
    """Returns mean, deviation and interval; all nan without numbers, or if one is not finite."""
    n = len(numbers)
    if not all(map(math.isfinite, numbers)):
        return Estimate(n, math.nan, math.nan, math.nan, math.nan)
    if n < 2:
        mean = float(numbers[0]) if numbers else math.nan
        return Estimate(n, mean, math.nan, math.nan, math.nan)
    from scipy import stats  # noqa: PLC0415 # a quarter of a second

    mean, sd = statistics.fmean(numbers), statistics.stdev(numbers)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * sd / math.sqrt(n)
    return Estimate(n, mean, sd, mean - half, mean + half)


def paired(ours: Mapping[Any, float], baseline: Mapping[Any, float]) -> list[float]:
    """Returns the differences ``ours - baseline`` of the keys that both have."""
    return [ours[key] - baseline[key] for key in ours if key in baseline]


def verdict(
    ours: Mapping[Any, float],
    baseline: Mapping[Any, float],
    *,
    smaller_is_better: bool = False,
    level: float = LEVEL,
) -> Verdict:
    """Compares two sets of runs by the paired differences ``ours - baseline``.

    Args:
      ours: the metric of every run, by the key that pairs them, such as the seed.
      smaller_is_better: of the metric, as for a loss.

    Returns:
      A verdict. It is "undecided" with fewer than two shared keys, where there is no interval.
    """
    found = estimate(paired(ours, baseline), level)
    side: Side = "undecided"
    if found.low > 0 or found.high < 0:
        side = "better" if (found.mean > 0) != smaller_is_better else "worse"
    return Verdict(found.n, found.mean, found.low, found.high, side)
