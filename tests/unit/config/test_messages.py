"""Each setting refuses a value of a wrong type in finray's own words."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from finray.training.common.errors import InputError
from finray.training.config.expected import schema_of
from finray.training.config.methods import METHODS
from finray.training.config.recipe import Recipe
from finray.training.config.validation import validate
from finray.training.config.yaml_file import Document
from finray.tuning.sweep import Sweep

RECIPE: dict[str, Any] = {
    "name": "x",
    "model": {"base": "o/m"},
    "data": {"train": [{"path": "rows.jsonl"}]},
}
SWEEP: dict[str, Any] = {"name": "x", "recipe": RECIPE}
WRONG = (None, True, -1.5, 10**30, float("inf"), "wrong", [], ["wrong"], [[]], {}, {"wrong": 1})
PYDANTIC = re.compile(
    r"Input should|[Vv]alid (integer|number|string|boolean|list|dict|tuple|dictionary)|unable to|"
    r"should have|should be|[Ff]ield required|Extra inputs|[Ii]nput type|type=|pydantic|"
    r"Value error|not permitted|should match|instance of|Unable"
)


def keys(
    schema: dict[str, Any], key: tuple[str | int, ...] = ()
) -> Iterator[tuple[str | int, ...]]:
    """Every key below a schema; the first item stands for all of a list."""
    for option in schema.get("anyOf", schema.get("oneOf", [])):
        yield from keys(option, key)
    for name, inner in schema.get("properties", {}).items():
        yield (*key, name)
        yield from keys(inner, (*key, name))
    if isinstance(schema.get("items"), dict):
        yield (*key, 0)
        yield from keys(schema["items"], (*key, 0))
    if isinstance(schema.get("additionalProperties"), dict):
        yield (*key, "some_name")
        yield from keys(schema["additionalProperties"], (*key, "some_name"))


def with_value(values: Any, key: tuple[str | int, ...], value: Any) -> Any:
    """A copy of the values in which the key has the value."""
    if not key:
        return value
    if isinstance(key[0], int):
        rest = values[1:] if isinstance(values, list) else []
        return [with_value(values[0] if values else {}, key[1:], value), *rest]
    inner = values.get(key[0], {}) if isinstance(values, dict) else {}
    return {
        **(values if isinstance(values, dict) else {}),
        key[0]: with_value(inner, key[1:], value),
    }


def refusals(settings: type[BaseModel], base: dict[str, Any], start: str = "") -> Iterator[str]:
    """Each line of the messages about a wrong value at each key of the settings."""
    for key in dict.fromkeys(keys(schema_of(settings))):
        for value in WRONG if ".".join(map(str, key)).startswith(start) else ():
            document = Document(with_value(base, key, value), {(): "file.yaml:1"})
            try:
                validate(settings, document)
            except InputError as error:
                yield from str(error).splitlines()


def check(lines: Iterator[str]) -> int:
    """Check each line; returns their number."""
    count = 0
    for line in lines:
        count += 1
        assert not PYDANTIC.search(line), line
        assert re.match(r"file\.yaml:1: [\w.]+(: | )", line), line
        assert re.search(r"[;,:] \S", line) and line.isprintable() and len(line) < 500, line
        assert not re.search(
            r"constrained|function-|literal\[|lax-or|tuple\[|dict\[|union", line
        ), line
    return count


@pytest.mark.long
@pytest.mark.parametrize("kind", METHODS)
def test_every_method(kind: str) -> None:
    rewards = {"rewards": [{"run": "r"}]} if kind in ("grpo", "rloo") else {}
    base = {**RECIPE, "method": {"kind": kind, **rewards}}
    assert check(refusals(Recipe, base, "method")) > 5


@pytest.mark.long
def test_every_setting_of_a_recipe() -> None:
    base = {**RECIPE, "adapter": {"rank": 4}}
    assert check(refusals(Recipe, base)) > 400


def test_every_setting_of_a_sweep() -> None:
    assert check(refusals(Sweep, SWEEP)) > 150


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"seed": "x"}, "seed: expected a whole number of at least 0, found 'x'"),
        (
            {"scale": {"workers": [1, 2], "gpus_per_worker": 0.5}},
            "gpus_per_worker: 0.5 puts two of 2 workers on one GPU, which NCCL refuses; set 1, or",
        ),
        (
            {"scale": {"gpus_per_worker": 2}},
            "gpus_per_worker: 2, but a worker trains on one GPU and the others would lie idle; set",
        ),
        ({"seed": 2**32}, "at least 0 and below 4,294,967,296, found 4294967296"),
        (
            {"optim": {"batch_size": 0}},
            "optim.batch_size: expected a whole number of at least 1, fo",
        ),
        ({"optim": {"learning_rate": "fast"}}, "expected a number above 0, found 'fast'"),
        ({"optim": {"beta1": 1}}, "expected a number of at least 0 and below 1, found 1"),
        (
            {"scale": {"workers": "two"}},
            "of at least 0 or a list [a whole number of at least 1, a wh",
        ),
        ({"data": {"train": []}}, "data.train: expected "),
        ({"log": {"to": ["neptune"]}}, "log.to.0: expected one of 'tensorboard', 'wandb',"),
        (
            {"eval": {"metrics": ["score.py:fine"]}},
            "eval.metrics.0: a metric is one of exact_match, token_f1, rouge1, rouge2, rougeL, "
            'bleu, chrf, json_valid, tool_calls and {file: "score.py:function"}, found '
            "'score.py:fine'",
        ),
        ({"adapter": {"dora": "maybe"}}, "adapter.dora: expected true or false, found 'maybe'"),
        ({"storage": 3}, "storage: expected text, found 3; put it into quotes"),
        ({"model": {}}, "model.base: missing, and it has no default; add it"),
        (
            {"method": {"kind": "dop"}},
            "method.kind: expected one of 'sft', 'pretrain', 'dpo', 'kto'",
        ),
    ],
)
def test_messages(section: dict[str, Any], message: str, tmp_path: Path) -> None:
    document = Document({**RECIPE, **section}, {(): "file.yaml:1"})
    with pytest.raises(InputError) as caught:
        validate(Recipe, document)
    assert message in str(caught.value)


def test_many_errors_are_cut() -> None:
    data = {"train": [{"path": 1}] * 5000}
    with pytest.raises(InputError) as caught:
        validate(Recipe, Document({**RECIPE, "data": data}, {(): "file.yaml:1"}))
    assert len(str(caught.value).splitlines()) == 51 and "and 4950 more" in str(caught.value)
