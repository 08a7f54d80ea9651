# SPDX-License-Identifier: Apache-2.0
"""Runs ``localglobal`` and records the step and the checksum of every batch that the loop is given.

    OBSERVED_BATCHES=batches.txt python experiments/stress/faults/observed.py train ...

One line a batch, in one write, so that a kill leaves no half of one.
"""

import dataclasses
import os
import sys
import zlib

from localglobal_jax.cli import main as cli
from localglobal_jax.training import setup


def main():
    notes = os.open(os.environ["OBSERVED_BATCHES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    create_task = setup.create_task

    def observed_task(*args, **kwargs):
        task = create_task(*args, **kwargs)

        def batches(start, stop):
            for step, batch in enumerate(task.train_batches(start, stop), start):
                checksum = 0
                for name in sorted(batch):  # the record numbers ("index") are among them
                    checksum = zlib.crc32(batch[name].tobytes(), checksum)
                os.write(notes, f"{step} {checksum:08x}\n".encode())
                yield batch

        return dataclasses.replace(task, train_batches=batches)

    setup.create_task = observed_task
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
