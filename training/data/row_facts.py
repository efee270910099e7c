"""What is said of rows before training: fields that nothing uses, lengths, and rows held out that
are trained on, too."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common import formatting
from ..config.methods import METHODS
from ..config.source import KnownFormat
from .fields import is_for_chat
from .formats import own_format
from .messages import CONVERSATIONS, READ_KEYS, with_lists
from .rows import Row
from .shapes import Example

Digests = NDArray[np.uint64]
"""Digests of rows, shape (rows,)."""
QUANTILES = (0.5, 0.9, 0.99, 1.0)
_MOST_NAMES = 100
"""Names of unused fields that are kept apart; rows can have keys without end."""
_MORE = "other fields"
_FOR_CHAT = frozenset({"system", "tools", "functions"})
_CHAT = _FOR_CHAT | {"chat_template_kwargs"}
_ALPACA = frozenset({"instruction", "input", "output", "history"}) | _CHAT
_SHAREGPT = frozenset({"conversations"}) | _CHAT
_PAIRS = frozenset({"prompt", "completion", "response"}) | _CHAT
_ANSWERS = frozenset({"chosen", "rejected", "chosen_messages", "rejected_messages"})
_USED: dict[KnownFormat, frozenset[str]] = {
    "messages": frozenset({"messages"}) | _CHAT,
    "sharegpt": _SHAREGPT,
    "alpaca": _ALPACA,
    "prompt_completion": _PAIRS,
    "prompt": frozenset({"prompt"}) | _CHAT,
    "text": frozenset({"text", "content"}),
    "preference": frozenset({"prompt"}) | _ANSWERS | _SHAREGPT | (_ALPACA - {"output"}),
    "labelled": frozenset({"label", "kto_tag", "messages"}) | _SHAREGPT | _ALPACA | _PAIRS,
}
"""The columns that each shape reads."""
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_OF_INSTRUCTION = frozenset({"input", "output", "history"})
_ONE_OF = (
    ("completion", "response"),
    ("text", "content"),
    ("label", "kto_tag"),
    ("tools", "functions"),
    ("chosen", "chosen_messages"),
    ("rejected", "rejected_messages"),
)
"""Names of the same column; of a row that has both, the first is read."""
_MESSAGE = READ_KEYS | {"tool_call_id", "name"}


def unused_fields(
    row: Row,
    row_format: KnownFormat,
    method: str,
    columns: Sequence[str],
    reads: Callable[[str], bool],
) -> set[str]:
    """Names of a row's columns, and of its messages' keys (as `messages[].date`), that have a
    value which nothing reads.

    Args:
        row: the row, after the changes of its source.
        row_format: the format of its source.
        method: the method's kind; reward functions receive every column.
        columns: the `columns` of the method's settings.
        reads: tells whether the chat template reads a key of a message.
    """
    used = _read_columns(row, own_format(row, row_format, method))
    unused = set()
    if METHODS[method].learns_from != "prompts":
        names = (name for name, value in row.items() if value not in _EMPTY)
        unused = {str(name) for name in names if name not in used and name not in columns}
    lists = with_lists(row)
    for name in CONVERSATIONS:
        if name in used and isinstance(value := lists.get(name), list):
            unused |= {f"{name}[].{key}" for key in _other_keys(value) if not reads(key)}
    return unused


def _read_columns(row: Row, row_format: KnownFormat) -> frozenset[str]:
    """The columns of a row that its shape reads."""
    used = _USED[row_format]
    if not is_for_chat(row):
        used -= _FOR_CHAT
    if row.get("instruction") is None:
        used -= _OF_INSTRUCTION
    if row_format == "preference" and row.get("prompt") is None:
        used |= {"messages"}
    return used - {second for first, second in _ONE_OF if row.get(first)}


def _other_keys(messages: list[Any]) -> set[str]:
    """Keys with a value that no shape reads."""
    return {
        str(key)
        for message in messages
        if isinstance(message, dict)
        for key, value in message.items()
        if value not in _EMPTY and key not in _MESSAGE
    }


def count_fields(counter: Counter[str], names: Iterable[str]) -> None:
    """Count fields, so that their number stays bounded."""
    for name in names:
        counter[name if name in counter or len(counter) < _MOST_NAMES else _MORE] += 1


def quantiles(lengths: Mapping[int, int], longer: int) -> dict[str, int | None]:
    """The length up to which a share of the texts goes, by the share.

    Args:
        lengths: number of texts by their length in tokens.
        longer: number of texts that are longer than all of them.

    Returns:
        None for a share that reaches into the longer ones; empty without texts.
    """
    sizes = np.array(sorted(lengths), np.int64)
    total = sum(lengths.values()) + longer
    if not total:
        return {}
    reached = np.cumsum([lengths[size] for size in sizes.tolist()])
    quantiles: dict[str, int | None] = {}
    for share in QUANTILES:
        place = int(np.searchsorted(reached, int(np.ceil(share * total))))
        quantiles[f"{share:g}"] = int(sizes[place]) if place < len(sizes) else None
    return quantiles


def digest(example: Example) -> int:
    """64 bits of a row's content: those of equal rows are equal."""
    hashed = hashlib.blake2b(digest_size=8)
    for part in example.contents:
        hashed.update(str(part).encode("utf-8", "surrogatepass"))
        hashed.update(b"\0")
    return int.from_bytes(hashed.digest(), "big")


def count_common(train: Sequence[Digests], held_out: Sequence[Digests]) -> int:
    """Number of held-out rows whose content is that of a training row."""
    if not train or not held_out:
        return 0
    return int(np.isin(np.concatenate(held_out), np.concatenate(train)).sum())


def describe_lengths(lengths: Mapping[str, int | None], max_length: int) -> str:
    """Quantiles as text for people; empty without texts."""
    words = {"0.5": "half up to", "0.9": "90% up to", "0.99": "99% up to", "1": "the longest"}
    parts = [
        f"{words.get(share, share)} {formatting.count(length)}"
        for share, length in lengths.items()
        if length is not None
    ]
    if len(parts) < len(lengths):
        parts.append(f"{'others' if parts else 'most'} more than {formatting.count(max_length)}")
    return f"{', '.join(parts)} tokens" if parts else ""


def describe_unused(unused: Mapping[str, int]) -> str:
    """Fields that nothing uses, with the number of their rows; empty without any."""
    listed = ", ".join(f"{name} ({formatting.count(n)} rows)" for name, n in unused.items())
    return f"not used: {listed}" if listed else ""
