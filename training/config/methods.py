"""The methods: the settings of each kind, and every fact about it that needs no torch.

`method_facts` says which facts there are. The rest of finray asks these classes and knows no method
by name. `engine/methods.py` maps each kind to the objective that computes its loss. A new method is
a class here (and a member of `Method`), an objective, and a line there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from .method_facts import (
    PAIR_MEASURES,
    DocumentSettings,
    LearnsFrom,
    MethodSettings,
    PairSettings,
    ReferenceSettings,
)
from .metric import Metric, declared
from .models import Head, LoraAdapter, ModelSettings
from .rewards import FunctionReward, ModelReward, Reward, RunReward, resolve_reward
from .section import PositiveInt
from .sections import CheckpointSettings, DataSettings, OptimSettings
from .short_forms import as_method

Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Smoothing = Annotated[float, Field(ge=0.0, lt=0.5)]
Column = Annotated[str, Field(min_length=1)]

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


class SftMethod(DocumentSettings):
    title: ClassVar[str] = "Supervised fine-tuning"
    has_answers: ClassVar[bool] = True

    kind: Literal["sft"] = "sft"
    """Imitates the answers of conversations and prompts, or plain text."""
    train_on: Literal["completions", "last", "all"] = "completions"
    """Tokens that are trained: the assistant's turns (or the completion), the last of these turns,
    or everything. A message whose weight is 0 is never trained."""
    train_on_reasoning: bool = True
    """Train the reasoning of an answer, too; with false it is only context."""

    @property
    def trains_on_all(self) -> bool:
        """True with `train_on: all`."""
        return self.train_on == "all"

    @property
    def trains_on_last(self) -> bool:
        """True with `train_on: last`."""
        return self.train_on == "last"

    @property
    def trains_on_reasoning(self) -> bool:
        """The setting `train_on_reasoning`."""
        return self.train_on_reasoning


class PretrainMethod(DocumentSettings):
    title: ClassVar[str] = "Continued pretraining"
    splits_overlong: ClassVar[bool] = True

    kind: Literal["pretrain"] = "pretrain"
    """Continues pretraining on the whole text of every row."""
    init: Literal["weights", "random"] = "weights"
    """weights: continue from the base's weights. random: only its configuration is used."""

    @property
    def trains_on_all(self) -> bool:
        """True: every token of a text is trained."""
        return True

    @property
    def starts_at_random(self) -> bool:
        """True with `init: random`."""
        return self.init == "random"


class DpoMethod(PairSettings, ReferenceSettings):
    title: ClassVar[str] = "Direct preference optimisation"

    kind: Literal["dpo"] = "dpo"
    """Learns from pairs of a chosen and a rejected answer, close to a reference model."""
    losses: Annotated[dict[DpoLoss, Positive], Field(min_length=1)] = {"sigmoid": 1.0}
    """Losses, summed with their weights: {sigmoid: 1.0, sft: 0.2}. sft is the cross-entropy of the
    chosen answer's tokens; aot and aot_unpaired sort the pairs of each forward pass."""
    beta: Positive = 0.1
    """Strength of the penalty for a distance from the reference; tau of ipo, eta of sppo_hard."""
    label_smoothing: Smoothing = 0.0
    """Assumed share of wrongly labelled pairs, for sigmoid, robust, exo_pair, aot and
    aot_unpaired."""
    discopop_tau: Positive = 0.05
    """Temperature of discopop."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """The divergence from the reference that is penalised."""
    divergence_alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """The parameter of the divergence alpha."""
    precompute_reference: bool = False
    """Compute the reference's log-probabilities once, before the first step, and keep them with
    the prepared data."""

    def contradiction(
        self, data: DataSettings, optim: OptimSettings, checkpoint: CheckpointSettings
    ) -> str | None:
        """A reference that is computed ahead needs all rows ahead."""
        if self.precompute_reference and data.streams:
            return (
                "method.precompute_reference computes on all rows, which data.prepare streaming "
                "never has together; remove it, or prepare ahead"
            )
        return None

    @property
    def averages_by_pass(self) -> bool:
        """True for losses that sort the pairs of a forward pass."""
        return not {"aot", "aot_unpaired"}.isdisjoint(self.losses)

    @property
    def uses_reference(self) -> bool:
        """False if the reference's log-probabilities are computed before the first step."""
        return not self.precompute_reference

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
            raise ValueError(
                "losses: sft alone ignores rejected; add another loss, or use kind sft"
            )
        if self.label_smoothing > 0 and not named & _SMOOTHED:
            raise ValueError(
                f"label_smoothing: only {', '.join(sorted(_SMOOTHED))} use it, but losses are "
                f"{', '.join(named)}; remove it or add one of these losses"
            )
        if "exo_pair" in named and self.label_smoothing == 0:
            raise ValueError("losses: exo_pair needs label_smoothing above 0, such as 0.001")
        others = named - _OF_ANY_DIVERGENCE
        if self.divergence != "reverse_kl" and others:
            raise ValueError(
                f"divergence {self.divergence} is not defined for {', '.join(sorted(others))}; "
                f"use reverse_kl, or only losses of {', '.join(sorted(_OF_ANY_DIVERGENCE))}"
            )
        return self


