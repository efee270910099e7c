"""Whatever a recipe or a sweep holds: exit code 0, 1 or 2, one message, no traceback, no hang."""

import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from finray.cluster.cli.main import main
from finray.training.common.errors import InputError
from finray.training.config.expected import schema_of
from finray.training.config.recipe import Recipe
from finray.tuning.plan import make_plan
from finray.tuning.sweep import Sweep, load_sweep

RECIPE = """\
name: support
model: {base: ./model, quantize: none}
adapter: {rank: 8, alpha: 16, targets: [q_proj, "v_proj"]}
method: {kind: dpo, losses: {sigmoid: 1.0, sft: 0.2}, beta: 0.1}
data:
  train:
  - {path: rows.jsonl, weight: 2}
  holdout: 0.1
  max_length: 64
optim: &o
  learning_rate: 1e-4
  batch_size: 1
  micro_batch_size: 1
eval: {every_steps: 10}
scale: {workers: [1, 1]}
storage: 'runs'
"""
SWEEP = f"""\
name: sweep
recipe:
{re.sub("^", "  ", RECIPE, flags=re.M).rstrip()}
search:
  optim.learning_rate: {{log_uniform: [1e-5, 1e-3]}}
  adapter.rank: {{choice: [4, 8], when: {{adapter.dora: false}}}}
  adapter.dora: {{choice: [true, false]}}
trials: 4
objective: [eval_loss, adapter_bytes]
time_budget: 90m
"""
SPECIAL = list(":-[]{}#&*!|>'\"%@`,?\\~=<.+_/0123456789eE \t\n\r\0\x1b\x85\u2028\ufeffé日")

PIECES = st.one_of(
    st.sampled_from(SPECIAL),
    st.sampled_from(
        ["<<: *o", "&a [*a]", "!!binary x", "---\n", "? ", "null", ".inf", "1e999", "- "]
    ),
    st.sampled_from(
        ["[" * 300, "9" * 5000, "x" * 3000, "hf_" + "aB1" * 12, "../" * 50, "~nobody/x"]
    ),
    st.text(max_size=5),
)


@st.composite
def damaged(draw: st.DrawFn, text: str) -> str:
    """A text with a few pieces inserted, replaced or cut out."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        stop = draw(st.sampled_from([start, start, start + 1, start + 5, start + 60]))
        text = text[:start] + draw(PIECES) + text[stop:]
    return text


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["auto", "x" * 5000, "/" * 300, "~nobody/x", "s3://", "nope://x", "file:///x", "."]
    ),
    st.sampled_from(
        ["{{ x }}", "{% for %}", "(" * 200, "a" * 300, "\udcff", "\0", "hf_" + "aB1" * 12]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


def dotted_keys(schema: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of a schema's sections."""
    keys: list[str] = []
    for option in schema.get("anyOf", schema.get("oneOf", [])):
        keys += dotted_keys(option, prefix)
    for name, inner in schema.get("properties", {}).items():
        keys += [prefix + name, *dotted_keys(inner, f"{prefix}{name}.")]
    if "items" in schema:
        keys += [f"{prefix}0", *dotted_keys(schema["items"], f"{prefix}0.")]
    return list(dict.fromkeys(keys))


OVERRIDES = st.lists(
    st.one_of(
        st.builds(
            lambda key, value: f"{key}={json.dumps(value)}",
            st.sampled_from(dotted_keys(schema_of(Recipe))),
            VALUES,
        ),
        st.builds(
            lambda key, value: f"{key}={value}",
            st.sampled_from(dotted_keys(schema_of(Recipe))),
            PIECES,
        ),
        st.text(max_size=10),
    ),
    min_size=1,
    max_size=3,
)
examples = pytest.mark.parametrize("examples", [100, pytest.param(300, marks=pytest.mark.slow)])
"""How many are drawn: a few for every change."""


def limit(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


@pytest.fixture(autouse=True)
def in_folder(
    tmp_path: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder with data and a model; the slow imports of the command are done."""
    (tmp_path / "model").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path)
    rows = (
        f'{{"prompt": "Hi {number}", "chosen": "yes", "rejected": "no"}}\n' for number in range(40)
    )
    (tmp_path / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "sweep.yaml").write_text(SWEEP, encoding="utf-8")
    assert check(tmp_path) == 0, capsys.readouterr().err
    return tmp_path


def check(folder: Path, *overrides: str) -> int:
    """Run `finray check`; returns its exit code."""
    out, err = io.StringIO(), io.StringIO()
    options = [f"--set={override}" for override in overrides]
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["check", "recipe.yaml", *options])
    message = err.getvalue()
    assert code in (0, 1, 2) and "Traceback" not in message
    if code:
        print(message)
        assert message.startswith("finray: ") and message.count("finray: ") == 1
        first = message.splitlines()[0]
        assert re.match(r"finray: (recipe\.yaml(:\d+)?|--set .*): ", first), message
        assert not re.search(r"Input should|Value error|yaml\.|pydantic|Errno", first), message
        assert all(letter.isprintable() or letter in "\n\t" for letter in message), message
        assert len(first) < 2000 and "aB1" * 12 not in message
    return code


@pytest.mark.long
@examples
def test_damaged_recipes(in_folder: Path, examples: int) -> None:
    @limit(examples)
    @given(damaged(RECIPE))
    def is_handled(text: str) -> None:
        (in_folder / "recipe.yaml").write_text(text, encoding="utf-8", newline="")
        check(in_folder)

    is_handled()


@pytest.mark.long
@examples
def test_any_bytes(in_folder: Path, examples: int) -> None:
    @limit(examples)
    @given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode()))
    def is_refused(content: bytes) -> None:
        (in_folder / "recipe.yaml").write_bytes(content)
        assert check(in_folder) == 2

    is_refused()


@pytest.mark.long
@examples
def test_any_value_of_any_setting(in_folder: Path, examples: int) -> None:
    @limit(examples)
    @given(OVERRIDES)
    def is_handled(overrides: list[str]) -> None:
        check(in_folder, *overrides)

    is_handled()


@pytest.mark.long
@examples
def test_damaged_sweeps(in_folder: Path, examples: int) -> None:
    @limit(examples)
    @given(damaged(SWEEP))
    def is_handled(text: str) -> None:
        (in_folder / "sweep.yaml").write_text(text, encoding="utf-8", newline="")
        try:
            make_plan(load_sweep(in_folder / "sweep.yaml"))
        except InputError as error:
            assert re.match(r"[^\n]*(sweep\.yaml(:\d+)?|--set .*): ", str(error)), error
            assert "Input should" not in str(error) and "aB1" * 12 not in str(error)

    is_handled()


@pytest.mark.long
@examples
def test_any_value_of_any_setting_of_a_sweep(in_folder: Path, examples: int) -> None:
    @limit(examples)
    @given(st.sampled_from(dotted_keys(schema_of(Sweep))), VALUES)
    def is_handled(key: str, value: Any) -> None:
        assume(not key.startswith("recipe"))
        try:
            make_plan(load_sweep(in_folder / "sweep.yaml", (f"{key}={json.dumps(value)}",)))
        except InputError as error:
            assert "Input should" not in str(error)

    is_handled()
