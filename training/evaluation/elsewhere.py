"""Answers prompts and measures losses in other processes, each of which loads a model once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..data.tasks import RunTasks
from .answer_settings import AnswerSettings
from .answering import Answer, Ask, answer
from .generate import Answering, Batch
from .located import locate
from .losses import LossSum, loss_of
from .opened import Opened, base_of, open_located
from .prompts import PromptRow

Measuring = Callable[[Iterator[list[PromptRow]], Iterator[list[Ask]]], Iterator[LossSum | Batch]]
"""Measures the losses of parts of rows, and answers batches, here or elsewhere; in any order."""


@dataclass(frozen=True)
class Remote:
    """A model that any process can load."""

    uri: str
    """Its absolute path, URI or hub id."""
    is_base: bool = False
    """True for the base under its adapter."""

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
class EvaluationTask:
    """Measures the loss of some rows, or answers a batch, in whatever process it is called."""

    model: Remote
    settings: AnswerSettings

    def __call__(
        self, item: list[PromptRow] | tuple[int, list[Ask]]
    ) -> LossSum | tuple[int, list[Answer]]:
        """The loss of rows; of a numbered batch the number, and the answers."""
        opened = self.model.opened()
        if isinstance(item, list):
            return loss_of(opened, item)
        number, batch = item
        return number, answer(opened, batch, self.settings)


def by_tasks(task: AnswerTask, run: RunTasks) -> Answering:
    """Answers batches as tasks, on GPUs where there are some."""

    def answering(waiting: Iterator[list[Ask]]) -> Iterator[Batch]:
        batches = list(waiting)
        for number, answers in run(task, list(enumerate(batches)), on_gpus=True):
            yield batches[number], answers

    return answering


def measuring_by_tasks(task: EvaluationTask, run: RunTasks) -> Measuring:
    """Evaluates as tasks, on GPUs where there are some: a process loads the model for all of it."""

    def measuring(
        losses: Iterator[list[PromptRow]], waiting: Iterator[list[Ask]]
    ) -> Iterator[LossSum | Batch]:
        batches = list(waiting)
        items: list[list[PromptRow] | tuple[int, list[Ask]]] = [*losses, *enumerate(batches)]
        for result in run(task, items, on_gpus=True):
            if isinstance(result, LossSum):
                yield result
            else:
                number, answers = result
                yield batches[number], [answers]

    return measuring
