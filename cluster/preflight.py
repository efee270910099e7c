"""What a run needs of every node, tried before a worker is started.

A small task on each node tells its versions, reads the model, tries bfloat16 and writes a file
into the storage; a second one reads what all the others wrote.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..training.capacity import (
    Demand,
    Resources,
    check_fits,
    cluster_nodes,
    demand,
    fitting_workers,
)
from ..training.data.tokenizer_files import has_vocabulary, model_folder
from ..training.device import probe_bfloat16
from ..training.errors import InputError, RunError, last_line
from ..training.recipe import ModelSettings, Recipe
from ..training.secrets import redact
from ..training.storage import Folder
from ..training.versions import installed_versions

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


@dataclass(frozen=True)
class Preflight:
    """What was tried, and what the workers need."""

    lines: tuple[Line, ...]
    worker_env: dict[str, str]

    def render(self) -> str:
        """A table for people."""
        marks = {True: "good", False: "FAILS"}
        return "\n".join(
            f"  {line.name:10}  {marks[line.is_good]:5}  {line.text}" for line in self.lines
        )

    def demand_good(self) -> None:
        """Raise an InputError with the whole table, where something failed."""
        if not all(line.is_good for line in self.lines):
            raise InputError(f"the cluster cannot run this recipe:\n{self.render()}")


@dataclass(frozen=True)
class _Answer:
    """What one node told of itself; a text where something failed."""

    versions: dict[str, str]
    model: str | None
    storage: str | None
    env: dict[str, str]


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
    answers, seen = _ask_all(recipe)
    lines: tuple[Line, ...] = (
        fit,
        _versions_line(answers),
        _model_line(recipe, answers),
        _storage_line(recipe, answers, seen),
    )
    env: dict[str, str] = {}
    for answer in answers.values():
        env.update(answer.env)
    if recipe.model.dtype == "bfloat16":
        cure = " ".join(f"{name}={value}" for name, value in env.items())
        text = f"set for the workers: {cure}" if cure else "works on every node"
        lines = (*lines, Line("bfloat16", True, text))
    return Preflight(lines, env)


def _fit(recipe: Recipe, wait_seconds: float, tell: Callable[[str], None]) -> Line:
    deadline = time.monotonic() + wait_seconds
    asked = False
    while True:
        nodes = cluster_nodes()
        wanted = demand(recipe.scale, nodes)
        try:
            check_fits(wanted, nodes)
        except InputError as error:
            if time.monotonic() >= deadline:
                waited = f" (after waiting {wait_seconds:g} s)" if wait_seconds else ""
                return Line("fits", False, f"{error}{waited}")
            if not asked:
                asked = True
                _ask_autoscaler(wanted)
                tell(f"waiting up to {wait_seconds:g} s for nodes: {error}")
            time.sleep(min(_POLL_SECONDS, wait_seconds))
            continue
        return Line("fits", True, f"{wanted}; {_busy(wanted, nodes)}")


def _busy(wanted: Demand, nodes: Sequence[Resources]) -> str:
    import ray

    most = fitting_workers(wanted, nodes)
    free = ray.available_resources()
    cpus, gpus = free.get("CPU", 0.0), free.get("GPU", 0.0)
    return f"{most} would; now free: {cpus:g} CPUs, {gpus:g} GPUs"


def _ask_autoscaler(wanted: Demand) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[*([wanted.worker] * wanted.workers), {"CPU": 1}])


def _ask_all(recipe: Recipe) -> tuple[dict[str, _Answer], dict[str, list[str]]]:
    """Every node's answer, and the names of the files that each node sees afterwards."""
    import ray

    nodes = {node["NodeID"]: node["NodeName"] for node in ray.nodes() if node["Alive"]}
    probe = Folder(recipe.storage) / f".probe-{uuid.uuid4().hex[:12]}"
    try:
        answers = {_DRIVER: _look(recipe.model, probe, _DRIVER)}
        asked = on_every_node(_look, nodes, lambda id: (recipe.model, probe, id))
        answers.update({id: asked[id] for id in nodes})
        seen: dict[str, list[str]] = {_DRIVER: probe.names()}
        seen.update(on_every_node(_see, nodes, lambda id: (probe,)))
    finally:
        with suppress(OSError):  # a storage that cannot be written is told by its own line
            probe.delete()
    names = {**{id: f"{name} ({id[:6]})" for id, name in nodes.items()}, _DRIVER: _DRIVER}
    known = {
        names[id]: [names[other] for other in found if other in names] for id, found in seen.items()
    }
    return {names[id]: answer for id, answer in answers.items()}, known


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


def _look(model: ModelSettings, probe: Folder, name: str) -> _Answer:
    """Runs on a node: what it has, and whether it can write."""
    storage = None
    try:
        probe.create()
        probe.write(name, b"")
    except (OSError, InputError) as error:
        storage = redact(last_line(error))
    return _Answer(
        versions=installed_versions(),
        model=_unreadable(model),
        storage=storage,
        env=probe_bfloat16() if model.dtype == "bfloat16" else {},
    )


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


def _storage_line(recipe: Recipe, answers: dict[str, _Answer], seen: dict[str, list[str]]) -> Line:
    unwritable = [f"{node}: {answer.storage}" for node, answer in answers.items() if answer.storage]
    if unwritable:
        return Line("storage", False, f"{recipe.storage}: " + "; ".join(unwritable))
    blind = [
        f"{node} does not see what {other} wrote"
        for node, found in seen.items()
        for other in answers
        if other not in found
    ]
    if blind:
        cure = "give a folder that all nodes share, s3:// or gs://"
        return Line("storage", False, f"{recipe.storage}: {'; '.join(blind)}; {cure}")
    return Line("storage", True, f"{recipe.storage}: written by every node, read by all")
