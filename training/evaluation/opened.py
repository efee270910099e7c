"""A model that answers: its weights on the device, its tokenizer, and how it renders prompts."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import AutoConfig, GenerationConfig

from ..common.errors import InputError
from ..config.model_folder import named_model
from ..config.models import ModelSettings
from ..data.render_settings import RenderSettings
from ..data.rendering import Renderer
from ..models.composite import model_from_config
from ..models.devices import device_kind
from ..models.dtypes import choose_dtype, torch_dtype
from ..models.loading import Model, load_tokenizer
from ..models.open_result import (
    OpenedModel,
    check_base,
    local_copy,
    open_checkpoint,
    open_named,
    open_result,
    tokenizer_named,
    tokenizer_of,
)
from ..models.output_head import OutputHead, find_head
from ..models.pretrained import not_loaded
from ..models.stopping import stop_tokens
from .located import Located

_LONGEST = 2**31 - 1

MARKS = (
    *("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<<SYS>>", "<start_of_turn>"),
    *("<end_of_turn>", "<|start_header_id|>", "<|eot_id|>", "<|user|>", "<|assistant|>"),
    *("<|start|>", "<|message|>", "### Instruction:", "<|turn>"),
)
"""Texts by which chat templates mark turns."""


@dataclass(frozen=True)
class Opened:
    """A model in evaluation mode, on this process's device."""

    name: str
    """The model's name in tables."""
    model: Model
    tokenizer: Any
    renderer: Renderer
    """Renders prompts as the training did."""
    without_adapter: bool = False
    """True for the base under an adapter, which both share the weights."""

    def active(self) -> AbstractContextManager[Any]:
        """Inside, the model computes as this one."""
        if self.without_adapter:
            assert isinstance(self.model, PeftModel)
            without: AbstractContextManager[Any] = self.model.disable_adapter()
            return without
        return nullcontext()

    @cached_property
    def stops(self) -> list[int]:
        """Ids of the tokens that end an answer, which take a rendering of the chat template."""
        return stop_tokens(self.model, self.tokenizer)

    @cached_property
    def head(self) -> OutputHead | None:
        """Its output head, if it can be applied to some tokens alone; a short run finds it."""

        def run() -> torch.Tensor:
            with self.active():
                token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
                logits: torch.Tensor = self.model(input_ids=token, use_cache=False).logits
                return logits

        return find_head(self.model, run)

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def context(self) -> int:
        """Most tokens of a prompt with its answer."""
        config = self.model.config.get_text_config()
        value = getattr(config, "max_position_embeddings", None)
        return value if isinstance(value, int) and value > 0 else _LONGEST

    def foreign_marks(self, texts: Sequence[str]) -> list[str]:
        """Marks of another chat template than the model's in some texts."""
        own = str(self.tokenizer.chat_template or "")
        return [mark for mark in MARKS if mark not in own and any(mark in text for text in texts)]


def open_located(located: Located) -> Opened:
    """Load a run's result, a checkpoint or a model, on the device of this process.

    Raises:
        InputError: it cannot be loaded.
    """
    transformers.utils.logging.disable_progress_bar()
    recipe, where = located.recipe, located.name
    if recipe is None:
        named = named_model(located.uri)
        dtype = _dtype(named)
        opened = open_named(located.uri, dtype, where)
        settings = _settings_of(located.uri, named)
    else:
        dtype = _dtype(recipe.model)
        settings = RenderSettings.of(recipe)
        if located.checkpoint is not None:
            opened = open_checkpoint(recipe, located.checkpoint, dtype, where)
        else:
            assert located.run is not None
            opened = open_result(located.run, "causal", dtype, where)
    return _placed(located.name, opened, settings)


def open_unloaded(located: Located) -> Opened:
    """As `open_located`, without weights: it renders prompts, and knows where answers end.

    Raises:
        InputError: the model's configuration or its tokenizer cannot be loaded.
    """
    recipe = located.recipe
    if recipe is None:
        tokenizer, source, revision = tokenizer_named(located.uri, located.name)
        return _without_weights(
            located,
            source,
            revision,
            tokenizer,
            _settings_of(located.uri, named_model(located.uri)),
        )
    settings, rendering = recipe.model, RenderSettings.of(recipe)
    if located.checkpoint is not None:
        tokenizer = load_tokenizer(recipe)
        return _without_weights(located, settings.base, settings.revision, tokenizer, rendering)
    assert located.run is not None
    with local_copy(located.run.result) as folder:
        tokenizer = tokenizer_of(folder, located.name)
        source, revision = settings.base, settings.revision
        if located.run.kind == "model":
            source, revision = str(folder), None
        else:
            check_base(folder, source, revision, located.name)
        return _without_weights(located, source, revision, tokenizer, rendering)


def _without_weights(
    located: Located, source: str, revision: str | None, tokenizer: Any, settings: RenderSettings
) -> Opened:
    how: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **how)
    except (OSError, ValueError) as error:
        raise not_loaded(located.name, source, error) from error
    with torch.device("meta"):
        model = model_from_config(config, "causal", located.name)
    with suppress(OSError):  # a model without one has that of its configuration
        model.generation_config = GenerationConfig.from_pretrained(source, revision=revision)
    return Opened(located.name, model, tokenizer, Renderer(tokenizer, settings))


def base_of(opened: Opened, located: Located) -> Opened:
    """The base of a run, which renders prompts as the run does.

    Raises:
        InputError: a model has no base, or the base cannot be loaded.
    """
    if isinstance(opened.model, PeftModel):
        return replace(opened, name="base", without_adapter=True)
    if located.recipe is None:
        raise InputError(f"--base: {located.name} is a model without an adapter; leave out --base")
    settings = located.recipe.model
    name = settings.base if settings.revision is None else f"{settings.base}@{settings.revision}"
    base = open_named(name, _dtype(settings), "--base")
    tokenizer = opened.tokenizer
    return _placed("base", OpenedModel(base.model, tokenizer), RenderSettings.of(located.recipe))


def _dtype(settings: ModelSettings) -> torch.dtype:
    """The compute type: float32 on a CPU, else what training would use."""
    return torch.float32 if device_kind() == "cpu" else torch_dtype(choose_dtype(settings))


def _settings_of(name: str, named: ModelSettings) -> RenderSettings:
    return RenderSettings(
        base=named.base,
        revision=named.revision,
        trust_remote_code=False,
        chat_template=None,
        train_on_all=False,
        split_overlong=False,
        max_length=_LONGEST,
        overlong="drop",
    )


def _placed(name: str, opened: OpenedModel, settings: RenderSettings) -> Opened:
    model = opened.model.to(torch.device(device_kind()))
    model.eval()
    model.config.get_text_config().use_cache = True
    return Opened(name, model, opened.tokenizer, Renderer(opened.tokenizer, settings))
