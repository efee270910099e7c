"""Secrets are refused in recipes, and never printed or written."""

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from finray.cluster.cli.main import main
from finray.training.common.errors import InputError, RunError
from finray.training.common.secrets import HIDDEN, redact, secret_kind, secret_places, texts
from finray.training.config.recipe import load_recipe

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


R24, R40 = "a1B2c3D4" * 3, "a1B2c3D4" * 5
PLANTED = {
    "Hugging Face": "hf_" + "kLmNoPqRsTuVwXyZaBcDeFgHiJkLmNoPqR",
    "Hugging Face, organisation": f"api_org_{R24}",
    "Weights & Biases": f"wandb_v1_{R24}",
    "Weights & Biases, before": "WANDB_API_KEY=" + "0123456789abcdef" * 2 + "01234567",
    "AWS, long": "AKIAIOSFODNN7EXAMPLE",
    "AWS, temporary": "ASIAIOSFODNN7EXAMPLE",
    "AWS, secret": 'aws_secret_access_key = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"',
    "AWS, variable": "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "AWS, session": "IQoJb3JpZ2luX2Vj" + R40,
    "Azure, account": "DefaultEndpointsProtocol=https;AccountName=a;AccountKey="
    + R40 * 2
    + "abcdef==",
    "Azure, bus": "Endpoint=sb://a.servicebus.windows.net/;SharedAccessKeyName=n;SharedAccessKey="
    + R40,
    "Azure, SAS": f"https://a.blob.core.windows.net/c?sv=2024-01-01&se=2027&sig={R40}%3D",
    "Azure, SAS alone": f"sig={R40}%3D&sv=2024-01-01",
    "Azure, client": "abc8Q~" + "a1B2c3D4" * 4,
    "Google": "AIza" + R40[:35],
    "Google, OAuth": f"ya29.{R40}",
    "Google, client": f"GOCSPX-{R24}",
    "Slack, bot": "xoxb-1234567890-1234567890123-" + R24,
    "Slack, app": f"xapp-1-A0-1-{R24}",
    "Slack, webhook": f"https://hooks.slack.com/services/T00000000/B00000000/{R24}",
    "GitHub": f"ghp_{R40[:36]}",
    "GitHub, server": f"ghs_{R40[:36]}",
    "GitHub, fine": f"github_pat_{R24[:22]}_{R40}",
    "GitLab": "glpat-" + R24[:20],
    "GitLab, job": "glcbt-64_" + R24[:20],
    "npm": f"npm_{R40[:36]}",
    "npm, file": f"//registry.npmjs.org/:_authToken={R24}",
    "Docker": f"dckr_pat_{R24}",
    "Docker, file": '{"auths": {"https://index.docker.io/v1/": {"auth": "dXNlcjpwYXNzd29yZA=="}}}',
    "NVIDIA": f"nvapi-{R40}-{R24}",
    "OpenAI": f"sk-{R40}",
    "OpenAI, project": f"sk-proj-{R24}_{R24}-{R24}",
    "Anthropic": f"sk-ant-api03-{R40}-{R24}AA",
    "OpenRouter": "sk-or-v1-" + "0123456789abcdef" * 4,
    "Groq": f"gsk_{R40}",
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
    "PyPI": f"pypi-AgEIcHlwaS5vcmc{R40}",
    "PEM": f"-----BEGIN RSA PRIVATE KEY-----\n{R40}\n-----END RSA PRIVATE KEY-----",
    "password": f"postgres://user:{R24}@host:5432/db",
    "password with @": "https://user:p@ss1word@host/x",
    "password only": f"redis://:{R24}@host",
    "token as user": f"https://{R24}@github.com/o/r.git",
    "token as user, git": f"git+https://{R24}@github.com/o/r.git",
    "query, token": f"https://host/x?a=1&access_token={R24}",
    "query, key": f"https://host/x?key={R24}",
    "query, api key": "https://host/x?api_key=pa55word",
    "query, signature": f"s3://b/x?X-Amz-Signature={R24}&a=1",
    "header": f"Authorization: Bearer {R24}",
    "bearer": f"curl -H 'bearer {R24}'",
    "in code": f'API_TOKEN = "{R24}"',
    "ODBC": "Server=h;Database=d;User Id=u;Password=Pa55!word;",
}
"""By kind: a text with a secret in it."""


