"""The reward of qwen3-4b-gsm8k-grpo.yaml: is the number at the end of the answer right?"""

import re
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def correct(completions: list[Any], reference: list[str], **columns: Any) -> list[float | None]:
    """1 for the right number, 0 for another one or none.

    The reference is the data set's worked answer, which ends in "#### 42". A row without such an
    end is not judged.
    """
    return [
        _judge(text_of(one), answer) for one, answer in zip(completions, reference, strict=True)
    ]


def _judge(text: str, answer: str) -> float | None:
    right = last_number(answer.rpartition("####")[2])
    return None if right is None else float(last_number(text) == right)


def last_number(text: str) -> float | None:
    """The last number in a text."""
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def text_of(completion: Any) -> str:
    """A completion's text; one to a conversation comes as messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
