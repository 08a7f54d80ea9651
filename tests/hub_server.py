# SPDX-License-Identifier: Apache-2.0
"""A server with the routes of the Hugging Face hub that downloads use, over HTTP."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading

API = re.compile(r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree)/([^/?]+))?(?:\?.*)?")
FILE = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")


class Hub:
    """Attributes: `repositories`: name -> revision -> folder; `private`: names that need `token`;
    `requests`: the paths asked for; `broken`: the status of every answer, if it is set."""

    token = "hf_secret"

    def __init__(self):
        self.repositories, self.private, self.requests = {}, set(), []
        self.broken = None

    def add(self, name, folder, revision="main"):
        self.repositories.setdefault(name, {})[revision] = pathlib.Path(folder)

    def commit(self, name, revision):
        """The commit of a revision, which may be one itself; None if there is none."""
        commits = {
            r: hashlib.sha1(f"{name}@{r}".encode()).hexdigest() for r in self.repositories[name]
        }
        return commits.get(revision) or (revision if revision in commits.values() else None)

    def folder(self, name, commit):
        revisions = self.repositories[name]
        return next(revisions[r] for r in revisions if self.commit(name, r) == commit)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub = self.server.hub
        hub.requests.append(self.path)
        api, file = API.fullmatch(self.path), FILE.fullmatch(self.path)
        name = (api or file)[1] if api or file else None
        given = self.headers.get("Authorization")
        if hub.broken:
            return self.answer(hub.broken, b"broken")
        if given not in (None, f"Bearer {hub.token}"):
            message = "Invalid credentials in Authorization header"
            return self.answer(401, b"", {"X-Error-Message": message})
        if name not in hub.repositories or (name in hub.private and not given):
            message = "Invalid username or password."  # of the hub, also for what is not there
            return self.answer(401, b"", {"X-Error-Message": message})
        commit = hub.commit(name, (api[3] if api else file[2]) or "main")
        if commit is None:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        folder = hub.folder(name, commit)
        if api:
            return self.answer(200, json.dumps(self.listing(name, commit, api[2])).encode())
        path = folder / file[3]
        if not path.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}
        return self.answer(200, data, headers)

    do_HEAD = do_GET

    def listing(self, name, commit, kind):
        folder = self.server.hub.folder(name, commit)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in files]
        if kind == "tree":
            return [
                {
                    "type": "file",
                    "path": path,
                    "size": file.stat().st_size,
                    "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                }
                for path, file in zip(names, files, strict=True)
            ]
        return {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in names]}

    def answer(self, status, data, headers=()):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve():
    """Context manager of a `Hub` and its URL."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
