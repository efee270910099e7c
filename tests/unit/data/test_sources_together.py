"""Several sources of one recipe: each row keeps what is its own."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import trl

from finray.training.common.storage import Folder
from finray.training.data.resolve import read_twice, resolve_data
from finray.training.data.shown_rows import show_rows

from .conftest import MakeRecipe, chat_row, write_jsonl

TEMPLATE = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text("utf-8")


def trace(tool: str, argument: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}}
    call = {"name": tool, "arguments": {argument: "x"}}
    return {
        "tools": [{"type": "function", "function": {"name": tool, "parameters": parameters}}],
        "messages": [
            {"role": "user", "content": "Look."},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": call}],
            },
            {"role": "tool", "content": "12"},
            {"role": "assistant", "content": "Twelve."},
        ],
    }


def test_two_sources_with_other_tools(
    tmp_path: Path, make_recipe: MakeRecipe, tokenizer: Any
) -> None:
    """Lines and Parquet, whose columns have all keys of all rows: no tool reaches another row."""
    stock, weather = trace("stock", "item"), trace("weather", "city")
    first = write_jsonl(tmp_path / "a.jsonl", [stock])
    second = tmp_path / "b.parquet"
    pq.write_table(pa.Table.from_pylist([weather, stock]), second)
    recipe = make_recipe(
        train=[{"path": str(first)}, {"path": str(second)}], chat_template=TEMPLATE, max_length=900
    )
    shown = show_rows(recipe, 2, Folder("/none")).rows
    assert not any(row.problem for row in shown)
    for row, (own, other) in zip(
        shown, [(stock, weather), (weather, stock), (stock, weather)], strict=True
    ):
        expected = tokenizer.apply_chat_template(
            own["messages"], tools=own["tools"], chat_template=TEMPLATE, tokenize=False
        )
        head = expected.partition("</tools>")[0]
        for text in row.texts:
            whole = "".join(piece.text for piece in text.pieces)
            assert whole.startswith(head)
            assert own["tools"][0]["function"]["name"] in whole
            assert other["tools"][0]["function"]["name"] not in whole
    pieces = [piece for text in shown[0].texts for piece in text.pieces]
    trained = "".join(piece.text for piece in pieces if piece.trained)
    assert '"item": "x"' in trained and "Twelve." in trained and "12\n" not in trained


def test_rows_that_two_sources_read_are_said(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("a", "b"):
        write_jsonl(folder / f"{name}.jsonl", [chat_row(f"q {n}", "a") for n in range(20)])
    path = str(folder / "a.jsonl")

    def said(*sources: Any, **data: Any) -> list[str]:
        recipe = make_recipe(train=list(sources), **data)
        return read_twice(recipe, resolve_data(recipe))

    (line,) = said(str(folder / "*.jsonl"), path)
    assert line.startswith("data.train.1 reads again") and line.endswith(f": {path}")
    assert said(path, path, str(folder)) and said({"path": path, "limit": 5}, path)
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert said(path, str(link / "a.jsonl")) and not said(path, str(link / "b.jsonl"))
    assert not said(path, str(folder / "b.jsonl")), "two files"
    assert not said(path, {"path": path, "system": "Be brief."}), "other rows"
    rows = [{"path": str(folder), "split": f"train[{part}]"} for part in (":50%", "50%:")]
    assert not said(*rows), "other parts"
    assert not said(path, path, curate=["deduplicate"])
