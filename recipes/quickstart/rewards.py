"""Rewards for the quickstart's task: is the answer valid JSON, and are its fields correct?

finray calls a reward function as TRL does: with lists of prompts, completions and token ids, and
with the data's columns. The column `reference` holds each row's own answer.
"""

import json
from typing import Any

FIELDS = ("name", "order", "issue", "wants")


def _fields(completion: list[dict[str, str]]) -> dict[str, Any] | None:
    """The fields of an answer; None if it is not a JSON object."""
    try:
        fields = json.loads(completion[-1]["content"])
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def json_valid(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    """1 for a JSON object with exactly the required fields, else 0."""
    answers = map(_fields, completions)
    return [float(fields is not None and tuple(fields) == FIELDS) for fields in answers]


def fields_right(
    completions: list[list[dict[str, str]]], reference: list[str], **columns: Any
) -> list[float]:
    """Share of the fields (0 to 1) that are equal to the reference's."""
    rewards = []
    for completion, expected in zip(completions, reference, strict=True):
        answer, correct = _fields(completion) or {}, json.loads(expected)
        rewards.append(sum(answer.get(name) == correct[name] for name in FIELDS) / len(FIELDS))
    return rewards
