# SPDX-License-Identifier: Apache-2.0
"""Tests of reading byte ranges of a directory's files."""

import contextlib
import os

from localglobal_jax.data.tfds import ranges


def test_a_file_that_vanishes_while_its_directory_is_listed_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "kept").write_bytes(b"kept")
    (tmp_path / "temporary").write_bytes(b"of another process")
    scandir = os.scandir

    @contextlib.contextmanager
    def scan(path):
        with scandir(path) as entries:
            found = list(entries)
        (tmp_path / "temporary").unlink()
        yield found

    monkeypatch.setattr(os, "scandir", scan)
    assert list(ranges.Directory(str(tmp_path)).stats()) == ["kept"]
