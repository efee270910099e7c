"""What a table of another project's settings holds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Fate = Literal["copied", "combined", "left"]


@dataclass(frozen=True)
class ForeignKey:
    """A setting of another project."""

    fate: Fate
    """copied: the value is finray's too. combined: it decides, alone or with others, what stands
    under finray's key. left: finray has no setting for it."""
    to: str
    """finray's dotted key, or a text that also shows the value: `model.quantize: nf4`; empty
    for what is left out."""
    text: str = ""
    """What it means, and of what is left out, why."""


@dataclass(frozen=True)
class Dialect:
    """The settings of one project."""

    name: str
    copied: Mapping[str, str]
    """finray's key by theirs."""
    combined: Mapping[str, tuple[str, str]]
    """(finray's key, meaning) by theirs."""
    left: Mapping[str, str]
    """Why nothing comes of them, by names with spaces between; without those that are combined."""
    marks: frozenset[str]
    """Keys that no other project has."""

    def entries(self) -> Iterator[tuple[str, ForeignKey]]:
        """Every key of the table."""
        for name, to in self.copied.items():
            yield name, ForeignKey("copied", to)
        for name, (to, text) in self.combined.items():
            yield name, ForeignKey("combined", to, text)
        for names, text in self.left.items():
            for name in names.split():
                if name not in self.combined:
                    yield name, ForeignKey("left", "", text)
