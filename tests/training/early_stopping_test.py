# SPDX-License-Identifier: Apache-2.0
"""A run that no longer improves stops, says so, and stays stopped."""

import json
import pathlib

import pytest
import small

from localglobal_jax.checkpoints import reader
from localglobal_jax.cli.main import main
from localglobal_jax.config import loading, validation
from localglobal_jax.launch import expand, status
from localglobal_jax.training import early_stopping, loop

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "coatnet_digits.py"
STILL = {  # nothing changes: the first evaluation is the best
    **small.IMAGES,
    "steps": "40",
    "optim.learning_rate": "1e-12",
    "optim.ema": "0",
    "eval.every": "2",
    "eval.patience": "3",
    "checkpoint.every": "5",
    "checkpoint.keep": "20",
    "log.tensorboard": "false",
}


def run_of(metric, patience):
    return validation.check(
        {
            "model": {"name": "m"},
            "checkpoint": {"best": metric},
            "eval": {"patience": patience},
        }
    )


NAN = float("nan")


@pytest.mark.parametrize(
    ("metric", "values", "stops"),
    [
        ("test/accuracy", [0.1, 0.2, 0.2, 0.1], 3),  # equal is not better
        ("test/accuracy", [0.1, 0.2, 0.1, 0.3, 0.2, 0.3], 5),
        ("-test/loss", [3.0, 2.0, 2.5, 1.0, 1.0, 1.5], 5),
        ("-test/loss", [1.0, 2.0, 3.0], 2),
        ("test/accuracy", [0.0, 0.0, -0.0], 2),
        ("-test/loss", [NAN, NAN], 1),
        ("-test/loss", [NAN, 2.0, NAN, NAN], 3),
        ("test/bleu", [1.0, 2.0, 3.0, 4.0], None),
    ],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_the_evaluation_at_which_it_stops(metric, values, stops, resumed):
    run = run_of(metric, 2)
    counter = early_stopping.EarlyStopping(run, {})
    stopped = None
    for i, value in enumerate(values):
        counter.add(10 * i, {"test": {metric.rpartition("/")[2]: value}})
        if counter.done and stopped is None:
            stopped = i
        if resumed:
            saved = json.loads(json.dumps({"config": {}, **counter.state()}))
            assert early_stopping.has_stopped(run, saved) == counter.done
            counter = early_stopping.EarlyStopping(run, saved)
    assert stopped == stops


def test_a_state_of_another_metric_is_not_used():
    counter = early_stopping.EarlyStopping(run_of("test/accuracy", 1), {})
    for step in (1, 2):
        counter.add(step, {"test": {"accuracy": 0.5}})
    assert early_stopping.has_stopped(run_of("test/accuracy", 1), counter.state())
    assert not early_stopping.has_stopped(run_of("test/accuracy", 2), counter.state())
    assert not early_stopping.has_stopped(run_of("-test/loss", 1), counter.state())
    assert early_stopping.EarlyStopping(run_of("test/accuracy", 0), {}).state() == {}


@pytest.mark.parametrize("best", ["None", "test/accuracy"])
def test_patience_needs_a_metric_and_evaluations(best):
    every = "0" if best != "None" else "2"
    given = {"eval.patience": "3", "eval.every": every, "checkpoint.best": best}
    with pytest.raises(ValueError, match=r"config\.eval: patience=3"):
        validation.check(loading.load(f"{CONFIG}:size=tiny,data=mock", given))


def test_a_run_stops_and_does_nothing_when_it_is_started_again(tmp_path, capfd):
    workdir = tmp_path / "digits-0"
    options = [f"--config.{key}={value}" for key, value in STILL.items()]
    command = ["train", f"--config={CONFIG}:size=tiny,data=mock", f"--workdir={workdir}", *options]
    assert main(command) == 0
    assert "stopped early at step 8 of 40" in capfd.readouterr().err
    steps, state, metadata = reader.read(workdir)
    assert steps == 8 and int(state["step"]) == 8
    kept = metadata["early_stopping"]
    assert (kept["metric"], kept["step"], kept["waited"]) == ("test/accuracy", 2, 3)
    assert "8 steps" in (workdir / "model_card.md").read_text()
    lines = (workdir / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in lines.splitlines() if '"test"' in line] == [
        *(2, 4, 6, 8)
    ]

    trained = [json.loads(line) for line in lines.splitlines() if '"train"' in line]
    assert trained[-1]["step"] == 8 and trained[-1]["loss"] > 0  # the window that was open
    assert main(command) == 0
    assert "at step 8 already" in capfd.readouterr().err
    assert (workdir / "metrics.jsonl").read_text() == lines
    assert reader.steps(workdir) == [5, 8]

    run = validation.check(loading.load(f"{CONFIG}:size=tiny,data=mock", STILL))
    described = expand.Description(0, workdir.name, {}, run, str(workdir), ())
    row = status.read(described)
    assert (row["state"], row["step"], row["steps"]) == ("done", 8, 8)

    more = loading.load(f"{CONFIG}:size=tiny,data=mock", {**STILL, "eval.patience": "4"})
    loop.train(more, workdir)  # a larger patience goes on
    assert reader.steps(workdir)[-1] == 10
