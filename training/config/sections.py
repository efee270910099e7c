"""The sections of a recipe that do not concern the model, the adapter or the method."""

import re
from collections.abc import Callable, Sequence
from datetime import date
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ..common.formatting import shown
from .curation import (
    DecontaminateStage,
    DeduplicateStage,
    HoldoutSettings,
    MixSettings,
    ScoreStage,
    Stages,
)
from .eval_metrics import MetricChoice
from .section import MOST, PositiveInt, Section, Share
from .short_forms import as_sources
from .source import Source
from .trackers import TrackerName

TEMPLATE_DATE = date(2026, 1, 1)
"""The day on which chat templates are rendered that read the clock."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

_TAG = re.compile(r"[A-Za-z0-9._:/+-]{1,40}")

RESERVED_NAMES = frozenset({"prepared"})
"""Folders that finray itself keeps in a storage, beside those of runs and sweeps."""


def _check_name(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise ValueError(
            "expected at most 63 letters, digits, '.', '_' and '-', the first a letter or digit; "
            f"found {shown(name)}"
        )
    if name.lower() in RESERVED_NAMES:
        raise ValueError(
            f"{name} is the folder where finray keeps prepared data in a storage; choose another"
        )
    return name


Name = Annotated[
    str, AfterValidator(_check_name), Field(json_schema_extra={"pattern": f"^{_NAME.pattern}$"})
]


def check_tag(tag: str) -> str:
    """The tag as it is.

    Raises:
        ValueError: it has more than 40 characters, or others than letters, digits and ._:/+-.
    """
    if _TAG.fullmatch(tag) is None:
        raise ValueError(
            f"expected a tag of at most 40 letters, digits and ._:/+-, found {shown(tag)}"
        )
    return tag


Tag = Annotated[
    str, AfterValidator(check_tag), Field(json_schema_extra={"pattern": f"^{_TAG.pattern}$"})
]


def _check_day(day: str) -> str:
    try:
        return date.fromisoformat(day).isoformat()
    except ValueError:
        raise ValueError(f"expected a day such as 2026-01-31; found {shown(day)}") from None


ANSWERS_AT_ONCE = 32
"""Answers to held-out prompts that a worker generates in one batch."""

Isolation = Literal["documents", "positions", "mask", "borders"]
"""How a model keeps packed documents apart: its attention computes each by itself; by positions
that restart; by a block mask; or by the documents' borders, which its kernels take."""
FLAT: tuple[Isolation | None, ...] = ("documents", "borders")
"""The ways in which a microbatch is a single row without padding, whatever its texts are."""

Day = Annotated[str, AfterValidator(_check_day)]


