"""Answers the prompts of a file, and writes them to another; a killed process goes on."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..common.progress import SILENT, Progress
from ..config.source import Source
from ..records.run_folder import Record
from .answer_file import AnswerFile
from .answer_settings import AnswerSettings
from .answering import Answer, Ask, answer, batches
from .opened import Opened
from .prompts import PromptRow, digest_of, read_prompts

Batch = tuple[list[Ask], list[list[Answer]]]
"""Prompts, and each model's answers to them."""
Answering = Callable[[Iterator[list[Ask]]], Iterator[Batch]]
"""Answers batches, in this process or elsewhere; in any order."""


@dataclass
class GenerateSummary:
    """What was generated."""

    file: Path
    rows: int = 0
    """Rows of the prompts."""
    before: int = 0
    """Rows that an earlier process had answered."""
    tokens: int = 0
    cut: int = 0
    """Answers that reached the most tokens."""
    plain: int = 0
    """Prompts that are text, which the chat template does not render."""
    bad: list[str] = field(default_factory=list)
    """Place and fault of each row that is no prompt."""
    marks: dict[str, int] = field(default_factory=dict)
    """Prompts with a mark of another chat template, by mark."""
    was_there: bool = False
    """True if the file was there already; nothing is generated then."""


def here(models: Sequence[Opened], settings: AnswerSettings) -> Answering:
    """Answers batches in this process."""

    def run(waiting: Iterator[list[Ask]]) -> Iterator[Batch]:
        for batch in waiting:
            yield batch, [answer(model, batch, settings) for model in models]

    return run


def generate(
    models: Sequence[Opened],
    sources: Sequence[Source],
    target: Path,
    settings: AnswerSettings,
    *,
    identity: str,
    engine: str = "transformers",
    answering: Answering | None = None,
    total: int | None = None,
    progress: Progress = SILENT,
) -> GenerateSummary:
    """Answer prompts, row by row.

    Args:
        models: the model, and perhaps the base under it.
        sources: the prompts.
        target: the JSON Lines to write: `row`, `prompt`, `answer`, `tokens`, `ended`, of a base
            `base`, of the row `reference`; or `row` and `error`.
        settings: how to answer.
        identity: which model it is, so that a file is not continued by another one.
        engine: what answers; likewise.
        answering: answers batches; in this process by default.
        total: number of rows, for the progress.
        progress: receives how far it is.

    Raises:
        InputError: the prompts cannot be read, or the file cannot be written.
    """
    summary = GenerateSummary(target)
    decides = {
        "finray": 1,
        "model": identity,
        "models": len(models),
        "engine": engine,
        "prompts": digest_of(sources),
        **settings.model_dump(),
    }
    with AnswerFile(target, decides) as file:
        summary.before = len(file.lines)
        done = file.lines.keys()
        answered = 0

        def waiting() -> Iterator[list[Ask]]:
            for item in batches(models[0], read_prompts(sources), settings):
                if isinstance(item, PromptRow):
                    file.add([{"row": item.number, "error": item.error}])
                elif any(ask.row.number not in done for ask in item):
                    yield item

        for batch, answers in (answering or here(models, settings))(waiting()):
            file.add([_line(ask, *each) for ask, *each in zip(batch, *answers, strict=True)])
            answered = len(file.lines)
            progress.advance(answered, max(total or answered, answered))
        _count(summary, models[0], file.lines.values())
        file.finish()
    return summary


def _line(ask: Ask, own: Answer, base: Answer | None = None) -> Record:
    assert ask.row.question is not None
    reference = ask.row.question.reference
    return {
        "row": ask.row.number,
        "prompt": ask.row.turns,
        "answer": own.text,
        **({} if base is None else {"base": base.text}),
        **({} if reference is None else {"reference": reference}),
        "tokens": len(own.ids),
        "ended": own.ended,
    }


def _count(summary: GenerateSummary, model: Opened, lines: Iterable[Record]) -> None:
    has_template = bool(model.tokenizer.chat_template)
    for line in lines:
        summary.rows += 1
        if "error" in line:
            summary.bad.append(line["error"])
            continue
        summary.tokens += line["tokens"]
        summary.cut += not line["ended"]
        prompt = line["prompt"]
        summary.plain += has_template and isinstance(prompt, str)
        texts = [prompt] if isinstance(prompt, str) else [str(m.get("content")) for m in prompt]
        for mark in model.foreign_marks(texts):
            summary.marks[mark] = summary.marks.get(mark, 0) + 1
