# SPDX-License-Identifier: Apache-2.0
"""Workdirs on object stores (``gs://``, ``s3://``, ``az://``), and the only place that knows them.

An object cannot be appended to, so the small files of such a workdir (config, metrics, tokenizer,
model card, TensorBoard) live in a local copy, which is put back after every flush. Checkpoints do
not pass through here: orbax writes them to the store itself, every host its own part.

Tested with fsspec's file system in memory; no real bucket was at hand. It needs fsspec's package
for the store (``gcsfs``, ``s3fs``, ``adlfs``).
"""

import atexit
import os
import pathlib
import re
import shutil
import tempfile

from etils import epath


class Copy:
    """A workdir: `local` holds its small files, `checkpoints` says where the steps are.

    Of a local directory it is the directory itself.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self._store: epath.Path | None = None
        if is_remote(directory):
            self._store = epath.Path(directory)
            self.local = pathlib.Path(tempfile.mkdtemp(prefix="localglobal-"))
            atexit.register(shutil.rmtree, self.local, ignore_errors=True)
            self.checkpoints = self._store / "checkpoints"
            self._pushed: dict[pathlib.Path, int] = {}
            self.pull()
        else:
            self.local = pathlib.Path(directory).absolute()
            self.checkpoints = epath.Path(self.local / "checkpoints")

    def pull(self) -> None:
        """Fetches what is there, but for checkpoints."""
        if self._store is None:
            return
        try:
            _fetch(self._store, self.local, leave_out=("checkpoints", "profile"))
        except ImportError as error:
            raise ValueError(f"{self._store}: {error}") from None

    def push(self) -> None:
        """Puts back what has changed since the last time."""
        if self._store is None:
            return
        for file in sorted(self.local.rglob("*")):
            changed = file.stat().st_mtime_ns
            if file.is_file() and self._pushed.get(file) != changed:
                target = self._store / file.relative_to(self.local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
                self._pushed[file] = changed


def is_remote(directory: str | os.PathLike[str]) -> bool:
    """``gs://bucket/run`` is, ``runs/gs`` is not; ValueError for stores that nobody knows."""
    scheme = re.match(r"(\w+):/", os.fspath(directory))
    if not scheme:
        return False
    if not re.match(r"(gs|s3|az)://[^/]+/.", os.fspath(directory)):
        raise ValueError(
            f"{directory}: want a local directory, or gs://BUCKET/PATH, s3://... or az://..."
        )
    return True


def _fetch(source: epath.Path, target: pathlib.Path, leave_out: tuple[str, ...] = ()) -> None:
    if not source.exists():
        return
    for item in source.iterdir():
        if item.name in leave_out:
            continue
        if item.is_dir():
            shutil.rmtree(target / item.name, ignore_errors=True)
            (target / item.name).mkdir()
            _fetch(item, target / item.name)
        else:
            (target / item.name).write_bytes(item.read_bytes())
