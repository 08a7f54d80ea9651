# SPDX-License-Identifier: Apache-2.0
"""File system of gcsfs with bounded waits, for every ``gs://`` path of a process (`store.prepare`).

gcsfs waits forever for an answer, repeats a request for half a minute only, and takes any other
error than "not found" for the absence of a directory, as if a run had no checkpoints.
"""

import asyncio
import contextlib
import inspect
import itertools
import logging
import math
import os
import random
import re
import time
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

from localglobal_jax.checkpoints import store

# else gcsfs asks another service for the bucket's type first; it reads this at its import
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
try:
    import aiohttp
    import google.auth.exceptions
    from gcsfs import core, retry

    from localglobal_jax.checkpoints import credentials
except ImportError as error:
    raise ValueError(
        f"paths on gs:// need the extra gcs ({error}): pip install 'localglobal_jax[gcs]'"
    ) from None

_once = inspect.unwrap(core.GCSFileSystem._request)  # without the retries of gcsfs
_get_once = inspect.unwrap(core.GCSFileSystem._get_file_request)
LOGIN = 10.0  # seconds of retries while credentials are rejected


class FileSystem(core.GCSFileSystem):
    """File system whose errors are `store.StoreFailed`, FileNotFoundError and FileExistsError.

    It is not ``gcsfs.GCSFileSystem``, which is another class where gcsfs was imported before this
    module.
    """

    def __init__(self, *args: Any, patience: float | None = None, **options: Any):
        """Takes the options of gcsfs, and the seconds of retries (default `store.LIMITS`)."""
        if options.get("requests_timeout") is None:
            options["requests_timeout"] = aiohttp.ClientTimeout(
                total=None, sock_connect=store.STALL, sock_read=store.STALL
            )
        options["token"] = credentials.chosen(options.get("token"))
        with credentials.named(options["token"]):
            super().__init__(*args, **options)
        self._patience = patience
        if not os.environ.get("LOCALGLOBAL_DEBUG"):
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # tracebacks of what is retried

    def upload_url(self, bucket: str) -> str:
        """Returns the URL to which objects of `bucket` are posted."""
        return f"{self._location}/upload/storage/v1/b/{urllib.parse.quote(bucket, safe='')}/o"

    def _deadline(self) -> float:
        patience = store.LIMITS.patience if self._patience is None else self._patience
        return time.monotonic() + patience

    async def _request(self, method: str, path: str, *args: Any, **options: Any) -> Any:
        name, has_key = _object(path, args, options)
        deadline = self._deadline()
        for attempt in itertools.count():
            try:
                async with _attempt(name, deadline):
                    return await _once(self, method, path, *args, **options)
            except FileNotFoundError as error:
                if has_key:
                    raise FileNotFoundError(f"{name} does not exist") from error
                raise store.failure(name, 404, "there is no such bucket") from error
            except Exception as error:
                await _pause(error, name, attempt, deadline)

    async def _get_file_request(self, rpath: str, *args: Any, **options: Any) -> Any:
        name = f"gs://{self._strip_protocol(rpath)}"
        deadline = self._deadline()
        for attempt in itertools.count():
            try:
                async with _attempt(name, deadline):
                    return await _get_once(self, rpath, *args, **options)
            except FileNotFoundError:
                raise
            except Exception as error:
                await _pause(error, name, attempt, deadline)

    async def _isdir(self, path: str) -> bool:
        try:
            return (await self._info(path))["type"] == "directory"
        except FileNotFoundError:  # and no other error
            return False

    async def _isfile(self, path: str) -> bool:
        try:
            return (await self._info(path))["type"] == "file"
        except FileNotFoundError:
            return False


