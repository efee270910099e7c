"""What the doctor says of ports that answer without a token."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from support.model_hub import listening

from finray.cluster.nodes import doctor


class Metrics(BaseHTTPRequestHandler):
    """Answers as Ray's agent does."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/metrics" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Metrics)
    with listening(server):
        yield server.server_port


def test_open_ports_of_metrics_are_named(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"NodeManagerAddress": "127.0.0.1", "MetricsExportPort": 1, "Resources": {"CPU": 1.0}}
    head = {**node, "Resources": {"node:__internal_head__": 1.0}}
    monkeypatch.setattr(doctor, "_HEAD_METRICS", (port, 2))
    assert doctor._metrics([node]).text == "no port serves metrics"
    line = doctor._metrics([head, {**node, "MetricsExportPort": port}])
    assert line.is_good and line.warns
    assert line.text.startswith(f"127.0.0.1:{port}, 127.0.0.1:{port}: /metrics answers without")
