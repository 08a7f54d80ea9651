# SPDX-License-Identifier: Apache-2.0
"""A proxy that injects faults in front of the server of `gcs_server`, and logs every request.

Rules are tried in order for every request. The first that matches its method and its path, and has
matches left, injects its fault; a request without a rule is passed on. The proxy adds the
precondition ``ifGenerationMatch`` of DELETE, which fake-gcs-server ignores.
"""

import contextlib
import dataclasses
import http.client
import http.server
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator

import gcs_server

CONTROL = "/-/faults"
TEXTS = {  # what Google Cloud Storage writes
    401: "Invalid Credentials",
    403: "test@example.com does not have storage.objects access to the object.",
    404: "The specified bucket does not exist.",
    429: "The object exceeded the rate limit for object mutation operations.",
    503: "Service Unavailable",
}
OF_THE_CONNECTION = ("host", "connection", "transfer-encoding", "content-length", "expect")


@dataclasses.dataclass
class _Rule:
    """A fault for the requests that match, at most `times` of them, after the first `skip`.

    Attributes:
      fault: "status", "reset" (before an answer), "cut" (in the middle of the body) or "stall".
      method, path: regular expressions; `path` is searched in the unquoted path and query, to
        which the name of the object is added where the body has it.
      status, retry_after: of "status"; seconds of the header ``Retry-After``, if any.
      seconds: of "stall"; afterwards the request is answered as usual.
      seen, hits: requests that matched; those to which the fault was done.
    """

    fault: str
    path: str = ""
    method: str = ".*"
    times: int = 10**9
    skip: int = 0
    status: int = 503
    retry_after: int | None = None
    seconds: float = 0.0
    seen: int = 0
    hits: int = 0

    def takes(self, method: str, path: str) -> bool:
        """Counts a request; returns whether the fault is done to it."""
        if not re.fullmatch(self.method, method) or not re.search(self.path, path):
            return False
        self.seen += 1
        taken = self.skip < self.seen <= self.skip + self.times
        self.hits += taken
        return taken


@dataclasses.dataclass
class Rule:
    """A rule of a running proxy."""

    proxy: "Proxy"
    index: int

    @property
    def hits(self) -> int:
        """Returns the number of requests to which the fault was done."""
        return self.proxy.state()["hits"][self.index]


class Proxy:
    """A running proxy, in a process of its own: its `url`, its rules and its requests.

    In this process it could not answer a client in native code that holds Python's lock.
    """

    def __init__(self, url: str):
        self.url = url

    def add(self, fault: str, path: str = "", **options: object) -> Rule:
        """Adds a rule, which it returns; `options` as of `_Rule`."""
        body = json.dumps({"fault": fault, "path": path} | options).encode()
        return Rule(self, json.loads(gcs_server.request(self.url + CONTROL, "POST", body)))

    def clear(self) -> None:
        """Removes all rules and forgets the requests."""
        gcs_server.request(self.url + CONTROL, "DELETE")

    def state(self) -> dict:
        """Returns the hits of every rule, and the requests."""
        return json.loads(gcs_server.request(self.url + CONTROL))

    @property
    def requests(self) -> list[tuple[str, str, str]]:
        """Returns (method, unquoted path and query, fault and its status) in order."""
        return [tuple(line) for line in self.state()["requests"]]


@contextlib.contextmanager
def serve(server: str) -> Iterator[Proxy]:
    """Context manager that runs a proxy of `server`; the environment names it meanwhile."""
    command = [sys.executable, __file__, server]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        proxy = Proxy(process.stdout.readline().strip())
        names = gcs_server.environment(proxy.url)
        before = {name: os.environ.get(name) for name in names}
        os.environ.update(names)
        try:
            yield proxy
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
    finally:
        process.kill()
        process.communicate()


# ---------------------------------------------------------------------------- in the process


class _State:
    """The rules and requests of the proxy's process."""

    def __init__(self, server: str):
        self.rules: list[_Rule] = []
        self.requests: list[tuple[str, str, str]] = []
        self.lock = threading.Lock()  # of rules and requests
        self.deleting = threading.Lock()  # a precondition and its DELETE are one operation
        target = urllib.parse.urlsplit(server)
        self.server, self.host, self.port = server, target.hostname or "", target.port or 80
        self.url = ""

    def rule_of(self, method: str, path: str) -> _Rule | None:
        """Returns the rule for a request, which it counts and logs."""
        with self.lock:
            rule = next((r for r in self.rules if r.takes(method, path)), None)
            named = "" if rule is None else f"{rule.fault} {rule.status}".removesuffix(" 503")
            self.requests.append((method, path, named))
            return rule

    def control(self, method: str, body: bytes) -> object:
        """Does what `Proxy` asks for."""
        with self.lock:
            if method == "POST":
                self.rules.append(_Rule(**json.loads(body)))
                return len(self.rules) - 1
            if method == "DELETE":
                self.rules.clear()
                self.requests.clear()
            return {"hits": [rule.hits for rule in self.rules], "requests": self.requests}


