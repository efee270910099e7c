"""Secrets are refused in recipes, and never printed or written."""

import json
import re
from pathlib import Path

import pytest
import yaml

from finray.cluster.cli.main import main
from finray.training.common.secrets import HIDDEN, redact, secret_places

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
    ],
)
def test_known_forms(text: str, secret: str) -> None:
    assert secret not in redact(text) and HIDDEN in redact(text)


def test_values_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/.ray/auth_token")
    text = "login with 0123456789abcdef failed; see /home/me/.ray/auth_token"
    assert redact(text) == f"login with {HIDDEN} failed; see /home/me/.ray/auth_token"


@pytest.mark.parametrize(
    "text", ["s3://bucket/runs?region=eu&scheme=http", "max_tokens=128", "a:b@c", "hf://d/x"]
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


def test_places() -> None:
    values = {
        "data": {"train": [{"path": "rows.jsonl"}, {"path": f"https://h/?token={HUB_TOKEN}"}]}
    }
    assert list(secret_places(values)) == [("data", "train", 1, "path")]


@pytest.mark.parametrize("command", ["check", "train", "prepare"])
def test_a_recipe_with_a_secret_is_refused_without_saying_it(
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
