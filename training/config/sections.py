"""The sections of a recipe that do not concern the model, the adapter or the method."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .section import PositiveInt, Section, Share

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]

RowFormat = Literal[
    "auto",
    "preference",
    "labelled",
    "messages",
    "alpaca",
    "sharegpt",
    "prompt_completion",
    "prompt",
    "text",
]


class Source(Section):
    path: str
    """File, glob or folder (relative to the recipe's folder), or a URI: s3://, gs://, hf://."""
    format: RowFormat = "auto"
    """Shape of the rows; auto looks at the first ones."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """How often each row is used: 2 uses each row twice, 0.5 every second row (by its hash)."""


class DataSettings(Section):
    train: Annotated[list[Source], Field(min_length=1)]
    eval: list[Source] = []
    """Held-out data. Instead of it, `holdout` sets a share of the training rows aside."""
    holdout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the training rows held out for evaluation, chosen by their hash."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest sequence, in tokens."""
    overlong: Literal["drop", "truncate"] = "drop"
    """A row longer than max_length is dropped (and counted) or cut at its end. Plain text is
    split into several sequences instead."""
    packing: Literal["auto"] | bool = "auto"
    """Put several documents into one row of max_length tokens, isolated from each other. auto:
    wherever the method takes single documents."""
    chat_template: str | None = None
    """chatml, a Jinja file (relative to the recipe's folder) or inline Jinja; otherwise the
    tokenizer's own template."""
    max_bad_rows: Share = 0.01
    """Largest share of unreadable rows; above it the run stops. Bad rows go to quarantine."""

    @model_validator(mode="after")
    def _one_source_of_evaluation(self) -> Self:
        if self.eval and self.holdout > 0:
            raise ValueError("eval and holdout contradict each other; keep one of them")
        return self


class OptimSettings(Section):
    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-4
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    """Passes over the training sequences; 1 where neither epochs nor max_steps is given."""
    max_steps: PositiveInt | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: PositiveInt = 32
    """Sequences in one optimizer step, over all workers."""
    micro_batch_size: PositiveInt = 4
    """Sequences in one forward pass of one worker."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: Share = 0.03
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Gradients are clipped to this norm; 0 does not clip."""
    max_skipped_steps: PositiveInt = 3
    """A step whose loss or gradient is not finite changes nothing. After this many in a row the run
    goes back to its last checkpoint; if they fail again, it ends."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    lora_plus_ratio: Annotated[float, Field(gt=0.0)] | None = None
    """Learning rate of an adapter's B matrices, as a multiple of learning_rate (LoRA+; 16 is
    usual)."""

    @model_validator(mode="after")
    def _one_duration(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps contradict each other; keep one of them")
        return self


class ScaleSettings(Section):
    workers: Annotated[int, Field(ge=0)] | tuple[PositiveInt, PositiveInt] = 1
    """On a cluster Ray Train's workers, else processes of this machine; 0 trains in this process.
    [2, 8]: as many as fit, at least 2 and at most 8. After the loss of a node the run
    goes on with fewer, and grows again when there is room; batch_size and the order of the data
    stay."""
    gpus_per_worker: Literal["auto"] | Annotated[float, Field(ge=0.0)] = "auto"
    """auto: one where there are GPUs, none where there are not."""
    cpus_per_worker: PositiveInt = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: every worker holds the whole model. fsdp: a shard of every weight, of its gradient and
    of its optimizer state (FSDP2), gathered layer by layer while it computes. auto: ddp where one
    GPU holds weights, gradients and optimizer states, else fsdp. Checkpoints are the same."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts from the last good checkpoint after failures, without a new checkpoint between
    them. Nodes that leave with notice and nodes that join do not count."""
    node_wait: Annotated[float, Field(ge=0)] = 600.0
    """Seconds to wait for nodes when the remaining ones cannot hold the workers."""
    hang_timeout: Literal["auto"] | Annotated[float, Field(gt=0.0)] | None = "auto"
    """Seconds after which a worker whose optimizer step does not end writes its stacks and
    exits. auto: ten times the longest of the last steps, at least 300; null: never."""

    @model_validator(mode="after")
    def _range_is_in_order(self) -> Self:
        if self.least_workers > self.most_workers:
            raise ValueError(f"workers: [{self.least_workers}, {self.most_workers}] is reversed")
        return self

    @property
    def least_workers(self) -> int:
        """Smallest number of workers that the run trains with."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def most_workers(self) -> int:
        """Largest number of workers that the run trains with; 0: in this process."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers


class CheckpointSettings(Section):
    every_steps: PositiveInt = 100
    keep: PositiveInt = 2
    """Number of latest checkpoints to keep, in addition to the best one on held-out data."""


class EvalSettings(Section):
    every_steps: PositiveInt | None = None
    """Steps between measurements of the held-out loss, which is always measured at the end."""
    samples: Annotated[int, Field(ge=0)] = 0
    """Held-out prompts answered greedily before and after training: exact match, and samples
    for the report."""
    max_new_tokens: PositiveInt = 128
    """Longest answer, in tokens."""


class LogSettings(Section):
    every_steps: PositiveInt = 10
    to: list[Literal["tensorboard"]] = ["tensorboard"]
