# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's file, written by whoever calls.

Not tensorboardX's `SummaryWriter`: that one hands over to a thread. When the thread dies, of a full
disk say, its queue fills up, and training waits for it forever, deaf to SIGTERM.
"""

import pathlib
import socket
import time
from collections.abc import Mapping

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboardX.proto.tensor_pb2 import TensorProto
from tensorboardX.record_writer import RecordWriter

VERSION = "brain.Event:2"  # of the format; TensorBoard wants it first


class EventFile:
    """A new file in `directory`; what other files there say from step `forget` on is forgotten."""

    def __init__(self, directory: pathlib.Path, forget: int):
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, which begin with the time.
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
        self._records = RecordWriter(str(directory / name))
        self._write(Event(file_version=VERSION))
        self._write(Event(step=forget, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds a point to the curve of every name; OSError if it cannot be written."""
        self._add(step, [Summary.Value(tag=tag, simple_value=x) for tag, x in numbers.items()])

    def show(self, step: int, shown: Mapping[str, str | np.ndarray]) -> None:
        """Adds texts (Markdown) and pictures ([h, w, 3], uint8) by their names."""
        self._add(step, [_text(k, v) if isinstance(v, str) else _picture(k, v)
                         for k, v in shown.items()])  # fmt: skip

    def _add(self, step: int, values: list[Summary.Value]) -> None:
        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Returns once everything is on the disk."""
        self._records.flush()

    def close(self) -> None:
        """Closes."""
        self._records.close()


def _text(tag: str, text: str) -> Summary.Value:
    plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()])
    return Summary.Value(tag=f"{tag}/text_summary", metadata=plugin, tensor=tensor)


def _picture(tag: str, pixels: np.ndarray) -> Summary.Value:
    import cv2  # noqa: PLC0415 # most runs show none

    height, width, channels = pixels.shape
    encoded = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
    image = Summary.Image(
        height=height, width=width, colorspace=channels, encoded_image_string=encoded
    )
    return Summary.Value(tag=tag, image=image)
