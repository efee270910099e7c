"""The recipe: everything a run is, validated and frozen before anything heavy is imported.

`load_recipe` reads a YAML file and `key=value` overrides; `Recipe` is what the rest of finray
receives. The docstring under a field is that field's documentation in `finray schema`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ..common.errors import InputError
from ..common.secrets import secret_places
from .adapter_folder import find_adapter
from .methods import DpoMethod, KtoMethod, Method, OnlineMethod, PretrainMethod, SftMethod
from .models import FreezeSettings, LoraAdapter, ModelSettings
from .paths import resolve_model, resolve_path
from .reference_folder import find_reference
from .remote_code import check_pinned
from .rewards import resolve_reward
from .section import PositiveInt, Section, Share
from .sharding_rules import cannot_shard
from .yaml_file import Change, Document, read_recipe_file, validate

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
    """How often each row is taken: 2 takes each twice, 0.5 every other one (by its hash)."""


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
    """A step whose loss or gradient is not finite changes nothing. So many of them in a row send
    the run back to its last checkpoint, and end it where they fail again."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    lora_plus_ratio: Annotated[float, Field(gt=0.0)] | None = None
    """An adapter's B matrices learn at so many times the learning rate (LoRA+; 16 is usual)."""

    @model_validator(mode="after")
    def _one_duration(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps contradict each other; keep one of them")
        return self


class ScaleSettings(Section):
    workers: Annotated[int, Field(ge=0)] | tuple[PositiveInt, PositiveInt] = 1
    """On a cluster Ray Train's workers, else processes of this machine; 0 trains in this process.
    [2, 8]: as many as there is room for, at least 2 and at most 8. After the loss of a node the run
    goes on with fewer, and grows again when there is room; batch_size and the order of the data
    stay."""
    gpus_per_worker: Literal["auto"] | Annotated[float, Field(ge=0.0)] = "auto"
    """auto: one where there are GPUs, none where there are not."""
    cpus_per_worker: PositiveInt = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: every worker holds the whole model. fsdp: a shard of every weight, of its gradient and
    of its optimizer state (FSDP2), gathered layer by layer while it computes. auto: ddp where one
    GPU holds all that lies there all the time, else fsdp. Checkpoints are the same."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts from the last good checkpoint after a failure, without a new checkpoint between
    them. Nodes that are taken away with notice, and those that come, do not count."""
    node_wait: Annotated[float, Field(ge=0)] = 600.0
    """Seconds that a run waits for nodes, where those that are left do not hold its workers."""
    hang_timeout: Literal["auto"] | Annotated[float, Field(gt=0.0)] | None = "auto"
    """Seconds after which a worker whose optimizer step does not end writes its stacks and gives
    up. auto: ten times the longest of the last steps, at least 300; null: never."""

    @model_validator(mode="after")
    def _range_is_in_order(self) -> Self:
        if self.least_workers > self.most_workers:
            raise ValueError(f"workers: [{self.least_workers}, {self.most_workers}] is reversed")
        return self

    @property
    def least_workers(self) -> int:
        """The run does not train with fewer."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def most_workers(self) -> int:
        """The run does not train with more; 0: in this process."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers


class CheckpointSettings(Section):
    every_steps: PositiveInt = 100
    keep: PositiveInt = 2
    """Checkpoints kept: the last so many, and the one that is best on held-out data."""


class EvalSettings(Section):
    every_steps: PositiveInt | None = None
    """Held-out loss every so many steps; it is always measured at the end."""
    samples: Annotated[int, Field(ge=0)] = 0
    """Held-out prompts answered greedily before and after training: exact match, and samples
    for the report."""
    max_new_tokens: PositiveInt = 128
    """Longest answer, in tokens."""


class LogSettings(Section):
    every_steps: PositiveInt = 10
    to: list[Literal["tensorboard"]] = ["tensorboard"]


class Recipe(Section):
    """One run, from the data to the result."""

    name: Name
    """The run's name: letters, digits, '.', '_' and '-', at most 63. Its folder is
    <storage>/<name>."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: ModelSettings
    adapter: LoraAdapter | None = None
    """Absent (and without model.adapter): the base's own weights are trained."""
    freeze: FreezeSettings | None = None
    """Absent, and without an adapter: full fine-tuning."""
    method: Method = SftMethod()
    data: DataSettings
    optim: OptimSettings = OptimSettings()
    scale: ScaleSettings = ScaleSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    eval: EvalSettings = EvalSettings()
    log: LogSettings = LogSettings()
    storage: str = "runs"
    """Folder (relative to where the command runs) or a URI that all nodes reach."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        held_out = bool(self.data.eval) or self.data.holdout > 0
        if self.eval.every_steps is not None and not held_out:
            raise ValueError("eval.every_steps needs held-out data: set data.eval or data.holdout")
        if self.eval.samples > 0 and not held_out:
            raise ValueError("eval.samples needs held-out data: set data.eval or data.holdout")
        kind = self.method.kind
        if (told := self.method.contradiction(self)) is not None:
            raise ValueError(told)
        if self.eval.samples > 0 and not self.method.has_answers:
            raise ValueError(
                f"eval.samples needs prompts with answers, which method {kind} does not have"
            )
        if self.data.packing is True and not self.method.packs:
            raise ValueError(
                f"data.packing: method {kind} does not take single documents, which alone can "
                "be packed; leave it out"
            )
        if self.optim.micro_batch_size > self.optim.batch_size:
            raise ValueError(
                f"optim.micro_batch_size {self.optim.micro_batch_size} is larger than "
                f"optim.batch_size {self.optim.batch_size}"
            )
        if self.scale.most_workers > self.rows_per_step:
            raise ValueError(
                f"scale.workers {self.scale.most_workers} is larger than the "
                f"{self.rows_per_step} rows that a step of optim.batch_size "
                f"{self.optim.batch_size} takes: some workers would have nothing to do"
            )
        return self

    @model_validator(mode="after")
    def _trained_weights_agree(self) -> Self:
        quantize = self.model.quantize
        init = "default" if self.adapter is None else self.adapter.init
        starts_at_random = isinstance(self.method, PretrainMethod) and self.method.init == "random"
        own = "full fine-tuning" if self.freeze is None else "freeze"
        contradictions = {
            "adapter and model.adapter contradict each other: the latter brings its own rank": (
                self.adapter is not None and self.model.adapter is not None
            ),
            "freeze contradicts an adapter, beside which the whole base is frozen": (
                self.freeze is not None and self.trains_adapter
            ),
            f"model.quantize {quantize} contradicts {own}: quantised weights are not trained; add "
            "the section adapter, or leave out quantize": (
                quantize != "none" and not self.trains_adapter
            ),
            "method.init random contradicts an adapter on frozen weights": (
                starts_at_random and self.trains_adapter
            ),
            "method.init random contradicts freeze, which keeps weights as they are": (
                starts_at_random and self.freeze is not None
            ),
            "adapter.init loftq needs model.quantize nf4, whose loss it makes up for": (
                init == "loftq" and quantize != "nf4"
            ),
            f"adapter.init {init} contradicts model.quantize {quantize}; keep one of them, or take "
            "init loftq": init in ("pissa", "olora", "orthogonal") and quantize != "none",
            "optim.lora_plus_ratio needs an adapter": (
                self.optim.lora_plus_ratio is not None and not self.trains_adapter
            ),
        }
        for told, holds in contradictions.items():
            if holds:
                raise ValueError(told)
        return self

    @model_validator(mode="after")
    def _strategy_agrees(self) -> Self:
        if self.scale.strategy != "fsdp":
            return self
        if self.scale.most_workers < 2:
            raise ValueError(
                "scale.strategy fsdp shares the weights out among workers, and scale.workers is "
                f"{self.scale.most_workers}; set 2 or more, or leave strategy out"
            )
        if (told := cannot_shard(self)) is not None:
            raise ValueError(f"scale.strategy fsdp: {told}")
        return self

    @property
    def trains_adapter(self) -> bool:
        """Whether an adapter is trained, a new or an existing one, and not the base itself."""
        return self.adapter is not None or self.model.adapter is not None

    @property
    def adapter_kind(self) -> Literal["lora", "dora", "existing"] | None:
        """What kind of adapter is trained, if any."""
        if self.adapter is None:
            return None if self.model.adapter is None else "existing"
        return "dora" if self.adapter.dora else "lora"

    @property
    def packs(self) -> bool:
        """Whether several documents share a sequence."""
        return self.method.packs if self.data.packing == "auto" else self.data.packing

    @property
    def rows_per_step(self) -> int:
        """Rows of the stream (sequences, pairs, prompts) that an optimizer step learns from."""
        return self.method.rows_per_step(self.optim.batch_size)

    @property
    def row_length(self) -> int:
        """Tokens that a text of the data may have."""
        return self.method.row_length(self.data.max_length)

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of the run over `rows` training rows.

        Every row is seen at least `optim.epochs` times: a last batch that an epoch does not fill
        is topped up from the next epoch's order.
        """
        if self.optim.max_steps is not None:
            return self.optim.max_steps
        epochs = 1.0 if self.optim.epochs is None else self.optim.epochs
        batches = max(1, math.ceil(round(epochs * rows, 6) / self.rows_per_step))
        return batches * self.method.repeats

    def epoch_at(self, step: int, rows: int) -> float:
        """Passes over `rows` training rows after an optimizer step."""
        return round(step / self.method.repeats * self.rows_per_step / rows, 4)


def load_recipe(path: Path, overrides: Sequence[str | Change] = ()) -> Recipe:
    """Read, override and validate a recipe; its input paths become absolute.

    Args:
        path: the YAML file.
        overrides: changes, or `dotted.key=value` strings; their value is parsed as YAML.

    Raises:
        InputError: with file:line and key of every fault found, and for a secret in a setting.
    """
    document = read_recipe_file(path, overrides)
    check_no_secret(document)
    recipe = validate(Recipe, document)
    return resolve_recipe(recipe, path.resolve().parent)


def check_no_secret(document: Document) -> None:
    """A run's folder and a job's metadata hold the recipe, for all who reach them."""
    lines = [
        f"{document.place(key)}: {'.'.join(map(str, key))}: holds a secret, which would be kept "
        "with the run; take it out, and set it in the environment instead (HF_TOKEN, "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; on Kubernetes the Secret finray-credentials)"
        for key in secret_places(document.values)
    ]
    if lines:
        raise InputError("\n".join(lines))


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """Rebuild a recipe that `Recipe.model_dump` wrote (run folders, workers)."""
    return Recipe.model_validate(values)


