"""The methods' settings: a variant for each kind, and what the rest must know of it early."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from .reward_settings import Reward
from .section import PositiveInt, Section

if TYPE_CHECKING:
    from .recipe import Recipe


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

    def row_length(self, max_length: int) -> int:
        """Tokens that a text of the data may have, where a sequence has at most `max_length`."""
        return max_length

    @property
    def repeats(self) -> int:
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


class DpoMethod(MethodSettings):
    texts: ClassVar[int] = 2
    has_answers: ClassVar[bool] = True

    kind: Literal["dpo"] = "dpo"
    beta: Annotated[float, Field(gt=0.0)] = 0.1
    """How strongly the policy is held to the reference."""


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
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample from the likeliest tokens whose probabilities reach this sum."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from so many likeliest tokens; 0: from all."""
    epsilon: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """The ratio to the policy that sampled is clipped to [1 - epsilon, 1 + epsilon_high]."""
    epsilon_high: Annotated[float, Field(gt=0.0)] | None = None
    """epsilon where it is left out."""
    passes: PositiveInt = 1
    """Optimizer steps on the same completions."""
    rollout: Literal["transformers", "vllm"] = "transformers"
    """What generates the completions; vllm needs a GPU and the extra finray[vllm]."""
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

    def contradiction(self, recipe: "Recipe") -> str | None:
        """Completions that do not fit their batch, their sequence or their checkpoint."""
        names = [reward.name for reward in self.rewards]
        batch_size, max_length = recipe.optim.batch_size, recipe.data.max_length
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
        if recipe.checkpoint.every_steps % self.passes:
            return (
                f"checkpoint.every_steps {recipe.checkpoint.every_steps} must be a multiple of "
                f"method.passes {self.passes}: completions are not kept in a checkpoint"
            )
        if self.rollout == "vllm" and not recipe.trains_adapter:
            return (
                "method.rollout vllm needs an adapter, which is what vLLM is handed before every "
                "rollout; add the section adapter, or set method.rollout: transformers"
            )
        return None


class GrpoMethod(OnlineMethod):
    kind: Literal["grpo"] = "grpo"
    beta: Annotated[float, Field(ge=0.0)] = 0.0
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
    beta: Annotated[float, Field(ge=0.0)] = 0.05
    """Weight of the KL divergence to the reference, which is taken off the reward; 0: none."""
    normalize_advantages: bool = False
    """Advantages of a batch are brought to mean 0 and standard deviation 1."""


Method = Annotated[
    SftMethod | PretrainMethod | DpoMethod | GrpoMethod | RlooMethod,
    Field(discriminator="kind"),
]

__all__ = [
    "DpoMethod",
    "GrpoMethod",
    "Method",
    "MethodSettings",
    "OnlineMethod",
    "PositiveInt",
    "PretrainMethod",
    "RlooMethod",
    "SftMethod",
]
