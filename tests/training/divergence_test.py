# SPDX-License-Identifier: Apache-2.0
"""What is told of bad numbers, and when a loss counts as a spike."""

import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localglobal_jax.config import validation
from localglobal_jax.training import divergence

PARAMS = {"a": np.zeros(2), "b": {"kernel": np.zeros((2, 2)), "bias": np.zeros(2)}}


def outcome(loss=1.0, bad=()):
    parts = np.ones(4, bool)
    parts[list(bad)] = False
    return divergence.Outcome({"loss": (np.float32(loss * 4), np.float32(4))}, parts)


def monitor(directory=None, start=10, **optim):
    run = validation.check({"model": {"name": "x"}, "optim": optim})
    return divergence.DivergenceMonitor(run, PARAMS, directory, start=start)


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=4),
        min_size=1,
        max_size=4,
    ),
    st.floats(width=32),
)
def test_finite_is_what_numpy_says_of_every_leaf(leaves, loss):
    gradient = [np.array(leaf, np.float32) for leaf in leaves]
    found = divergence.finite(jnp.float32(loss), divergence.squares(gradient))
    with np.errstate(over="ignore"):
        squares = [np.sum(np.square(leaf)) for leaf in gradient]
    assert found.tolist() == [bool(np.isfinite(x)) for x in (np.float32(loss), *squares)]


def test_what_is_wrong_is_named():
    assert divergence.wrong(np.array([False, True, False, True]), PARAMS) == (True, ["b/bias"])
    assert divergence.in_words(True, ["b/bias"]) == (
        "the loss and the gradients of 1 parameters (b/bias)"
    )
    assert divergence.in_words(False, list("abcdefg")) == (
        "the gradients of 7 parameters (a, b, c, d, e, ...)"
    )


def test_it_looks_one_step_late_and_before_every_save(tmp_path):
    watching = monitor(tmp_path)
    watching.add(10, outcome(), np.arange(4))
    watching.saving(11, {"count": np.int32(2), "mean": np.ones(3)})
    watching.add(11, outcome(np.nan, bad=(0, 3)), np.array([7, 5, 5, 9]))  # still on the device
    with pytest.raises(divergence.Diverged, match="step 11"):
        watching.add(12, outcome(), np.arange(4))
    found = json.loads((tmp_path / divergence.FILE).read_text())
    assert found == {
        **{"step": 11, "last_checkpoint": 11, "loss": True, "parameters": ["b/kernel"]},
        **{"records": [5, 7, 9], "skipped": 0},
    }
    last = monitor()
    last.add(10, outcome(bad=(1,)), np.arange(4))
    with pytest.raises(divergence.Diverged):
        last.saving(11, {})


def test_a_state_that_overflowed_behind_a_finite_loss_is_not_saved(tmp_path):
    watching = monitor(tmp_path)
    state = {"params": PARAMS, "batch_stats": {"var": np.array([1, np.inf], np.float32)}}
    with pytest.raises(divergence.Diverged, match="batch_stats/var"):
        watching.saving(20, state)
    found = json.loads((tmp_path / divergence.FILE).read_text())
    assert found == {"step": 20, "last_checkpoint": 10, "state": ["batch_stats/var"]}
    watching.saving(30, {"params": PARAMS})  # as a later start does
    assert not (tmp_path / divergence.FILE).exists()


@pytest.mark.parametrize(("start", "kept"), [(0, "no checkpoint"), (10, "step 10")])
def test_the_message_names_the_checkpoint_that_is_left(start, kept, tmp_path):
    bad = monitor(tmp_path, start)
    bad.add(start + 1, outcome(bad=(1,)), np.arange(4))
    with pytest.raises(divergence.Diverged) as first:
        bad.settle()
    state = monitor(tmp_path, start)
    with pytest.raises(divergence.Diverged) as second:
        state.saving(start + 1, {"a": np.array([np.nan], np.float32)})
    for found in (first, second):
        assert kept in str(found.value) and "step 0" not in str(found.value)


def test_skipped_steps_are_counted_up_to_the_limit(caplog):
    watching = monitor(skip_nonfinite=2)
    for step in (10, 11):
        watching.add(step, outcome(bad=(1,)), np.arange(4))
    with caplog.at_level(logging.WARNING):
        watching.settle()
    assert watching.line() == {"skipped": 2} and monitor().line() == {}
    assert "step 11 changed nothing (2 of at most 2 to skip): the gradients of 1" in caplog.text
    watching.add(12, outcome(bad=(2,)), np.arange(4))
    with pytest.raises(divergence.Diverged):
        watching.settle()


def test_the_first_of_the_losses_far_above_the_typical_ones_is_a_spike():
    rng = np.random.default_rng(0)
    spikes = divergence.LossSpikeDetector()
    calm = [spikes.add(3 * 0.99**i + 0.1 * rng.normal()) for i in range(300)]
    assert not any(calm)
    assert "typical are" in spikes.add(9.0)
    assert not spikes.add(9.0) and not spikes.add(0.2)
    assert spikes.add(9.0)
    assert any([spikes.add(9.0 + 0.1 * rng.normal()) for _ in range(300)]) is False  # a plateau


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e30), min_size=60, max_size=80))
def test_spikes_take_any_loss(losses):
    spikes = divergence.LossSpikeDetector()
    assert all(isinstance(spikes.add(loss), str) for loss in losses)


@pytest.mark.parametrize("typical", [0.0, 1.0, 300.0])
def test_a_loss_that_hardly_moves_has_no_spikes(typical):
    spikes = divergence.LossSpikeDetector()
    for loss in (*[typical] * 60, *[typical + 1e-7, typical] * 3):
        assert not spikes.add(loss)
    assert spikes.add(2 * typical + 1)
