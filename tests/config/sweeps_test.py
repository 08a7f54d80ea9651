# SPDX-License-Identifier: Apache-2.0
"""Counts of expansions; names that depend on the overrides only and are valid in every back end."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localglobal_jax.config import sweeps

VALUES = st.one_of(
    st.integers(-5, 5), st.floats(allow_nan=False), st.text(max_size=3), st.tuples(st.integers())
)
AXES = st.dictionaries(
    st.sampled_from(["seed", "steps", "optim.ema", "model.depths"]),
    st.lists(VALUES, min_size=1, max_size=3),
    min_size=1,
)
OVERRIDES = st.dictionaries(st.text("abc.", min_size=1), VALUES, max_size=4)


@given(AXES)
def test_a_product_has_every_combination(axes):
    found = list(sweeps.product(axes))
    assert len(found) == math.prod(map(len, axes.values()))
    assert all(run.keys() == axes.keys() for run in found)
    for field, values in axes.items():
        assert {repr(run[field]) for run in found} == set(map(repr, values))


@given(AXES)
def test_a_chain_has_every_value_once(axes):
    found = list(sweeps.chain(axes))
    assert found == [{field: value} for field, values in axes.items() for value in values]


def test_helpers_nest():
    rates = sweeps.zip_({"optim.learning_rate": (1e-3, 2e-3), "optim.ema": [0.9, 0.99]})
    parts = sweeps.product({"seed": range(2)}, sweeps.chain(rates, [{"steps": 5}]))
    assert list(parts) == [
        {"seed": 0, "optim.learning_rate": 1e-3, "optim.ema": 0.9},
        {"seed": 0, "optim.learning_rate": 2e-3, "optim.ema": 0.99},
        {"seed": 0, "steps": 5},
        {"seed": 1, "optim.learning_rate": 1e-3, "optim.ema": 0.9},
        {"seed": 1, "optim.learning_rate": 2e-3, "optim.ema": 0.99},
        {"seed": 1, "steps": 5},
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sweeps.zip_({"a": [1], "b": [1, 2]}), r"zip_.*\[1, 2\]"),
        (lambda: sweeps.product({"a": [1]}, {"a": [2]}), " a "),
        (lambda: sweeps.product({"model.layout": "CCTT"}), r"model\.layout.*'CCTT'"),
        (lambda: sweeps.chain({"seed": 3}), "seed.*3"),
    ],
)
def test_wrong_parts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        list(make())


@given(st.text(max_size=60), st.integers(0, 99_999), OVERRIDES)
def test_names_are_safe(prefix, index, overrides):
    name = sweeps.name(prefix, index, overrides)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 40
    assert name.endswith(f"-{index:03d}-{sweeps.digest(overrides)}")
    assert sweeps.safe(sweeps.safe(prefix)) == sweeps.safe(prefix)


@given(OVERRIDES, OVERRIDES)
def test_a_name_depends_on_the_overrides_only(one, other):
    assert sweeps.canonical(one) == sweeps.canonical(dict(reversed(one.items())))
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in one.items()}
    assert sweeps.digest(one) == sweeps.digest(lists)
    same = repr(sorted(one.items())) == repr(sorted(other.items()))
    assert (sweeps.canonical(one) == sweeps.canonical(other)) == same


def test_names_never_change():
    """Otherwise the same command would start every run again under another name."""
    overrides = {"optim.learning_rate": 1e-3, "model.depths": (1, 2), "model.layout": "CT"}
    assert sweeps.name("coatnet_layouts", 3, overrides) == "coatnet-layouts-003-2af4d8c2"


@given(prefix=st.text(min_size=1, max_size=60), index=st.integers(0, 999))
def test_cloud_names_of_two_sweeps_differ(prefix, index):
    here = sweeps.name(prefix, index, {"seed": 1})
    one, other = (sweeps.cloud_name(here, root) for root in ("gs://a/x", "gs://b/x"))
    assert one != other and one[:-4] == other[:-4]
    assert len(one) <= sweeps.LONGEST and re.fullmatch(r"[a-z][a-z0-9-]*", one)
