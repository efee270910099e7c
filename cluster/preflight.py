"""What a run needs of every node, tried before a worker is started.

A small task on each node tells its versions, reads the model, tries bfloat16 and writes a file
into the storage; a second one reads what all the others wrote.
"""

import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..training.common.errors import InputError, RunError, last_line
from ..training.common.secrets import redact
from ..training.common.storage import Folder
from ..training.common.versions import installed_versions
from ..training.config.model_folder import has_vocabulary, model_folder
from ..training.config.models import ModelSettings
from ..training.config.recipe import Recipe
from ..training.launch.resources import (
    Resources,
    WorkerRequest,
    check_fits,
    cluster_nodes,
    fitting_workers,
    request_from_autoscaler,
    worker_request,
)
from ..training.models.dtypes import probe_bfloat16
from .gpus import Gpu, gpus_here, judge

PROBE_SECONDS = 60.0
"""A node that does not answer within it is told."""
_POLL_SECONDS = 2.0
_DRIVER = "driver"


@dataclass(frozen=True)
class Line:
    """One thing that was tried."""

    name: str
    is_good: bool
    text: str
    warns: bool = False
    """It will run, but something should be changed."""


@dataclass(frozen=True)
class Preflight:
    """What was tried, and what the workers need."""

    lines: tuple[Line, ...]
    worker_env: dict[str, str]

    def demand_good(self) -> None:
        """Raise an InputError with the whole table, where something failed."""
        if not all(line.is_good for line in self.lines):
            raise InputError(f"this recipe cannot run here:\n{render_lines(self.lines)}")


def render_lines(lines: Sequence[Line]) -> str:
    """What was tried, as a table for people."""
    return "\n".join(f"  {line.name:10}  {_mark(line):5}  {line.text}" for line in lines)


def _mark(line: Line) -> str:
    return "WARNS" if line.warns else "good" if line.is_good else "FAILS"


@dataclass(frozen=True)
class _Answer:
    """What one node told of itself."""

    versions: dict[str, str]
    model: str | None
    """Why it cannot be read."""
    env: dict[str, str]
    gpus: tuple[Gpu, ...]


def preflight(
    recipe: Recipe, wait_seconds: float = 0.0, tell: Callable[[str], None] = lambda _: None
) -> Preflight:
    """Try the initialised cluster, which was there before, for a run.

    Args:
        recipe: the recipe, its paths absolute.
        wait_seconds: how long to wait for nodes that an autoscaler brings.
        tell: called with what is waited for.
    """
    fit = _fit(recipe, wait_seconds, tell)
    if not fit.is_good:
        return Preflight((fit,), {})
    answers = _ask_all(recipe)
    lines: tuple[Line, ...] = (
        fit,
        _versions_line(answers),
        _model_line(recipe, answers),
        try_storage(recipe.storage),
        *memory_lines(recipe, _gpus_of(answers)),
    )
    env: dict[str, str] = {}
    for answer in answers.values():
        env.update(answer.env)
    if recipe.model.dtype == "bfloat16":
        cure = " ".join(f"{name}={value}" for name, value in env.items())
        text = f"set for the workers: {cure}" if cure else "works on every node"
        lines = (*lines, Line("bfloat16", True, text))
    return Preflight(lines, env)


def _gpus_of(answers: dict[str, _Answer]) -> list[Gpu]:
    """Those of the nodes; the driver may be another machine."""
    return [gpu for id, answer in answers.items() if id != _DRIVER for gpu in answer.gpus]


def memory_lines(recipe: Recipe, gpus: Sequence[Gpu]) -> tuple[Line, ...]:
    """Whether a worker's memory fits these GPUs; nothing where there are none to be used, or where
    the model's configuration is not on this machine."""
    share = recipe.scale.gpus_per_worker
    if not gpus or share == 0 or model_folder(recipe.model, only_cached=True) is None:
        return ()
    from ..training.models.memory_estimate import sizes_of

    verdict = judge(recipe, sizes_of(recipe), gpus, 1.0 if share == "auto" else share)
    warns = verdict.fits and verdict.is_tight
    return (Line("memory", verdict.fits, verdict.text, warns),)


def try_machine(recipe: Recipe) -> Preflight:
    """What is to be tried where a run stays on this machine: its GPUs' memory. What should be
    changed is printed.

    Raises:
        InputError: something failed; the message is the whole table.
    """
    return _demand_good(Preflight(memory_lines(recipe, gpus_here()), {}))


def try_running_cluster(recipe: Recipe, address: str | None, wait_seconds: float) -> Preflight:
    """`preflight` of the initialised Ray, where it was there before; one that was started here for
    a command is as `try_machine` says. What should be changed is printed.

    Raises:
        InputError: something failed; the message is the whole table.
    """
    if address in (None, "local"):
        return try_machine(recipe)
    print("trying the cluster", file=sys.stderr)
    tell = partial(print, file=sys.stderr, flush=True)
    return _demand_good(preflight(recipe, wait_seconds, tell))


def _demand_good(tried: Preflight) -> Preflight:
    tried.demand_good()
    for line in tried.lines:
        if line.warns:
            print(f"{line.name}: {line.text}", file=sys.stderr)
    return tried


