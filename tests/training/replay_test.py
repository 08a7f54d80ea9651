# SPDX-License-Identifier: Apache-2.0
"""A record that poisons every batch it is in: found, named, replayed, or skipped."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from localglobal_jax.checkpoints import reader
from localglobal_jax.config import loading, validation
from localglobal_jax.training import divergence, optim, setup
from localglobal_jax.training.loop import train
from localglobal_jax.training.replay import replay
from localglobal_jax.training.tasks import create_task

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "coatnet_digits.py"
FIRST, STEPS = 5, 12


def make_run(**overrides):
    given = {"steps": STEPS, "checkpoint.every": 2, "log.every": 3, "log.tensorboard": False}
    given |= {"eval.every": 0, "checkpoint.best": None, "batch_size": 16, "eval.batch_size": 64}
    texts = {name: str(value) for name, value in (small.IMAGES | given | overrides).items()}
    return validation.check(loading.load(f"{CONFIG}:size=tiny,data=mock", texts))


@pytest.fixture
def poison(monkeypatch):
    """The record that batch number `FIRST` is the first to hold, now with a loss that is NaN."""
    batches = [set(b["index"].tolist()) for b in create_task(make_run()).train_batches(0, STEPS)]
    record = min(batches[FIRST].difference(*batches[:FIRST]))

    def create(run, **options):
        task = create_task(run, **options)

        def loss(variables, batch, key):
            found = task.loss(variables, batch, key)
            factor = jnp.where((batch["index"] == record).any(), jnp.nan, 1.0)
            return found._replace(total=found.total * factor)

        return dataclasses.replace(task, loss=loss)

    monkeypatch.setattr(setup, "create_task", create)
    return record, sum(record in batch for batch in batches)


def files(directory):
    return {p: p.stat().st_mtime_ns for p in directory.rglob("*")}


def test_the_step_the_batch_and_the_record_are_named(poison, tmp_path):
    record, _ = poison
    with pytest.raises(divergence.Diverged, match=f"step {FIRST}.*step 4"):
        train(make_run(), tmp_path)
    found = json.loads((tmp_path / divergence.FILE).read_text())
    assert found["step"] == FIRST and found["last_checkpoint"] == 4 and found["loss"]
    assert len(found["records"]) == 16 and record in found["records"]
    step, state, _ = reader.read(tmp_path)
    assert step == 4
    assert found["parameters"] == [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(state["variables"]["params"])
    ]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))

    before = files(tmp_path)
    again = replay(make_run(), tmp_path, FIRST)
    assert again["from"] == 4 and not again["finite"] and again["alone"] == [record]
    for name in ("records", "parameters"):
        assert again[name] == found[name]
    assert divergence.describe(again).endswith(f"alone in a batch: {record}")
    fine = replay(make_run(), tmp_path, 1)  # from step 0: no checkpoint is that old any more
    assert fine["finite"] and fine["alone"] is None and fine["from"] == 0
    assert files(tmp_path) == before


def test_what_cannot_be_replayed(tmp_path):
    with pytest.raises(ValueError, match=f"--replay {STEPS}"):
        replay(make_run(), tmp_path, STEPS)
    with pytest.raises(ValueError, match=r"config\.json"):
        replay(make_run(), tmp_path / "nothing", 3)
    assert not (tmp_path / "nothing").exists()


def test_skipping_goes_on_and_counts(poison, tmp_path):
    _, times = poison
    assert times == 1
    run = make_run(**{"optim.skip_nonfinite": 1})
    results = train(run, tmp_path)
    assert results["train"]["skipped"] == 1 and np.isfinite(results["train"]["loss"])
    _, state, metadata = reader.read(tmp_path)
    assert state["step"] == STEPS and metadata["skipped"] == 1
    leaves = [np.asarray(x) for x in jax.tree.leaves(state["optimizer"])]
    (updates,) = {int(x) for x in leaves if not x.ndim and np.issubdtype(x.dtype, np.integer)}
    used = optim.make_schedule(run.optim, run.steps)(updates - 1)  # by the last update
    assert updates == STEPS - 1 and results["train"]["learning_rate"] == pytest.approx(float(used))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    again = replay(run, tmp_path, FIRST)  # the numbers, not the zeros of a skipped step
    assert not again["finite"] and not np.isfinite(again["gradient_norm"])


def test_a_damaged_checkpoint_before_the_step_is_gone_around(tmp_path, caplog):
    run = make_run(steps=6)
    train(run, tmp_path)
    last, *_ = (tmp_path / "checkpoints" / "4" / "state").rglob("d/*")
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    found = replay(run, tmp_path, 5)
    assert found["from"] < 4 and found["finite"]


def test_a_state_that_is_not_finite_is_not_evaluated(poison, tmp_path):
    with pytest.raises(divergence.Diverged):
        train(make_run(**{"eval.every": 1, "log.every": 50}), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines if line["split"] == "test") <= FIRST
