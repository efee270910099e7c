"""A stand-in for the hub on this machine: data sets of files, with commits, gates and secrets."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import HfFileSystem, constants

from .model_hub import listening

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves data sets; `gated` ones only to nobody."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.datasets: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.commits: dict[str, str] = {}
        self.past: dict[tuple[str, str], dict[str, bytes]] = {}
        """Files at earlier commits, by the name and the commit."""
        self.sent = 0
        """Bytes of data files that were sent."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str) -> str:
        return self.commits.get(name, COMMIT)

    def move(self, name: str, commit: str, files: dict[str, bytes]) -> None:
        """Let the main branch of a data set be at another commit."""
        self.past[name, self.commit(name)] = self.datasets[name]
        self.datasets[name], self.commits[name] = files, commit

    def use(self, patch: pytest.MonkeyPatch) -> None:
        """Let the client libraries of this process talk to this hub."""
        from finray.training.common.storage import _filesystem
        from finray.training.data.hub import _commit

        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", self.url)
        patch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            self.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        HfFileSystem.clear_instance_cache()
        _filesystem.cache_clear()
        _commit.cache_clear()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._route(body)

    def _route(self, body: bytes = b"") -> None:  # noqa: PLR0911 - a table of addresses
        path = unquote(urlparse(self.path).path)
        match = re.fullmatch(
            r"/(api/)?datasets/([\w.-]+/[\w.-]+)(?:/([\w-]+)(?:/([^/]+))?(/.*)?)?", path
        )
        if match is None or match[2] not in self.server.datasets:
            return self._error(401, "RepoNotFound", "Repository Not Found")
        name, action, revision, rest = match[2], match[3], match[4], (match[5] or "")[1:]
        files = self.server.datasets[name]
        commit = self.server.commit(name)
        if past := self.server.past.get((name, revision or "")):
            files, commit = past, str(revision)
        elif revision not in (None, "main", commit):
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        if action in ("auth-check", "resolve") and name in self.server.gated:
            return self._error(403, "GatedRepo", "Access is restricted")
        if action == "auth-check":
            return self._json({})
        if action in (None, "revision"):
            return self._json(
                {
                    "_id": "1",
                    "id": name,
                    "sha": commit,
                    "private": False,
                    "gated": "manual" if name in self.server.gated else False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "siblings": [{"rfilename": file} for file in files],
                }
            )
        if action == "tree":
            return self._json(_tree(files, rest, "recursive=true" in self.path.lower()))
        if action == "paths-info":
            asked = (
                json.loads(body)["paths"]
                if body[:1] == b"{"
                else re.findall(rb"paths=([^&]*)", body)
            )
            paths = [unquote(p.decode()) if isinstance(p, bytes) else p for p in asked]
            entries = {entry["path"]: entry for entry in _tree(files, "", True)}
            return self._json([entries[path] for path in paths if path in entries])
        if action == "resolve" and rest in files:
            return self._file(commit, files[rest])
        return self._error(404, "EntryNotFound", "Entry not found")

    def _file(self, commit: str, content: bytes) -> None:
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        last = int(asked[2]) if asked and asked[2] else len(content) - 1
        part = content[first : last + 1]
        self.send_response(206 if asked else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command != "HEAD":
            self.server.sent += len(part)
            self.wfile.write(part)

    def _json(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _error(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _tree(files: dict[str, bytes], below: str, recursive: bool) -> list[dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for path, content in files.items():
        if below and not path.startswith(f"{below}/"):
            continue
        inner = path.removeprefix(f"{below}/") if below else path
        parts = inner.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(filter(None, [below, *parts[:depth]]))
            if recursive or depth == 1:
                entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
        if recursive or len(parts) == 1:
            oid = hashlib.sha1(content).hexdigest()
            entries[path] = {"type": "file", "path": path, "oid": oid, "size": len(content)}
    return list(entries.values())


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that listens on this machine."""
    hub = Hub()
    with listening(hub):
        yield hub
