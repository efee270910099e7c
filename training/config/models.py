"""The settings of a recipe's model, of its adapter, and of what stays frozen without one."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from .section import PositiveInt, Section


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_check_pattern)]
"""A regular expression."""


Head = Literal["causal", "score"]
"""Output of a model: causal for logits of the next token, score for one number per text."""


class ModelSettings(Section):
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
    """Attention kernel; auto lets transformers choose."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Keep the frozen base's linear layers in 4 bits (NF4 with double quantisation: QLoRA) or in
    8 (LLM.int8()), through bitsandbytes. Needs an adapter."""
    adapter: str | None = None
    """An adapter to start from and to train on: a run's folder, or one that PEFT wrote (relative
    to the recipe's folder, to where the command runs, or to `storage`). Its rank, targets and so
    on come with it, instead of the section `adapter`."""


class LoraAdapter(Section):
    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the adapter's input."""
    targets: list[str] | Pattern = "all-linear"
    """Modules that get an adapter: all-linear (every linear layer but the head), names of
    modules, or a regular expression that a module's whole name must match."""
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
            raise ValueError("init orthogonal needs even ranks")
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
