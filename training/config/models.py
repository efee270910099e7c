"""The settings of a recipe's model, of its adapter, and of what stays frozen without one."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from ..common.formatting import shown
from .section import PositiveInt, Section


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{shown(pattern)} is not a regular expression: {error}; correct it"
        ) from None
    return pattern


Pattern = Annotated[str, AfterValidator(_check_pattern)]
"""A regular expression."""


Head = Literal["causal", "score"]
"""Output of a model: causal for logits of the next token, score for one number per text."""


class ModelSettings(Section):
    """The model to start from, and how it is loaded."""

    base: str
    """Hub id, or a folder (relative to the recipe's folder) as transformers writes it."""
    revision: str | None = None
    """Commit, tag or branch of a hub model."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a model type outside transformers. A hub model
    then needs `revision`, the full hash of a commit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type. auto: bfloat16 where a GPU has it, else float16; float32 on a CPU."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel. auto: packed documents one at a time, and transformers' choice where a
    model's attention cannot be replaced; sdpa and eager take a mask over the whole row."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time. auto: only
    where the run does not fit the GPU without it, by the estimate; decided at its first start."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Keep the frozen base's linear layers in 4 bits (NF4 with double quantisation: QLoRA) or in
    8 (LLM.int8()), through bitsandbytes. Needs an adapter."""
    add_tokens: Literal["auto"] | tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Tokens that get a row of their own in embedding and head, which is trained whole; the
    tokenizer learns those that it lacks. auto: the marks like <|im_start|> that the chat template
    writes and the tokenizer would split. New rows start at the mean of the others."""
    adapter: str | None = None
    """An adapter to start from and to train on: a run's folder, or one that PEFT wrote (relative
    to the recipe's folder, to where the command runs, or to `storage`). Its rank, targets, added
    tokens and so on come with it, instead of the section `adapter`."""

    @property
    def checkpoints(self) -> bool:
        """True if activations are recomputed; `auto` does not, before it is decided."""
        return self.gradient_checkpointing is True

    @field_validator("add_tokens")
    @classmethod
    def _tokens_differ(
        cls, tokens: Literal["auto"] | tuple[str, ...]
    ) -> Literal["auto"] | tuple[str, ...]:
        twice = sorted({token for token in tokens if tokens.count(token) > 1})
        if tokens != "auto" and twice:
            raise ValueError(f"{shown(twice[0])} is listed twice; remove one of them")
        return tokens


class LoraAdapter(Section):
    """A new LoRA adapter, which is trained while the base stays frozen."""

    kind: Literal["lora"] = "lora"
    """Low-rank adaptation, the only kind; dora and rslora below are variants of it."""
    rank: PositiveInt = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the adapter's input."""
    targets: list[str] | Pattern = "all-linear"
    """What gets an adapter: all-linear (every linear layer and every expert, but no router and no
    head), names of modules and of experts' parameters, or a regular expression that a whole name
    must match."""
    experts: bool = True
    """Adapt the experts of a mixture of experts, each with its own matrices of this rank. false
    leaves them out: attention, dense and shared layers alone are adapted."""
    modules_to_save: list[str] = []
    """Modules that are trained whole and saved with the adapter, such as embed_tokens."""
    rank_pattern: dict[Pattern, PositiveInt] = {}
    """Another rank for target modules whose name ends with a match of the pattern."""
    alpha_pattern: dict[Pattern, Annotated[float, Field(gt=0)]] = {}
    """Another alpha for target modules whose name ends with a match of the pattern."""
    dora: bool = False
    """Train the magnitude of the weights apart from their direction (DoRA)."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead (rsLoRA)."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq"] = "default"
    """First values. pissa, olora: the base's principal components or the start of its QR
    decomposition, which leave the base; the result is written as an ordinary adapter of the whole
    base, of twice the rank. loftq: what a quantize: nf4 base has lost."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the adapter's weights. auto: bfloat16 where the model computes in it (the optimizer
    keeps float32 copies), else float32."""

    @property
    def changes_base(self) -> bool:
        """True if the initial values are taken out of the base's weights."""
        return self.init in ("pissa", "olora")

    @model_validator(mode="after")
    def _init_fits(self) -> Self:
        if self.dora and (self.changes_base or self.init == "loftq"):
            raise ValueError(f"dora and init {self.init} contradict each other; keep one of them")
        if self.init == "orthogonal" and any(
            rank % 2 for rank in (self.rank, *self.rank_pattern.values())
        ):
            raise ValueError("init orthogonal needs even ranks; take another rank or init")
        if self.changes_base and self.rslora and (self.rank_pattern or self.alpha_pattern):
            raise ValueError(
                f"init {self.init} with rslora has one rank and one alpha; leave out rank_pattern "
                "and alpha_pattern"
            )
        return self


class FreezeSettings(Section):
    """Selects the base weights to train without an adapter; all others are frozen."""

    last_layers: PositiveInt | None = None
    """Number of last decoder layers to train. Embedding, final norm and head stay frozen, unless
    `train` names them."""
    train: list[Pattern] = []
    """Regular expressions; parameters are trained whose name contains a match, such as lm_head."""

    @model_validator(mode="after")
    def _something_is_trained(self) -> Self:
        if self.last_layers is None and not self.train:
            raise ValueError("nothing is left to train: set last_layers or train")
        return self
