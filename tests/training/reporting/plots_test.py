# SPDX-License-Identifier: Apache-2.0
"""The learning curve is drawn from the metrics file."""

import math

import pytest

from localglobal_jax.training.reporting import metrics_log, plots


def test_learning_curve_draws_what_was_written(tmp_path):
    writer = metrics_log.Writer(tmp_path, resume_step=None, tensorboard=False)
    for step in range(5):
        loss = math.nan if step == 2 else 1 / (step + 1)
        writer.write(step, "train", {"loss": loss})
    writer.write(4, "test", {"loss": 0.3, "accuracy": 0.9})
    writer.close()
    path = plots.learning_curve(tmp_path)
    assert path == tmp_path / "learning_curve.png"
    raw = path.read_bytes()
    assert raw.startswith(b"\x89PNG")
    width, height = (int.from_bytes(raw[i : i + 4], "big") for i in (16, 20))
    assert width == 1100 and height == 360


def test_no_metrics_no_curve(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        plots.learning_curve(tmp_path)
