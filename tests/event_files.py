# SPDX-License-Identifier: Apache-2.0
"""Reads TensorBoard's event files."""


def read(directory):
    """Yields the events of all files of a folder. A record is a length, a CRC, an Event, a CRC."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(directory.iterdir()):
        raw = path.read_bytes()
        while raw:
            size = int.from_bytes(raw[:8], "little")
            yield Event.FromString(raw[12 : 12 + size])
            raw = raw[16 + size :]
