"""Answers batches in other processes, each of which loads the model once."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..data.tasks import RunTasks
from .answering import Answer, AnswerSettings, Ask, answer
from .generate import Answering, Batch
from .located import locate
from .opened import Opened, base_of, open_located


@dataclass(frozen=True)
class AnswerTask:
    """Answers a batch, in whatever process it is called.

    Args:
        model: the run or model, as an absolute path, a URI or a hub id.
        with_base: answer with the base under it, too.
        settings: how to answer.
    """

    model: str
    with_base: bool
    settings: AnswerSettings

    def __call__(self, batch: list[Ask]) -> list[list[Answer]]:
        """Each model's answers to the batch."""
        return [
            answer(model, batch, self.settings) for model in _models(self.model, self.with_base)
        ]


@lru_cache(maxsize=1)
def _models(name: str, with_base: bool) -> tuple[Opened, ...]:
    located = locate(name, Path.cwd())
    opened = open_located(located)
    return (opened, base_of(opened, located)) if with_base else (opened,)


def by_tasks(task: AnswerTask, run: RunTasks) -> Answering:
    """Answers batches as tasks, on GPUs where there are some."""

    def answering(waiting: Iterator[list[Ask]]) -> Iterator[Batch]:
        batches = list(waiting)
        yield from zip(batches, run(task, batches, on_gpus=True), strict=True)

    return answering
