"""An evaluation from its models to its files: eval.json, eval.jsonl and eval.html."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ..common.progress import SILENT, Progress
from ..common.scratch import scratch_folder
from ..common.storage import Folder
from ..config.source import Source
from .answer_file import part_of
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
from .opened import Opened, base_of, open_located
from .page import render_page

RECORD_FILE = "eval.json"
ROWS_FILE = "eval.jsonl"
PAGE_FILE = "eval.html"


def candidates_of(located: Located, other: Located | None, base: bool) -> dict[str, Candidate]:
    """The models of an evaluation, by column; none is loaded yet.

    Args:
        located: the model.
        other: another model to compare with.
        base: the base under the model, too.
    """

    @cache
    def own() -> Opened:
        return open_located(located)

    found = {OWN: Candidate(located.name, located.identity, own)}
    if base:
        under = f"base of {located.identity}"
        found[BASE] = Candidate("base", under, lambda: base_of(own(), located))
    if other is not None:
        found[AGAINST] = Candidate(other.name, other.identity, lambda: open_located(other))
    return found


def write_evaluation(
    candidates: dict[str, Candidate],
    sources: Sequence[Source],
    target: Folder,
    settings: EvaluationSettings,
    progress: Progress = SILENT,
) -> Evaluation:
    """Evaluate, and write the three files; where something failed, the answers stay in a part
    that the next evaluation goes on with.

    Args:
        candidates, sources, settings, progress: as in `evaluate`.
        target: the folder of the files.

    Raises:
        InputError: see `evaluate`.
    """
    if target.local is not None:
        evaluation = evaluate(candidates, sources, target.local / ROWS_FILE, settings, progress)
    else:
        evaluation = _evaluate_in_store(candidates, sources, target, settings, progress)
    target.write(RECORD_FILE, write_record(evaluation.record))
    target.write(PAGE_FILE, render_page(evaluation).encode("utf-8", "replace"))
    return evaluation


def _evaluate_in_store(
    candidates: dict[str, Candidate],
    sources: Sequence[Source],
    target: Folder,
    settings: EvaluationSettings,
    progress: Progress,
) -> Evaluation:
    """Evaluate on this machine's disk, with the part of the object store, which gets it back."""
    with scratch_folder("eval") as scratch:
        file = Path(scratch) / ROWS_FILE
        part = part_of(file)
        if target.exists(part.name):
            part.write_bytes(target.read(part.name))
        try:
            place = str(target / part.name)
            evaluation = evaluate(candidates, sources, file, settings, progress, place)
        finally:
            if part.exists():
                target.write(part.name, part.read_bytes())
        if file.exists():
            target.write(ROWS_FILE, file.read_bytes())
            target.delete(part.name)
    return evaluation