def run(server: str) -> None:
    """Runs the proxy; prints its URL first."""
    state = _State(server)
    listener = _Listener(("127.0.0.1", 0), type("Bound", (_Handler,), {"proxy": state}))
    state.url = f"http://127.0.0.1:{listener.server_address[1]}"
    print(state.url, flush=True)
    listener.serve_forever()


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Stays silent: clients close connections after faults."""


class _Handler(http.server.BaseHTTPRequestHandler):
    proxy: _State
    protocol_version = "HTTP/1.1"  # connections are kept
    disable_nagle_algorithm = True
    wbufsize = 65536
    upstream: http.client.HTTPConnection | None = None

    def finish(self) -> None:
        """Closes both connections."""
        if self.upstream:
            self.upstream.close()
        with contextlib.suppress(OSError, ValueError):  # reset
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing: `Proxy.requests` has every request."""

    def _do(self) -> None:
        body = self._body()
        if self.path == CONTROL:
            found = self.proxy.control(self.command, body)
            return self._answer(200, [], json.dumps(found).encode())
        path = urllib.parse.unquote(self.path)
        if "uploadType=multipart" in path:  # the name is in the body
            named = re.search(rb'"name": ?"([^"]+)"', body[:1000])
            path += f"&name={named[1].decode()}" if named else ""
        rule = self.proxy.rule_of(self.command, path)
        if rule and rule.fault == "stall":
            time.sleep(rule.seconds)
        elif rule and rule.fault == "reset":
            return self._reset()
        elif rule and rule.fault == "status":
            reason = TEXTS.get(rule.status, "")
            error = {"code": rule.status, "message": reason, "errors": [{"message": reason}]}
            headers = [("Content-Type", "application/json")]
            if rule.retry_after is not None:
                headers.append(("Retry-After", str(rule.retry_after)))
            return self._answer(rule.status, headers, json.dumps({"error": error}).encode())
        with self.proxy.deleting if self.command == "DELETE" else contextlib.nullcontext():
            if self.command == "DELETE" and not self._generation_matches():
                return self._answer(
                    412, [], b'{"error": {"code": 412, "message": "conditionNotMet"}}'
                )
            status, headers, content = self._forward(body)
        if rule and rule.fault == "cut":
            return self._cut(status, headers, content)
        self._answer(status, headers, content)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _do

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _generation_matches(self) -> bool:
        where = urllib.parse.urlsplit(self.path)
        wanted = urllib.parse.parse_qs(where.query).get("ifGenerationMatch")
        if not wanted:
            return True
        with contextlib.suppress(OSError):
            found = json.loads(gcs_server.request(f"{self.proxy.server}{where.path}"))
            return found["generation"] == wanted[0]
        return True  # the server answers 404

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        headers = {k: v for k, v in self.headers.items() if k.lower() not in OF_THE_CONNECTION}
        for last in (False, True):  # the server may have closed a connection that was kept
            self.upstream = self.upstream or http.client.HTTPConnection(
                self.proxy.host, self.proxy.port, timeout=120
            )
            try:
                self.upstream.request(self.command, self.path, body=body, headers=headers)
                answer = self.upstream.getresponse()
                content = answer.read()
                break
            except (OSError, http.client.HTTPException):
                self.upstream.close()
                self.upstream = None
                if last:
                    raise
        kept = [
            (k, v.replace(self.proxy.server, self.proxy.url))  # Location of an upload
            for k, v in answer.getheaders()
            if k.lower() not in ("content-length", "transfer-encoding", "connection", "date")
        ]
        return answer.status, kept, content

    def _head(self, status: int, headers: list[tuple[str, str]], size: int) -> None:
        self.send_response_only(status)
        self.send_header("Date", self.date_time_string())
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self._head(status, headers, len(content))
        if self.command != "HEAD":
            self.wfile.write(content)
        self.wfile.flush()

    def _cut(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self._head(status, headers, len(content))
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        self._reset()

    def _reset(self) -> None:
        """Closes the connection by a TCP reset."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True


if __name__ == "__main__":
    run(sys.argv[1])