def _fit(recipe: Recipe, wait_seconds: float, tell: Callable[[str], None]) -> Line:
    deadline = time.monotonic() + wait_seconds
    asked = False
    while True:
        nodes = cluster_nodes()
        wanted = worker_request(recipe.scale, nodes)
        try:
            check_fits(wanted, nodes)
        except InputError as error:
            if time.monotonic() >= deadline:
                waited = f" (after waiting {wait_seconds:g} s)" if wait_seconds else ""
                return Line("fits", False, f"{error}{waited}")
            if not asked:
                asked = True
                request_from_autoscaler(wanted)
                tell(f"waiting up to {wait_seconds:g} s for nodes: {error}")
            time.sleep(min(_POLL_SECONDS, wait_seconds))
            continue
        return Line("fits", True, f"{wanted}; {_busy(wanted, nodes)}")


def _busy(wanted: WorkerRequest, nodes: Sequence[Resources]) -> str:
    import ray

    most = fitting_workers(wanted, nodes)
    free = ray.available_resources()
    cpus, gpus = free.get("CPU", 0.0), free.get("GPU", 0.0)
    return f"{most} would; now free: {cpus:g} CPUs, {gpus:g} GPUs"


def _ask_all(recipe: Recipe) -> dict[str, _Answer]:
    """What the driver and every node tell."""
    names = node_names()
    answers = on_every_node(_look, names, lambda id: (recipe.model,))
    return {_DRIVER: _look(recipe.model), **{names[id]: answers[id] for id in names}}


def node_names() -> dict[str, str]:
    """Each living node's id, and what messages call it."""
    import ray

    alive = (node for node in ray.nodes() if node["Alive"])
    return {node["NodeID"]: f"{node['NodeName']} ({node['NodeID'][:6]})" for node in alive}


def try_storage(storage: str) -> Line:
    """Whether the driver and all nodes write into the storage, and read what the others wrote."""
    names = node_names()
    probe = Folder(storage) / f".probe-{uuid.uuid4().hex[:12]}"
    try:
        faults = {_DRIVER: _write(probe, _DRIVER)}
        faults.update(on_every_node(_write, names, lambda id: (probe, id)))
        seen = {_DRIVER: _see(probe), **on_every_node(_see, names, lambda id: (probe,))}
    finally:
        with suppress(OSError, InputError):  # the line tells of a storage that is out of reach
            probe.delete()
    names[_DRIVER] = _DRIVER
    told = [f"{names[id]}: {fault}" for id, fault in faults.items() if fault]
    told += [
        f"{names[id]} does not see what {names[other]} wrote"
        for id, found in seen.items()
        for other in names
        if not told and other not in found
    ]
    if not told:
        return Line("storage", True, f"{storage}: written by every node, read by all")
    cure = "give a folder that all nodes share, s3:// or gs://"
    return Line("storage", False, f"{storage}: {'; '.join(told)}; {cure}")


def on_every_node(
    task: Callable[..., Any], nodes: dict[str, str], arguments: Callable[[str], tuple[Any, ...]]
) -> dict[str, Any]:
    """Run a task once on each node, without taking a CPU; results by node id.

    Raises:
        RunError: a node does not answer, or the task fails there.
    """
    import ray
    import ray.exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=1)(task)
    references = {
        id: remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(id, soft=False)
        ).remote(*arguments(id))
        for id in nodes
    }
    results = {}
    deadline = time.monotonic() + PROBE_SECONDS
    for id, reference in references.items():
        try:
            results[id] = ray.get(reference, timeout=max(0.1, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            raise RunError(f"node {nodes[id]} does not answer within {PROBE_SECONDS:g} s") from None
        except ray.exceptions.RayError as error:
            raise RunError(
                f"node {nodes[id]} cannot run a task: {last_line(error)}; where finray is not "
                "installed on the nodes, finray job submit brings it along"
            ) from None
    return results


def _look(model: ModelSettings) -> _Answer:
    """Runs on a node: what it has."""
    return _Answer(
        versions=installed_versions(),
        model=_unreadable(model),
        env=probe_bfloat16() if model.dtype == "bfloat16" else {},
        gpus=gpus_here(),
    )


def _write(probe: Folder, name: str) -> str | None:
    """Runs on a node: leave a file; returns why that failed."""
    try:
        probe.create().write(name, b"")
    except (OSError, InputError) as error:
        return redact(last_line(error))
    return None


def _see(probe: Folder) -> list[str]:
    """Runs on a node: the files that it sees."""
    try:
        return probe.names()
    except OSError:
        return []


def _unreadable(model: ModelSettings) -> str | None:
    """Why the model cannot be read here; a hub model is fetched when it is not here yet."""
    try:
        folder = model_folder(model, only_cached=True)
        if folder is not None and not (folder / "config.json").is_file():
            return f"{folder} has no config.json"
        if folder is not None and not has_vocabulary(folder):
            return f"{folder} has no tokenizer"
    except (OSError, InputError) as error:
        return redact(last_line(error))
    return None


def _versions_line(answers: dict[str, _Answer]) -> Line:
    ours = answers[_DRIVER].versions
    faults = [
        f"{node} has {name} {answer.versions[name]}, the driver {ours[name]}"
        for node, answer in answers.items()
        for name in ours
        if answer.versions[name] != ours[name]
    ]
    same = ", ".join(f"{name} {ours[name]}" for name in ours)
    return Line("versions", not faults, "; ".join(faults) or f"{same} on every node")


def _model_line(recipe: Recipe, answers: dict[str, _Answer]) -> Line:
    faults = [f"{node}: {answer.model}" for node, answer in answers.items() if answer.model]
    return Line("model", not faults, "; ".join(faults) or f"{recipe.model.base} on every node")
