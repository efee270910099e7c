"""Checks that run as small tasks on every node of the initialised cluster."""

import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ...training.common.errors import InputError, RunError, in_one_line
from ...training.common.secrets import redact
from ...training.common.storage import Folder

DRIVER = "driver"
"""Name of this process in messages."""
PROBE_SECONDS = 60.0
"""Time in which every node must answer."""


@dataclass(frozen=True)
class Line:
    """The result of one check."""

    name: str
    is_good: bool
    text: str
    warns: bool = False
    """The run will work, but something should be changed."""


def render_lines(lines: Sequence[Line]) -> str:
    """Checks as a table for people."""
    return "\n".join(f"  {line.name:10}  {_mark(line):4}  {line.text}" for line in lines)


def _mark(line: Line) -> str:
    return "WARN" if line.warns else "ok" if line.is_good else "FAIL"


def node_names() -> dict[str, str]:
    """Name in messages of each living node, by node id."""
    import ray

    alive = (node for node in ray.nodes() if node["Alive"])
    return {node["NodeID"]: f"{node['NodeName']} ({node['NodeID'][:6]})" for node in alive}


def try_storage(storage: str) -> Line:
    """Check that the driver and every node write to the storage and see each other's files."""
    names = node_names()
    probe = Folder(storage) / f".probe-{uuid.uuid4().hex[:12]}"
    try:
        faults = {DRIVER: _write(probe, DRIVER)}
        faults.update(on_every_node(_write, names, lambda id: (probe, id)))
        seen = {DRIVER: _see(probe), **on_every_node(_see, names, lambda id: (probe,))}
    finally:
        with suppress(OSError, InputError):  # the returned line reports an unreachable storage
            probe.delete()
    names[DRIVER] = DRIVER
    messages = [f"{names[id]}: {fault}" for id, fault in faults.items() if fault]
    if not messages:
        messages = [
            f"{names[id]} does not see what {names[other]} wrote"
            for id, files in seen.items()
            for other in names
            if other not in files
        ]
    if not messages:
        return Line("storage", True, f"{storage}: written by every node, read by all")
    remedy = "give a folder that all nodes share, s3:// or gs://"
    return Line("storage", False, f"{storage}: {'; '.join(messages)}; {remedy}")


def on_every_node(
    task: Callable[..., Any], nodes: dict[str, str], arguments: Callable[[str], tuple[Any, ...]]
) -> dict[str, Any]:
    """Run a task once on each node, without reserving a CPU.

    Args:
        task: runs on the node.
        nodes: the nodes' names in messages, by id.
        arguments: of the task, for a node's id.

    Returns:
        The tasks' results by node id.

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
            raise RunError(
                f"node {nodes[id]} did not answer within {PROBE_SECONDS:g} s; check that it runs "
                "and reaches the head, or remove it from the cluster"
            ) from None
        except ray.exceptions.RayError as error:
            raise RunError(
                f"node {nodes[id]} cannot run a task: {in_one_line(error)}; where finray is not "
                "installed on the nodes, finray job submit brings it along"
            ) from None
    return results


def _write(probe: Folder, name: str) -> str | None:
    """Runs on a node: write a file; returns why that failed, None if it did not."""
    try:
        probe.create().write(name, b"")
    except (OSError, InputError) as error:
        return redact(in_one_line(error))
    return None


def _see(probe: Folder) -> list[str]:
    """Runs on a node: names of the files that it sees."""
    try:
        return probe.names()
    except OSError:
        return []