@contextlib.asynccontextmanager
async def _attempt(name: str, deadline: float) -> AsyncIterator[None]:
    """Context manager of one attempt of a request.

    Logs that there is no answer after `store.TELL_AFTER` seconds. Raises TimeoutError at the end
    that all requests share (`store.LIMITS`).
    """
    left = store.LIMITS.end - time.monotonic()
    bound = None if math.isinf(left) else max(left, store.LEAST)

    def tell() -> None:
        reason = f"no answer for {store.TELL_AFTER:.0f} s from {store.server_of('gcsfs')}"
        until = min(deadline, store.LIMITS.end)
        store.tell(name, reason, max(until - time.monotonic(), 0.0))

    timer = asyncio.get_running_loop().call_later(store.TELL_AFTER, tell)
    try:
        async with asyncio.timeout(bound) as timeout:
            yield
    except TimeoutError as error:
        waited = bound if bound and timeout.expired() else store.STALL
        at = store.server_of("gcsfs")
        raise TimeoutError(f"no answer for {waited:.0f} s from {at}") from error
    finally:
        timer.cancel()


async def _pause(error: Exception, name: str, attempt: int, deadline: float) -> None:
    """Returns when a request may be repeated; raises StoreFailed where it may not, or is too late.

    Raises `error` where it is not an error of the store.
    """
    failed = _failure(error, name)
    if failed is None:
        raise error
    now, deadline = time.monotonic(), min(deadline, store.LIMITS.end)
    wait = min(2**attempt, store.LONGEST) * random.uniform(0.5, 1.0)  # nosec B311 # spreads hosts
    if failed.status == 401:
        deadline = min(deadline, now - wait + LOGIN) if attempt < 3 else now
    if not _may_pass(error, failed) or now + wait > deadline:
        raise failed from error
    if attempt >= 2:
        store.tell(name, failed.reason, deadline - now)
    await asyncio.sleep(wait)


def _may_pass(error: Exception, failed: store.StoreFailed) -> bool:
    if isinstance(error, TimeoutError | aiohttp.ClientError):
        return True
    return failed.status not in (403, 404) and retry.is_retriable(error)


def _failure(error: Exception, name: str) -> store.StoreFailed | None:
    """Returns the one-line error; None for an error that is not the store's."""
    if isinstance(error, FileExistsError):  # a precondition that was not met
        return None
    if isinstance(error, retry.HttpError):
        code = int(error.code or 0)
        # any other 4xx is a wrong request, and not a fault of the store
        known = code in (0, 401, 408, 429) or code >= 500
        text = str(error.message).removesuffix(f", {error.code}")
        return store.failure(name, code, text) if known else None
    if isinstance(error, OSError) and str(error).startswith("Forbidden: "):  # as gcsfs writes 403
        return store.failure(name, 403, str(error).partition("\n")[2] or "no permission")
    if isinstance(error, google.auth.exceptions.GoogleAuthError | retry.NonRetryableError):
        return store.failure(name, 401, str(error))
    if isinstance(error, TimeoutError):
        return store.failure(name, 0, str(error))
    if isinstance(error, aiohttp.ClientError) or retry.is_retriable(error):
        # without the settings and the repr of the cause, which aiohttp adds
        text = re.split(r" ssl:\w+ \[|: *<", str(error))[0]
        return store.failure(name, 0, text or type(error).__name__)
    return None


def _object(path: str, args: tuple, options: dict) -> tuple[str, bool]:
    """Returns the ``gs://`` name that a request is about, and whether it names an object."""
    whole = path.format(*(urllib.parse.quote(str(x), safe="") for x in args)) if args else path
    found = re.search(r"(?:^|/)b/([^/?]+)(?:/o/([^?]+))?", whole)
    bucket, key = (urllib.parse.unquote(found[1]), found[2]) if found else ("", None)
    if key:
        return f"gs://{bucket}/{urllib.parse.unquote(key)}", True
    data, sent = options.get("data"), (options.get("json") or {}).get("name")
    if isinstance(data, bytes | bytearray | memoryview):  # an upload in one request
        upload = re.search(rb'"name": "([^"]+)"', bytes(data[:1000]))
        sent = upload[1].decode(errors="replace") if upload else sent
    sent = sent or "".join(urllib.parse.parse_qs(whole.partition("?")[2]).get("name", []))
    return f"gs://{bucket}/{sent or options.get('prefix') or ''}".rstrip("/"), False
