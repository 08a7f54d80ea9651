# SPDX-License-Identifier: Apache-2.0
"""No line twice, none lost, all of it JSON; and a progress line whose clock is ours."""

import io
import json
import math
import subprocess
import sys
import types

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localglobal_jax.training.reporting import metrics_log, plots, wandb
from localglobal_jax.training.reporting import progress as reporting_progress

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
from localglobal_jax import reporting, wandb_run
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
writer = reporting.Writer(sys.argv[1], resume_step=None)
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
        timeout=60,
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


def scalars(directory):
    """(tag, step) of the event files, by their records: length, crc, a protobuf, crc."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(directory.iterdir()):
        raw = path.read_bytes()
        while raw:
            size = int.from_bytes(raw[:8], "little")
            event = Event.FromString(raw[12 : 12 + size])
            found += [(value.tag, event.step) for value in event.summary.value]
            if event.HasField("session_log"):
                found.append(("restart", event.step))
            raw = raw[16 + size :]
    return found


def test_tensorboard_is_told_what_to_forget(tmp_path):
    for resume_step, steps in ((None, (1, 2)), (1, (2, 3))):
        writer = metrics_log.Writer(tmp_path, resume_step=resume_step, tensorboard=True)
        for step in steps:
            writer.write(step, "train", {"loss": 1.0, "bad": math.nan})
        writer.close()
    events = scalars(tmp_path / "tensorboard")
    assert [event for event in events if event[0] != "restart"] == [
        ("train/loss", 1),
        ("train/loss", 2),
        ("train/loss", 2),
        ("train/loss", 3),
    ]
    assert ("restart", 2) in events


def test_tensorboard_gets_texts_and_pictures(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    writer = metrics_log.Writer(tmp_path, resume_step=None)
    picture = np.zeros((3, 5, 3), np.uint8)
    picture[0, 0] = 255, 1, 2
    writer.show(7, {"test/attention": picture, "test/translations": "*Hallo* & <b>"})
    writer.close()
    raw = next((tmp_path / "tensorboard").iterdir()).read_bytes()
    events = []
    while raw:
        size = int.from_bytes(raw[:8], "little")
        events.append(Event.FromString(raw[12 : 12 + size]))
        raw = raw[16 + size :]
    image, text = events[-1].summary.value
    assert events[-1].step == 7
    decoded = cv2.imdecode(np.frombuffer(image.image.encoded_image_string, np.uint8), 1)
    np.testing.assert_array_equal(decoded[..., ::-1], picture)
    assert (image.image.height, image.image.width) == (3, 5)
    assert text.metadata.plugin_data.plugin_name == "text"
    assert text.tensor.string_val == [b"*Hallo* & <b>"]


def test_wandb_is_one_run_however_often_it_is_resumed(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for _ in range(2):
        writer = metrics_log.Writer(
            tmp_path, resume_step=None, tensorboard=False, wandb="p", config={"seed": 3}
        )
        writer.write(1, "train", {"loss": 0.5, "bad": math.nan})
        writer.show(1, {"picture": np.zeros((4, 4, 3), np.uint8), "text": "<b>&"})
        writer.close()
    runs = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 2 and all(path.stat().st_size > 0 for path in runs)
    assert {path.stem for path in runs} == {f"run-{(tmp_path / 'wandb_id').read_text()}"}


def test_wandb_without_a_key_is_refused_and_one_that_fails_is_left_out(
    tmp_path, monkeypatch, caplog
):
    fake = types.SimpleNamespace(api=types.SimpleNamespace(api_key=None), Image=None, Html=None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ValueError, match="wandb login"):
        wandb.check("p")
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.check("p")
    writer = metrics_log.Writer(tmp_path, resume_step=None, tensorboard=False, wandb="p")
    assert writer.write(1, "train", {"loss": 0.5})
    writer.close()
    assert "training without it" in caplog.text


def test_wandb_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'localglobal_jax\[wandb\]'"):
        wandb.check("project")
    wandb.check(None)


@pytest.mark.parametrize(
    ("given_", "line"),
    [
        (
            {"step": 350, "loss": 0.12344, "rate": 5234.4, "seconds": 65.2, "waiting": 0.031},
            "step  350/1000  loss 0.1234  5,234 items/s  ETA 1:05  input wait 3 %",
        ),
        (
            {"step": 1000, "loss": None, "rate": 0.25, "seconds": 0, "waiting": 1, "mfu": 0.412},
            "step 1000/1000  0.25 items/s  ETA 0:00  input wait 100 %  MFU 41 %",
        ),
        (
            {"step": 1, "loss": math.nan, "rate": 12, "seconds": 3599.7, "waiting": 0},
            "step    1/1000  loss nan  12 items/s  ETA 1:00:00  input wait 0 %",
        ),
        (
            {"step": 0, "loss": 1, "rate": math.inf, "seconds": math.inf, "waiting": math.nan},
            "step    0/1000  loss 1.0000",
        ),
    ],
)
def test_progress_line(given_, line):
    given_ = dict(given_)
    assert reporting_progress.progress_line(given_.pop("step"), 1000, **given_) == line


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_pipe_gets_plain_lines():
    pipe = io.StringIO()
    progress = reporting_progress.Progress(pipe)
    progress.show("step 1")
    progress.print("test: 1.0")
    progress.show("step 2")
    progress.close()
    assert pipe.getvalue().splitlines() == ["step 1", "test: 1.0", "step 2"]


def test_a_terminal_gets_one_line_redrawn(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    terminal = Terminal()
    progress = reporting_progress.Progress(terminal)
    progress.show("step 1/9 and so on, for longer than the terminal is wide")
    progress.show("step 2/9")
    assert "\n" not in terminal.getvalue()
    assert all(len(x) < 30 for x in terminal.getvalue().replace("\x1b[K", "").split("\r"))
    progress.print("saved")
    progress.show("step 3/9")
    progress.close()
    progress.close()
    lines = terminal.getvalue().split("\n")
    assert lines[0].endswith("\r\x1b[Ksaved")
    assert lines[1].startswith("\rstep 3/9")
    assert lines[2:] == [""]


def test_parameter_table_adds_up():
    params = {"stem": {"kernel": np.zeros((3, 3, 1, 16))}, "head": {"bias": np.zeros(1000)}}
    table = reporting_progress.parameter_table(params).splitlines()
    assert table[0].split() == ["head/bias", "(1000,)", "1,000"]
    assert table[1].split() == ["stem/kernel", "(3,", "3,", "1,", "16)", "144"]
    assert table[-1].split() == ["total", "2", "arrays", "1,144"]
    assert len({len(line) for line in table}) == 1


def test_a_large_table_is_grouped():
    block = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
    params = {f"stage{s}": {f"block{b}": block for b in range(10)} for s in range(3)}
    table = reporting_progress.parameter_table(params).splitlines()
    assert len(table) == 32
    assert table[0].split() == ["stage0/block0", "2", "arrays", "9"]
    assert table[-1].split() == ["total", "60", "arrays", "270"]


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
    with pytest.raises(ValueError, match="no learning curve"):
        plots.learning_curve(tmp_path)


def test_drawing_libraries_are_loaded_only_when_used():
    code = (
        "import sys; from localglobal_jax.training.reporting import metrics_log, model_card, plots;"
        "assert not {'matplotlib', 'tensorboardX', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
