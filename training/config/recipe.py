"""The recipe: all settings of a run, validated and frozen before anything heavy is imported.

`load_recipe` reads a YAML file and `key=value` overrides; `Recipe` is what the rest of finray
receives. The docstring under a field is that field's documentation in `finray schema`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ..common.errors import InputError
from ..common.secrets import secret_kind, secret_places
from .adapter_folder import find_adapter
from .methods import Method, SftMethod
from .models import FreezeSettings, LoraAdapter, ModelSettings
from .paths import resolve_model, resolve_path
from .remote_code import check_pinned
from .section import Section
from .sections import (
    CheckpointSettings,
    DataSettings,
    EvalSettings,
    LogSettings,
    Name,
    OptimSettings,
    ScaleSettings,
    Source,
)
from .yaml_file import Change, Document, read_recipe_file, validate

_SECRET_REMEDY = (
    ", which would be kept with the run; take it out, and set it in the environment instead "
    "(HF_TOKEN, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; on Kubernetes the Secret "
    "finray-credentials)"
)


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
        message = self.method.contradiction(self.data, self.optim, self.checkpoint)
        message = message or self.method.model_contradiction(self.model, self.adapter)
        if message is not None:
            raise ValueError(message)
        if self.eval.samples > 0 and not self.method.has_answers:
            raise ValueError(
                f"eval.samples needs prompts with answers, which method {kind} does not have"
            )
        if self.data.packing is True and not self.method.packs:
            raise ValueError(
                f"data.packing: only single documents can be packed, and rows of method {kind} are "
                "not; remove it"
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
                f"{self.optim.batch_size} takes, so some would be idle; lower scale.workers"
            )
        return self

    @model_validator(mode="after")
    def _trained_weights_agree(self) -> Self:
        quantize = self.model.quantize
        init = "default" if self.adapter is None else self.adapter.init
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
                self.method.starts_at_random and self.trains_adapter
            ),
            "method.init random contradicts freeze, which keeps weights as they are": (
                self.method.starts_at_random and self.freeze is not None
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
        for message, holds in contradictions.items():
            if holds:
                raise ValueError(message)
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
        if self.method.why_not_shardable is not None:
            return self.method.why_not_shardable
        if self.adapter is not None and self.adapter.changes_base:
            return (
                f"adapter.init {self.adapter.init} writes its result from whole weights; use "
                "another init, or ddp"
            )
        return None

    @property
    def packs(self) -> bool:
        """True if several documents share a sequence."""
        return self.method.packs if self.data.packing == "auto" else self.data.packing

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


def load_recipe(path: Path, overrides: Sequence[str | Change] = ()) -> Recipe:
    """Read, override and validate a recipe; its input paths become absolute.

    Args:
        path: the YAML file.
        overrides: changes, or `dotted.key=value` strings; their value is parsed as YAML.

    Raises:
        InputError: with file:line and key of every fault, and for a secret in a setting.
    """
    document = read_recipe_file(path, overrides)
    check_no_secret(document)
    recipe = validate(Recipe, document)
    return resolve_recipe(recipe, path.resolve().parent)


def check_no_secret(document: Document) -> None:
    """Refuse a secret in a setting: a run's folder and a job's metadata hold the recipe.

    Raises:
        InputError: with file, line and key of every secret.
    """
    lines = [
        f"{document.place(key)}: {'.'.join(map(str, key))}: holds a secret{_SECRET_REMEDY}"
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
    return recipe.model_copy(
        update={
            "data": data,
            "method": recipe.method.resolve(places),
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
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data.chat_template: cannot read {file}: {error}; give 'chatml', the path of a "
            "Jinja file, or inline Jinja"
        ) from None
    if (kind := secret_kind(text)) is not None:
        raise InputError(f"data.chat_template: holds {kind}{_SECRET_REMEDY} ({file})")
    return text