class KtoMethod(ReferenceSettings):
    title: ClassVar[str] = "Kahneman–Tversky optimisation"
    learns_from: ClassVar[LearnsFrom] = "labelled answers"
    measures: ClassVar[tuple[str, ...]] = ("chosen_reward", "rejected_reward", "kl")

    kind: Literal["kto"] = "kto"
    """Learns from single answers, each labelled good or bad, close to a reference model."""
    loss: Literal["kto", "apo_zero"] = "kto"
    """kto compares with the divergence from the reference, estimated on the whole batch; apo_zero
    with zero."""
    beta: Positive = 0.1
    """Strength of the penalty for a distance from the reference."""
    desirable_weight: Positive = 1.0
    """Weight of answers whose label is true."""
    undesirable_weight: Positive = 1.0
    """Weight of answers whose label is false."""

    def step_metrics(self) -> tuple[str, ...]:
        """Without kl if the loss compares with zero: that does not estimate the divergence."""
        without = () if self.loss == "kto" else ("kl",)
        return tuple(name for name in super().step_metrics() if name not in without)

    def contradiction(
        self, data: DataSettings, optim: OptimSettings, checkpoint: CheckpointSettings
    ) -> str | None:
        """A batch of one answer has no other answer to estimate the divergence with."""
        if self.loss == "kto" and optim.batch_size < 2:
            return "optim.batch_size: method kto compares answers of a batch; take at least 2"
        return None


class OrpoMethod(PairSettings):
    title: ClassVar[str] = "Odds-ratio preference optimisation"

    kind: Literal["orpo"] = "orpo"
    """Learns from pairs without a reference model, by the odds ratio of both answers."""
    beta: Positive = 0.1
    """Weight of the odds-ratio loss, which is added to the chosen answer's cross-entropy."""


class CpoMethod(PairSettings):
    title: ClassVar[str] = "Contrastive preference optimisation"

    kind: Literal["cpo"] = "cpo"
    """Learns from pairs without a reference model, by the answers' log-probabilities."""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """Loss of the difference between the answers' log-probabilities; ipo takes their means over
    tokens."""
    beta: Positive = 0.1
    """Temperature of the difference."""
    sft_weight: NotNegative = 1.0
    """Weight of the cross-entropy of the chosen answer's tokens."""
    label_smoothing: Smoothing = 0.0
    """Assumed share of wrongly labelled pairs, for sigmoid."""

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> Self:
        if self.label_smoothing > 0 and self.loss != "sigmoid":
            raise ValueError(
                f"label_smoothing: only loss sigmoid uses it, but loss is {self.loss}; remove it"
            )
        return self


