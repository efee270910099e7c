"""The documents hold: recipes are valid, commands parse, links lead somewhere, nothing is stale."""

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from support.document_faults import faults, files_in, is_sweep
from support.documents import ROOT, Document, Fence, documents, slug
from support.house import modules, parse
from support.reference import pages

from finray.cluster.cli.main import main
from finray.training.common.yaml_text import load_yaml
from finray.training.config.methods import METHODS
from finray.training.config.recipe import Recipe
from finray.training.config.section import Section, json_schema
from finray.training.data.examples import examples_of
from finray.training.data.formats import EXPECTED_FIELDS, detect_format, normalise
from finray.training.data.shapes import RowError
from finray.tuning.sweep import Sweep

DOCUMENTS = documents()
FILES = files_in(DOCUMENTS)
README_BYTES = 6_000


@pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda document: str(document.path.relative_to(ROOT))
)
def test_a_document_holds(document: Document) -> None:
    assert not (rotten := faults(document, FILES)), "\n".join(rotten)


def test_what_is_checked() -> None:
    names = {str(document.path.relative_to(ROOT)) for document in DOCUMENTS}
    assert {"README.md", "docs/methods/dpo.md", "k8s/README.md", "AGENTS.md"} <= names
    assert "recipes/quickstart/README.md" in names
    fences = [fence for document in DOCUMENTS for fence in document.fences]
    assert sum(fence.language == "yaml" for fence in fences) > 30
    commands = [words for fence in fences for _, words in fence.commands()]
    assert sum(words[0] == "finray" for words in commands) > 40


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= README_BYTES


ROTTEN = {
    "```yaml\noptim: {learnin_rate: 1}\n```": "did you mean 'learning_rate'?",
    "```yaml\nmethod: {kind: dpo}\nmethod: {kind: kto}\n```": "already set on line 1",
    "```yaml\nmodel: {base: a/b, quantize: nf4}\n```": "contradicts full fine-tuning",
    "```yaml\nlearning_rate: 1\n```": "unknown key",
    "```yaml\nname: [\n```": "not valid YAML",
    "```yaml\nrecipe: support.yaml\ntrails: 3\n```": "did you mean 'trials'?",
    "```yaml\nsearch: {optim.beta3: {choice: [1]}}\n```": "did you mean 'beta2'?",
    "```yaml\nsearch: {adapter.rank: {choice: [0]}}\n```": "never makes a valid recipe",
    '```yaml title="kustomization.yaml"\nresource: []\n```': "unknown keys of a kustomization",
    "- a list\n\n  ```yaml\n  scale: {wrokers: 2}\n  ```": "did you mean 'workers'?",
    "```\nfinray trian support.yaml\n```": "trian",
    "```\n$ cd x && finray train\n```": "RECIPE",
    "```\nfinray train support.yaml \\\n  --lokal\n```": "--lokal",
    "```\nA=1 .venv/bin/finray train support.yaml | head --oops\nfinray rnu\n```": "rnu",
    "```\nfinray check no.yaml\n```": "no.yaml is no file of the repository",
    "```\nfinray train support.yaml --set optim.rate=1\n```": "unknown key",
    "```\nfinray train recipes/quickstart/sft.yaml --set adapter.rank=0\n```": "adapter.rank",
    "```\nfinray tune sweep.yaml --stop-when tokenz=1\n```": "did you mean 'tokens'?",
    "```\nfinray tune sweep.yaml --set recipe.scale.worker=1\n```": "did you mean 'workers'?",
    "```\nmake coffee\n```": "no target coffee",
    "```\npython benchmarks/slow.py --quick\n```": "there is no benchmarks/slow.py",
    "Run `finray trian`.": "there is no command trian",
    "Run `finray job fetch --quick`.": "no option --quick",
    "See `training/config/receipt.py`.": "there is no training/config/receipt.py",
    "Run `make coffee`.": "no target coffee",
    "```python\nrun = finray.train(\n```": "was never closed",
    "```json\n{\n```": "Expecting property name",
    '```jsonl\n{"a": 1}\n{"a"\n```': "Expecting ':' delimiter",
    "[x](docs/absent.md)": "leads nowhere",
    "[x](README.md#absent)": "names no heading",
    "# Here\n[x](#there)": "names no heading",
}


@pytest.mark.parametrize("text", ROTTEN)
def test_rot_is_seen(text: str) -> None:
    planted = faults(Document(ROOT / "planted.md", text), FILES)
    assert len(planted) == 1 and ROTTEN[text] in planted[0], planted


