"""What a rehearsal found; plain values, which need no torch."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..common.errors import InputError
from ..config.recipe import Recipe
from ..config.sections import FLAT, Isolation

_MASKED = (
    "data.packing: attention cannot be computed one document at a time in this architecture, so "
    "packed rows keep a mask over the whole row: memory and time grow with its square"
)


@dataclass(frozen=True)
class Outcome:
    """The result of a rehearsal."""

    status: Literal["ok", "refused", "not rehearsed"]
    message: str | None = None
    """refused: what would end the run, and the remedy. not rehearsed: why there was no copy."""
    isolation: Isolation | None = None
    """How texts that share a row are kept apart; None if they are not, or it is not known."""
    shares_prefixes: bool = False
    """True if texts of a row that begin with the same tokens may share them."""
    unpacked_because: str | None = None
    """Why documents cannot be packed; None if they can, or the method packs none."""
    left_out: tuple[str, ...] = ()
    """Patterns of what would be trained, but gets no gradient (`models/left_out`)."""
    adapted: dict[str, int] | None = None
    """Numbers of modules with an adapter on the copy, by the last part of their name."""
    checkpointing: bool = True
    """False if activations cannot be recomputed, which `model.gradient_checkpointing: auto` does
    not do then."""
    notes: tuple[str, ...] = ()
    """Further lines for the user, such as that the result cannot be merged."""

    @classmethod
    def from_json(cls, content: bytes | str) -> "Outcome":
        """Read an outcome.

        Raises:
            ValueError: it is none.
        """
        values: Any = json.loads(content)
        try:
            return cls(
                **{
                    **values,
                    "left_out": tuple(values["left_out"]),
                    "notes": tuple(values["notes"]),
                }
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"it is no outcome of a rehearsal: {error}") from None

    def way(self, packs: bool) -> Isolation | None:
        """How texts share a row in training; None if each has its own.

        Args:
            packs: True if rows are packed documents. Other texts share one only where that saves
                padding.
        """
        return self.isolation if packs or self.isolation in FLAT else None

    def to_json(self) -> str:
        """The outcome as a line of JSON."""
        return json.dumps(asdict(self))

    def settle(self, recipe: Recipe, packed_before: bool | None = None) -> Recipe:
        """The recipe with its packing decided, and without checkpointing where that fails.

        Args:
            recipe: the recipe that was rehearsed.
            packed_before: whether an earlier attempt of the run packs; None for a new run.

        Raises:
            InputError: the run would fail, or documents are to be packed that would mix.
        """
        if self.status == "refused":
            raise InputError(str(self.message))
        is_fixed = recipe.data.packing is True
        if self.isolation is None and recipe.method.packs and (is_fixed or packed_before):
            reason = self.unpacked_because or f"it is not known whether they mix: {self.message}"
            remedy = (
                "set data.packing: auto, which then trains one document a row"
                if is_fixed
                else "continue it where it was started, or start over with --fresh"
            )
            raise InputError(f"data.packing: documents cannot share a row: {reason}; {remedy}")
        recipe = self.allowed(recipe)
        return with_packing(recipe, packed_before, self.isolation is not None, self.isolation)

    def allowed(self, recipe: Recipe) -> Recipe:
        """The recipe, without checkpointing for `auto` to come to where that fails."""
        if self.checkpointing or recipe.model.gradient_checkpointing != "auto":
            return recipe
        model = recipe.model.model_copy(update={"gradient_checkpointing": False})
        return recipe.model_copy(update={"model": model})

    def lines(self, recipe: Recipe) -> list[str]:
        """What the user should know, one line each."""
        lines = list(self.notes)
        if self.status == "not rehearsed":
            lines.append(f"not rehearsed: {self.message}")
        if recipe.method.packs and recipe.data.packing == "auto" and self.isolation is None:
            reason = self.unpacked_because or "it could not be rehearsed"
            lines.append(f"data.packing: one document a row: {reason}")
        is_free = recipe.model.attention == "auto" and recipe.data.packing is not False
        if is_free and recipe.method.packs and self.isolation in ("positions", "mask"):
            lines.append(_MASKED)
        if not self.checkpointing:
            lines.append("model.gradient_checkpointing: false: the model cannot be trained with it")
        if self.left_out:
            shown = ", ".join(self.left_out[:5])
            more = f" and {len(self.left_out) - 5} more" if len(self.left_out) > 5 else ""
            lines.append(f"not trained, because they get no gradient: {shown}{more}")
        return lines

    def as_record(self, recipe: Recipe) -> dict[str, Any]:
        """The outcome for run.json: what it found, and `lines` for people."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {**values, "lines": self.lines(recipe), "text": self.describe()}

    def describe(self) -> str:
        """The outcome in a few words, for `check` and the report."""
        if self.status != "ok":
            return f"{self.status}: {self.message}"
        words = ["forward, backward, save and load work on a small copy of the model"]
        if self.isolation is not None:
            words.append(f"texts that share a row are kept apart by {_WAYS[self.isolation]}")
        if self.shares_prefixes:
            words.append("what several of them begin with is computed once")
        return "; ".join(words)


def with_packing(
    recipe: Recipe,
    packed_before: bool | None,
    isolates: bool = True,
    way: Isolation | None = None,
) -> Recipe:
    """The recipe that packs as an earlier attempt of the run does, else if documents stay apart."""
    return recipe.with_isolation(isolates if packed_before is None else packed_before, way)


_WAYS: dict[Isolation, str] = {
    "documents": "attention to one document at a time",
    "positions": "their positions",
    "mask": "a block mask",
    "borders": "their borders",
}
