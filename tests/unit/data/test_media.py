"""Rows with images, videos or sounds, of which only the text could be trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from finray.training.common.errors import InputError
from finray.training.config.recipe import Recipe
from finray.training.data.formats import read_examples
from finray.training.data.shapes import RowError
from finray.training.inspection import inspect_recipe

ANSWER = {"role": "assistant", "content": "A cat."}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **more}, ANSWER]}


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ({"image": "cat.png", **user("What is it?")}, "image"),
        ({"images": [{"bytes": "", "path": "cat.png"}], **user("What is it?")}, "images"),
        ({"pixel_values": [[0.5]], **user("What is it?")}, "pixel_values"),
        (user([{"type": "text", "text": "?"}, {"type": "image"}]), r"messages\[0\]\.content\[1\]"),
        (user([{"type": "image_url", "image_url": {"url": "x"}}]), r"messages\[0\]\.content\[0\]"),
        (user([{"type": "input_audio"}]), r"messages\[0\]\.content\[0\]"),
        (user([{"type": "text", "text": "?", "video": "x"}]), r"messages\[0\]\.content\[0\]\.vid"),
        (user("What is it?", image="cat.png"), r"messages\[0\]\.image"),
    ],
)
def test_media_are_refused(row: dict[str, Any], place: str) -> None:
    with pytest.raises(RowError, match=rf"^{place}.* only text is trained; remove it"):
        read_examples(row, "messages", "sft", ())


@pytest.mark.parametrize("empty", [None, [], ""])
def test_empty_columns_hold_nothing(empty: Any) -> None:
    row = {"images": empty, **user("What is it?")}
    assert read_examples(row, "messages", "sft", ()) == read_examples(
        user("What is it?"), "messages", "sft", ()
    )


def test_both_answers_of_a_pair() -> None:
    row = {"prompt": [{"role": "user", "content": "?"}], "chosen": [ANSWER]}
    row["rejected"] = [{"role": "assistant", "content": "A dog.", "images": ["dog.png"]}]
    with pytest.raises(RowError, match=r"^rejected\[0\]\.images holds"):
        read_examples(row, "preference", "dpo", ())


def test_a_source_of_images_is_refused_with_its_line(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"image": "cat.png", "prompt": "What is it?", "completion": "A cat."}] * 3
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {"name": "x", "model": str(tiny_model), "data": {"train": str(file), "max_length": 64}}
    with pytest.raises(InputError, match=r"rows\.jsonl:1: image holds other data than text"):
        inspect_recipe(Recipe.model_validate(values))
