"""Whatever a recipe file holds: one message with file and line, key and remedy."""

from pathlib import Path

import pytest

from finray.training.common.errors import InputError
from finray.training.config.recipe import load_recipe

GOOD = """\
name: support
model: {base: some/model}
data:
  train: [{path: rows.jsonl}]
"""

TENFOLD = "\n".join(
    ["a: &l0 [x]", *(f"b{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 40))]
)
MERGES = "\n".join(
    ["a: &l0 {x: 1}", *(f"b{n}: &l{n} {{<<: [{f'*l{n - 1}, ' * 10}]}}" for n in range(1, 40))]
)
CHAIN = "\n".join(["a: &l0 [x]", *(f"b{n}: &l{n} [*l{n - 1}]" for n in range(1, 5000))])

BAD = {
    "an alias of itself": (GOOD + "adapter: &x\n  targets: [*x]\n", 6, "adapter.targets", "anchor"),
    "brackets": (GOOD + "storage: " + "[" * 20_000, 5, "storage", "a bracket may be missing"),
    "dashes": ("- " * 20_000, 1, "", "inside each other"),
    "tenfold aliases": (TENFOLD, 6, "b5", "more than 50,000 values"),
    "tenfold merges": (MERGES, 6, "b5", "more than 50,000 values"),
    "a chain of aliases": (CHAIN, 63, "b62", "inside each other"),
    "digits": (GOOD + f"seed: {'7' * 5001}\n", 5, "seed", "of 5,001 characters; write a shorter"),
    "hex digits": (GOOD + f"seed: 0x{'7' * 5001}\n", 5, "seed", "write a shorter one"),
    "a tab": (GOOD + "optim:\n\tepochs: 1\n", 6, "optim", "a tab"),
    "a tab after the colon": (GOOD + "seed:\t1\n", 5, "seed", "a tab"),
    "less indented": (GOOD + "optim:\n   epochs: 1\n  seed: 2\n", 7, "optim.seed", "align it"),
    "more indented": ("name: x\n  seed: 1\n", 2, "name.seed", "indent it like the lines"),
    "a list among keys": (GOOD + "optim:\n  epochs: 1\n  - a\n", 7, "optim", "indent it below"),
    "a Windows path": (GOOD + r'storage: "C:\Users\x"', 5, "storage", "single quotes, or write /"),
    "an escape": (GOOD + r'storage: "\UFFFFFFFF"', 5, "storage", "correct it"),
    "a colon": (GOOD + "storage: a: b\n", 5, "storage", "into quotes"),
    "no colon": (GOOD + "seed 1\n", 5, "", "add the colon"),
    "an open quote": (GOOD + "storage: 'a\nseed: 1\n", 5, "storage", "close it"),
    "an open bracket": (GOOD + "storage: [a\nseed: 1\n", 5, "storage", "close it"),
    "text after a list": (GOOD + "storage: [draft] rows\n", 5, "storage", "single quotes"),
    "a glob": (GOOD + "storage: *.jsonl\n", 5, "storage", "starts with * is an alias"),
    "an unknown alias": (GOOD + "storage: *rows\n", 5, "storage", "starts with * is an alias"),
    "at": (GOOD + "storage: @home\n", 5, "storage", "starts with @ needs quotes"),
    "a template": (GOOD + "storage: {{ user }}\n", 5, "storage", "starts with { or [ into quotes"),
    "a decimal comma": (
        GOOD + "optim:\n  learning_rate: 1,5e-4\n",
        6,
        "optim.learning_rate",
        "found '1,5e-4'; write a decimal point: 1.5e-4",
    ),
    "a repeated key": (GOOD + "optim: {epochs: 1, epochs: 2}\n", 5, "optim.epochs", "on line 5"),
    "a number as key": (GOOD + "optim:\n  1: x\n", 6, "optim.1", "put it into quotes: '1'"),
    "null as key": (GOOD + "~: x\n", 5, "~", "into quotes"),
    "a word as key": (GOOD + "on: x\n", 5, "on", "into quotes"),
    "a list as key": (GOOD + "? [a]\n: x\n", 5, "", "a key must be text"),
    "a date": (GOOD + "seed: 2026-01-31\n", 5, "seed", "whole number of at least 0, found '2026-"),
    "binary": (GOOD + "storage: !!binary aGVsbG8=\n", 5, "storage", "the tag !!binary"),
    "an object": (GOOD + "storage: !!python/object:os.x\n", 5, "storage", "the tag !!python"),
    "NUL": (GOOD + "storage: a\0b\n", 5, "storage", "U+0000 is not allowed; remove it"),
    "an escaped NUL": (GOOD + 'storage: "a\\0b"\n', 5, "storage", "U+0000; remove it"),
    "half a character": (GOOD + 'storage: "a\\ud800"\n', 5, "storage", "U+D800; remove it"),
    "an escape sequence": (GOOD + "storage: \x1b[31m\n", 5, "storage", "U+001B is not allowed"),
    "nothing": ("", 1, "", "the file is empty"),
    "a comment": ("# later\n", 1, "", "the file is empty"),
    "a list": ("- a\n", 1, "", "such as 'name: my-run'; found a list"),
    "a word": ("hello\n", 1, "", "expected a mapping"),
    "two documents": (GOOD + "---\n" + GOOD, 5, "", "keep one document"),
    "no value": (GOOD + "optim:\n", 5, "optim", "found nothing; give it a value, or remove"),
    "half a range": (GOOD + "scale: {workers: [2]}\n", 5, "scale.workers", "found a list of 1"),
    "no kind": (GOOD + "method: {beta: 1}\n", 5, "method", "a mapping with kind: "),
    "true as a number": (
        GOOD + "optim: {batch_size: yes}\n",
        5,
        "optim.batch_size",
        "whole number of at least 1, found true",
    ),
    "an unknown loss": (
        GOOD + "method: {kind: dpo, losses: {sigmod: 1}}\n",
        5,
        "method.losses.sigmod",
        "unknown key; expected one of 'sigmoid'",
    ),
    "a wrong reward": (
        GOOD + "method:\n  kind: grpo\n  rewards:\n  - run: r\n    weight: x\n",
        9,
        "method.rewards.0.weight",
        "expected a number, found 'x'",
    ),
    "a misspelt choice": (
        GOOD + "optim: {schedule: cosin}\n",
        5,
        "optim.schedule",
        "did you mean 'cosine'?",
    ),
    "a bad name": (GOOD.replace("support", "my run"), 1, "name", "found 'my run'"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_line_with_place_key_and_remedy(tmp_path: Path, name: str) -> None:
    text, line, key, remedy = BAD[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: {key}{': ' if key else ''}")
    assert remedy in message
    assert len(message.splitlines()) == 1 and len(message) < len(str(path)) + 300


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD.encode("utf-16"), ":1: cannot read the file: it is UTF-16; save it as UTF-8"),
        (GOOD.encode("utf-16-be"), ":1: "),
        (GOOD.encode() + b"storage: caf\xe9\n", ":5: cannot read the file: not UTF-8 text; save"),
        (b" " * (2**20 + 1), ": larger than 1 MiB"),
    ],
)
def test_files_that_are_not_utf8_text(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(GOOD.encode("utf-8-sig"))
    assert load_recipe(path).name == "support"


def test_found_values_are_short_and_without_escapes_and_secrets(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for value in ('"\\e[31m\\u202ered"', "x" * 5000, "[" + "1, " * 5000 + "]"):
        path.write_text(GOOD + f"seed: {value}\n", encoding="utf-8")
        with pytest.raises(InputError) as caught:
            load_recipe(path)
        shown = str(caught.value).partition(", found ")[2]
        assert 0 < len(shown) <= 60 and shown.isprintable()


def test_an_alias_is_a_copy(tmp_path: Path) -> None:
    """An override of one use must not change the other."""
    path = tmp_path / "recipe.yaml"
    train = "data:\n  train: &rows [{path: a.jsonl}]\n  eval: *rows\n"
    path.write_text(f"name: x\nmodel: {{base: o/m}}\n{train}", encoding="utf-8")
    recipe = load_recipe(path, ["data.eval.0.weight=2"])
    assert (recipe.data.train[0].weight, recipe.data.eval[0].weight) == (1, 2)


def test_merged_keys_keep_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = GOOD + "optim: &o\n  epochs: x\neval:\n  <<: *o\n"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert str(caught.value).splitlines() == [
        f"{path}:6: optim.epochs: expected a number above 0 or null, found 'x'",
        f"{path}:6: eval.epochs: unknown key; did you mean 'optim.epochs'?",
    ]


@pytest.mark.parametrize(
    "value",
    [
        "a #b",
        "50%/x",
        "%x",
        "@home",
        "a: b",
        "*.jsonl",
        "d\u00e9j\u00e0 vu?",
        "C:\\Users\\x",
        "- x",
    ],
)
def test_a_text_on_the_command_line_is_taken_as_it_is(tmp_path: Path, value: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD, encoding="utf-8")
    recipe = load_recipe(path, [f"storage=/runs/{value}", f"model.revision={value}"])
    assert recipe.storage == f"/runs/{value}" and recipe.model.revision == value


def test_values_on_the_command_line_have_types(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD + "adapter: {rank: 4}\n", encoding="utf-8")
    recipe = load_recipe(path, ["optim.learning_rate=1e-3", "adapter=null", "scale.workers=[1, 2]"])
    assert recipe.optim.learning_rate == 1e-3
    assert recipe.adapter is None and recipe.scale.workers == (1, 2)
    for override in ("name='x", "name=a\0b", "name=\udcff", "data.train.\u00b2.path=x"):
        with pytest.raises(InputError, match=r"^--set [^\n]*$"):
            load_recipe(path, [override])
