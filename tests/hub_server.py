"""A Hugging Face hub on this machine: enough of its API to list and fetch model repositories from a directory.

Serves ROOT/owner/repository/... as revision "main" (and as its commit), and refuses as the real one does: 404 with
X-Error-Code RepoNotFound or RevisionNotFound, 403 with GatedRepo for the names in `gated`.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

REPO = r"(?P<repo>[^/]+/[^/]+)"
API = re.compile(rf"/api/models/{REPO}(?:/(?P<verb>revision|tree)/(?P<revision>[^/]+))?/?")
FILE = re.compile(rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class HubServer(ThreadingHTTPServer):
    """Serves a directory of repositories; remembers which files were fetched."""

    daemon_threads = True

    def __init__(self, root: Path, gated: tuple[str, ...] = ()) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.gated = gated
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        """What HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serve_hub(root: Path, gated: tuple[str, ...] = ()) -> Iterator[HubServer]:
    """Serve while the block runs.

    Args:
        root: holds owner/repository directories.
        gated: names of repositories that may not be read.
    """
    server = HubServer(root, gated)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        match = API.fullmatch(path) or FILE.fullmatch(path)
        if match is None:
            return self._refuse(404, "EntryNotFound", "no such page")
        repo = match["repo"]
        if not (self.server.root / repo).is_dir():
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if repo in self.server.gated:
            return self._refuse(403, "GatedRepo", "Access to this model is restricted")
        commit = _commit_of(self.server.root / repo)
        if (match["revision"] or "main") not in ("main", commit):
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        if match.re is FILE:
            return self._send_file(repo, match["path"], commit, with_body)
        listing = _list(self.server.root / repo)
        answer: object = listing
        if match["verb"] != "tree":
            siblings = [{"rfilename": entry["path"]} for entry in listing]
            answer = {"_id": commit, "id": repo, "modelId": repo, "sha": commit, "private": False, "siblings": siblings}
        return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, with_body)

    def _send_file(self, repo: str, path: str, commit: str, with_body: bool) -> None:
        file = self.server.root / repo / path
        if not file.is_file():
            return self._refuse(404, "EntryNotFound", "Entry not found")
        content = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if with_body:
            self.server.fetched.append(path)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(200, content, headers, with_body)
        start, stop = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._send(206, content[start:stop], headers, with_body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), headers, self.command != "HEAD")

    def _send(self, status: int, content: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)


def _list(directory: Path) -> list[dict[str, object]]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return [
        {
            "type": "file",
            "path": path.relative_to(directory).as_posix(),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in files
    ]


def _commit_of(directory: Path) -> str:
    return hashlib.sha1(json.dumps(_list(directory)).encode()).hexdigest()
