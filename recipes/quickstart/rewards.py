"""Rewards for the quickstart's task: is the answer what the shop's desk can read, and is it right?

finray calls a reward function as TRL does: with lists of prompts, completions and their tokens,
and with the data's columns, of which `reference` is the answer that the row holds.
"""

import json
from typing import Any

FIELDS = ("name", "order", "issue", "wants")


def _fields(completion: list[dict[str, str]]) -> dict[str, Any] | None:
    """The answer's fields; None where it is no JSON object."""
    try:
        found = json.loads(completion[-1]["content"])
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def json_valid(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    """1 for a JSON object with exactly the fields that are asked for, else 0."""
    found = map(_fields, completions)
    return [float(fields is not None and tuple(fields) == FIELDS) for fields in found]


def fields_right(
    completions: list[list[dict[str, str]]], reference: list[str], **columns: Any
) -> list[float]:
    """The share of the fields that are as the reference has them."""
    rewards = []
    for completion, expected in zip(completions, reference, strict=True):
        found, wanted = _fields(completion) or {}, json.loads(expected)
        rewards.append(sum(found.get(name) == wanted[name] for name in FIELDS) / len(FIELDS))
    return rewards