def test_what_holds_is_not_called_rotten() -> None:
    text = (
        "# A `b` & c\n[x](#a-b-c) [y](https://example.org) `make test`\n"
        "```yaml\nobjective: eval_loss\ntime_budget: 8h\n```\n"
        "```\n# finray nothing\nX=1 finray train support.yaml > log.txt   # a comment\n"
        'echo "finray nothing"\nfinray --help\n```\n'
        "```text\nfinray: support.yaml:3: name: missing\n```\n"
    )
    assert not faults(Document(ROOT / "planted.md", text), FILES)


# The schema and the reference


@pytest.mark.parametrize("file", pages(), ids=lambda file: file.name)
def test_the_reference_is_current(file: Path) -> None:
    assert file.read_text(encoding="utf-8") == pages()[file], (
        "renew it: python tests/support/reference.py"
    )


@pytest.mark.parametrize("settings", [Recipe, Sweep])
def test_every_setting_is_described(settings: type[Section]) -> None:
    schema = json_schema(settings)
    sections = {"": schema, **schema["$defs"]}
    bare = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, value in section["properties"].items()
        if not value.get("description", "").strip()
    ]
    assert not bare


def test_the_reference_has_every_setting() -> None:
    text = "\n".join(pages().values())
    for settings in (Recipe, Sweep):
        for section in json_schema(settings)["$defs"].values():
            for key, value in section["properties"].items():
                assert re.search(rf"^#### `([\w.]+\.)?{key}`$", text, re.MULTILINE), key
                words = value["description"].split()[:3]
                assert " ".join(words).replace("<", "&lt;") in text, key


@pytest.mark.parametrize(("settings", "name"), [(Recipe, "recipe"), (Sweep, "sweep")])
def test_the_schema_names_itself(
    settings: type[Section], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = json_schema(settings)
    assert main(["schema", name]) == 0
    assert json.loads(capsys.readouterr().out) == schema
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"] == f"urn:finray:{name}"
    Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("recipes/**/*.yaml")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_shipped_files_are_valid_by_the_schema(path: Path) -> None:
    values = load_yaml(path.read_text(encoding="utf-8"))
    schema = json_schema(Sweep if is_sweep(values) else Recipe)
    assert not [error.message for error in Draft202012Validator(schema).iter_errors(values)]
    assert list(Draft202012Validator(schema).iter_errors({**values, "nmae": "x"}))


# Pages that state facts of the code


def sections(name: str, level: str = "##") -> dict[str, tuple[str, list[Fence]]]:
    """Text and blocks under each heading of a page."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    parts = re.split(rf"^{level} (.+)$", text, flags=re.MULTILINE)
    return {
        title: (body, Document(ROOT / "docs" / name, body).fences)
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
    }


@pytest.mark.parametrize("row_format", EXPECTED_FIELDS)
def test_rows_of_each_format(row_format: Any) -> None:
    """Each shown row is recognised, and exactly the stated methods learn from it."""
    text, fences = sections("data-formats.md")[row_format]
    rows = [json.loads(fence.text) for fence in fences]
    assert rows
    line = next(line for line in text.splitlines() if line.startswith("Learnt by:"))
    stated = set(re.findall(r"`(\w+)`", line))
    for row in rows:
        assert all(detect_format([("row", row)], kind) == row_format for kind in stated)
        example = normalise(row, row_format)
        assert {kind for kind in METHODS if learns(example, kind)} == stated


def learns(example: Any, kind: str) -> bool:
    try:
        return bool(examples_of(example, kind))
    except RowError:
        return False


def test_every_method_has_a_page() -> None:
    pages_of_methods = (ROOT / "docs" / "methods").glob("*.md")
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages_of_methods)
    for kind in METHODS:
        assert f"kind: {kind}" in text or f"or {kind}" in text, kind
        assert f"reference/recipe.md#{slug(f'method: {kind}')}" in text, kind


@cache
def messages() -> str:
    """Every text of the product in a line of its own; `…` stands for its variable parts."""
    texts = (text for path in modules().values() for text in _texts(parse(path)))
    return "\n".join(" ".join(text.replace("`", "").split()) for text in texts)


def _texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def is_message(quoted: str) -> bool:
    parts = [re.escape(part.strip()) for part in quoted.split("…")]
    return re.search("[^\n]*".join(parts), messages()) is not None


@pytest.mark.long
def test_messages_are_those_of_the_code() -> None:
    titles = sections("troubleshooting.md", "###")
    assert len(titles) > 40
    for title in titles:
        assert re.fullmatch("`[^`]+`", title), title
        assert is_message(title.strip("`")), f"no text of the code is {title}"
    assert not is_message("…: unknwon key")
