"""Rotary positions whose frequencies depend on the longest text of a forward pass."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

_Text = TypeVar("_Text")


def length_border(config: Any) -> int | None:
    """Tokens beyond which a text changes the positions of every text beside it.

    transformers computes a whole forward pass with other frequencies where one of its texts is
    longer than the model's first training was (LongRoPE, dynamic NTK).

    Args:
        config: the model's configuration.

    Returns:
        None where frequencies stay as they are.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    borders = []
    for settings in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        kind = str(settings.get("rope_type"))
        if kind == "longrope":
            borders.append(int(settings["original_max_position_embeddings"]))
        elif "dynamic" in kind:
            borders.append(int(text.max_position_embeddings))
    return min(borders, default=None)


def on_either_side(
    texts: Iterable[_Text], border: int | None, size: Callable[[_Text], int]
) -> list[list[_Text]]:
    """The texts that share no forward pass, in their order: those up to the border, and those that
    pass it; without a side that has none.

    Args:
        texts: any.
        border: of `length_border`.
        size: tokens of a text.
    """
    sides: list[list[_Text]] = [[], []]
    for text in texts:
        sides[border is not None and size(text) > border].append(text)
    return [side for side in sides if side]
