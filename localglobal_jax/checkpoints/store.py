# SPDX-License-Identifier: Apache-2.0
"""Faults of Google Cloud Storage: how long its clients retry, and the line that reports the rest.

Three clients are used: gcsfs (small files; `gcs_file_system`), tensorstore (the arrays of
checkpoints; indexed TFRecord files) and array_record. All retry what may pass (429, 5xx, lost
connections, no answer) for about four minutes, with growing pauses. What is left is a `StoreFailed`
that names the object and the remedy.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import re
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

STALL = 60  # seconds without a byte, after which a request is repeated
LONGEST = 32.0  # seconds between two attempts
# tensorstore counts attempts: pauses of 1, 2, 4, 8, 16 and seven times 32 s are 255 s
TENSORSTORE: dict[str, Any] = {
    "max_retries": 12,
    "initial_delay": "1s",
    "max_delay": f"{LONGEST:.0f}s",
}
# read by tensorstore at its first request, and left alone where the user has set them
TENSORSTORE_ENVIRONMENT = {
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": str(STALL),  # it waits forever without these
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": str(STALL),
}
GOOGLE = "storage.googleapis.com"
SERVERS = {  # client: environment variables that send it to another server, the first set one wins
    "gcsfs": ("STORAGE_EMULATOR_HOST",),
    "array_record": ("CLOUD_STORAGE_EMULATOR_ENDPOINT", "CLOUD_STORAGE_TESTBENCH_ENDPOINT"),
    "tensorstore": ("TENSORSTORE_GCS_HTTP_URL",),
}
TOKEN = "GOOGLE_AUTH_TOKEN_FOR_TESTING"
LEAST = 5.0  # seconds that one attempt has after `Limits.end`
TELL_AFTER = 10.0  # seconds without an answer, before the first warning
TELL_EVERY = 30.0  # seconds between two warnings
FILE_SYSTEM = "localglobal_jax.checkpoints.gcs_file_system.FileSystem"


@dataclasses.dataclass
class Limits:
    """Limits of gcsfs that may change while a process runs, in seconds.

    Attributes:
      patience: of all retries of one request; a pod's outages of minutes pass without a restart.
      end: time after which no request is repeated, and each has `LEAST` seconds.
      told: time of the last warning.
    """

    patience: float = 240.0
    end: float = math.inf
    told: float = 0.0

    def left(self) -> float:
        """Returns the seconds for which a request that begins now may be repeated."""
        return min(self.patience, self.end - time.monotonic())


LIMITS = Limits()
log = logging.getLogger(__name__)


class StoreFailed(OSError):
    """The store did not do what was asked, also after retries; nothing is known of the object.

    Attributes:
      status: the HTTP status; 0 where none arrived.
      reason: the fault alone, with its status, without the object and the remedy.
      remedy: a sentence, without its full stop; empty where the text has it.
    """

    def __init__(self, text: str, status: int = 0, reason: str = "", remedy: str = ""):
        super().__init__(text)
        self.status, self.reason, self.remedy = status, reason or text, remedy

    @property
    def is_final(self) -> bool:
        """Returns whether the same request would fail again: no permission, or no such bucket."""
        return self.status in (403, 404)


class WrongCredentials(ValueError):
    """The credentials for the store cannot be used; see `credentials.named`."""


def prepare() -> None:
    """Gives the clients their settings; called before the first path in a bucket is used."""
    import fsspec  # noqa: PLC0415 # only for buckets

    for name, value in TENSORSTORE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("LOCALGLOBAL_DEBUG"):  # every file, and tracebacks of what is raised too
        logging.getLogger("fsspec").setLevel(logging.CRITICAL)
    for protocol in ("gs", "gcs"):
        # by name: gcsfs, an optional dependency, is imported at its first use
        fsspec.register_implementation(protocol, FILE_SYSTEM, clobber=True)
    _check_servers(tuple(map(server_of, SERVERS)))
    _fetch_token()


@functools.cache
def _check_servers(servers: tuple[str, ...]) -> None:
    """Logs, once, that the clients are sent to different servers.

    Raises ValueError for a server that is not a URL with a host and a possible port.
    """
    for server in servers:
        at, _, variable = server.partition(" (")
        try:
            url = urllib.parse.urlsplit(at if variable else f"https://{at}")
            is_possible = url.scheme in ("http", "https") and url.hostname and url.port != 0
        except ValueError:  # a port above 65535, or not a number
            is_possible = False
        if not is_possible or re.search(r"\s", at):
            raise ValueError(
                f"{variable.rstrip(')')}={os.environ.get(variable.rstrip(')'))!r} is not the URL "
                "of a server: give http://HOST:PORT with a port from 1 to 65535, or unset it"
            )
    if len({server.partition(" ")[0] for server in servers}) > 1:
        each = ", ".join(f"{client}: {at}" for client, at in zip(SERVERS, servers, strict=True))
        log.warning(
            "the clients of gs:// use different servers: %s. If one is meant, set all of %s to it",
            each,
            ", ".join(names[0] for names in SERVERS.values()),
        )


@functools.cache
def _fetch_token() -> None:
    """Keeps a line of tensorstore off stderr, which it writes for the token of another server.

    It does so when it first needs the token. That is done here, by a read whose answer does not
    matter, while stderr goes to a file. All other lines in it are written to stderr afterwards.
    """
    if not os.environ.get(TOKEN) or os.environ.get("LOCALGLOBAL_DEBUG"):
        return
    import tensorstore  # noqa: PLC0415 # only for buckets

    spec = {"driver": "gcs", "bucket": "localglobal", "path": "token/"}
    once = {"gcs_request_retries": {"max_retries": 1, "initial_delay": "1ms"}}
    with tempfile.TemporaryFile() as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            reading = tensorstore.KvStore.open({**spec, "context": once}).result().read("x")
            with contextlib.suppress(Exception):
                reading.result(timeout=1.0)
            reading.cancel()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        file.seek(0)
        for line in file:
            if TOKEN.encode() not in line:
                os.write(2, line)


def server_of(client: str) -> str:
    """Returns the server that a client of `SERVERS` uses, and the variable that names it."""
    for variable in SERVERS[client]:
        if found := os.environ.get(variable, "").removesuffix("/"):
            if client == "gcsfs" and found == "default":  # gcsfs's word
                break
            return f"{found if '://' in found else f'http://{found}'} ({variable})"
    return GOOGLE


def tell(name: str, reason: str, left: float) -> None:
    """Logs that `name` is waited for, at most `left` seconds; at most every `TELL_EVERY` s."""
    if (now := time.monotonic()) - LIMITS.told > TELL_EVERY:
        LIMITS.told = now
        log.warning("waiting for %s (%s), %.0f s at most", name, reason, left)


def check_path(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a path in a bucket that the clients do not agree on.

    tensorstore ends a path at ``#`` or ``?``, so the arrays of all steps would be in one place; the
    others are patterns in gcsfs.
    """
    if found := sorted(set(re.findall(r"[#?*\[\]]", os.fspath(path)))):
        raise ValueError(
            f"{path}: {' '.join(found)} has another meaning for the clients of a bucket: choose a "
            "path without # ? * [ ]"
        )


