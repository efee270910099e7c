"""Ray's token: its file is private, it is required, and a dashboard without one is refused."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from support.model_hub import listening

from finray.cluster.nodes import token
from finray.training.common.errors import InputError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "unset")  # so that it is restored afterwards
    monkeypatch.delenv("RAY_AUTH_MODE")
    return tmp_path


@pytest.fixture(params=[200, 401])
def dashboard(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    with listening(HTTPServer(("127.0.0.1", 0), Answer)) as address:
        yield address, request.param


def test_a_token_is_made_once_and_is_private(home: Path) -> None:
    file = token.ensure_token()
    content = file.read_text(encoding="utf-8")
    assert file == home / ".ray" / "auth_token" and len(content) == 64
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    file.chmod(0o644)
    assert token.ensure_token().read_text(encoding="utf-8") == content
    assert file.stat().st_mode & 0o777 == 0o600


def test_joining_without_a_token_says_where_to_get_it() -> None:
    with pytest.raises(InputError, match=r"head:6379 requires a token(.|\n)*scp"):
        token.join_with_token("head:6379")
    token.ensure_token()
    token.join_with_token("head:6379")


def test_a_dashboard_decides_whether_a_token_is_needed(dashboard: tuple[str, int]) -> None:
    address, status = dashboard
    if status == 200:
        assert token.authenticate(address) == "open"
        return
    with pytest.raises(InputError, match="requires a token"):
        token.authenticate(address)
    token.ensure_token()
    assert token.authenticate(address) == "token"


def test_an_open_dashboard_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token, "probe", lambda _: "open")
    with pytest.raises(InputError, match="answers without a token"):
        token.authenticate("http://10.1.2.3:8265")


@pytest.mark.parametrize("address", ["head:8265", "http://127.0.0.1:9"])
def test_no_dashboard(address: str) -> None:
    with pytest.raises(InputError, match="8265"):
        token.authenticate(address)


@pytest.mark.parametrize(
    ("address", "is_loopback"),
    [
        ("http://localhost:8265", True),
        ("http://127.0.0.9:8265", True),
        ("http://[::1]:8265", True),
        ("http://0.0.0.0:8265", False),
        ("http://127.evil.example:8265", False),
    ],
)
def test_loopback(address: str, is_loopback: bool) -> None:
    assert token.is_loopback(address) is is_loopback
