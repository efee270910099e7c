"""A reward function for qwen3-4b-grpo.yaml.

finray calls it as TRL does: with lists of prompts, completions and token ids, and with the data's
columns. It returns one number for each completion.
"""

from typing import Any

FREE, LONGEST = 256, 512
"""Tokens that cost nothing, and those of the longest completion (method.max_completion)."""


def brevity(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """0 for a completion of up to FREE tokens, falling to -1 for one of LONGEST tokens."""
    return [-max(0, len(ids) - FREE) / (LONGEST - FREE) for ids in completion_ids]
