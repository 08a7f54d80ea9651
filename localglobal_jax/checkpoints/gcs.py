# SPDX-License-Identifier: Apache-2.0
"""Workdirs on Google Cloud Storage (``gs://``), and the only place that knows them.

An object cannot be appended to, so the small files of such a workdir (config, metrics, tokenizer,
model card, TensorBoard) live in a local copy, which is put back with
every checkpoint and at the end, however that comes about. Checkpoints do
not pass through here: orbax writes them to the store itself, every host its own part.

Tested with fsspec's file system in memory; no real bucket was at hand. It needs the extra
``gcs``. Orbax knows no other store.
"""

import atexit
import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath

from localglobal_jax.checkpoints.workdir import is_remote

WANDB = "wandb"  # what its process writes, and sends by itself
LEFT_OUT = ("profile", WANDB)  # of what is fetched


class LocalMirror:
    """A workdir: `local` holds its small files, `checkpoints` says where the steps are.

    Of a local directory it is the directory itself. `lock` is the file to lock, always a local one.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self._store: epath.Path | None = None
        if is_remote(directory):
            self._store = epath.Path(directory)
            self.local = pathlib.Path(tempfile.mkdtemp(prefix="localglobal-"))
            atexit.register(shutil.rmtree, self.local, ignore_errors=True)
            self.checkpoints = self._store / "checkpoints"
            name = hashlib.sha256(os.fspath(self._store).encode()).hexdigest()[:16]
            self.lock = pathlib.Path(os.path.expanduser("~/.cache/localglobal/locks"), name)
            self._pushed: dict[pathlib.Path, int] = {}
            self.pull()
        else:
            self.local = pathlib.Path(directory).absolute()
            self.checkpoints = epath.Path(self.local / "checkpoints")
            self.lock = self.local / ".lock"

    def pull(self) -> None:
        """Fetches what is there, but for checkpoints."""
        if self._store is None:
            return
        try:
            _fetch(self._store, self.local, leave_out=("checkpoints", *LEFT_OUT))
        except ImportError as error:
            raise ValueError(f"{self._store}: {error}") from None

    @contextlib.contextmanager
    def kept(self, ours: bool) -> Iterator[None]:
        """Puts back what has changed when the block ends, however it does, if that is `ours`."""
        try:
            yield
        finally:
            if ours:
                self.push()

    def push(self) -> None:
        """Puts back what has changed since the last time."""
        if self._store is None:
            return
        for file in sorted(self.local.rglob("*")):
            inside = file.relative_to(self.local)
            if inside.parts[0] == WANDB or not file.is_file():  # a dangling link is none
                continue
            changed = file.stat().st_mtime_ns
            if self._pushed.get(file) != changed:
                target = self._store / inside.as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
                self._pushed[file] = changed


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
