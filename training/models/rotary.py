"""Rotary positions whose frequencies depend on the longest text of a forward pass."""

from typing import Any


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