class SimpoMethod(PairSettings):
    title: ClassVar[str] = "Simple preference optimisation"

    kind: Literal["simpo"] = "simpo"
    """Learns from pairs without a reference model, by mean log-probabilities and a margin."""
    beta: Positive = 2.0
    """Scale of the answers' mean log-probabilities."""
    gamma: NotNegative = 1.0
    """Margin by which the chosen answer's scaled mean log-probability should lead."""
    sft_weight: NotNegative = 0.0
    """Weight of the cross-entropy of the chosen answer's tokens."""
    label_smoothing: Smoothing = 0.0
    """Assumed share of wrongly labelled pairs."""


class RewardMethod(MethodSettings):
    title: ClassVar[str] = "Reward model"
    learns_from: ClassVar[LearnsFrom] = "graded pairs"
    sequences_per_row: ClassVar[int] = 2
    measures: ClassVar[tuple[str, ...]] = PAIR_MEASURES
    watched: ClassVar[Metric] = declared("eval_reward_accuracy")
    head: ClassVar[Head] = "score"
    learning_rate_share: ClassVar[float | None] = 0.1

    kind: Literal["reward"] = "reward"
    """Trains a reward model on pairs: it gives each text one number, its score."""
    center_coefficient: NotNegative = 0.0
    """Weight of the squared sum of both scores, which keeps scores around zero."""
    margin: Column | tuple[Column, Column] | None = None
    """By how much the chosen answer's score should lead: a column of numbers, or
    [score_chosen, score_rejected], two columns whose difference it is. Absent: by no set amount,
    whatever columns the data has."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of `margin`."""
        if self.margin is None:
            return ()
        return (self.margin,) if isinstance(self.margin, str) else self.margin


