"""What `finray import` says of each setting."""

from collections.abc import Iterator, Mapping
from typing import Any


def render(imported: Mapping[str, Any]) -> str:
    """What became of the settings of another project, as text.

    Args:
        imported: the fields of `Imported`.
    """
    parts = {
        "mapped": imported["mapped"],
        "changed": imported["changed"],
        "left out": imported["left"],
    }
    counts = [f"{len(part)} {name}" for name, part in parts.items() if part]
    if imported["off"]:
        counts.append(f"{len(imported['off'])} empty or off")
    if imported["unknown"]:
        counts.append(f"{len(imported['unknown'])} unknown")
    lines = [f"{imported['dialect']}: {', '.join(counts)}"]
    for name, part in parts.items():
        lines += _section(name, part)
    if imported["off"]:
        lines.append(f"  empty or off: {', '.join(imported['off'])}")
    if imported["unknown"]:
        lines.append(f"  unknown: {', '.join(imported['unknown'])}")
    lines += [f"  note: {note}" for note in imported["notes"]]
    return "\n".join(lines)


def _section(name: str, part: Mapping[str, str]) -> Iterator[str]:
    if not part:
        return
    yield f"  {name}:"
    width = min(28, max(map(len, part)))
    for reason in dict.fromkeys(part.values()):
        names = [key for key, text in part.items() if text == reason]
        joined = ", ".join(names)
        yield f"    {joined:{width}}  {reason}"