def failure(name: str, status: int, reason: str) -> StoreFailed:
    """Returns the error of a request for `name` (``gs://bucket/object``)."""
    bucket = "/".join(name.split("/")[:3])
    reason = f"{f'{status} ' if status else ''}{' '.join(reason.split()).rstrip('.')[:200]}"
    if status == 401:
        remedy = (
            "The credentials are missing or have expired: log in again (gcloud auth "
            "application-default login) or renew the key that GOOGLE_APPLICATION_CREDENTIALS names"
        )
    elif status == 403:
        remedy = f"Grant the account roles/storage.objectUser on {bucket}, or give another bucket"
    elif status == 404:
        remedy = f"Create the bucket {bucket}, or correct its name"
    else:
        remedy = "The store was asked again until the time was up: run the same command again later"
    return StoreFailed(f"{name}: {reason}. {remedy}", status, reason, remedy)


def of_tensorstore(error: BaseException, name: str | os.PathLike[str]) -> StoreFailed | None:
    """Returns the error of the store behind an error of tensorstore, which has no class of its own.

    None where the store answered: the file is damaged, or it is not there.
    """
    text = str(error)
    found = re.search(r"\[http_response_code='(\d+)'\]", text)
    if not found and not re.search(r"\[curl_code='\d+'\]|^(?:UNAVAILABLE|DEADLINE_EXCEEDED)", text):
        return None
    status = int(found[1]) if found else 0
    if status in (400, 412, 416):
        return None
    plain = re.split(r"\s*\[\w+(?:\[\d+\])?='", text.splitlines()[0])[0]
    objects = re.findall(r"(gs://.+?): ", plain)
    name = objects[-1] if objects else os.fspath(name)
    reason = plain.rpartition(f"{name}: ")[2]
    reason = re.sub(r"^[A-Z_]{5,}: |All \d+ retry attempts failed: ", "", reason)
    return failure(name, status, reason)


@contextlib.contextmanager
def named(path: epath.Path | str) -> Iterator[None]:
    """Context manager that turns tensorstore's errors of a failing store into StoreFailed."""
    try:
        yield
    except ValueError as error:
        if failed := of_tensorstore(error, path):
            raise failed from error
        raise


@contextlib.contextmanager
def final_is_wrong() -> Iterator[None]:
    """Context manager that turns a StoreFailed that `is_final` into a ValueError: a wrong path."""
    try:
        yield
    except StoreFailed as error:
        if error.is_final:
            raise ValueError(str(error)) from error
        raise


@contextlib.contextmanager
def told(path: epath.Path | str, doing: str) -> Iterator[None]:
    """Context manager that logs, every `TELL_EVERY` s, that tensorstore still reads or writes.

    tensorstore retries without a message. Does nothing for a path on disk.
    """
    ended = threading.Event()

    def tell_until_it_ends() -> None:
        waited = 0.0
        while not ended.wait(TELL_EVERY):
            waited += TELL_EVERY
            at = server_of("tensorstore")
            log.warning("%s %s: %.0f s so far, at %s", doing, path, waited, at)

    if not os.fspath(path).startswith("gs:"):
        yield
        return
    threading.Thread(target=tell_until_it_ends, name="long transfers", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Context manager that bounds the requests of gcsfs by `seconds` in all.

    Does nothing where `seconds` are not less than the limit of one request.
    """
    if seconds >= LIMITS.patience:
        yield
        return
    before = LIMITS.patience, LIMITS.end
    LIMITS.patience, LIMITS.end = seconds, min(LIMITS.end, time.monotonic() + seconds)
    try:
        yield
    finally:
        LIMITS.patience, LIMITS.end = before


@contextlib.contextmanager
def one_end() -> Iterator[Callable[[], None]]:
    """Context manager that yields a function, after whose call all requests have one deadline.

    It is ``LIMITS.patience`` seconds after the first call: the waits of a run that is asked to stop
    do not add up.
    """
    before = LIMITS.end

    def begin() -> None:
        LIMITS.end = min(LIMITS.end, time.monotonic() + LIMITS.patience)

    try:
        yield begin
    finally:
        LIMITS.end = before
