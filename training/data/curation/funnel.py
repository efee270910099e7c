"""What stages drop, and why: the funnel from rows that are read to rows that are tokenised."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...common import formatting

BAD_ROW, LEFT_OUT = "bad_row", "left_out"
"""Why a row is dropped that cannot be used, or for which the source's function returns None."""
SAMPLES = 5
"""Rows that are shown of what a stage dropped."""
_LANGUAGES = 12
"""Languages that are named; the rows of the others are added up."""
MOST_BAD_OF_CHUNK = 1000
"""Rows of a chunk that cannot be used of which place and reason are kept."""


_COUNTERS = ("dropped", "languages_in", "languages_out")


@dataclass
class Counts:
    """What a stage counted in a part of the data."""

    rows_in: int = 0
    rows_out: int = 0
    changed: int = 0
    characters_in: int = 0
    """Of the texts that are compared, of rows that can be used."""
    characters_out: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of dropped rows by the reason."""
    bad: list[dict[str, Any]] = field(default_factory=list)
    """line, reason and row of rows that cannot be used."""
    languages_in: Counter[str] = field(default_factory=Counter)
    """Rows by their language, where the stage looks for that."""
    languages_out: Counter[str] = field(default_factory=Counter)
    samples: list[dict[str, Any]] = field(default_factory=list)
    """The first dropped rows, as `samples.sample_of` makes them."""
    rows: int = 0
    """Rows of the chunk as it is read."""
    lines: int = 0
    """Lines of the chunk."""

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), **{name: dict(getattr(self, name)) for name in _COUNTERS}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Counts":
        return cls(**{**values, **{name: Counter(values.get(name, {})) for name in _COUNTERS}})


@dataclass(frozen=True)
class StageResult:
    """A finished stage, as its manifest.json holds it."""

    kind: str
    chunks: tuple[Counts, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the funnel says beside the counts."""

    @property
    def total(self) -> Counts:
        """Of all chunks; bad rows and samples without place."""
        total = Counts()
        for counts in self.chunks:
            for name in ("rows_in", "rows_out", "changed", "characters_in", "characters_out"):
                setattr(total, name, getattr(total, name) + getattr(counts, name))
            for name in _COUNTERS:
                getattr(total, name).update(getattr(counts, name))
        return total

    def to_json(self) -> dict[str, Any]:
        chunks = [counts.to_json() for counts in self.chunks]
        return {"kind": self.kind, "chunks": chunks, "facts": self.facts}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "StageResult":
        chunks = tuple(map(Counts.from_json, values["chunks"]))
        return cls(values["kind"], chunks, values.get("facts", {}))


def describe_funnel(funnel: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each stage: `1 filter: 1,200 → 1,100 rows (too short 100)`.

    Args:
        funnel: as in the manifest of prepared data.
    """
    return [_line(stage) for stage in funnel]


def funnel_facts(funnel: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(label, text) pairs: each stage, its change of the lengths, and a row that it dropped."""
    facts = []
    for stage in funnel:
        name, _, text = _line(stage).partition(": ")
        facts.append((name, text))
        before, after = map(formatting.count, mean_lengths(stage))
        if before != after:
            facts.append((f"{name}, characters a row", f"{before} → {after}"))
        facts += [(f"{name}, {of}", text) for of, text in describe_kinds(stage)]
        facts += [(f"{name}, for example", text) for text in describe_samples(stage)[:1]]
    return facts


def _line(stage: Mapping[str, Any]) -> str:
    facts = [f"{reason} {formatting.count(n)}" for reason, n in stage["dropped"].items()]
    if stage["changed"]:
        facts.insert(0, f"changed {formatting.count(stage['changed'])}")
    why = f" ({', '.join(facts)})" if facts else ""
    rows = f"{formatting.count(stage['rows_in'])} → {formatting.count(stage['rows_out'])} rows"
    return f"{stage['stage']}: {rows}{why}"


def mean_lengths(stage: Mapping[str, Any]) -> tuple[float, float]:
    """Characters of a row before and after a stage; those of rows that cannot be used are not
    counted."""
    unread = sum(stage["dropped"].get(reason, 0) for reason in (BAD_ROW, LEFT_OUT))
    before = stage["characters_in"] / max(1, stage["rows_in"] - unread)
    return before, stage["characters_out"] / max(1, stage["rows_out"])


def describe_kinds(stage: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of the languages or scores before and after a stage that looks for them."""
    facts = [("languages", text) for text in describe_languages(stage)]
    for when, values in stage.get("scores", {}).items():
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        facts.append((f"scores {when}", text or formatting.MISSING))
    return facts


def describe_languages(stage: Mapping[str, Any]) -> list[str]:
    """A line with the rows of each language before and after the stage that looks for them, the
    most frequent first: `en 1,200 → 1,200, fr 300 → 0`; of other stages none."""
    languages = stage.get("languages")
    if not languages:
        return []
    rows = [
        (before, languages["after"].get(code, 0), code)
        for code, before in languages["before"].items()
    ]
    rows.sort(key=lambda row: (-row[0], row[2]))
    rare = rows[_LANGUAGES:]
    if rare:
        others = (sum(row[0] for row in rare), sum(row[1] for row in rare))
        rows = [*rows[:_LANGUAGES], (*others, f"{len(rare)} others")]
    return [
        ", ".join(
            f"{code} {formatting.count(before)} → {formatting.count(after)}"
            for before, after, code in rows
        )
    ]


def describe_samples(stage: Mapping[str, Any]) -> Sequence[str]:
    """A line for each row that is shown of what a stage dropped."""
    return [
        f"{sample['place']}: {sample['reason']}: {formatting.one_line(sample['text'])}"
        for sample in stage["samples"]
    ]
