"""The recipe: all settings of a run, validated and frozen before anything heavy is imported.

`load_recipe` reads a YAML file and `key=value` overrides; `Recipe` is what the rest of finray
receives. The docstring under a field is that field's documentation in `finray schema`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from ..common.errors import InputError, reason
from ..common.formatting import dotted
from ..common.secrets import secret_kind, secret_places
from .adapter_folder import added_tokens, find_adapter
from .default_storage import check_storage_kind, settle_storage
from .eval_metrics import answer_metrics, metric_name
from .methods import Method, SftMethod
from .metric import Metric
from .models import FreezeSettings, LoraAdapter, ModelSettings
from .paths import resolve_model, resolve_path
from .places import PlacedSection, about, locates
from .remote_code import check_pinned
from .resolved_sources import resolve_sources
from .sections import (
    FLAT,
    CheckpointSettings,
    DataSettings,
    EvalSettings,
    Isolation,
    LogSettings,
    Name,
    OptimSettings,
    ScaleSettings,
    Strategy,
)
from .short_forms import AdapterName, as_adapter, as_model, write_out
from .validation import validate
from .yaml_file import Change, Document, read_settings

_SECRET_REMEDY = (
    ", which would be kept with the run; take it out, and set it in the environment instead "
    "(HF_TOKEN, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; on Kubernetes the Secret "
    "finray-credentials)"
)


class Recipe(PlacedSection):
    """One run, from the data to the result."""

    name: Name
    """The run's name: letters, digits, '.', '_' and '-', at most 63. Its folder is
    <storage>/<name>."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of all that is random: new weights, dropout, the order of the data, completions."""
    deterministic: bool = False
    """true: a GPU computes the same every time, so that a resumed run equals an undisturbed one bit
    for bit there too; some kernels are slower. A CPU does so anyway."""
    model: Annotated[ModelSettings, BeforeValidator(as_model, str | ModelSettings)]
    """A section, or only the base: its hub id or folder."""
    adapter: Annotated[
        LoraAdapter | None, BeforeValidator(as_adapter, AdapterName | LoraAdapter | None)
    ] = None
    """A section, or lora or dora with its defaults. Absent (and without model.adapter): the base's
    own weights are trained."""
    freeze: FreezeSettings | None = None
    """Absent, and without an adapter: full fine-tuning."""
    method: Method = SftMethod()
    """What is learnt from the rows; its key kind selects the method, and with it the other keys."""
    data: DataSettings
    """The rows to learn from."""
    optim: OptimSettings = OptimSettings()
    """Optimizer, batch size and duration."""
    scale: ScaleSettings = ScaleSettings()
    """Number and size of the workers."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """Saving while the run trains."""
    eval: EvalSettings = EvalSettings()
    """Measurements on held-out data."""
    log: LogSettings = LogSettings()
    """Metrics while the run trains."""
    storage: str = "runs"
    """Folder (relative to where the command runs) or a URI that all nodes reach. Where it is not
    set, the environment variable FINRAY_STORAGE decides."""

    _isolates: bool | None = PrivateAttr(default=None)
    _isolation: Isolation | None = PrivateAttr(default=None)
    _longest: int | None = PrivateAttr(default=None)
    """Whether the model keeps packed documents apart; None before a rehearsal."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        held_out = bool(self.data.eval) or self.data.holds_out
        if self.eval.every_steps is not None and not held_out:
            raise ValueError("eval.every_steps needs held-out data: set data.eval or data.holdout")
        if self.eval.samples > 0 and not held_out:
            raise ValueError("eval.samples needs held-out data: set data.eval or data.holdout")
        self._check_metrics()
        kind = self.method.kind
        message = self.method.contradiction(self.data, self.optim, self.checkpoint)
        message = message or self.method.model_contradiction(self.model, self.adapter)
        if message is not None:
            raise ValueError(message)
        if self.eval.samples > 0 and not self.method.has_answers:
            raise ValueError(
                f"eval.samples needs prompts with answers, which method {kind} does not have; "
                "remove it"
            )
        if self.data.packing is True and not self.method.packs:
            raise ValueError(
                f"data.packing: only single documents can be packed, and rows of method {kind} are "
                "not; remove it"
            )
        if self.data.overlong == "split" and self.method.learns_from != "documents":
            raise ValueError(
                "data.overlong split: only single documents can be split, and rows of method "
                f"{kind} are not; use truncate_left, truncate or drop"
            )
        if self.microbatch_fault is not None:
            raise ValueError(self.microbatch_fault)
        if self.scale.most_workers > self.rows_per_step:
            raise ValueError(
                f"scale.workers {self.scale.most_workers} is larger than the "
                f"{self.rows_per_step} rows that a step of optim.batch_size "
                f"{self.optim.batch_size} takes, so some would be idle; lower scale.workers"
            )
        return self

    def _check_metrics(self) -> None:
        """Refuse metrics without answers, a metric twice, and a watched one that is not there."""
        if self.eval.metrics and not self.eval.samples:
            raise ValueError(
                "eval.metrics measures answers to held-out prompts: set eval.samples, their number"
            )
        names = [metric_name(metric) for metric in self.eval.metrics]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"eval.metrics names {twice} twice; remove or rename one of them")
        own = [f"eval_{name}" for name in self.method.held_out_metrics(self.trains_adapter)]
        possible = [*own, *answer_metrics(self.eval.metrics)]
        if self.eval.watch is not None and self.eval.watch not in possible:
            raise ValueError(
                f"eval.watch: an evaluation of this run does not report {self.eval.watch}; choose "
                f"one of {', '.join(possible)}"
            )

    @property
    def watched(self) -> Metric:
        """The metric that decides which checkpoint is the best."""
        name = self.eval.watch
        return self.method.watched if name is None else self.metric(name)

    def metric(self, name: str) -> Metric:
        """A metric that the run reports, with its direction."""
        return answer_metrics(self.eval.metrics).get(name) or self.method.metric(name)

    @model_validator(mode="after")
    def _can_stream(self) -> Self:
        if not self.data.streams:
            return self
        if self.optim.epochs is not None:
            raise ValueError(
                "optim.epochs counts all rows, which data.prepare streaming never has together; "
                "set optim.max_steps instead, or prepare ahead"
            )
        if self.optim.max_steps is None:
            raise ValueError(
                "data.prepare streaming needs optim.max_steps, as the number of rows is not known; "
                "set it, or prepare ahead"
            )
        if self.data.why_not_streaming is not None:
            raise ValueError(self.data.why_not_streaming)
        return self

    @model_validator(mode="after")
    def _trained_weights_agree(self) -> Self:
        quantize = self.model.quantize
        init = "default" if self.adapter is None else self.adapter.init
        own = "full fine-tuning" if self.freeze is None else "freeze"
        contradictions = {
            "adapter and model.adapter contradict each other: the latter brings its own rank; keep "
            "one of them": (self.adapter is not None and self.model.adapter is not None),
            "freeze contradicts an adapter, beside which the base is frozen; keep one of them": (
                self.freeze is not None and self.trains_adapter
            ),
            f"model.quantize {quantize} contradicts {own}: quantised weights are not trained; add "
            "the section adapter, or leave out quantize": (
                quantize != "none" and not self.trains_adapter
            ),
            "method.init random contradicts an adapter on frozen weights; keep one of them": (
                self.method.starts_at_random and self.trains_adapter
            ),
            "method.init random contradicts freeze, which keeps weights; remove one of them": (
                self.method.starts_at_random and self.freeze is not None
            ),
            "adapter.init loftq needs model.quantize nf4, whose error it reduces; add that": (
                init == "loftq" and quantize != "nf4"
            ),
            "adapter.dora contradicts model.quantize int8, whose layers give DoRA no weights to "
            "measure; use nf4": (
                quantize == "int8" and self.adapter is not None and self.adapter.dora
            ),
            f"adapter.init {init} contradicts model.quantize {quantize}; keep one of them, or take "
            "init loftq": init in ("pissa", "olora", "orthogonal") and quantize != "none",
            "model.add_tokens contradicts method.reference_model, which has no rows for them; keep "
            "one of them": (bool(self.model.add_tokens) and self.method.reference_name is not None),
            "optim.lora_plus_ratio needs an adapter; add the section adapter, or remove it": (
                self.optim.lora_plus_ratio is not None and not self.trains_adapter
            ),
        }
        for message, holds in contradictions.items():
            if holds:
                raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _can_be_deterministic(self) -> Self:
        uses_vllm = self.method.samples_online and not self.method.completions_at_once
        if self.deterministic and uses_vllm:
            raise ValueError(
                "deterministic contradicts method.rollout vllm, whose completions differ from run "
                "to run; use rollout transformers, or remove deterministic"
            )
        return self

    @model_validator(mode="after")
    def _strategy_agrees(self) -> Self:
        if self.scale.strategy != "fsdp":
            return self
        if self.scale.most_workers < 2:
            raise ValueError(
                "scale.strategy fsdp shards the weights over workers, but scale.workers is "
                f"{self.scale.most_workers}; set 2 or more, or remove strategy"
            )
        if (reason := self.why_not_shardable) is not None:
            raise ValueError(f"scale.strategy fsdp: {reason}")
        return self

    @property
    def trains_adapter(self) -> bool:
        """True if the run trains a new or an existing adapter instead of the base model."""
        return self.adapter is not None or self.model.adapter is not None

    @property
    def adapter_kind(self) -> Literal["lora", "dora", "existing"] | None:
        """Kind of the trained adapter; None if there is none."""
        if self.adapter is None:
            return None if self.model.adapter is None else "existing"
        return "dora" if self.adapter.dora else "lora"

    @property
    def why_not_shardable(self) -> str | None:
        """Why the weights cannot be sharded over workers (FSDP2), and what to do instead.

        None where they can.
        """
        if self.model.quantize == "int8":
            return (
                "model.quantize int8 stores scales of whole rows, which cannot be sharded with the "
                "weights; use nf4"
            )
        if self.model.dtype == "float16":
            return (
                "model.dtype float16 scales its gradients, which finray does not do for shards; "
                "set bfloat16 or float32, or take ddp"
            )
        if self.method.why_not_shardable is not None:
            return self.method.why_not_shardable
        if self.adapter is not None and self.adapter.changes_base:
            return (
                f"adapter.init {self.adapter.init} writes its result from whole weights; use "
                "another init, or ddp"
            )
        return None

    def with_strategy(self, strategy: Strategy) -> Self:
        """The same recipe with what `scale.strategy: auto` results in."""
        scale = self.scale.model_copy(update={"strategy": strategy})
        return self.model_copy(update={"scale": scale})

    @property
    def packs(self) -> bool:
        """True if several documents share a sequence; before `with_isolation` a guess for auto."""
        if self.data.packing == "auto":
            return self.method.packs and self._isolates is not False
        return self.data.packing

    @property
    def isolation(self) -> Isolation | None:
        """How documents of a row are kept apart; None if they are not, or it is not known yet."""
        return self._isolation

    @property
    def is_flat(self) -> bool:
        """True if the texts of a microbatch share a row; before `with_isolation` a guess."""
        if self._isolation is not None:
            return self._isolation in FLAT
        return self._isolates is not False and self.model.attention not in ("sdpa", "eager")

    def with_isolation(self, isolates: bool, way: Isolation | None = None) -> Self:
        """The same recipe, whose `data.packing: auto` packs if the model keeps documents apart.

        Args:
            isolates: True if it does.
            way: how, if it is known.
        """
        decided = self.model_copy()
        decided._isolates, decided._isolation = isolates, way
        return decided

    @property
    def microbatch_fault(self) -> str | None:
        """Why there are no microbatches of the size that the recipe asks for; else None."""
        optim, row = self.optim, self.tokens_per_row
        is_auto = optim.micro_batch_size == "auto"
        if self.method.averages_by_pass and (is_auto or optim.micro_batch_tokens is not None):
            return (
                f"optim.{'micro_batch_size auto' if is_auto else 'micro_batch_tokens'}: the loss "
                "(bnpo, aot or aot_unpaired) is computed over each forward pass, so it depends on "
                "which rows share one; set micro_batch_size to a number instead"
            )
        if optim.micro_batch_tokens is None:
            if optim.microbatch <= optim.batch_size:
                return None
            return (
                f"optim.micro_batch_size {optim.microbatch} is larger than optim.batch_size "
                f"{optim.batch_size}; lower it"
            )
        if optim.micro_batch_tokens < row:
            texts = self.method.sequences_per_row
            each = f"{texts} texts of " if texts > 1 else ""
            return (
                f"optim.micro_batch_tokens {optim.micro_batch_tokens} holds no row, which may have "
                f"{each}data.max_length {self.data.max_length} tokens; give at least {row}, or a "
                "shorter max_length"
            )
        return None

    @property
    def tokens_per_row(self) -> int:
        """Largest number of tokens of a row, in all its texts."""
        return self.method.sequences_per_row * self.data.max_length

    @property
    def microbatch(self) -> int:
        """Rows of a microbatch; with a budget of tokens, those of full length that it holds."""
        budget = self.optim.micro_batch_tokens
        return self.optim.microbatch if budget is None else max(1, budget // self.tokens_per_row)

    def rows_of_worker(self, workers: int) -> int:
        """Most rows of a step (sequences, pairs, completions) that each of so many workers has."""
        of_stream = self.rows_per_step
        return math.ceil(of_stream / max(1, workers)) * (self.optim.batch_size // of_stream)

    @property
    def microbatch_tokens(self) -> int:
        """Largest number of tokens of a microbatch in a step."""
        budget, row = self.optim.micro_batch_tokens, self.tokens_per_row
        rows = self.rows_of_worker(self.scale.least_workers)
        if budget is None or self.packs:
            return min(self.microbatch, rows) * row
        return min(budget, rows * row)

    @property
    def microbatch_setting(self) -> str:
        """The size of a microbatch, as --set takes it."""
        if (budget := self.optim.micro_batch_tokens) is not None:
            return f"optim.micro_batch_tokens={budget}"
        return f"optim.micro_batch_size={self.microbatch}"

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document of a row; `data.max_length` before `with_longest`."""
        return min(self._longest or self.data.max_length, self.data.max_length)

    def with_longest(self, tokens: int | None) -> Self:
        """The same recipe, whose prepared documents have at most so many tokens; None for
        `data.max_length`."""
        decided = self.model_copy()
        decided._longest = tokens
        return decided

    @property
    def leaves_open(self) -> bool:
        """True if a setting is auto that follows from the GPU's memory when the run starts."""
        return "auto" in (self.optim.micro_batch_size, self.model.gradient_checkpointing)

    def with_placement(self, rows: int, checkpoints: bool) -> Self:
        """The same recipe with a microbatch, and with or without gradient checkpointing.

        A budget of tokens stays one: it becomes that of so many rows, unless it holds so many.
        """
        model = self.model.model_copy(update={"gradient_checkpointing": checkpoints})
        size: dict[str, int] = {"micro_batch_size": rows}
        if self.optim.micro_batch_tokens is not None:
            size = {"micro_batch_tokens": rows * self.tokens_per_row}
        if self.optim.micro_batch_size != "auto" and rows == self.microbatch:
            size = {}
        optim = self.optim.model_copy(update=size)
        return self.model_copy(update={"model": model, "optim": optim})

    @property
    def rows_per_step(self) -> int:
        """Rows of the stream (sequences, pairs, prompts) that an optimizer step learns from."""
        return self.method.rows_per_step(self.optim.batch_size)

    @property
    def row_length(self) -> int:
        """Largest number of tokens of a text in the data."""
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


def load_recipe(source: Path | Mapping[str, Any], overrides: Sequence[str | Change] = ()) -> Recipe:
    """Read, override and validate a recipe; its paths become absolute.

    $FINRAY_STORAGE is the storage of a recipe that names none.

    Args:
        source: the YAML file, or the settings.
        overrides: changes, or `dotted.key=value` strings; their value is parsed as YAML.

    Raises:
        InputError: with file:line and key of every fault, and for a secret in a setting.
    """
    document, folder = read_settings(source, overrides, write_out)
    settle_storage(document)
    check_no_secret(document)
    check_storage_kind(document)
    return resolve_recipe(build_recipe(document), folder)


def build_recipe(document: Document) -> Recipe:
    """The recipe of a document, with the places of its keys; paths stay as they are written.

    Raises:
        InputError: with the place of every fault.
    """
    return validate(Recipe, document).with_places(document.places)


def check_no_secret(document: Document) -> None:
    """Refuse a secret in a setting: a run's folder and a job's metadata hold the recipe.

    Raises:
        InputError: with file, line and key of every secret.
    """
    lines = [
        f"{document.place(key)}: {dotted(key)}: holds a secret{_SECRET_REMEDY}"
        for key in secret_places(document.values)
    ]
    if lines:
        raise InputError("\n".join(lines))


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """Rebuild a recipe that `Recipe.model_dump` wrote (run folders, workers)."""
    return Recipe.model_validate(values)


@locates
def resolve_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """Make a recipe from a folder independent of the current one: Ray's workers run elsewhere.

    Raises:
        InputError: a path does not lead to usable files.
    """

    with about("storage"):
        storage = resolve_path(recipe.storage, Path.cwd())
    places = (folder, Path.cwd(), Path(storage))
    data = recipe.data.model_copy(
        update={
            **resolve_sources(recipe.data, places),
            "chat_template": _read_template(recipe.data.chat_template, folder),
        }
    )
    with about("model.base"):
        base = resolve_model(recipe.model.base, folder)
    check_pinned(recipe.model.model_copy(update={"base": base}))
    adapter = recipe.model.adapter
    if adapter is not None:
        with about("model.adapter"):
            candidates = [resolve_path(adapter, place) for place in places]
        adapter = find_adapter(candidates)
    tokens = _tokens_of(recipe, adapter)
    metrics = [
        metric if isinstance(metric, str) else metric.resolve(folder, f"eval.metrics.{index}")
        for index, metric in enumerate(recipe.eval.metrics)
    ]
    return recipe.model_copy(
        update={
            "data": data,
            "eval": recipe.eval.model_copy(update={"metrics": metrics}),
            "method": recipe.method.resolve(places),
            "model": recipe.model.model_copy(
                update={"base": base, "adapter": adapter, "add_tokens": tokens}
            ),
            "storage": storage,
        }
    )


def _tokens_of(recipe: Recipe, adapter: str | None) -> Literal["auto"] | tuple[str, ...]:
    """The added tokens: the recipe's, or those that come with an existing adapter."""
    own = recipe.model.add_tokens
    if adapter is None:
        return own
    tokens = tuple(added_tokens(Path(adapter)))
    if own not in ((), "auto", tokens):
        raise InputError(
            f"model.add_tokens: {adapter} trains {', '.join(tokens) or 'no tokens'}, and no "
            "others can be added to it; remove add_tokens"
        )
    return tokens


def _read_template(template: str | None, folder: Path) -> str | None:
    """Inline Jinja and the name chatml stay; a file is read, so that it travels with the recipe."""
    if template is None or template == "chatml" or "{" in template:
        return template
    with about("data.chat_template"):
        file = Path(resolve_path(template, folder))
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data.chat_template: cannot read {file}: {reason(error)}; give 'chatml', the path "
            "of a Jinja file, or inline Jinja"
        ) from None
    if (kind := secret_kind(text)) is not None:
        raise InputError(f"data.chat_template: holds {kind}{_SECRET_REMEDY} ({file})")
    return text
