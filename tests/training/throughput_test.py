# SPDX-License-Identifier: Apache-2.0
"""Speeds and means of a window of steps, by hand, on a clock that only the tests move."""

import json
import types

import numpy as np
import pytest

from localglobal_jax.config import loading, validation
from localglobal_jax.parallel import multihost
from localglobal_jax.training import optim, throughput

PEAK = 1000.0  # FLOPs a second
WORK = 500  # multiply-adds of a step
IMAGES = 4  # of a step


class Clock:
    """Seconds that pass only when `wait` is called."""

    now = 100.0

    def perf_counter(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(multihost, "peak_flops", lambda: PEAK)
    return clock


@pytest.fixture(scope="module")
def run():
    return validation.check(loading.load("configs/coatnet_digits.py:size=tiny,data=mock"))


def meter(run, start=0, partial=None, work=lambda batch: WORK):
    task = types.SimpleNamespace(items="images")
    return throughput.ThroughputMeter(run, task, start, partial, work)


def step(meter, clock, *, input_wait, seconds, loss=2.0, size=8):
    with meter.waiting():
        clock.wait(input_wait)
    with meter.compiling({"image": np.zeros((IMAGES, size, size, 3))}):
        clock.wait(seconds)
    meter.add({"loss": (np.float32(loss * IMAGES), np.int32(IMAGES))})


def test_a_window_by_hand(run, clock):
    made = meter(run)
    step(made, clock, input_wait=1, seconds=10, loss=1.0)  # compiles, which does not count
    with made.paused():
        clock.wait(5)
    step(made, clock, input_wait=1, seconds=3)
    made.partial()  # a checkpoint in the middle changes nothing
    step(made, clock, input_wait=0, seconds=2, loss=3.0)
    line = made.close(3)
    assert line.pop("memory_bytes") >= 0
    assert line == pytest.approx(
        {
            "loss": 2.0,
            "learning_rate": float(optim.make_schedule(run.optim, run.steps)(2)),
            "images_per_second": 3 * IMAGES / 7,
            "steps_per_second": 3 / 7,
            "seconds_left": (run.steps - 3) * 7 / 3,
            "input_wait": 2 / 7,
            "compile_seconds": 10.0,
            "mfu": 3 * 2 * WORK / 7 / PEAK,
        }
    )


def test_the_next_window_begins_from_nothing(run, clock):
    made = meter(run)
    step(made, clock, input_wait=1, seconds=10, loss=1.0)
    made.close(1)
    step(made, clock, input_wait=0.5, seconds=1.5)
    line = made.close(2)
    assert line["loss"] == 2.0 and line["images_per_second"] == IMAGES / 2
    assert line["input_wait"] == 0.25 and line["mfu"] == 2 * WORK / 2 / PEAK
    assert "compile_seconds" not in line
    step(made, clock, input_wait=1, seconds=7, size=16)  # another shape is compiled, too
    assert made.close(3)["compile_seconds"] == 7


def test_a_resumed_window_has_the_means_of_a_whole_one_and_its_own_speed(run, clock):
    made = meter(run, start=6)
    step(made, clock, input_wait=0, seconds=1, loss=1.1)
    saved = json.loads(json.dumps(made.partial()))
    resumed = meter(run, start=7, partial=saved)
    assert resumed.partial() == saved and saved["first"] == 6
    step(resumed, clock, input_wait=1, seconds=9, loss=3.0)
    line = resumed.close(8)
    assert line["loss"] == float(np.float32(1.1 * IMAGES) + np.float32(3.0 * IMAGES)) / 8
    assert line["images_per_second"] == IMAGES and line["steps_per_second"] == 1
    assert resumed.partial() == {"first": 8, "sums": {}}
    assert meter(run, start=8, partial=resumed.partial()).partial() == {"first": 8, "sums": {}}


def test_work_that_cannot_be_counted_has_no_mfu(run, clock, caplog):
    def work(batch):
        raise ValueError("a loop of unknown length")

    caplog.set_level("INFO", throughput.log.name)
    made = meter(run, work=work)
    step(made, clock, input_wait=1, seconds=1)
    step(made, clock, input_wait=1, seconds=1)
    assert "mfu" not in made.close(2)
    assert caplog.text.count("a loop of unknown length") == 1


@pytest.mark.parametrize(("reached", "skipped"), [(5, 0), (5, 2), (1, 1)])
def test_the_rate_is_that_of_the_updates_that_were_made(reached, skipped, run, clock):
    made = meter(run)
    step(made, clock, input_wait=0, seconds=1)
    schedule = optim.make_schedule(run.optim, run.steps)
    rate = float(schedule(max(0, reached - 1 - skipped)))
    step(made, clock, input_wait=0, seconds=1)
    assert made.close(reached, skipped)["learning_rate"] == pytest.approx(rate)
