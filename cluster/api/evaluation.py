"""`finray.evaluate`: how good a trained model is, on rows with answers."""

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...training.common.errors import InputError, reason, writing
from ...training.common.storage import Folder
from ...training.config.eval_metrics import FunctionMetric, MetricChoice, check_installed, metric_of
from ...training.config.paths import resolve_path
from ...training.config.source import Source
from ...training.config.user_code import try_file
from .recipes import prepare_process
from .results import Report
from .trained import ModelSource, check_count, elsewhere, name_of, shown_progress, source_at

if TYPE_CHECKING:
    from ...training.evaluation.located import Located

DEFAULT_METRICS = ("exact_match", "token_f1")


@dataclass(frozen=True)
class EvaluationResult:
    """Measures of a model, and the folder of their files."""

    folder: str
    """Folder or URI of eval.json, eval.jsonl and eval.html."""
    record: dict[str, Any]
    """The content of eval.json."""
    problems: tuple[str, ...] = ()
    """Measures that could not be computed for all rows, with the reason."""

    @property
    def values(self) -> dict[str, float | None]:
        """Each metric of the model by its name."""
        return {one["name"]: one["values"]["answer"] for one in self.record["measures"]}

    @property
    def report(self) -> Report:
        """The page; in a notebook it shows itself."""
        folder = Folder(self.folder)
        text = folder.read("eval.html").decode("utf-8")
        return Report(str(folder / "eval.html"), text)


