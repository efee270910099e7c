"""Runs whose data streams in small windows, and rows that each method learns from."""

import json
from pathlib import Path
from typing import Any

import pytest

from finray.training.data import window_plan

SMALL = {
    "FIRST_BYTES": 2048,
    "WINDOW_BYTES": 4096,
    "BLOCK_BYTES": 1024,
    "_SMALLEST_BLOCK": 256,
    "_PACKED_BYTES": 1,
}


def make_windows_small(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Windows of 4 KiB, or of other sizes."""
    for name, size in {**SMALL, **sizes}.items():
        monkeypatch.setattr(window_plan, name, size)


_ANSWERED = {"prompt": "What comes after {n}?", "completion": "After {n} comes {m}."}
_PAIR = {"prompt": "What comes after {n}?", "chosen": "{m} comes.", "rejected": "Who knows {n}?"}
_ROWS: dict[str, dict[str, str]] = {
    "sft": _ANSWERED,
    "pretrain": {"text": "The quick brown fox jumps over {n} lazy dogs."},
    "kto": _ANSWERED,
    "grpo": {"prompt": "Which number comes after {n}?"},
    "rloo": {"prompt": "Which number comes after {n}?"},
}


def method_rows(kind: str, count: int) -> list[dict[str, Any]]:
    """Different rows of the kind that a method learns from."""
    shape = _ROWS.get(kind, _PAIR)
    rows: list[dict[str, Any]] = [
        {name: text.format(n=n, m=n + 1) for name, text in shape.items()} for n in range(count)
    ]
    if kind == "kto":
        rows = [{**row, "label": n % 3 > 0} for n, row in enumerate(rows)]
    return rows


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def method_of(kind: str, **changes: Any) -> dict[str, Any]:
    """A section `method`; that of an online one has a reward function, and two steps a rollout."""
    if kind not in ("grpo", "rloo"):
        return {"kind": kind, **changes}
    online = {"generations": 2, "max_completion": 8, "passes": 2}
    rewards = [{"file": "/rewards.py:worth", "source": _REWARDS}]
    return {"kind": kind, "rewards": rewards, **online, **changes}


_REWARDS = """
def worth(prompts, completions, completion_ids, **columns):
    return [sum(token % 7 for token in ids) / 20 for ids in completion_ids]
"""
