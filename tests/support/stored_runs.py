"""Runs made by hand: what lists, comparisons and deletions read of a storage."""

import json
from pathlib import Path
from typing import Any

import yaml


def stored_run(storage: Path, name: str, **how: Any) -> Path:
    """A finished run in a storage.

    Args:
        storage: where to.
        name: its name.
        how: `recipe` and `lines` (of metrics.jsonl) and `samples`; all else is of run.json.
    """
    folder = storage / name
    folder.mkdir(parents=True)
    recipe = {"name": name, "storage": str(storage), "model": {"base": "owner/base"}}
    recipe |= how.pop("recipe", {})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    for file in ("lines", "samples"):
        content = "".join(json.dumps(line) + "\n" for line in how.pop(file, ()))
        written = "metrics.jsonl" if file == "lines" else "samples.jsonl"
        (folder / written).write_text(content, encoding="utf-8")
    record = {
        "status": "finished",
        "name": name,
        "method": "sft",
        "step": 10,
        "total_steps": 10,
        "started_at": "2026-01-01T00:00:00Z",
        "finished_at": "2026-01-02T00:00:00Z",
        "metrics": {},
        **how,
    }
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def checkpoint(run: Path, step: int = 5) -> None:
    """A checkpoint of a run, by its name alone."""
    (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
