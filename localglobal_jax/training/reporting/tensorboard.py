# SPDX-License-Identifier: Apache-2.0
"""Writer of TensorBoard's event files, in the calling thread.

tensorboardX's `SummaryWriter` writes in a thread of its own. When that thread ends, for example
because the disk is full, its queue fills up and training blocks forever, also on SIGTERM.
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

VERSION = "brain.Event:2"  # of the file format; the first record


class EventFile:
    """A new event file in `directory`. TensorBoard drops older points from step `forget` on."""

    def __init__(self, directory: pathlib.Path, forget: int):
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, which start with the time.
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
        self._records = RecordWriter(str(directory / name))
        self._write(Event(file_version=VERSION))
        self._write(Event(step=forget, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds a point to the curve of every name. Raises OSError if it cannot be written."""
        self._add(step, [Summary.Value(tag=tag, simple_value=x) for tag, x in numbers.items()])

    def show(self, step: int, shown: Mapping[str, str | np.ndarray]) -> None:
        """Adds texts (Markdown) and pictures (uint8 [h, w, 3]) by name."""
        values = [
            _text(name, value) if isinstance(value, str) else _picture(name, value)
            for name, value in shown.items()
        ]
        self._add(step, values)

    def _add(self, step: int, values: list[Summary.Value]) -> None:
        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Returns once everything is on the disk."""
        self._records.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._records.close()


def _text(tag: str, text: str) -> Summary.Value:
    plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()])
    return Summary.Value(tag=f"{tag}/text_summary", metadata=plugin, tensor=tensor)


def _picture(tag: str, pixels: np.ndarray) -> Summary.Value:
    import cv2  # noqa: PLC0415 # most runs log no pictures

    height, width, channels = pixels.shape
    encoded = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
    image = Summary.Image(
        height=height, width=width, colorspace=channels, encoded_image_string=encoded
    )
    return Summary.Value(tag=tag, image=image)
