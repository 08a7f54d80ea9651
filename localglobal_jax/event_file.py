# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's file, written by whoever calls.

Not tensorboardX's `SummaryWriter`: that one hands over to a thread. When the thread dies, of a full
disk say, its queue fills up, and training waits for it forever, deaf to SIGTERM.
"""

import pathlib
import socket
import time

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
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

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Adds a point of the curve `name`; OSError if it cannot be written."""
        point = Summary.Value(tag=name, simple_value=value)
        self._write(Event(step=step, summary=Summary(value=[point])))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Returns once everything is on the disk."""
        self._records.flush()

    def close(self) -> None:
        """Closes."""
        self._records.close()
