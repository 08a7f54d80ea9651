# SPDX-License-Identifier: Apache-2.0
"""Means, intervals and verdicts: numbers computed by hand, and by scipy's own tests."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from localglobal_jax.training.reporting.verdicts import estimate, paired, verdict

NUMBERS = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9)


def test_an_interval_by_hand():
    """1, 2, 3: s = 1, t(0.975, 2) = 4.3027, so 2 ± 4.3027 / sqrt(3) = 2 ± 2.4841."""
    found = estimate([1.0, 2.0, 3.0])
    assert (found.n, found.mean, found.sd) == (3, 2.0, 1.0)
    assert found.low == pytest.approx(2 - 2.4841, abs=1e-4)
    assert found.high == pytest.approx(2 + 2.4841, abs=1e-4)
    assert found.half == pytest.approx(2.4841, abs=1e-4)


def test_fewer_than_two_numbers_have_no_interval():
    one, none = estimate([3.0]), estimate([])
    assert (one.n, one.mean, none.n) == (1, 3.0, 0)
    assert all(map(math.isnan, (*one[2:], *none[1:])))


@given(NUMBERS)
def test_an_interval_is_scipys(numbers):
    if np.std(numbers) < 1e-6:
        return
    low, high = stats.t.interval(0.95, len(numbers) - 1, np.mean(numbers), stats.sem(numbers))
    found = estimate(numbers)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)


def test_a_verdict_by_hand():
    """Differences 0.02, 0.03, 0.04: mean 0.03, s 0.01, t 4.3027: 0.03 ± 0.0248, above 0."""
    ours = {0: 0.92, 1: 0.83, 2: 0.94, 7: 0.1}
    baseline = {2: 0.90, 0: 0.90, 1: 0.80, 9: 0.2}
    assert paired(ours, baseline) == pytest.approx([0.02, 0.03, 0.04])
    found = verdict(ours, baseline)
    assert (found.n, found.side) == (3, "better") and found.difference == pytest.approx(0.03)
    assert (found.low, found.high) == pytest.approx((0.0052, 0.0548), abs=1e-4)
    assert verdict(ours, baseline, smaller_is_better=True).side == "worse"
    assert verdict(baseline, ours).side == "worse"
    assert verdict(ours, baseline, level=0.99).side == "undecided"  # t(0.995, 2) = 9.92


@pytest.mark.parametrize("ours", [{}, {0: 1.0}, {0: 1.0, 1: 0.0}, {0: 0.5, 1: 0.5}, {5: 1, 6: 1}])
def test_too_few_or_too_different_is_undecided(ours):
    assert verdict(ours, {0: 0.5, 1: 0.5, 2: 0.5}).side == "undecided"


def test_the_same_difference_in_every_pair_is_decided():
    found = verdict({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5})
    assert (found.difference, found.low, found.high, found.side) == (0.5, 0.5, 0.5, "better")


@given(NUMBERS, NUMBERS)
def test_a_verdict_agrees_with_the_paired_t_test(ours, others):
    n = min(len(ours), len(others))
    a, b = np.array(ours[:n]), np.array(others[:n])
    if np.std(a - b) < 1e-6:
        return
    p = stats.ttest_rel(a, b).pvalue
    if abs(p - 0.05) > 1e-9:
        decided = verdict(dict(enumerate(a)), dict(enumerate(b))).side != "undecided"
        assert decided == (p < 0.05)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_undecided(number):
    found = estimate([1.0, number, 3.0])
    assert found.n == 3 and all(map(math.isnan, found[1:]))
    assert verdict({0: 1.0, 1: number}, {0: 0.0, 1: 0.5}).side == "undecided"
