"""Secrets are refused in recipes, and never printed or written."""

import json
import re
from pathlib import Path

import pytest
import yaml

from finray.cluster.cli.main import main
from finray.training.common.secrets import HIDDEN, redact, secret_kind, secret_places, texts

HUB_TOKEN = "hf_" + "a1B2" * 6


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"401 for {HUB_TOKEN} at the hub", HUB_TOKEN),
        ("s3://KEYID:sEcReT/x@bucket/runs", "sEcReT"),
        ("s3://KEYID:sEcReTx@bucket/runs", "sEcReTx"),
        ("https://host/x?token=abc123&size=3", "abc123"),
        ("s3://b/r?endpoint_override=h&secret_key=abc123", "abc123"),
        ("key AKIAABCDEFGHIJKLMNOP was used", "AKIAABCDEFGHIJKLMNOP"),
        ("key ASIAABCDEFGHIJKLMNOP was used", "ASIAABCDEFGHIJKLMNOP"),
        ("wandb_v1_" + "a1B2" * 8, "a1B2" * 8),
        ("ghp_" + "a1B2" * 9, "a1B2" * 9),
        ("sk-proj-" + "a1B2" * 9, "a1B2" * 9),
        ("s3://user:pa55/word@bucket/runs", "pa55/word"),
        ("s3://bucket/runs?region=a&X-Amz-Signature=pa55word", "pa55word"),
        ("https://account.blob/x?sv=2024&sig=pa55word", "pa55word"),
        ("https://host/x?api-key=pa55word", "pa55word"),
        ("https://host/x?apikey=pa55word", "pa55word"),
        ("https://host/x?db_passwd=pa55word", "pa55word"),
    ],
)
def test_formats_of_secrets(text: str, secret: str) -> None:
    """What is hidden in output is refused in settings, and vice versa."""
    assert secret not in redact(text) and HIDDEN in redact(text)
    assert secret_kind(text) is not None and list(secret_places({"a": text})) == [("a",)]
    assert secret_kind(redact(text)) is None


def test_kinds_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_APIKEY", "0123456789abcdef")
    assert secret_kind(f"at {HUB_TOKEN}") == "a Hugging Face token"
    assert secret_kind("https://a:b@host") == "a user name with a password in a URI"
    assert secret_kind("s3://b?secret_key=x") == "credentials in the query of a URI"
    assert secret_kind("/0123456789abcdef/") == "the value of $OPENAI_APIKEY"


def test_values_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/.ray/auth_token")
    text = "login with 0123456789abcdef failed; see /home/me/.ray/auth_token"
    assert redact(text) == f"login with {HIDDEN} failed; see /home/me/.ray/auth_token"


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/runs?region=eu&scheme=http",
        "s3://bucket/runs?region=eu-1&endpoint_override=http://s3:9000",
        "s3://bucket/a@b",
        "https://host/x?design=round&assigned=me",
        "max_tokens=128",
        "a:b@c",
        "hf://d/x",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text and secret_kind(text) is None


def test_places() -> None:
    values = {
        "data": {"train": [{"path": "rows.jsonl"}, {"path": f"https://h/?token={HUB_TOKEN}"}]}
    }
    assert list(secret_places(values)) == [("data", "train", 1, "path")]


def test_every_text_has_its_key() -> None:
    values = {"a": "x", "b": [{"c": "y"}, 1, "z"], "d": None}
    assert list(texts(values)) == [(("a",), "x"), (("b", 0, "c"), "y"), (("b", 2), "z")]


@pytest.mark.parametrize("name", ["SSL_CERT_TOKEN_FILE", "GOOGLE_APPLICATION_CREDENTIALS"])
def test_variables_that_name_files_hold_no_secret(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "/home/me/key.json")
    assert redact("cannot read /home/me/key.json") == "cannot read /home/me/key.json"


@pytest.mark.parametrize("command", ["check", "train", "prepare"])
def test_a_recipe_with_a_secret_is_refused_without_printing_it(
    tmp_path: Path,
    tiny_model: Path,
    chat_file: Path,
    command: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {
        "name": "run",
        "model": {"base": str(tiny_model)},
        "data": {"train": [{"path": str(chat_file)}], "max_length": 128},
        "scale": {"workers": 0},
        "storage": "s3://KEYID:sEcReTvalue@bucket/runs",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main([command, str(path)]) == 2
    out, err = capsys.readouterr()
    assert re.search(r"recipe\.yaml:\d+: storage: holds a secret", err)
    assert "sEcReTvalue" not in out + err


def test_an_error_in_run_json_holds_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finray.training.common.storage import Folder
    from finray.training.config.recipe import recipe_from_dict
    from finray.training.run import _record_end

    monkeypatch.setenv("HF_TOKEN", "not-a-usual-form-42")
    recipe = recipe_from_dict(
        {"name": "run", "model": {"base": "o/m"}, "data": {"train": [{"path": "/rows.jsonl"}]}}
    )
    _record_end(recipe, Folder(str(tmp_path)), "failed", "refused not-a-usual-form-42", 1.0)
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert record["error"] == f"refused {HIDDEN}"
