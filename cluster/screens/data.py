"""What `finray data show` prints."""

from itertools import groupby
from operator import attrgetter

from ...training.common.formatting import count, printable
from ...training.data.shown_rows import Piece, ShownRow, ShownRows, ShownText

_TRAINED, _SPECIAL, _TRAINED_SPECIAL, _DIM, _RED = "32", "36", "1;32", "2", "31"
_OPEN, _CLOSE = "⟦", "⟧"
"""Around trained text where there are no colours."""


def render_rows(shown: ShownRows, *, colour: bool = False) -> str:
    """Rows as text: each under a line with its place, each text under a line with its size.

    Args:
        shown: the rows.
        colour: whether to use a terminal's colours; else brackets mark what is trained.
    """
    facts = [f"  {label:10}  {text}" for label, text in shown.facts]
    legend = (
        f"{_paint('trained', _TRAINED)}, {_paint('special tokens', _SPECIAL)}, the rest is context"
        if colour
        else f"{_OPEN}trained{_CLOSE}, the rest is context"
    )
    rows = [line for row in shown.rows for line in _row(row, colour)]
    return "\n".join([printable(shown.name), *facts, f"  {'marks':10}  {legend}", *rows])


def _row(row: ShownRow, colour: bool) -> list[str]:
    head = f"── {printable(row.place)} · {' · '.join(row.facts)}"
    lines = ["", _paint(head, _DIM) if colour else head]
    if row.problem:
        problem = f"   {printable(row.problem)}"
        lines.append(_paint(problem, _RED) if colour else problem)
    for text in row.texts:
        lines += _text(text, colour)
    return lines


def _text(text: ShownText, colour: bool) -> list[str]:
    head = f"   {text.title}: {count(text.tokens)} tokens, {count(text.trained)} trained"
    if colour:
        return [_paint(head, _DIM), "".join(map(_coloured, text.pieces))]
    parts = []
    for is_trained, pieces in groupby(text.pieces, key=attrgetter("trained")):
        part = "".join(map(_printable, pieces))
        parts.append(f"{_OPEN}{part}{_CLOSE}" if is_trained else part)
    return [head, "".join(parts)]


def _printable(piece: Piece) -> str:
    """Line ends are part of what the model sees; other control characters change the terminal."""
    return "\n".join(map(printable, piece.text.split("\n")))


def _coloured(piece: Piece) -> str:
    text = _printable(piece)
    if piece.special:
        return _paint(text, _TRAINED_SPECIAL if piece.trained else _SPECIAL)
    return _paint(text, _TRAINED) if piece.trained else text


def _paint(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m"
