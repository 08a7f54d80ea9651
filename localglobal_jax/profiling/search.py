# SPDX-License-Identifier: Apache-2.0
"""Searches for the largest batch that fits. Pure."""

from collections.abc import Callable

MOST = 2**24  # the search ends at this size
CLOSE = 16  # stop when the next trial can gain less than a 16th


def largest(fits: Callable[[int], bool], start: int, unit: int) -> int:
    """Returns the largest multiple of `unit` that fits, to a 16th; 0 if `unit` does not fit.

    Doubles or halves from `start`, then bisects. Assumes that every size below a fitting one fits.
    """
    good, bad = 0, 0
    n = max(start // unit, 1)
    while not (good and bad):
        if n * unit > MOST:
            return good * unit
        if fits(n * unit):
            good, n = n, 2 * n
        else:
            bad, n = n, n // 2
            if n == 0:
                return 0
    while bad - good > max(1, good // CLOSE):
        middle = (good + bad) // 2
        if fits(middle * unit):
            good = middle
        else:
            bad = middle
    return good * unit