def pieces(text: str) -> list[str]:
    """The long runs of letters and digits of a planted secret."""
    return [piece for piece in re.findall(r"[A-Za-z0-9]{20,}", text) if "Default" not in piece]


@pytest.mark.parametrize("name", PLANTED)
def test_every_kind_is_hidden_in_any_message_and_refused(name: str) -> None:
    text = PLANTED[name]
    assert secret_kind(text) is not None
    for message in (text, f"cannot open '{text}': gone", f'{{"a": ["{text}"]}}', f"x\n{text}\ny"):
        hidden = redact(message)
        assert HIDDEN in hidden and redact(hidden) == hidden and secret_kind(hidden) is None
        for piece in pieces(text):
            assert piece not in hidden, (piece, hidden)
    for piece in ("p@ss1word", "ss1word", "Pa55!word", "pa55word", "dXNlcjpw"):
        assert piece not in redact(text)


HARMLESS = [
    *("d41d8cd98f00b204e9800998ecf8427e", "sha256:" + "0123456789abcdef" * 4),
    *(
        "0123456789abcdef0123456789abcdef01234567",
        "1aa0079",
        "550e8400-e29b-41d4-a716-446655440000",
    ),
    *("meta-llama/Llama-3.1-8B-Instruct", "hf-internal-testing/tiny-random-LlamaForCausalLM"),
    *(
        "org/hf_finetuned_llama_model_v2",
        "nvidia/Llama-3_1-Nemotron-51B-Instruct",
        "openai/gpt-oss-20b",
    ),
    *("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "sk-learn-text-classification-model-v2"),
    *("fw-llama-3-8b-instruct-finetuned-v2", "runs/sk-sft-2026-01-31-qwen3-lora-r16-alpha32"),
    *(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==",
    ),
    "data:image/png;base64," + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo" * 8,
    *("key", "key_column", "monkey", "tokens", "max_tokens=128", "secret", "a token of thanks"),
    *("password", "pass@1", "author", "the key is under the mat", "<|im_start|>", "[secret]"),
    *("https://host/x?max_tokens=128&tokenizer=abc", "https://host/x?keyword=tokenisation"),
    *("https://host/x?passage=long&key=name", "https://host/x?design=round&assigned=me"),
    *("s3://bucket/a@b", "http://minio:9000/a@b", "http://h:80/x?q=a@b", "s3://bucket/run@v2"),
    *(
        "hf://datasets/org/name@main/data.parquet",
        "hf://datasets/org/name@refs%2Fconvert/x.parquet",
    ),
    *("abfss://my-container-data-2026@account.dfs.core.windows.net/x", "ssh://git@github.com/o/r"),
    *("git@github.com:org/repo.git", "user@example.com", "https://user@host/x", "C:\\Users\\x"),
    *("https://{user}:{password}@host", "https://user:${PASSWORD}@host", "https://user:***@host"),
    *("api_key = os.environ['OPENAI_API_KEY_2']", "token = tokenizer.eos_token", "password: str"),
    *(
        "def f(api_key: str = DEFAULT_API_KEY_2): ...",
        "headers = {'Authorization': f'Bearer {token}'}",
    ),
    *("secret = secrets.token_hex(16)", "'pad_token': '<|endoftext|>'", "access_key=None"),
    "if self.access_token == settings_from_environment_number_12(): pass",
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}",
    "the bearer of bad news walked straightforwardly",
    *("https://hooks.slack.com/services/{hook}", "Basic training of a language model"),
]


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_texts_stay(text: str) -> None:
    assert redact(text) == text and secret_kind(text) is None


RECIPE = {
    "name": "run",
    "model": {"base": "o/m", "revision": "main", "adapter": None},
    "adapter": {"targets": ["q_proj"], "modules_to_save": ["x"], "rank_pattern": {"q_proj": 2}},
    "method": {"kind": "grpo", "rewards": [{"run": "r"}, {"model": "o/c", "label": "l"}]},
    "data": {"train": [{"path": "a.jsonl"}], "eval": ["b.jsonl"], "chat_template": "{{ x }}"},
    "storage": "runs",
    "unknown": {"key": "text"},
}


