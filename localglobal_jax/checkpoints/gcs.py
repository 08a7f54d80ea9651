# SPDX-License-Identifier: Apache-2.0
"""Workdirs on Google Cloud Storage (``gs://``): a local mirror of their small files.

An object cannot be appended to. So the small files of such a workdir (config, metrics, tokenizer,
model card, TensorBoard) are written locally and uploaded with every checkpoint and at the end of
the run, also after an error. Checkpoints do not pass through here: orbax writes them to the store,
every host its own shards. Messages name the store's path of a file (`workdir.shown`).

Tested against fake-gcs-server, over HTTP. Needs the extra ``gcs``. Orbax
supports no other object store.
"""

import atexit
import contextlib
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator

from etils import epath

from localglobal_jax.checkpoints import objects, store, workdir

LAST_PATIENCE = 5.0  # seconds
LOCK = ".lock"
WANDB = "wandb"  # uploaded by wandb's own process
FETCHED = ("tokenizer",)  # folders; the others are empty here, which shows that they exist
log = logging.getLogger(__name__)


class LocalMirror:
    """The small files of a workdir in a local directory, kept in step with the store.

    Attributes:
      local: the directory of the small files; a workdir that is local is its own mirror.
      checkpoints: the directory of the steps, in the store.
      lock: the file, or the object in the store, for `workdir.Lock`.
      confirm: called before every upload; raises Locked if another run has taken the workdir over.
    """

    confirm: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, directory: str | os.PathLike[str]):
        self._store: epath.Path | None = None
        self.lock: epath.Path | pathlib.Path
        if workdir.is_remote(directory):
            self._store = workdir.absolute(directory)
            self.local = pathlib.Path(tempfile.mkdtemp(prefix="localglobal-"))
            atexit.register(shutil.rmtree, self.local, ignore_errors=True)
            self.checkpoints = self._store / "checkpoints"
            self.lock = self._store / LOCK
            self._same: dict[str, tuple[int, int]] = {}  # time and size of what the store has too
            workdir.show_as(self.local, self._store)
            self.pull()
        else:
            self.local = pathlib.Path(directory).expanduser().absolute()
            self.checkpoints = epath.Path(self.local / "checkpoints")
            self.lock = self.local / LOCK

    def pull(self) -> None:
        """Downloads the small files.

        Raises ValueError where the extra ``gcs`` is not installed, where the bucket does not exist
        and where reading is not permitted; StoreFailed for other faults of the store.
        """
        if self._store is None:
            return
        with store.final_is_wrong():
            self._pull(self._store)

    def _pull(self, there: epath.Path) -> None:
        found = objects.sizes(there)
        folders = {name.split("/")[0] for name in found if "/" in name}
        wanted = {
            name: size
            for name, size in found.items()
            if ("/" not in name or name.split("/")[0] in FETCHED)
            and ".." not in name.split("/")
            and name != LOCK
        }
        for folder in folders - {"..", ""}:
            (self.local / folder).mkdir(exist_ok=True)
        for name in self._same.keys() - wanted.keys():
            (self.local / name).unlink(missing_ok=True)
        for name, contents in objects.contents(there, wanted):
            file = self.local / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(contents)
        self._same = {name: _stamp(self.local / name) for name in wanted}

    @contextlib.contextmanager
    def kept(self, ours: bool) -> Iterator[None]:
        """Context manager that uploads changed files at its end, also after an error, if `ours`.

        After an error, a failing upload is only logged, and after an OSError, such as a failing
        store, repeated for a few seconds only.
        """
        try:
            yield
        except BaseException as error:
            if ours:
                last = LAST_PATIENCE if isinstance(error, OSError) else store.LIMITS.patience
                try:
                    with store.patience(last):
                        self.push()
                except OSError as second:
                    log.error("the last lines of the run's files are not uploaded: %s", second)
            raise
        if ours:
            self.push()

    def push(self) -> None:
        """Uploads the files that have changed since the last call, and deletes those removed."""
        if self._store is None:
            return
        self.confirm()
        files = {
            file.relative_to(self.local).as_posix(): _stamp(file)
            for top in sorted(self.local.iterdir())
            if top.name != WANDB  # its files come and go
            for file in (top, *sorted(top.rglob("*")))
            if file.is_file()  # a dangling link is not a file
        }
        changed = [name for name, stamp in files.items() if self._same.get(name) != stamp]
        objects.upload(self._store, self.local, changed)
        objects.delete(self._store, self._same.keys() - files.keys())
        self._same = files


def _stamp(file: pathlib.Path) -> tuple[int, int]:
    """Returns the time of the last change, in nanoseconds, and the size of a file."""
    about = file.stat()
    return about.st_mtime_ns, about.st_size
