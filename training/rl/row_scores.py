"""Scores rows of data by the reward model of a finished run, for the stage `score` of curation.

torch is imported where a model is opened: whoever prepares data names this module.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from ..common.storage import Folder
from ..data.shapes import (
    Answer,
    Completion,
    Conversation,
    Example,
    LabelledExample,
    PreferencePair,
    Question,
    Text,
)
from ..models.devices import device_kind
from ..records.run_folder import finished_run

if TYPE_CHECKING:
    from .rewards.classifiers import Classifier

WHERE = "data.curate"


def open_row_scorer(run: str) -> Callable[[Sequence[Example]], list[float]]:
    """What scores rows by a run's reward model; it is opened once in a process.

    Of a text that is longer than the model's positions, the end is read.

    Args:
        run: the run's folder.

    Raises:
        InputError: the model cannot be loaded, or its tokenizer has no chat template for rows that
            are conversations.
        RunError: not one row fits into memory.
    """
    classifier = _opened(run)

    def score(examples: Sequence[Example]) -> list[float]:
        answers = [answer for example in examples for answer in _answers(example)]
        texts = [_ids(classifier, answer)[-classifier.longest :] for answer in answers]
        values = iter(classifier.scores(texts))
        return [
            next(values) - next(values) if isinstance(example, PreferencePair) else next(values)
            for example in examples
        ]

    return score


def _answers(example: Example) -> list[Answer | Text | Question]:
    if isinstance(example, PreferencePair):
        return [example.chosen, example.rejected]
    return [example.answer if isinstance(example, LabelledExample) else example]


def _ids(classifier: "Classifier", row: Answer | Text | Question) -> list[int]:
    if isinstance(row, Conversation):
        return classifier.ids([*row.messages], [], row.context)
    if isinstance(row, Completion):
        return classifier.ids(row.prompt, row.completion)
    if isinstance(row, Text):
        return classifier.ids(row.text, "")
    raise TypeError(f"rows of {type(row).__name__} have no answer to score")


def close_row_scorers() -> None:
    """Free the memory of what this process opened."""
    if _opened.cache_info().currsize:
        from ..models.dtypes import free_memory

        _opened.cache_clear()
        free_memory()


@lru_cache(maxsize=1)
def _opened(run: str) -> "Classifier":
    import torch

    from ..models import import_peft  # noqa: F401 - before what loads peft
    from ..models.devices import has_bfloat16
    from ..models.open_result import open_result
    from .rewards.classifiers import classifier_of

    kind = device_kind()
    half = torch.bfloat16 if kind != "cpu" and has_bfloat16(kind) else torch.float32
    opened = open_result(finished_run(Folder(run)), "score", half, WHERE)
    remedy = "drop long rows in a stage before it, or take a smaller reward model"
    return classifier_of(opened.model.to(kind), opened.tokenizer, WHERE, remedy)
