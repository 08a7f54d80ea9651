# SPDX-License-Identifier: Apache-2.0
"""Workdirs on Google Cloud Storage (``gs://``): a local mirror of their small files.

An object cannot be appended to. So the small files of such a workdir (config, metrics, tokenizer,
model card, TensorBoard) are written locally and uploaded with every checkpoint and at the end of
the run, also after an error. Checkpoints do not pass through here: orbax writes them to the store,
every host its own shards.

Tested against fake-gcs-server, over HTTP. Needs the extra ``gcs``. Orbax
supports no other object store.
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

WANDB = "wandb"  # uploaded by wandb's own process
NOT_FETCHED = ("checkpoints", "profile", WANDB)


class LocalMirror:
    """The small files of a workdir in a local directory, kept in step with the store.

    Attributes:
      local: the directory of the small files; a workdir that is local is its own mirror.
      checkpoints: the directory of the steps, in the store.
      lock: the file for `workdir.Lock`, always local.
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
        """Downloads the small files. Raises ValueError where the extra ``gcs`` is not installed."""
        if self._store is None:
            return
        try:
            _fetch(self._store, self.local, leave_out=NOT_FETCHED)
        except ImportError as error:
            raise ValueError(f"{self._store}: {error}") from None

    @contextlib.contextmanager
    def kept(self, ours: bool) -> Iterator[None]:
        """Context manager that uploads changed files at its end, also after an error, if `ours`."""
        try:
            yield
        finally:
            if ours:
                self.push()

    def push(self) -> None:
        """Uploads the files that have changed since the last call."""
        if self._store is None:
            return
        for file in sorted(self.local.rglob("*")):
            inside = file.relative_to(self.local)
            if inside.parts[0] == WANDB or not file.is_file():  # a dangling link is not a file
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
