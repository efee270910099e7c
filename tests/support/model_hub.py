"""A stand-in for the hub's API for models: repositories are made, and files come in one commit."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from threading import Thread
from typing import Any

TOKEN = "hf_" + "q" * 34


class ModelHub(ThreadingHTTPServer):
    """Keeps what was uploaded; `refuses` is the status of every answer to a change."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.private: dict[str, bool] = {}
        """Repositories, and whether each is private."""
        self.files: dict[str, dict[str, bytes]] = {}
        self.refuses: int | None = None
        self.seen: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: ModelHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.seen.append(f"GET {self.path}")
        name = self.path.partition("?")[0].removeprefix("/api/models/")
        name = name.partition("/revision/")[0]
        if name not in self.server.private:
            self._answer(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
            return
        self._answer(200, {"id": name, "private": self.server.private[name], "siblings": []})

    def do_POST(self) -> None:
        self.server.seen.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuses or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(self.server.refuses or 401, {"error": "You may not write here"})
        elif self.path == "/api/repos/create":
            request = json.loads(body)
            name = "/".join(filter(None, (request.get("organization"), request["name"])))
            private = request.get("private", request.get("visibility") == "private")
            self.server.private.setdefault(name, private)
            self._answer(200, {"url": f"{self.server.url}/{name}"})
        elif self.path == "/api/validate-yaml":  # the card's header
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in files
            ]
            self._answer(200, {"files": modes})
        elif "/commit/" in self.path:
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    content = base64.b64decode(value["content"])
                    self.server.files.setdefault(name, {})[value["path"]] = content
            url = f"{self.server.url}/{name}/commit/{'0' * 40}"
            self._answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": url})
        else:
            self._answer(404, {"error": self.path})

    def _answer(self, status: int, content: Any, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def listening(server: BaseServer) -> Iterator[str]:
    """The address of a server that answers for as long as the context lasts."""
    # It looks every half second whether it shall end, if nobody says how often.
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        host, port = server.server_address[:2]
        yield f"http://{host}:{port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def model_hub() -> Iterator[ModelHub]:
    """A hub that answers for as long as the context lasts."""
    hub = ModelHub()
    with listening(hub):
        yield hub
