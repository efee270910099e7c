"""The methods' settings: a variant for each kind, and what the rest must know of it early."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from .models import LoraAdapter, ModelSettings
from .rewards import FunctionReward, Reward
from .section import PositiveInt, Section
from .sections import CheckpointSettings, DataSettings, OptimSettings

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

    kind: str

    def rows_per_step(self, batch_size: int) -> int:
        """Rows of data behind an optimizer step of `batch_size` sequences."""
        return batch_size

    def row_length(self, max_length: int) -> int:
        """Tokens that a text of the data may have, where a sequence has at most `max_length`."""
        return max_length

    @property
    def repeats(self) -> int:
        """Optimizer steps on the same rows, before the next ones are taken."""
        return 1

    @property
    def facts(self) -> dict[str, Any]:
        """What run.json tells of the method beside its kind."""
        return {}

    @property
    def why_not_shardable(self) -> str | None:
        """Why this method cannot train a sharded model, and what to do instead; None if it can."""
        return None

    def contradiction(
        self, data: DataSettings, optim: OptimSettings, checkpoint: CheckpointSettings
    ) -> str | None:
        """What is wrong between the method's settings and other sections, if anything."""
        return None

    def model_contradiction(self, model: ModelSettings, adapter: LoraAdapter | None) -> str | None:
        """What is wrong between the method's settings and the trained model, if anything."""
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

    @property
    def why_not_shardable(self) -> str | None:
        """The reference is computed before the model is cut up."""
        if not self.precompute_reference:
            return None
        return (
            "method.precompute_reference computes on whole models; leave it out (beside an "
            "adapter, the reference takes no memory), or take ddp"
        )

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

    def contradiction(
        self, data: DataSettings, optim: OptimSettings, checkpoint: CheckpointSettings
    ) -> str | None:
        """A batch of one answer has no other answer to estimate the divergence with."""
        if self.loss == "kto" and optim.batch_size < 2:
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