def evaluate(
    model: ModelSource,
    data: str | os.PathLike[str] | None = None,
    *,
    metrics: Sequence[str] = (),
    tasks: Sequence[str] = (),
    loss: bool = True,
    schema: str | os.PathLike[str] | None = None,
    judge: str | None = None,
    judge_model: str = "",
    against: ModelSource | None = None,
    base: bool = False,
    rows: int | None = None,
    max_tokens: int = 512,
    batch: int = 32,
    to: str | os.PathLike[str] | None = None,
    address: str | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> EvaluationResult:
    """Measure a trained model on rows with answers.

    Args:
        model: a run, a checkpoint or a model.
        data: rows in any shape that finray reads; by default the run's own `data.eval`.
        metrics: metrics of its answers by name, and functions as `"score.py:function"`, which
            take what reward functions take; by default exact match and token F1.
        tasks: tasks of lm-evaluation-harness by name, or YAML files of such.
        loss: measure loss and perplexity, too.
        schema: a JSON schema for the metric `json_valid`; a row's column `schema` goes before it.
        judge: the address of an OpenAI-compatible API that scores answers, and with `against`
            chooses between two; its token is in $FINRAY_JUDGE_TOKEN.
        judge_model: the judge's model.
        against: another model, to be compared row by row.
        base: measure the model under the adapter, too.
        rows: read the first rows only.
        max_tokens: longest answer.
        batch: answers in a batch.
        to: folder or URI of eval.json, eval.jsonl and eval.html; by default the run's.
        address: a Ray cluster, as in `train`, whose nodes reach the model at the same place.
        workers: processes that answer, each with a GPU where there are some; by default this one
            alone, and on a cluster all of its GPUs, or two processes.
        quiet: show no progress.

    Returns:
        The metrics; they are complete if `problems` is empty.

    Raises:
        InputError: there is no such model, data or metric, or a package is missing.
        RunError: an answer does not fit into memory.
    """
    prepare_process()
    from ...training.evaluation.answer_settings import AnswerSettings
    from ...training.evaluation.judge import judge_at
    from ...training.evaluation.located import locate
    from ...training.evaluation.prompts import read_prompts

    answers = AnswerSettings.of("evaluate", max_tokens=max_tokens, at_once=batch)
    judging = judge_at(judge, judge_model)
    check_count("--rows", rows)
    check_count("--workers", workers)
    located = locate(name_of(model), Path.cwd())
    other = None if against is None else locate(name_of(against), Path.cwd())
    if other is not None and other.uri == located.uri:
        raise InputError(f"--against: {other.uri} is the model that is measured; name another")
    chosen = _metrics(metrics)
    _check_tasks(tasks, address, workers)
    rules = None if schema is None else _schema(schema)
    of_rows = bool(metrics or judge) or schema is not None
    sources = _sources(located, data, is_needed=of_rows or not tasks)
    for source in sources:  # what cannot be read is said before torch is loaded
        next(read_prompts([source], 1), None)
    target = _target(located, to)
    from ...training.models import import_peft  # noqa: F401, I001 - before what loads peft
    from ...training.evaluation.evaluate import EvaluationSettings
    from ...training.evaluation.results import candidates_of, write_evaluation

    has_rows = bool(sources)
    settings = EvaluationSettings(
        *(chosen if has_rows else (), loss and has_rows, answers, rules, judging, rows),
        tasks=tuple(tasks),
    )
    # Tasks need the weights here, also where a variable names a cluster.
    with (
        shown_progress("evaluating", quiet) as progress,
        nullcontext() if tasks else elsewhere(address, workers, progress) as run,
    ):
        candidates = candidates_of(located, other, base, elsewhere=run is not None)
        evaluation = write_evaluation(candidates, sources, target, settings, progress, run)
    return EvaluationResult(str(target), evaluation.record, tuple(evaluation.problems))


def _metrics(names: Sequence[str]) -> tuple[MetricChoice, ...]:
    """Measures by their names; functions of the user are loaded.

    Raises:
        InputError: there is no such metric, its package is missing, or the function fails.
    """
    chosen = tuple(
        metric_of(name, Path.cwd(), "--metric") for name in dict.fromkeys(names or DEFAULT_METRICS)
    )
    check_installed(chosen, "--metric")
    for metric in chosen:
        if isinstance(metric, FunctionMetric):
            try_file(metric, "--metric")
    return chosen


def _check_tasks(tasks: Sequence[str], address: str | None, workers: int | None) -> None:
    """Check what the tasks of lm-evaluation-harness need.

    Raises:
        InputError: the harness is not installed, or other processes are to answer.
    """
    if not tasks:
        return
    if address is not None or (workers or 1) > 1:
        raise InputError(
            "--tasks: lm-evaluation-harness works in this process; leave out --workers and "
            "--address, or measure the tasks by themselves"
        )
    if find_spec("lm_eval") is None:
        raise InputError(
            "--tasks: needs the package lm-eval; install it: pip install 'finray[harness]'"
        )


def _sources(
    located: "Located", data: str | os.PathLike[str] | None, is_needed: bool
) -> list[Source]:
    """The rows to measure on: those named, else the held-out ones of the run's recipe."""
    if data is not None:
        return [source_at(data)]
    held_out = [] if located.recipe is None else located.recipe.data.eval
    if is_needed and not held_out:
        raise InputError(f"{located.name} has no data.eval of its own; give rows with --data FILE")
    return list(held_out)


def _target(located: "Located", to: str | os.PathLike[str] | None) -> Folder:
    """The folder of an evaluation's files.

    Raises:
        InputError: it cannot be written.
    """
    if to is not None:
        folder = Folder(resolve_path(os.fspath(to), Path.cwd()))
    elif located.folder is None:
        folder = Folder(str(Path.cwd() / "eval" / located.name.replace("/", "--")))
    elif located.checkpoint is not None:
        folder = located.folder / "eval" / located.checkpoint.name
    else:
        return located.folder
    with writing(folder if to is None else f"--to: {folder}", "give another folder with --to"):
        return folder.create()


def _schema(place: str | os.PathLike[str]) -> Any:
    """A JSON schema in a file.

    Raises:
        InputError: it cannot be read, or is none.
    """
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    file = Path(resolve_path(os.fspath(place), Path.cwd()))
    try:
        rules = json.loads(file.read_text(encoding="utf-8"))
        validator_for(rules).check_schema(rules)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(
            f"--schema: cannot read {file}: {reason(error)}; give a file of JSON"
        ) from None
    except SchemaError as error:
        raise InputError(
            f"--schema: {file} is not a JSON schema: {error.message}; correct it"
        ) from None
    return rules
