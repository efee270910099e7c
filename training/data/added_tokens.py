"""The tokens that a run adds to its tokenizer, and those that its model has no embedding for."""

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any, Literal

from ..common.errors import InputError
from .chat import CHATML

Requested = Literal["auto"] | Iterable[str]
"""The recipe's `model.add_tokens`."""

_MARK = re.compile(r"<\|[^|<>\s]{1,64}\|>")
_SHOWN = 5


def tokens_to_add(
    requested: Requested, vocabulary: Container[str], template: str | None
) -> list[str]:
    """The tokens of `model.add_tokens`.

    Args:
        requested: the recipe's setting; `auto` means the marks of the template.
        vocabulary: the tokens that the tokenizer has.
        template: the Jinja source of the chat template; None if there is none.
    """
    if requested != "auto":
        return list(requested)
    return [mark for mark in marks_of(template) if mark not in vocabulary]


def marks_of(template: str | None) -> list[str]:
    """The marks like <|im_start|> that a chat template names, in its order."""
    source = CHATML if template == "chatml" else template or ""
    return list(dict.fromkeys(_MARK.findall(source)))


def add_tokens(tokenizer: Any, requested: Requested, template: str | None) -> list[int]:
    """Add tokens to a tokenizer of transformers, as special ones that are never split.

    Args:
        tokenizer: it is changed.
        requested: the recipe's `model.add_tokens`.
        template: the recipe's `data.chat_template`; None means the tokenizer's own.

    Returns:
        The ids of the requested tokens, sorted, whether they are new or not.
    """
    from tokenizers import AddedToken

    if template is None and isinstance(tokenizer.chat_template, str):
        template = tokenizer.chat_template
    tokens = tokens_to_add(requested, tokenizer.get_vocab(), template)
    lacking = [token for token in tokens if token not in tokenizer.get_vocab()]
    if lacking:
        added = [AddedToken(token, special=True, normalized=False) for token in lacking]
        tokenizer.add_tokens(added, special_tokens=True)
    return sorted(tokenizer.convert_tokens_to_ids(tokens))


def check_embedded(tokens: Mapping[int, str], rows: int) -> None:
    """Refuse tokens whose ids are beyond the model's embedding.

    Args:
        tokens: the beginning of the vocabulary that is used: tokens by id.
        rows: number of rows of the embedding.

    Raises:
        InputError: naming them.
    """
    beyond = [tokens[index] for index in sorted(tokens) if index >= rows]
    if beyond:
        more = f" and {len(beyond) - _SHOWN} more" if len(beyond) > _SHOWN else ""
        raise InputError(
            f"model.add_tokens: the model's embedding has {rows} rows, and none for "
            f"{', '.join(beyond[:_SHOWN])}{more}, which the data needs; list them there"
        )
