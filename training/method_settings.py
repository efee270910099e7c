"""The methods' settings: a variant for each kind, and what the rest must know of it early."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from .section import PositiveInt, Section

if TYPE_CHECKING:
    from .recipe import Recipe


Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Smoothing = Annotated[float, Field(ge=0.0, lt=0.5)]

DpoLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
]
_SMOOTHED = {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"}
_OF_ANY_DIVERGENCE = {
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "robust",
    "discopop",
    "sft",
}


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

    def contradiction(self, recipe: "Recipe") -> str | None:
        """What is wrong between the method's settings and others of the recipe, if anything."""
        return None


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


class PairSettings(MethodSettings):
    """What methods on pairs of answers have in common."""

    texts: ClassVar[int] = 2
    has_answers: ClassVar[bool] = True


class DpoMethod(PairSettings):
    kind: Literal["dpo"] = "dpo"
    losses: Annotated[dict[DpoLoss, Positive], Field(min_length=1)] = {"sigmoid": 1.0}
    """Losses, summed with their weights: {sigmoid: 1.0, sft: 0.2}. sft is the cross-entropy of the
    chosen answer's tokens; aot and aot_unpaired sort the pairs of each forward pass."""
    beta: Positive = 0.1
    """How strongly the policy is held to the reference; tau of ipo, eta of sppo_hard."""
    label_smoothing: Smoothing = 0.0
    """Share of the pairs whose label is taken to be wrong, in sigmoid, robust, exo_pair, aot and
    aot_unpaired."""
    discopop_tau: Positive = 0.05
    """Temperature of discopop."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """Divergence from the reference that is held small."""
    divergence_alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """The alpha of divergence alpha."""
    reference_model: str | None = None
    """Hub id, model folder or finished run of the reference; absent: the model as this run
    starts."""
    precompute_reference: bool = False
    """Compute the reference's log-probabilities once, before the first step, and keep them with
    the prepared data."""

    @model_validator(mode="after")
    def _losses_agree(self) -> Self:
        named = self.losses.keys()
        if named == {"sft"}:
            raise ValueError("losses: sft alone prefers nothing; add another loss, or use kind sft")
        if self.label_smoothing > 0 and not named & _SMOOTHED:
            raise ValueError(
                f"label_smoothing is used by {', '.join(sorted(_SMOOTHED))}, and losses are "
                f"{', '.join(named)}"
            )
        if "exo_pair" in named and self.label_smoothing == 0:
            raise ValueError("losses: exo_pair needs label_smoothing above 0, such as 0.001")
        others = named - _OF_ANY_DIVERGENCE
        if self.divergence != "reverse_kl" and others:
            raise ValueError(
                f"divergence {self.divergence} is not defined for {', '.join(sorted(others))}; "
                f"it is for {', '.join(sorted(_OF_ANY_DIVERGENCE))}"
            )
        return self


class KtoMethod(MethodSettings):
    kind: Literal["kto"] = "kto"
    loss: Literal["kto", "apo_zero"] = "kto"
    """kto compares with the divergence from the reference, estimated on the whole batch; apo_zero
    with zero."""
    beta: Positive = 0.1
    """How strongly the policy is held to the reference."""
    desirable_weight: Positive = 1.0
    """Weight of answers whose label is true."""
    undesirable_weight: Positive = 1.0
    """Weight of answers whose label is false."""
    reference_model: str | None = None
    """Hub id, model folder or finished run of the reference; absent: the model as this run
    starts."""

    def contradiction(self, recipe: "Recipe") -> str | None:
        """A batch of one answer has no other answer to estimate the divergence with."""
        if self.loss == "kto" and recipe.optim.batch_size < 2:
            return "optim.batch_size: method kto compares answers of a batch; take at least 2"
        return None


class OrpoMethod(PairSettings):
    kind: Literal["orpo"] = "orpo"
    beta: Positive = 0.1
    """Weight of the odds ratio beside the chosen conversation's cross-entropy."""


class CpoMethod(PairSettings):
    kind: Literal["cpo"] = "cpo"
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """Loss of the difference between the answers' log-probabilities; ipo takes their means over
    tokens."""
    beta: Positive = 0.1
    """Temperature of the difference."""
    sft_weight: NotNegative = 1.0
    """Weight of the cross-entropy of the chosen answer's tokens."""
    label_smoothing: Smoothing = 0.0
    """Share of the pairs whose label is taken to be wrong, in sigmoid."""

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> Self:
        if self.label_smoothing > 0 and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is used by loss sigmoid, and loss is {self.loss}")
        return self


class SimpoMethod(PairSettings):
    kind: Literal["simpo"] = "simpo"
    beta: Positive = 2.0
    """Scale of the answers' mean log-probabilities."""
    gamma: NotNegative = 1.0
    """Margin by which the chosen answer's scaled mean log-probability should lead."""
    sft_weight: NotNegative = 0.0
    """Weight of the cross-entropy of the chosen answer's tokens."""
    label_smoothing: Smoothing = 0.0
    """Share of the pairs whose label is taken to be wrong."""


class RewardMethod(MethodSettings):
    texts: ClassVar[int] = 2

    kind: Literal["reward"] = "reward"
    center_coefficient: NotNegative = 0.0
    """Weight of the squared sum of both scores, which keeps scores around zero."""


Method = Annotated[
    SftMethod
    | PretrainMethod
    | DpoMethod
    | KtoMethod
    | OrpoMethod
    | CpoMethod
    | SimpoMethod
    | RewardMethod,
    Field(discriminator="kind"),
]

__all__ = [
    "CpoMethod",
    "DpoLoss",
    "DpoMethod",
    "KtoMethod",
    "Method",
    "MethodSettings",
    "OrpoMethod",
    "PairSettings",
    "PositiveInt",
    "PretrainMethod",
    "RewardMethod",
    "SftMethod",
    "SimpoMethod",
]
