"""`finray data show`: rows as the model sees them, in the terminal and as a page."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from finray.cluster.cli.main import main
from finray.training.records.report import asset

CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is <b>4</b>."}]
PROMPT = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"


def recipe(folder: Path, model: Path, rows: list[Any], **changes: Any) -> str:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"train": "rows.jsonl", "max_length": 64, **changes.pop("data", {})}
    values = {"name": "shown", "model": str(model), "data": data, "storage": "runs", **changes}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_a_conversation(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": CHAT}, {"messages": CHAT[:1]}, {"messages": CHAT}]
    assert main(["data", "show", recipe(tmp_path, tiny_model, rows), "--rows", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"{PROMPT}⟦It is <b>4</b>.<|im_end|>\n⟧" in shown
    assert "rows.jsonl:1 · train · messages · the model's own chat template" in shown
    assert "not usable: there is no assistant turn to learn from" in shown
    assert "rows.jsonl:3" not in shown
    assert "texts share sequences of 64 tokens, isolated from each other" in shown


def test_pairs_pieces_and_long_rows(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = {"prompt": CHAT[:1], "chosen": "4\x1b[31m", "rejected": "5"}
    assert main(["data", "show", recipe(tmp_path, tiny_model, [pair], method="dpo")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"chosen: \d+ tokens, \d+ trained\n", shown) and f"{PROMPT}⟦5<" in shown
    assert "\x1b" not in shown
    long = {"prompt": "one " * 200, "completion": "two " * 30}
    path = recipe(tmp_path, tiny_model, [long])
    assert main(["data", "show", path]) == 0
    assert "no template: the text as it is" in (shown := capsys.readouterr().out)
    assert "dropped: overlong" in shown
    assert main(["data", "show", path, "--set", "data.overlong=split"]) == 0
    assert re.search(r"part 1 of \d: 64 tokens", capsys.readouterr().out)


def test_a_page(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "rows.html"
    path = recipe(tmp_path, tiny_model, [{"messages": CHAT}])
    assert main(["data", "show", path, "--page", str(page)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text(encoding="utf-8")
    assert '<span class="trained ">It is &lt;b&gt;4&lt;/b&gt;.</span>' in text
    assert '<span class="trained special">&lt;|im_end|&gt;</span>' in text
    assert str(asset("rows.css")) in text and "<b>4" not in text and "://" not in text
    assert "default-src 'none'" in text and "script-src" not in text


def test_bad_arguments(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, tiny_model, [{"messages": CHAT}])
    assert main(["data", "show", path, "--rows", "0"]) == 2
    assert "--rows: expected at least 1, found 0" in capsys.readouterr().err
    assert main(["data", "show", path, "--page", str(tmp_path)]) == 2
    assert (
        f"--page {tmp_path}: cannot be written: Is a directory; give another"
        in capsys.readouterr().err
    )
    assert main(["data", "show", path, "--set", "data.train.0.path=none.jsonl"]) == 2
    assert "data.train.0: " in capsys.readouterr().err
