"""Answers prompts and measures losses in other processes, each of which loads a model once."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..data.tasks import RunTasks
from .answer_settings import AnswerSettings
from .answering import Answer, Ask, answer
from .generate import Answering, Batch
from .located import locate
from .losses import LossSum, MeasureLosses, loss_of
from .opened import Opened, base_of, open_located
from .prompts import PromptRow


@dataclass(frozen=True)
class Remote:
    """A model that any process can load."""

    uri: str
    """Its absolute path, URI or hub id."""
    is_base: bool = False
    """The base under it."""

    def opened(self) -> Opened:
        """The model; a process loads one, and keeps it."""
        return _base(self.uri) if self.is_base else _own(self.uri)


@lru_cache(maxsize=1)
def _own(uri: str) -> Opened:
    return open_located(locate(uri, Path.cwd()))


@lru_cache(maxsize=1)
def _base(uri: str) -> Opened:
    return base_of(_own(uri), locate(uri, Path.cwd()))


@dataclass(frozen=True)
class AnswerTask:
    """Answers a batch, in whatever process it is called."""

    models: tuple[Remote, ...]
    settings: AnswerSettings

    def __call__(self, item: tuple[int, list[Ask]]) -> tuple[int, list[list[Answer]]]:
        """The number of the batch, and each model's answers to it."""
        number, batch = item
        return number, [answer(model.opened(), batch, self.settings) for model in self.models]


@dataclass(frozen=True)
class LossTask:
    """Measures the loss of some rows, in whatever process it is called."""

    model: Remote

    def __call__(self, rows: list[PromptRow]) -> LossSum:
        """The loss of the rows."""
        return loss_of(self.model.opened(), rows)


def by_tasks(task: AnswerTask, run: RunTasks) -> Answering:
    """Answers batches as tasks, on GPUs where there are some."""

    def answering(waiting: Iterator[list[Ask]]) -> Iterator[Batch]:
        batches = list(waiting)
        for number, answers in run(task, list(enumerate(batches)), on_gpus=True):
            yield batches[number], answers

    return answering


def losses_by_tasks(task: LossTask, run: RunTasks) -> MeasureLosses:
    """Measures losses as tasks, on GPUs where there are some."""
    return lambda waiting: run(task, list(waiting), on_gpus=True)