class OnlineMethod(MethodSettings):
    """What methods whose model answers the prompts itself have in common."""

    learns_from: ClassVar[LearnsFrom] = "prompts"
    has_answers: ClassVar[bool] = True
    measures: ClassVar[tuple[str, ...]] = (
        "reward",
        "reward_std",
        "completion_length",
        "truncated",
        "kl",
        "clipped",
    )
    watched: ClassVar[Metric] = declared("eval_reward")
    samples_online: ClassVar[bool] = True

    beta: NotNegative
    """Weight of the KL divergence to the reference, the model before its training; 0: none."""
    rewards: Annotated[list[Reward], Field(min_length=1)]
    """A completion's reward is the weighted sum of these."""
    on_reward_error: Literal["fail", "missing"] = "fail"
    """When a reward function raises or does not return rewards: fail ends the run and shows prompt,
    completion and traceback; missing leaves the completion without its value."""
    generations: Annotated[int, Field(ge=2)] = 8
    """Completions of each prompt; optim.batch_size, which counts completions, is a multiple."""
    max_completion: PositiveInt = 256
    """Longest completion, in tokens; prompts get what data.max_length leaves."""
    mask_truncated: bool = False
    """Completions cut off at max_completion are not trained on."""
    temperature: Positive = 1.0
    """Logits are divided by this before sampling; below 1 the likely tokens gain."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample from the most likely tokens whose probabilities reach this sum."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from this many most likely tokens; 0: from all."""
    epsilon: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """The ratio to the policy that sampled is clipped to [1 - epsilon, 1 + epsilon_high]."""
    epsilon_high: Positive | None = None
    """Same as epsilon if it is left out."""
    passes: PositiveInt = 1
    """Optimizer steps on the same completions."""
    rollout: Literal["transformers", "vllm"] = "transformers"
    """What generates the completions; vllm needs an adapter, and the extra finray[vllm]."""
    rollout_batch_size: PositiveInt = 64
    """Number of completions that a worker generates in one batch."""

    def step_metrics(self) -> tuple[str, ...]:
        """With a metric for each reward; the divergence only if the loss uses a reference."""
        without = () if self.uses_reference else ("kl",)
        names = (name for name in super().step_metrics() if name not in without)
        return (*names, *self._reward_metrics())

    def held_out_metrics(self, trains_adapter: bool) -> tuple[str, ...]:
        """Held-out completions, one for each prompt, have no loss and no group."""
        kl = ("kl",) if self.uses_reference or trains_adapter else ()
        return ("reward", *self._reward_metrics(), "completion_length", "truncated", *kl)

    def metric(self, name: str) -> Metric:
        """A reward with a weight below zero is a penalty, so less of it is better."""
        rewards = dict(zip(self._reward_metrics(), self.rewards, strict=True))
        reward = rewards.get(name.removeprefix("eval_"))
        if reward is None:
            return super().metric(name)
        return Metric(name, "max" if reward.weight >= 0 else "min")

    def _reward_metrics(self) -> tuple[str, ...]:
        return tuple(f"reward/{reward.name}" for reward in self.rewards)

    def rows_per_step(self, batch_size: int) -> int:
        """Number of prompts in one optimizer step."""
        return max(1, batch_size // self.generations)

    def row_length(self, max_length: int) -> int:
        """Largest number of tokens of a prompt."""
        return max_length - self.max_completion

    @property
    def repeats(self) -> int:
        """Number of `passes` over the same completions."""
        return self.passes

    @property
    def uses_reference(self) -> bool:
        """True if the KL divergence to the reference has a weight above 0."""
        return self.beta > 0

    @property
    def completions_at_once(self) -> int:
        """Completions that the trained model generates in one batch; 0 with vLLM."""
        return self.rollout_batch_size if self.rollout == "transformers" else 0

    @property
    def samples_top_p(self) -> bool:
        """True if top_p leaves tokens out."""
        return self.top_p < 1.0

    @property
    def clip_high(self) -> float:
        """epsilon_high, or epsilon if that is left out: the upper bound of the ratio, minus 1."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def run_facts(self) -> dict[str, Any]:
        """SHA-256 of each file of reward functions."""
        functions = [reward for reward in self.rewards if isinstance(reward, FunctionReward)]
        return {"reward_files": {function.file: function.digest for function in functions}}

    def resolve(self, places: Sequence[Path]) -> Self:
        """The settings with absolute paths, and the text of each reward function."""
        rewards = [
            resolve_reward(reward, places, f"method.rewards.{index}")
            for index, reward in enumerate(self.rewards)
        ]
        return self.model_copy(update={"rewards": rewards})

    @property
    def models(self) -> dict[str, str]:
        """The classifiers among the rewards."""
        return {
            f"method.rewards[{index}].model": reward.model
            for index, reward in enumerate(self.rewards)
            if isinstance(reward, ModelReward)
        }

    def with_models(self, names: Mapping[str, str]) -> Self:
        """The same settings with other names for these classifiers."""
        rewards = [
            reward.model_copy(update={"model": names[key]}) if key in names else reward
            for index, reward in enumerate(self.rewards)
            for key in [f"method.rewards[{index}].model"]
        ]
        return self.model_copy(update={"rewards": rewards})

    @property
    def runs(self) -> dict[str, str]:
        """The finished runs among the rewards."""
        return {
            f"method.rewards[{index}].run": reward.run
            for index, reward in enumerate(self.rewards)
            if isinstance(reward, RunReward)
        }

    @property
    def why_not_shardable(self) -> str | None:
        """Online methods cannot be sharded: every worker generates with the whole model."""
        return (
            f"method {self.kind} samples on every worker, which would gather all weights for every "
            "token; use ddp, with model.quantize nf4 if the model is large"
        )

    def contradiction(
        self, data: DataSettings, optim: OptimSettings, checkpoint: CheckpointSettings
    ) -> str | None:
        """Message about a conflict with batch size, sequence length or checkpoint interval."""
        names = [reward.name for reward in self.rewards]
        batch_size, max_length = optim.batch_size, data.max_length
        if len(set(names)) < len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            return (
                f"method.rewards: two rewards share the name {repeated}; metrics are logged under "
                "it, so give each its own name"
            )
        if batch_size % self.generations:
            return (
                f"optim.batch_size {batch_size} counts completions and must be a multiple of "
                f"method.generations {self.generations}"
            )
        if self.max_completion >= max_length:
            return (
                f"method.max_completion {self.max_completion} leaves no tokens for prompts: both "
                f"share data.max_length {max_length}; lower the one or raise the other"
            )
        if checkpoint.every_steps % self.passes:
            return (
                f"checkpoint.every_steps {checkpoint.every_steps} must be a multiple of "
                f"method.passes {self.passes}: checkpoints do not hold completions"
            )
        return None

    def model_contradiction(self, model: ModelSettings, adapter: LoraAdapter | None) -> str | None:
        """Message about a model that vLLM cannot sample from, if the rollout uses vLLM."""
        return _unfit_for_vllm(model, adapter) if self.rollout == "vllm" else None


def _unfit_for_vllm(model: ModelSettings, adapter: LoraAdapter | None) -> str | None:
    """Why vLLM cannot sample from the trained model; None if it can."""
    if adapter is None and model.adapter is None:
        return (
            "method.rollout vllm needs an adapter, which vLLM loads before every rollout; add the "
            "section adapter, or set method.rollout: transformers"
        )
    unsupported = []
    if adapter is not None:
        names = ("dora", "modules_to_save", "rank_pattern", "alpha_pattern")
        unsupported = [f"adapter.{name}" for name in names if getattr(adapter, name)]
        if adapter.changes_base or adapter.init == "loftq":
            unsupported.append(f"adapter.init {adapter.init}")
    if model.quantize != "none":
        unsupported.append(f"model.quantize {model.quantize}")
    if model.add_tokens:
        unsupported.append("model.add_tokens")
    if unsupported:
        return (
            f"method.rollout: vLLM cannot sample from the trained model: it does not support "
            f"{', '.join(unsupported)}; remove that, or set method.rollout: transformers"
        )
    return None


class GrpoMethod(OnlineMethod):
    title: ClassVar[str] = "Group-relative policy optimisation"

    kind: Literal["grpo"] = "grpo"
    """Samples completions of each prompt and learns from their rewards relative to the group."""
    beta: NotNegative = 0.0
    """Weight of the KL divergence to the reference, the model before its training; 0: none."""
    loss: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = "dapo"
    """What the token losses are averaged over. dapo: the tokens of the batch; grpo: each
    completion's, then the completions; bnpo: the tokens of a forward pass, then the passes (it
    depends on micro_batch_size); dr_grpo: max_completion tokens for every completion."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Advantages are divided by the rewards' standard deviation in a prompt's group, in the whole
    batch, or not at all."""

    @property
    def averages_by_pass(self) -> bool:
        """True for bnpo."""
        return self.loss == "bnpo"


class RlooMethod(OnlineMethod):
    title: ClassVar[str] = "REINFORCE leave-one-out"

    kind: Literal["rloo"] = "rloo"
    """Samples completions of each prompt; the mean reward of the others is the baseline."""
    beta: NotNegative = 0.05
    """Weight of the KL divergence to the reference, subtracted from the reward; 0: none."""
    normalize_advantages: bool = False
    """Normalise the advantages of a batch to mean 0 and standard deviation 1."""


_Variants = Annotated[
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

METHODS: dict[str, type[MethodSettings]] = {
    variant.model_fields["kind"].default: variant for variant in get_args(get_args(_Variants)[0])
}
"""The settings class of each kind."""
ONLINE = frozenset(kind for kind, settings in METHODS.items() if settings.samples_online)
"""Kinds that learn from answers that the model samples while it trains."""

_Name = Annotated[str, Field(json_schema_extra={"enum": list(METHODS)})]
Method = Annotated[_Variants, BeforeValidator(as_method, _Name | _Variants)]
"""A section, or only its kind."""


def title_of(kind: str) -> str:
    """A method's full name; the kind itself if this version of finray does not have the method."""
    return METHODS[kind].title if kind in METHODS else kind