class OnlineMethod(MethodSettings):
    """What the methods have in common whose model answers the prompts itself."""

    has_answers: ClassVar[bool] = True

    rewards: Annotated[list[Reward], Field(min_length=1)]
    """What a completion is worth: the weighted sum of these."""
    on_reward_error: Literal["fail", "missing"] = "fail"
    """A reward function that raises, or returns what is no reward: fail ends the run and shows
    prompt, completion and traceback; missing counts the completion as not judged by it."""
    generations: Annotated[int, Field(ge=2)] = 8
    """Completions of each prompt; optim.batch_size, which counts completions, is a multiple."""
    max_completion: PositiveInt = 256
    """Longest completion, in tokens; prompts get what data.max_length leaves."""
    mask_truncated: bool = False
    """Completions cut off at max_completion bear no loss."""
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample from the likeliest tokens whose probabilities reach this sum."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from so many likeliest tokens; 0: from all."""
    epsilon: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """The ratio to the policy that sampled is clipped to [1 - epsilon, 1 + epsilon_high]."""
    epsilon_high: Positive | None = None
    """epsilon where it is left out."""
    passes: PositiveInt = 1
    """Optimizer steps on the same completions."""
    rollout: Literal["transformers", "vllm"] = "transformers"
    """What generates the completions; vllm needs an adapter, and the extra finray[vllm]."""
    rollout_batch_size: PositiveInt = 64
    """Completions that a worker generates at a time."""

    def rows_per_step(self, batch_size: int) -> int:
        """Prompts."""
        return max(1, batch_size // self.generations)

    def row_length(self, max_length: int) -> int:
        """Tokens of a prompt."""
        return max_length - self.max_completion

    @property
    def repeats(self) -> int:
        """As the setting `passes` says."""
        return self.passes

    @property
    def clip_high(self) -> float:
        """By how much the ratio may exceed 1."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def facts(self) -> dict[str, Any]:
        """The files of the reward functions, by SHA-256."""
        functions = [one for one in self.rewards if isinstance(one, FunctionReward)]
        return {"reward_files": {function.file: function.digest for function in functions}}

    @property
    def why_not_shardable(self) -> str | None:
        """Every worker generates with the whole model."""
        return (
            f"method {self.kind} samples on every worker by itself, and would gather all weights "
            "for every token; take ddp, with model.quantize nf4 if the model is large"
        )

    def contradiction(
        self, data: DataSettings, optim: OptimSettings, checkpoint: CheckpointSettings
    ) -> str | None:
        """Completions that do not fit their batch, their sequence or their checkpoint."""
        names = [reward.name for reward in self.rewards]
        batch_size, max_length = optim.batch_size, data.max_length
        if len(set(names)) < len(names):
            return f"method.rewards: two have the same name, which measures go by: {names}"
        if batch_size % self.generations:
            return (
                f"optim.batch_size {batch_size} counts completions, and must be a multiple of "
                f"method.generations {self.generations}"
            )
        if self.max_completion >= max_length:
            return (
                f"method.max_completion {self.max_completion} leaves no room for a prompt: "
                f"data.max_length {max_length} counts both"
            )
        if checkpoint.every_steps % self.passes:
            return (
                f"checkpoint.every_steps {checkpoint.every_steps} must be a multiple of "
                f"method.passes {self.passes}: completions are not kept in a checkpoint"
            )
        return None

    def model_contradiction(self, model: ModelSettings, adapter: LoraAdapter | None) -> str | None:
        """A model that vLLM cannot sample from, where it is to."""
        return _unfit_for_vllm(model, adapter) if self.rollout == "vllm" else None


def _unfit_for_vllm(model: ModelSettings, adapter: LoraAdapter | None) -> str | None:
    """Why vLLM would not sample from the model that is trained."""
    if adapter is None and model.adapter is None:
        return (
            "method.rollout vllm needs an adapter, which is what vLLM is handed before every "
            "rollout; add the section adapter, or set method.rollout: transformers"
        )
    unknown = []
    if adapter is not None:
        names = ("dora", "modules_to_save", "rank_pattern", "alpha_pattern")
        unknown = [f"adapter.{name}" for name in names if getattr(adapter, name)]
        if adapter.changes_base or adapter.init == "loftq":
            unknown.append(f"adapter.init {adapter.init}")
    if model.quantize != "none":
        unknown.append(f"model.quantize {model.quantize}")
    if unknown:
        return (
            f"method.rollout: vLLM would not sample from the model that is trained, as it does not "
            f"know {', '.join(unknown)}; leave that out, or set method.rollout: transformers"
        )
    return None


class GrpoMethod(OnlineMethod):
    kind: Literal["grpo"] = "grpo"
    beta: NotNegative = 0.0
    """Weight of the KL divergence to the reference, the model before its training; 0: none."""
    loss: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = "dapo"
    """What the token losses are averaged over. dapo: the tokens of the batch; grpo: each
    completion's, then the completions; bnpo: the tokens of a forward pass, then the passes (it
    depends on micro_batch_size); dr_grpo: max_completion tokens for every completion."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Advantages are divided by the rewards' standard deviation in a prompt's group, in the whole
    batch, or not at all."""


class RlooMethod(OnlineMethod):
    kind: Literal["rloo"] = "rloo"
    beta: NotNegative = 0.05
    """Weight of the KL divergence to the reference, which is taken off the reward; 0: none."""
    normalize_advantages: bool = False
    """Advantages of a batch are brought to mean 0 and standard deviation 1."""


Method = Annotated[
    SftMethod
    | PretrainMethod
    | DpoMethod
    | KtoMethod
    | OrpoMethod
    | CpoMethod
    | SimpoMethod
    | RewardMethod
    | GrpoMethod
    | RlooMethod,
    Field(discriminator="kind"),
]

__all__ = [
    "CpoMethod",
    "DpoLoss",
    "DpoMethod",
    "GrpoMethod",
    "KtoMethod",
    "Method",
    "MethodSettings",
    "OnlineMethod",
    "OrpoMethod",
    "PairSettings",
    "PositiveInt",
    "PretrainMethod",
    "RewardMethod",
    "RlooMethod",
    "SftMethod",
    "SimpoMethod",
]
