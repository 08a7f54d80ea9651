# SPDX-License-Identifier: Apache-2.0
"""Numbers, parameters and confusion matrices of a page."""

import numpy as np

from localglobal_jax.training.reporting.html.facts import (
    Confusion,
    Run,
    number,
    shown,
    size,
)


def test_numbers_for_people():
    assert [shown(x) for x in (None, 3, 10**16, 0.12345, 12345.6, True, "nan", float("inf"))] == [
        *("", "3", "10,000,000,000,000,000", "0.1235", "12,346", "True", "nan", "inf")
    ]
    assert [size(n) for n in (0, 1023, 1024, 3 * 2**30, 2**50)] == [
        *("0 B", "1,023 B", "1.0 KiB", "3.0 GiB", "1,024.0 TiB")
    ]
    assert [number(x) for x in (1, "1", "nan", None, float("nan"), 1e31, 10**400, [])] == [1.0] + [
        None
    ] * 7


def test_mistakes_and_parameters():
    counts = np.array([[5, 0, 2], [1, 9, 0], [3, 0, 0]])
    found = Confusion("test", "", ["a", "b", "c"], counts)
    assert found.mistakes() == [("c", "a", 3), ("a", "c", 2), ("b", "a", 1)]
    assert [found.shade(0, j) for j in range(3)] == [8, 0, 3] and found.shade(2, 0) == 10
    leaves = {
        f"variables/params/{k}": {"shape": [2], "dtype": d}
        for k, d in {"a/b/kernel": "bfloat16", "a/b/c/bias": "float32", "top": "bool"}.items()
    } | {"step": {"shape": [], "dtype": "int32"}, "average/x": {"shape": [4], "dtype": "float32"}}
    assert Run("", "", "", {}, leaves=leaves).parameters() == {
        "a/b": (4, 12),
        "top": (2, 2),
        "all parameters": (6, 14),
        "beside them: average": (4, 16),
    }
