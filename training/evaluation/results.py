"""An evaluation from its models to its files: eval.json, eval.jsonl and eval.html."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from ..common.errors import writing
from ..common.progress import SILENT, Progress
from ..common.scratch import scratch_folder
from ..common.storage import Folder
from ..config.source import Source
from ..data.tasks import RunTasks
from .answer_file import part_of
from .elsewhere import Remote
from .evaluate import (
    AGAINST,
    BASE,
    OWN,
    Candidate,
    Evaluation,
    EvaluationSettings,
    evaluate,
    write_record,
)
from .located import Located
from .opened import Opened, base_of, open_located, open_unloaded
from .page import render_page

RECORD_FILE = "eval.json"
ROWS_FILE = "eval.jsonl"
PAGE_FILE = "eval.html"


def candidates_of(
    located: Located, other: Located | None, base: bool, elsewhere: bool = False
) -> dict[str, Candidate]:
    """The models of an evaluation, by column; none is loaded yet.

    Args:
        located: the model.
        other: another model to compare with.
        base: the base under the model, too.
        elsewhere: other processes load the weights.
    """
    load = open_unloaded if elsewhere else open_located

    @cache
    def own() -> Opened:
        return load(located)

    def under() -> Opened:
        return replace(own(), name="base") if elsewhere else base_of(own(), located)

    are_alike = other is not None and other.name == located.name
    name = located.uri if are_alike else located.name
    candidates = {OWN: Candidate(name, located.identity, own, Remote(located.uri))}
    if base:
        identity = f"base of {located.identity}"
        candidates[BASE] = Candidate("base", identity, under, Remote(located.uri, is_base=True))
    if other is not None:
        candidates[AGAINST] = Candidate(
            other.uri if are_alike else other.name,
            *(other.identity, lambda: load(other), Remote(other.uri)),
        )
    return candidates


def write_evaluation(
    candidates: dict[str, Candidate],
    sources: Sequence[Source],
    target: Folder,
    settings: EvaluationSettings,
    progress: Progress = SILENT,
    run: RunTasks | None = None,
) -> Evaluation:
    """Evaluate, and write the three files; where something failed, the answers stay in a part
    that the next evaluation goes on with.

    Args:
        candidates, sources, settings, progress, run: as in `evaluate`.
        target: the folder of the files.

    Raises:
        InputError: see `evaluate`.
        RunError: the disk is full.
    """
    if target.local is not None:
        file = target.local / ROWS_FILE
        evaluation = evaluate(candidates, sources, file, settings, progress, run=run)
    else:
        evaluation = _evaluate_in_store(candidates, sources, target, settings, progress, run)
    page = render_page(evaluation).encode("utf-8", "replace")
    with writing(target, "give another folder with --to"):
        target.write(RECORD_FILE, write_record(evaluation.record))
        target.write(PAGE_FILE, page)
    return evaluation


def _evaluate_in_store(
    candidates: dict[str, Candidate],
    sources: Sequence[Source],
    target: Folder,
    settings: EvaluationSettings,
    progress: Progress,
    run: RunTasks | None,
) -> Evaluation:
    """Evaluate on this machine's disk, with the part of the object store, which gets it back."""
    with scratch_folder("eval") as scratch:
        file = Path(scratch) / ROWS_FILE
        part = part_of(file)
        if target.exists(part.name):
            part.write_bytes(target.read(part.name))
        try:
            place = str(target / part.name)
            evaluation = evaluate(candidates, sources, file, settings, progress, place, run)
        finally:
            if part.exists():
                target.write(part.name, part.read_bytes())
        if file.exists():
            target.write(ROWS_FILE, file.read_bytes())
            if not part.exists():
                target.delete(part.name)
    return evaluation