def resolve_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """Make a recipe from a folder independent of the current one: Ray's workers run elsewhere."""

    def absolute(source: Source) -> Source:
        return source.model_copy(update={"path": resolve_path(source.path, folder)})

    data = recipe.data.model_copy(
        update={
            "train": [absolute(source) for source in recipe.data.train],
            "eval": [absolute(source) for source in recipe.data.eval],
            "chat_template": _read_template(recipe.data.chat_template, folder),
        }
    )
    base = resolve_model(recipe.model.base, folder)
    check_pinned(recipe.model.model_copy(update={"base": base}))
    storage = resolve_path(recipe.storage, Path.cwd())
    places = (folder, Path.cwd(), Path(storage))
    adapter = recipe.model.adapter
    if adapter is not None:
        adapter = find_adapter([resolve_path(adapter, place) for place in places])
    method = recipe.method
    if isinstance(method, DpoMethod | KtoMethod) and method.reference_model is not None:
        name = method.reference_model
        found = find_reference(name, [resolve_path(name, place) for place in places])
        method = method.model_copy(update={"reference_model": found})
    if isinstance(method, OnlineMethod):
        rewards = [
            resolve_reward(reward, places, f"method.rewards[{index}]")
            for index, reward in enumerate(method.rewards)
        ]
        method = method.model_copy(update={"rewards": rewards})
    return recipe.model_copy(
        update={
            "data": data,
            "method": method,
            "model": recipe.model.model_copy(update={"base": base, "adapter": adapter}),
            "storage": storage,
        }
    )


def _read_template(template: str | None, folder: Path) -> str | None:
    """Inline Jinja and the name chatml stay; a file is read, so that it travels with the recipe."""
    if template is None or template == "chatml" or "{" in template:
        return template
    file = Path(resolve_path(template, folder))
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data.chat_template: cannot read {file}: {error}; give 'chatml', the path of a "
            "Jinja file, or inline Jinja"
        ) from None