def planted(values: Any, text: str) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """(key, values with the text there) of each string and each key of the values."""
    if isinstance(values, dict):
        for name, value in values.items():
            rest = {other: each for other, each in values.items() if other != name}
            yield (text,), {**rest, text: value}
            for key, changed in planted(value, text):
                yield (name, *key), {**values, name: changed}
    elif isinstance(values, list):
        for index, value in enumerate(values):
            for key, changed in planted(value, text):
                yield (index, *key), [*values[:index], changed, *values[index + 1 :]]
    elif isinstance(values, str):
        yield (), text


@pytest.mark.parametrize("name", ["Hugging Face", "JWT", "password", "in code", "PEM"])
def test_a_secret_anywhere_in_a_recipe_is_refused_with_its_place(tmp_path: Path, name: str) -> None:
    path = tmp_path / "recipe.yaml"
    count = 0
    for key, values in planted(RECIPE, PLANTED[name]):
        path.write_text(yaml.safe_dump(values, sort_keys=False, width=10**6), encoding="utf-8")
        with pytest.raises(InputError) as caught:
            load_recipe(path)
        message = str(caught.value)
        line = rf"{re.escape(str(path))}:\d+: [^\n]*: holds a secret"
        assert re.fullmatch(rf"{line}[^\n]*", message), (key, message)
        assert all(piece not in message for piece in pieces(PLANTED[name]))
        count += 1
    assert count > 30


@given(
    st.sampled_from(sorted(PLANTED)),
    st.text(" ab/:.,'\"\n\u00e9", max_size=20),
    st.text(" \n,'", min_size=1),
)
def test_redact_removes_it_from_any_message(name: str, before: str, after: str) -> None:
    hidden = redact(f"{before} {PLANTED[name]}{after}")
    assert all(piece not in hidden for piece in pieces(PLANTED[name]))
    assert redact(hidden) == hidden


def test_errors_hold_no_secret() -> None:
    for kind in (InputError, RunError):
        error = pickle.loads(pickle.dumps(kind(f"cannot open {PLANTED['password']}\x1b[31m")))
        assert str(error) == f"cannot open postgres://{HIDDEN}@host:5432/db\\x1b[31m"


@pytest.mark.long
def test_long_texts_take_little_time() -> None:
    """Else this test would not end."""
    for text in (
        "eyJ" * 50_000,
        "://a:" * 30_000,
        "?token" * 30_000,
        "a" * 200_000,
        "sk-" * 50_000,
    ):
        assert redact(text) == text


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(("DB_PASS", "correct horse"), ("PGPASSWORD", "swordfish"), ("SSHPASS", "swordfish")),
        *(
            ("SIGNING_KEY", "/abc+defghi"),
            ("APP_KEY", "base64:abcd1234"),
            ("OPENAI_KEY", "a1b2c3d4e5"),
        ),
        *(("REDISCLI_AUTH", "a1b2c3d4e5"), ("NPM_AUTH", "dXNlcjpwYXNz"), ("MY_TOKEN", "swordfish")),
        *(("SLACK_WEBHOOK_URL", "https://host/hook/12345"), ("AUTH_HEADER", "Basic abcdefg")),
        *(
            ("AZURE_STORAGE_CONNECTION_STRING", "UseDevelopmentStorage=true"),
            ("DJANGO_SECRET", "x" * 8),
        ),
    ],
)
def test_names_of_secret_variables(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert redact(f"refused <{value}>") == f"refused <{HIDDEN}>"
    assert secret_kind(f"<{value}>") == f"the value of ${variable}"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(("SSH_AUTH_SOCK", "/tmp/ssh-XXXX/agent.1"), ("XAUTHORITY", "/home/me/.Xauthority")),
        *(("TOKENIZERS_PARALLELISM", "disabled"), ("GIT_AUTHOR_NAME", "Jane Doe Smith")),
        *(
            ("PARTITION_KEY", "customer_id"),
            ("KEYBOARD_LAYOUT", "us-intl-1"),
            ("PWD", "/work/folder"),
        ),
        *(
            ("AUTH_URL", "https://login.host/x"),
            ("SSL_KEY", "/etc/ssl/key.pem"),
            ("AUTH_MODE", "password"),
        ),
        ("MAX_TOKENS", "12345678"),
    ],
)
def test_names_of_other_variables(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert redact(f"uses {value}") == f"uses {value}"


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
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    _record_end(recipe, Folder(str(tmp_path)), "failed", "refused not-a-usual-form-42", 1.0)
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert record["error"] == f"refused {HIDDEN}"
