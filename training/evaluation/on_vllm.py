"""Answers prompts with vLLM's engine, in this process or on Ray's workers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import numpy as np

from ..common.errors import InputError, RunError, in_one_line
from ..config.adapter_folder import (
    CONFIG_FILE,
    adapter_base,
    read_adapter_config,
    unknown_to_vllm,
)
from ..config.model_folder import named_model
from ..config.models import ModelSettings
from ..data.rows import Row
from ..data.tasks import RunTasks
from ..models.devices import device_kind
from ..models.dtypes import choose_dtype
from ..models.generation import Generated
from ..models.open_result import local_copy
from ..rl.rollouts.vllm import SHARE_OF_HOST, Engine, EngineSettings
from .answer_settings import AnswerSettings
from .answering import Ask, answers_of, windows
from .generate import Answering, Batch
from .located import Located, locate
from .opened import Opened

_BATCHES_AT_ONCE = 32
"""Batches that the engine gets together; it makes its own of them."""
_SHARE = 0.9
"""Of a GPU's memory, for the engine's weights and cache."""
_REMEDY = "--engine transformers answers without it"


@dataclass(frozen=True)
class _Parts:
    """What the engine loads."""

    base: str
    revision: str | None
    adapter: Path | None
    settings: ModelSettings


@dataclass(frozen=True)
class VllmTask:
    """Completes prompts in whatever process it is called, which loads the engine once.

    Args:
        model: the run or model, as an absolute path, a URI or a hub id.
        with_base: complete with the base under it, too.
        settings: how to answer.
        stops: ids of the tokens that end an answer.
        longest: most tokens of a prompt with its answer.
    """

    model: str
    with_base: bool
    settings: AnswerSettings
    stops: tuple[int, ...]
    longest: int

    def __call__(self, item: tuple[int, list[Ask]]) -> tuple[int, list[list[Generated]]]:
        """The number of the batch, and each model's completions of it."""
        number, batch = item
        loaded = _load(self.model, self.longest)
        prompts = [ask.prompt.input_ids.tolist() for ask in batch]
        parameters = [self._parameters(ask) for ask in batch]
        completed = []
        for adapter in (loaded.adapter, *([None] if self.with_base else [])):
            rollouts = loaded.engine.complete(prompts, parameters, adapter)
            completed.append([Generated(one.ids, one.ended) for one in rollouts])
        return number, completed

    def _parameters(self, ask: Ask) -> Row:
        random = np.random.default_rng((self.settings.seed, ask.row.number))
        return {
            "max_tokens": ask.room,
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "top_k": self.settings.top_k,
            "stop_token_ids": list(self.stops),
            "seed": int(random.integers(2**31)),
        }


@dataclass(frozen=True)
class _Loaded:
    engine: Engine
    adapter: object
    kept: ExitStack
    """Holds copies of an object store's files, which the engine reads at its first request."""


def by_vllm(
    located: Located,
    opened: Opened,
    with_base: bool,
    settings: AnswerSettings,
    run: RunTasks,
) -> Answering:
    """Answers batches with vLLM.

    Args:
        located: the model.
        opened: the model without its weights: its tokens and stops are used.
        with_base: answer with the base under it, too.
        settings: how to answer.
        run: where the engine works.
    """

    def answering(waiting: Iterator[list[Ask]]) -> Iterator[Batch]:
        groups = [list(chain(*some)) for some in windows(waiting, _BATCHES_AT_ONCE)]
        asks = list(chain(*groups))
        longest = max((len(ask.prompt.input_ids) + ask.room for ask in asks), default=0)
        task = VllmTask(located.uri, with_base, settings, tuple(opened.stops), longest)
        for number, completed in run(task, list(enumerate(groups)), on_gpus=True):
            batch = groups[number]
            yield batch, [answers_of(opened, batch, one) for one in completed]

    return answering


def chooses_vllm(engine: str | None, located: Located, with_base: bool, on_gpus: bool) -> bool:
    """Whether vLLM answers: if it is asked for, or installed where there are GPUs.

    Args:
        engine: vllm or transformers; None to choose.
        located: the model.
        with_base: the base under it answers, too.
        on_gpus: GPUs answer.

    Raises:
        InputError: it is asked for, and not able to load the model.
    """
    if engine == "transformers" or find_spec("vllm") is None:
        return False
    if engine is None and not on_gpus:
        return False
    with _parts(located) as parts:
        unfit = _unfit(parts, with_base)
    if unfit and engine is not None:
        raise InputError(f"--engine: vLLM {unfit}; {_REMEDY}")
    return not unfit


def _unfit(parts: _Parts, with_base: bool) -> str:
    """Why the engine cannot load a model; empty if it can."""
    if parts.adapter is None:
        return "loads one model at a time, and the base is another one" if with_base else ""
    unknown = unknown_to_vllm(read_adapter_config(parts.adapter, "--engine"))
    return f"does not support {', '.join(unknown)} of the adapter" if unknown else ""


@contextmanager
def _parts(located: Located) -> Iterator[_Parts]:
    """The files of a model; those of an object store are on this machine within the context."""
    recipe = located.recipe
    if recipe is None:
        path, named = Path(located.uri), named_model(located.uri)
        if not (path / CONFIG_FILE).is_file():
            yield _Parts(named.base, named.revision, None, named)
            return
        base, revision = adapter_base(path, "causal", located.name)
        yield _Parts(base, revision, path, named)
        return
    settings = recipe.model
    result = located.checkpoint or (located.run.result if located.run else None)
    assert result is not None
    with local_copy(result) as folder:
        if (folder / CONFIG_FILE).is_file():
            yield _Parts(settings.base, settings.revision, folder, settings)
        else:
            yield _Parts(str(folder), None, None, settings)


@lru_cache(maxsize=1)
def _load(model: str, longest: int) -> _Loaded:
    """The engine of a model, loaded once in a process.

    Raises:
        RunError: vLLM cannot load it.
    """
    kept = ExitStack()
    parts = kept.enter_context(_parts(locate(model, Path.cwd())))
    rank = None
    if parts.adapter is not None:
        rank = int(read_adapter_config(parts.adapter, "--engine")["r"])
    settings = EngineSettings(
        base=parts.base,
        revision=parts.revision,
        trust_remote_code=False,
        dtype=choose_dtype(parts.settings),
        max_length=longest,
        rank=rank,
        share=SHARE_OF_HOST if device_kind() == "cpu" else _SHARE,
    )
    try:
        engine = Engine(settings)
    except Exception as error:  # an installation that does not fit raises anything
        raise RunError(f"vLLM cannot load {model}: {in_one_line(error)}; {_REMEDY}") from error
    adapter = None if parts.adapter is None else engine.adapter(parts.adapter)
    return _Loaded(engine, adapter, kept)
