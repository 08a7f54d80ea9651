# SPDX-License-Identifier: Apache-2.0
"""The largest batch, in few trials, and an end to them."""

from hypothesis import given
from hypothesis import strategies as st

from localglobal_jax.profiling.search import CLOSE, MOST, largest


@given(most=st.integers(1, 100_000), start=st.integers(1, 100_000), unit=st.integers(1, 64))
def test_is_close_to_the_largest_in_few_trials(most, start, unit):
    trials = []

    def fits(n):
        trials.append(n)
        return n <= most

    found = largest(fits, start, unit)
    assert found % unit == 0 and found <= most
    assert found == 0 or found + max(unit, 2 * found // CLOSE) >= most - unit
    assert found > 0 or most < unit
    assert len(trials) < 40


def test_ends_where_everything_fits():
    assert largest(lambda n: True, 4096, 256) <= MOST
