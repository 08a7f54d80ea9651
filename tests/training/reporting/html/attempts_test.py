# SPDX-License-Identifier: Apache-2.0
"""The attempts of a run, from event files and from a sweep's file."""

from localglobal_jax.training.reporting import tensorboard
from localglobal_jax.training.reporting.html import attempts


def test_attempts_are_read_from_tensorboard(tmp_path):
    for start, steps in ((0, (2, 4, 6)), (4, (6, 8))):
        file = tensorboard.EventFile(tmp_path / "tensorboard", forget=start + 1)
        for step in steps:
            file.add(step, {"train/loss": 1.0})
        file.close()
    (tmp_path / "tensorboard" / "events.out.tfevents.9.torn").write_bytes(b"torn")
    rows = attempts.attempts(tmp_path, 8)
    assert [(row["start"], row["last"], row["ended"]) for row in rows] == [
        ("0", "6", "not recorded"),
        ("4", "8", "at the last step"),
    ]


def test_what_a_sweep_knows_of_attempts(tmp_path):
    (tmp_path / "attempts.jsonl").write_text(
        '{"event": "start", "time": 0}\n{"event": "end", "code": -9, "time": 90.4}\n'
        'torn\n{"event": "start", "time": 1e300}\n{"event": "end", "time": "x"}\n[]\n'
    )
    first, second = attempts.attempts(tmp_path, 10)
    assert first["lasted"] == "0:01:30" and first["ended"] == "exit code -9"
    assert second["lasted"] == "" and second["ended"] == "not recorded"
