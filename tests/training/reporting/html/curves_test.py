# SPDX-License-Identifier: Apache-2.0
"""The geometry of the curves."""

from localglobal_jax.training.reporting.html import curves
from localglobal_jax.training.reporting.html.facts import (
    Run,
)


def test_a_curve_is_where_its_numbers_are():
    lines = [{"step": s, "split": "train", "loss": float(s == 10)} for s in (0, 10, 20)]
    (chart,) = curves.charts([Run("a", "a", "", {}, metrics=lines)])
    (curve,) = chart.curves
    left, right, top, bottom = (curves.BOX[k] for k in ("left", "right", "top", "bottom"))
    assert curve.path == f"M{left}.0,{bottom}.0L{(left + right) / 2},{top}.0L{right}.0,{bottom}.0"
    assert [text for _, _, text in curve.dots][1] == "a, train: 1 at step 10"
    assert (chart.x[0][1], chart.x[-1][1]) == ("0", "20")


def test_spikes_survive_thinning():
    points = [(i, float(i == 12_345)) for i in range(50_000)]
    kept = curves.thinned(points)
    assert len(kept) <= curves.MOST_POINTS and (12_345, 1.0) in kept and kept == sorted(kept)
    assert curves.thinned(points[:500]) == points[:500]
    for length in range(1200, 1210):  # the last point is the value that a label names
        assert curves.thinned(points[:length])[-1] == points[length - 1]
