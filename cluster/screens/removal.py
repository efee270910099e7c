"""What is to be deleted, and what is kept: as text, and as a question on a terminal."""

import sys
from collections.abc import Sequence

from ...training.common.formatting import one_line, short_bytes
from ...tuning.removal import Removal
from .runs import columns

_KEPT_SHOWN = 20


def render_removal(removal: Removal) -> str:
    """Each thing with its size, the sum, and what is kept with the reason."""
    lines = []
    if removal.doomed:
        rows = [
            (one_line(item.name), item.kind, short_bytes(item.size), one_line(item.why))
            for item in removal.doomed
        ]
        lines.append(columns([("name", "kind", "size", "why"), *rows], 2, 3))
        lines.append(f"{len(rows)} to delete, {short_bytes(removal.size)}")
    else:
        lines.append("nothing to delete")
    shown = removal.kept[:_KEPT_SHOWN]
    lines += [f"kept: {one_line(name)}: {one_line(why)}" for name, why in shown]
    if len(removal.kept) > len(shown):
        lines.append(f"kept: {len(removal.kept) - len(shown)} more")
    return "\n".join(lines)


def is_confirmed() -> bool:
    """Ask on the terminal; False where there is none."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print("delete this? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def render_deleted(deleted: Sequence[str], removal: Removal) -> str:
    """How much was deleted."""
    size = sum(item.size for item in removal.doomed if item.name in deleted)
    return f"deleted {len(deleted)} of {len(removal.doomed)}, {short_bytes(size)}"
