"""A stand-in for the Hugging Face Hub on the loopback: model info and files of a few small repositories."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_right"
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b"{}",
    "model.safetensors": b"weights" * 50_000,
    "original/consolidated.00.pth": b"pickle",
    "README.md": b"# a model",
}
LARGE = {"model.safetensors": bytes(range(256)) * 90_000}
"""More than the client reads at a time (10 MiB), so that a broken transfer leaves something behind."""
REPOSITORIES = {"tiny/open": "open", "some/large": "open", "tiny/gated": "gated", "tiny/private": "private"}


def files_of(repo: str) -> dict[str, bytes]:
    return LARGE if repo == "some/large" else FILES


class Handler(BaseHTTPRequestHandler):
    """Answers the handful of requests that a snapshot download makes; `server.asked` lists them."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append((self.command, path, self.headers.get("Range")))  # type: ignore[attr-defined]
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == "hf_wrong":
            return self.send(401, b'{"error": "Invalid credentials in Authorization header"}', {})
        if info := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            return self.info(info[1], info[2], token)
        if tree := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            return self.tree(tree[1], token)
        if file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.file(file[1], file[2], token)
        return self.send(404, b"{}", {})

    def refused(self, repo: str, token: str) -> bool:
        kind = REPOSITORIES.get(repo)
        if kind is None or kind == "private" and token != TOKEN:
            self.send(401, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif kind == "gated" and token != TOKEN:
            self.send(403, b'{"error": "Access is restricted"}', {"X-Error-Code": "GatedRepo"})
        else:
            return False
        return True

    def info(self, repo: str, revision: str | None, token: str) -> None:
        if self.refused(repo, token):
            return
        if revision and revision.removeprefix("/revision/") not in ("main", COMMIT):
            self.send(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": name} for name in files_of(repo)]
        body = {
            "_id": "1",
            "id": repo,
            "sha": COMMIT,
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }
        self.send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def tree(self, repo: str, token: str) -> None:
        if self.refused(repo, token):
            return
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files_of(repo).items()
        ]
        self.send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def file(self, repo: str, name: str, token: str) -> None:
        if self.refused(repo, token):
            return
        content = files_of(repo).get(name)
        if content is None:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range") or "")
        if start and self.command == "GET":
            first = int(start[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self.send(206, content[first:], headers)
        elif name in self.server.breaks and self.command == "GET":  # type: ignore[attr-defined]
            self.server.breaks.discard(name)  # type: ignore[attr-defined]
            self.send(200, content, headers, sent=len(content) // 2)
        else:
            self.send(200, content, headers)

    def send(self, status: int, body: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        """Answer; with `sent` the connection breaks after so many bytes of the body."""
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])
        self.close_connection = sent is not None

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve() -> Iterator[tuple[str, list, set]]:
    """(address, the requests so far, the files whose next transfer breaks off halfway) of a running server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.breaks = [], set()  # type: ignore[attr-defined]
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked, server.breaks  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