class DataSettings(Section):
    """The rows to learn from, and how they become sequences of tokens."""

    train: Annotated[
        list[Source],
        Field(min_length=1),
        BeforeValidator(
            as_sources, str | Source | Annotated[list[Source | str], Field(min_length=1)]
        ),
    ]
    """A list of sources; a file alone is a source too."""
    eval: Annotated[
        list[Source], BeforeValidator(as_sources, str | Source | list[Source | str])
    ] = []
    """Held-out data. {split: test} is that split of the training data. Instead of it, `holdout`
    sets a share of the training rows aside."""
    holdout: Annotated[float, Field(ge=0.0, lt=1.0)] | HoldoutSettings = 0.0
    """Share of the training rows held out for evaluation, chosen by their hash; or a section, with
    which related rows stay on one side."""
    curate: Stages = []
    """Stages that the training rows go through, in this order, before they are tokenised. Those
    without settings may be written by name: [normalise, deduplicate]."""
    mix: MixSettings | None = None
    """Weights of the sources by their sizes, instead of their own weights."""
    prepare: Literal["ahead", "streaming"] = "ahead"
    """ahead: all rows become sequences before the first step. streaming: a window of rows after the
    other, while the run trains; only a few windows are in the storage at any time, and the number
    of steps (optim.max_steps) has to be given."""
    max_length: Annotated[int, Field(ge=8, le=MOST)] = 2048
    """Longest sequence, in tokens."""
    overlong: Literal["drop", "truncate", "truncate_left", "split"] = "drop"
    """A row longer than max_length is dropped (and counted), cut at its end (truncate) or at its
    beginning (truncate_left), or split into several sequences, as plain text always is. Prompts
    for a model to answer are dropped or lose their beginning."""
    packing: Literal["auto"] | bool = "auto"
    """Put several documents into one row of max_length tokens, isolated from each other. auto:
    wherever the method takes single documents and the model keeps them apart, which is rehearsed
    on a small copy of it."""
    chat_template: str | None = None
    """chatml, a Jinja file (relative to the recipe's folder) or inline Jinja; otherwise the
    tokenizer's own template."""
    template: Literal["own", "training"] = "own"
    """own: what is learnt is what the model will have to write after its own template's prompt;
    where a template renders earlier answers differently, each answer is an example of its own.
    training: TRL's training template for the model's family makes a conversation one example."""
    date: Day = TEMPLATE_DATE.isoformat()
    """The day that a chat template sees which reads the clock, so that rows stay the same."""
    max_bad_rows: Share = 0.01
    """Largest share of unreadable rows; above it the run stops. Bad rows go to quarantine."""
    max_row_bytes: Annotated[int, Field(ge=1024)] = 16 * 2**20
    """A larger row goes to quarantine, too: it would cost twenty times its size of memory."""

    @model_validator(mode="after")
    def _one_source_of_evaluation(self) -> Self:
        if self.eval and self.holds_out:
            raise ValueError("eval and holdout contradict each other; keep one of them")
        for index, source in enumerate(self.train):
            if not source.place:
                raise ValueError(f"train.{index} needs a path or a dataset; add one")
        return self

    @model_validator(mode="after")
    def _curation_agrees(self) -> Self:
        weighted = [n for n, source in enumerate(self.train) if source.weight != 1.0]
        if self.mix is not None and weighted:
            raise ValueError(
                f"mix contradicts train.{weighted[0]}.weight, which it would replace; keep one of "
                "them"
            )
        for number, stage in enumerate(self.curate):
            if not isinstance(stage, DecontaminateStage):
                continue
            if not (stage.against or self.eval):
                raise ValueError(
                    f"curate.{number}.against: there is no evaluation data to compare with; name "
                    "some here, or in data.eval"
                )
            for index, source in enumerate(stage.against):
                if not source.place:
                    raise ValueError(
                        f"curate.{number}.against.{index} needs a path or a dataset; add one"
                    )
        return self

    def with_sources(self, change: Callable[[str, Source], Source]) -> Self:
        """The same settings with each source changed: those for training and for evaluation, and
        those that stages compare with.

        Args:
            change: is given the source's key in the recipe, and the source.
        """
        stages = [
            stage.model_copy(
                update={"against": _changed(stage.against, f"data.curate.{n}.against", change)}
            )
            if isinstance(stage, DecontaminateStage)
            else stage
            for n, stage in enumerate(self.curate)
        ]
        changed: dict[str, object] = {
            "train": _changed(self.train, "data.train", change),
            "eval": _changed(self.eval, "data.eval", change),
        }
        # What is not set stays so.
        return self.model_copy(update={**changed, "curate": stages} if stages else changed)

    @property
    def sources(self) -> list[tuple[str, Source]]:
        """(key in the recipe, source) of every source."""
        sources: list[tuple[str, Source]] = []

        def note(key: str, source: Source) -> Source:
            sources.append((key, source))
            return source

        self.with_sources(note)
        return sources

    @property
    def streams(self) -> bool:
        """True if the rows are prepared while the run trains."""
        return self.prepare == "streaming"

    @property
    def why_not_streaming(self) -> str | None:
        """Which setting needs all rows at once, with its key; None if none does."""
        for number, stage in enumerate(self.curate):
            if isinstance(stage, DeduplicateStage):
                return (
                    f"data.curate.{number} deduplicate compares all rows, which data.prepare "
                    "streaming never has together; remove the stage, or prepare ahead"
                )
            if isinstance(stage, ScoreStage) and stage.keep_top is not None:
                return (
                    f"data.curate.{number}.keep_top compares all rows, which data.prepare "
                    "streaming never has together; set min, a score, or prepare ahead"
                )
            if isinstance(stage, ScoreStage) and stage.run is not None:
                return (
                    f"data.curate.{number}.run takes a GPU, which data.prepare streaming leaves to "
                    "the training; score with a function, or prepare ahead"
                )
        if self.mix is not None:
            return (
                "data.mix counts all rows, which data.prepare streaming never has together; write "
                "a weight at each source instead, or prepare ahead"
            )
        if not isinstance(self.holdout, float):
            return (
                "data.holdout groups all rows, which data.prepare streaming never has together; "
                "give a share alone or data.eval, or prepare ahead"
            )
        return None

    @property
    def held_out_share(self) -> float:
        """Share of the training rows, or of their groups, that is held out."""
        return self.holdout if isinstance(self.holdout, float) else self.holdout.share

    @property
    def grouped_by(self) -> str | None:
        """The column whose equal values keep rows on one side of a holdout."""
        return None if isinstance(self.holdout, float) else self.holdout.group_by

    @property
    def holds_out(self) -> bool:
        """True if a share of the training rows is held out."""
        return self.held_out_share > 0

    @property
    def is_curated(self) -> bool:
        """True if training rows go through stages before they are tokenised."""
        return bool(self.curate) or self.mix is not None or not isinstance(self.holdout, float)


