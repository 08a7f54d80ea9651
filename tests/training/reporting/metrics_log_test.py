# SPDX-License-Identifier: Apache-2.0
"""The lines of metrics.jsonl: none twice, none lost, all of them strict JSON."""

import json
import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from localglobal_jax.training.reporting import metrics_log

SPLITS = ("train", "test")


def write(workdir, steps, *, resume_step=None, value=lambda step: step / 10, close=True):
    writer = metrics_log.Writer(workdir, resume_step=resume_step, tensorboard=False)
    for step in steps:
        for split in SPLITS:
            writer.write(step, split, {"loss": value(step)})
    if close:
        writer.close()
    return writer


def keys(workdir):
    return [(line["step"], line["split"]) for line in metrics_log.read_metrics(workdir)]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_however_often_it_dies_the_lines_are_those_of_one_run(tmp_path_factory, data):
    workdir, start = tmp_path_factory.mktemp("run"), None
    path = workdir / "metrics.jsonl"
    for _ in range(data.draw(st.integers(0, 4))):
        first = 0 if start is None else start
        died = data.draw(st.integers(first, 10))
        write(workdir, range(first, died + 1), resume_step=start)
        torn = data.draw(st.integers(0, 20))  # bytes of the last line that never got there
        path.write_bytes(path.read_bytes()[: -torn or None])
        # A checkpoint is saved only after a flush: it is never ahead of the lines.
        whole = keys(workdir)
        complete = [s for s in range(died + 1) if all((s, split) in whole for split in SPLITS)]
        start = data.draw(st.sampled_from(complete)) if complete else None
    write(workdir, range(start or 0, 11), resume_step=start)
    assert keys(workdir) == [(step, split) for step in range(11) for split in SPLITS]
    assert all(line["loss"] == line["step"] / 10 for line in metrics_log.read_metrics(workdir))


def test_lines_that_are_not_those_of_the_checkpoint_are_told(tmp_path, caplog):
    writer = write(tmp_path, range(6))
    assert writer.checksum == metrics_log.checksum(tmp_path, 5)
    known = metrics_log.checksum(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    good = path.read_bytes()

    def resume():
        caplog.clear()
        options = {"resume_step": 3, "tensorboard": False, "expected": known}
        metrics_log.Writer(tmp_path, **options).close()
        return caplog.text

    assert "lines are missing or have changed" not in resume()  # later lines may go
    for damaged in (good.replace(b"0.2", b"0.3", 1), good.replace(b'"loss"', b'"lo\xf3s"', 1), b""):
        path.write_bytes(damaged)
        assert "lines are missing or have changed" in resume()
    path.unlink()
    assert "lines are missing or have changed" in resume()


FULL = """
import resource, sys
from localglobal_jax.training.reporting import metrics_log
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
writer = metrics_log.Writer(sys.argv[1], resume_step=None)
try:
    for step in range(1000):
        writer.write(step, "train", {f"metric{i}": step / 7 for i in range(20)})
except OSError as error:
    print(error.strerror)
writer.close()
print("closed")
"""


def test_a_file_that_cannot_grow_is_an_error_and_no_hang(tmp_path):
    """TensorBoard's is the first here; its writer was a thread once, which training waited for."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert done.stdout == "File too large\nclosed\n"
    assert "the last lines are not in" in done.stderr
    assert max(path.stat().st_size for path in tmp_path.glob("tensorboard/*")) == 20000
    assert metrics_log.read_metrics(tmp_path)


def test_lines_after_the_checkpoint_are_dropped_and_the_first_of_a_step_stays(tmp_path):
    write(tmp_path, range(6))
    writer = metrics_log.Writer(tmp_path, resume_step=3, tensorboard=False)
    assert keys(tmp_path) == [(step, split) for step in range(4) for split in SPLITS]
    assert not writer.write(3, "test", {"loss": 9.0})
    assert writer.write(4, "test", {"loss": 9.0})
    assert not writer.write(4, "test", {"loss": 8.0})
    writer.close()
    assert [x["loss"] for x in metrics_log.read_metrics(tmp_path)[-2:]] == [0.3, 9.0]


def test_without_a_checkpoint_nothing_is_kept(tmp_path):
    write(tmp_path, range(3))
    write(tmp_path, [])
    assert keys(tmp_path) == []


def test_a_workdir_is_made(tmp_path):
    write(tmp_path / "runs" / "one", range(1))
    assert keys(tmp_path / "runs" / "one")


def test_a_file_that_needs_no_change_is_not_touched(tmp_path):
    write(tmp_path, range(3))
    before = (tmp_path / "metrics.jsonl").stat()
    write(tmp_path, [], resume_step=2)
    after = (tmp_path / "metrics.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_every_number_becomes_strict_json(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    writer = metrics_log.Writer(tmp_path, resume_step=None, tensorboard=True)
    numbers = {
        "nan": math.nan,
        "inf": -np.inf,
        "array": jnp.float32(0.5),
        "count": np.int64(7),
        "half": jnp.bfloat16(1.5),
    }
    writer.write(np.int64(1), "train", numbers)
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {
        "step": 1,
        "split": "train",
        "nan": "nan",
        "inf": "-inf",
        "array": 0.5,
        "count": 7,
        "half": 1.5,
    }


def test_flush_means_on_disk(tmp_path):
    writer = write(tmp_path, [1], close=False)
    writer.flush()
    assert keys(tmp_path) == [(1, "train"), (1, "test")]
    writer.close()


def test_drawing_libraries_are_loaded_only_when_used():
    code = (
        "import sys; from localglobal_jax.training.reporting import metrics_log, model_card, plots;"
        "assert not {'matplotlib', 'tensorboardX', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
