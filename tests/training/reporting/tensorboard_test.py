# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's event files: resumed runs, texts and pictures."""

import math

import cv2
import event_files
import numpy as np

from localglobal_jax.training.reporting import metrics_log


def scalars(directory):
    """(tag, step) of the event files."""
    found = []
    for event in event_files.read(directory):
        found += [(value.tag, event.step) for value in event.summary.value]
        if event.HasField("session_log"):
            found.append(("restart", event.step))
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
    writer = metrics_log.Writer(tmp_path, resume_step=None)
    picture = np.zeros((3, 5, 3), np.uint8)
    picture[0, 0] = 255, 1, 2
    writer.show(7, {"test/attention": picture, "test/translations": "*Hallo* & <b>"})
    writer.close()
    events = list(event_files.read(tmp_path / "tensorboard"))
    assert events[0].file_version == "brain.Event:2"  # from 2 on, readers look for restarts
    image, text = events[-1].summary.value
    assert events[-1].step == 7
    decoded = cv2.imdecode(np.frombuffer(image.image.encoded_image_string, np.uint8), 1)
    np.testing.assert_array_equal(decoded[..., ::-1], picture)
    assert (image.image.height, image.image.width) == (3, 5)
    assert text.metadata.plugin_data.plugin_name == "text"
    assert text.tensor.string_val == [b"*Hallo* & <b>"]


def test_tensorboard_gets_the_note_and_the_tags_of_a_run(tmp_path):
    about = {"tags": ("first", "wide"), "note": "why this run"}
    for config in ({"log": about}, {"log": {}}, None):
        metrics_log.Writer(tmp_path, resume_step=None, config=config).close()
    said = [file.read_bytes() for file in sorted((tmp_path / "tensorboard").iterdir())]
    assert [b"why this run" in text and b"first, wide" in text for text in said] == [
        *(True, False, False)
    ]