_USUAL_MICROBATCH = 4
_RAY_RESOURCES = frozenset({"CPU", "GPU", "memory", "object_store_memory", "TPU"})


def _changed(
    sources: Sequence[Source], key: str, change: Callable[[str, Source], Source]
) -> list[Source]:
    return [change(f"{key}.{n}", source) for n, source in enumerate(sources)]


class OptimSettings(Section):
    """The optimizer (AdamW), its learning rate, and how long it trains."""

    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-4
    """Largest learning rate of the schedule, which is reached after the warm-up."""
    epochs: Annotated[float, Field(gt=0.0, le=1e6)] | None = None
    """Passes over the training sequences; 1 where neither epochs nor max_steps is given."""
    max_steps: PositiveInt | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: PositiveInt = 32
    """Sequences in one optimizer step, over all workers."""
    micro_batch_size: Literal["auto"] | PositiveInt | None = None
    """Rows in one forward pass of one worker: sequences, pairs, completions; 4 where
    micro_batch_tokens is absent too. auto: as many as the GPU holds by the estimate of its memory,
    decided when the run first starts; without a GPU 4."""
    micro_batch_tokens: PositiveInt | None = None
    """Tokens in one forward pass of one worker, instead of a number of rows: short rows share a
    pass, and long ones do not exceed the memory. At least those of a row of full length. The steps
    stay the same: batch_size counts their rows."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, or down to zero at the last step, in a straight
    line or along half a cosine."""
    warmup_ratio: Share = 0.03
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay of AdamW: a step takes learning_rate times this share off a weight."""
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Gradients are clipped to this norm; 0 does not clip."""
    max_skipped_steps: PositiveInt = 3
    """A step whose loss or gradient is not finite changes nothing. After this many in a row the run
    goes back to its last checkpoint; if they fail again, it ends."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay per step of AdamW's mean of the gradients."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Decay per step of AdamW's mean of the squared gradients."""
    lora_plus_ratio: Annotated[float, Field(gt=0.0)] | None = None
    """Learning rate of an adapter's B matrices, as a multiple of learning_rate (LoRA+; 16 is
    usual)."""

    @property
    def microbatch(self) -> int:
        """`micro_batch_size`; what `auto` is without a GPU, before it is decided."""
        if self.micro_batch_size == "auto":
            return min(_USUAL_MICROBATCH, self.batch_size)
        return self.micro_batch_size or _USUAL_MICROBATCH

    @model_validator(mode="after")
    def _one_microbatch(self) -> Self:
        if self.micro_batch_tokens is not None and self.micro_batch_size is not None:
            raise ValueError(
                "micro_batch_tokens and micro_batch_size contradict each other; keep one, and set "
                "the other to null"
            )
        return self

    @model_validator(mode="after")
    def _one_duration(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(
                "epochs and max_steps contradict each other; keep one, and set the other to null"
            )
        return self


class PrepareSettings(Section):
    """Where on a cluster large data is prepared, before workers take GPUs."""

    cpus: PositiveInt | None = None
    """Most CPU cores that prepare at once. Absent: all that are free."""
    resources: dict[str, Annotated[float, Field(gt=0.0)]] = {}
    """Custom resources that each task asks for, as in {cpu_node: 0.001}: where nodes without GPUs
    have cpu_node, the others prepare nothing."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.cpus is None and not self.resources:
            raise ValueError("prepare needs cpus or resources; add one of them, or remove it")
        if named := _RAY_RESOURCES.intersection(self.resources):
            raise ValueError(
                f"resources: {min(named)} is Ray's own; name a custom resource, with which the "
                "nodes that prepare are started"
            )
        return self


Strategy = Literal["ddp", "fsdp"]


class ScaleSettings(Section):
    """How many workers train, with what each, and what happens when some fail."""

    workers: Annotated[int, Field(ge=0)] | tuple[PositiveInt, PositiveInt] = 1
    """On a cluster Ray Train's workers, else processes of this machine; 0 trains in this process.
    [2, 8]: as many as fit, at least 2 and at most 8. After the loss of a node the run
    continues with fewer, and grows again when there is room; batch_size and the order of the data
    stay."""
    gpus_per_worker: Literal["auto"] | Annotated[float, Field(ge=0.0)] = "auto"
    """auto: one where there are GPUs, none where there are not. A worker trains on one GPU; a part
    of one (0.5) lets several trials of one worker each share it."""
    cpus_per_worker: PositiveInt = 1
    """CPU cores that a worker reserves on a cluster."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: every worker holds the whole model. fsdp: a shard of every weight, of its gradient and
    of its optimizer state (FSDP2), gathered layer by layer while it computes. auto: ddp where one
    GPU holds weights, gradients and optimizer states, else fsdp. Checkpoints are the same."""
    prepare: PrepareSettings | None = None
    """Bounds of the preparation of large data on a cluster. Absent: all free CPUs of all nodes."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts from the last good checkpoint after failures, without a new checkpoint between
    them. Nodes that leave with notice and nodes that join do not count."""
    node_wait: Annotated[float, Field(ge=0)] = 600.0
    """Seconds to wait for nodes when the remaining ones cannot hold the workers."""
    hang_timeout: Literal["auto"] | Annotated[float, Field(gt=0.0)] | None = "auto"
    """Seconds after which an optimizer step that does not end counts as a hang: the workers write
    their stacks, end, and start again from the last checkpoint. auto: ten times the longest of the
    last steps, at least 300; null: never. Other phases may take a multiple of it: the first step,
    a step's rollouts, and the workers' meeting 6 times as long, loading the libraries 8 times, an
    evaluation (between two batches) and a save 12 times, loading model and data 24 times."""

    @model_validator(mode="after")
    def _range_is_in_order(self) -> Self:
        if self.least_workers > self.most_workers:
            raise ValueError(
                f"workers: [{self.least_workers}, {self.most_workers}] is reversed; write the "
                "smaller number first"
            )
        if self.prepare is not None and self.most_workers == 0:
            raise ValueError(
                "prepare bounds tasks on Ray, and with workers 0 this process prepares the data; "
                "remove prepare"
            )
        return self

    @model_validator(mode="after")
    def _one_gpu_for_each_worker(self) -> Self:
        gpus = self.gpus_per_worker
        if gpus == "auto":
            return self
        if gpus > 1:
            raise ValueError(
                f"gpus_per_worker: {gpus:g}, but a worker trains on one GPU and the others would "
                "lie idle; set 1, and scale.workers to the number of GPUs"
            )
        if 0 < gpus < 1 and self.most_workers > 1:
            raise ValueError(
                f"gpus_per_worker: {gpus:g} puts two of {self.most_workers} workers on one GPU, "
                "which NCCL refuses; set 1, or scale.workers to 1"
            )
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
    """When the state of the run is saved, and how much of it is kept."""

    every_steps: PositiveInt = 100
    """Optimizer steps between two checkpoints; a crash repeats at most as many."""
    keep: PositiveInt = 2
    """Number of latest checkpoints to keep, in addition to the best one on held-out data."""


class EvalSettings(Section):
    """What is measured on held-out data."""

    every_steps: PositiveInt | None = None
    """Steps between measurements of the held-out loss, which is always measured at the end."""
    samples: Annotated[int, Field(ge=0)] = 0
    """Held-out prompts answered greedily before and after training: exact match, and samples
    for the report."""
    max_new_tokens: PositiveInt = 128
    """Longest answer, in tokens."""
    metrics: list[MetricChoice] = []
    """Metrics of the answers to the prompts of `samples`, at each measurement of the loss: names
    such as exact_match, and your own functions as {file: "score.py:json_valid"}. They are logged
    as eval_exact_match, …"""
    watch: str | None = None
    """The metric that decides which checkpoint is the best: eval_loss, or one of `metrics` such as
    eval_exact_match. Absent: the method's own."""
    patience: PositiveInt | None = None
    """Measurements in a row without a better value of the watched metric (the held-out loss, or the
    method's own) after which the run ends early. Absent: it trains to its last step."""

    @model_validator(mode="after")
    def _patience_counts_measurements(self) -> Self:
        if self.patience is not None and self.every_steps is None:
            raise ValueError("patience: it counts measurements; set eval.every_steps, too")
        return self


class LogSettings(Section):
    """How often metrics are written, and where to."""

    every_steps: PositiveInt = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    to: list[TrackerName] = ["tensorboard"]
    """Where metrics go beside metrics.jsonl: files of TensorBoard, and servers of Weights & Biases,
    MLflow and Trackio, through their own packages and environment variables."""
    tags: list[Tag] = []
    """Words by which `finray runs --tag` selects runs: at most 40 letters, digits and ._:/+-."""
