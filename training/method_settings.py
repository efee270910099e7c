"""The methods' settings: a variant for each kind, and what the rest must know of it early."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .section import PositiveInt, Section


class MethodSettings(Section):
    """What all kinds have; no setting of its own."""

    packs: ClassVar[bool] = False
    """Rows are single documents, several of which may share a sequence."""
    texts: ClassVar[int] = 1
    """Texts of a row, each of at most `data.max_length` tokens."""
    has_answers: ClassVar[bool] = False
    """A held-out row is a prompt with a reference answer, which can be compared."""

    def rows_per_step(self, batch_size: int) -> int:
        """Rows of data behind an optimizer step of `batch_size` sequences."""
        return batch_size

    @property
    def passes(self) -> int:
        """Optimizer steps on the same rows, before the next ones are taken."""
        return 1


class SftMethod(MethodSettings):
    packs: ClassVar[bool] = True
    has_answers: ClassVar[bool] = True

    kind: Literal["sft"] = "sft"
    train_on: Literal["completions", "all"] = "completions"
    """Tokens that bear loss: the assistant's turns (or the completion), or everything."""


class PretrainMethod(MethodSettings):
    packs: ClassVar[bool] = True

    kind: Literal["pretrain"] = "pretrain"
    init: Literal["weights", "random"] = "weights"
    """weights: continue from the base's weights. random: only its configuration is used."""


class DpoMethod(MethodSettings):
    texts: ClassVar[int] = 2
    has_answers: ClassVar[bool] = True

    kind: Literal["dpo"] = "dpo"
    beta: Annotated[float, Field(gt=0.0)] = 0.1
    """How strongly the policy is held to the reference."""


Method = Annotated[SftMethod | PretrainMethod | DpoMethod, Field(discriminator="kind")]

__all__ = [
    "DpoMethod",
    "Method",
    "MethodSettings",
    "PositiveInt",
    "PretrainMethod",
    "SftMethod",
]
