"""Whether a cluster can hold a run's workers, and what would fit."""

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import InputError
from .recipe import ScaleSettings

Resources = dict[str, float]
"""A node's resources by Ray's names: CPU, GPU, …"""

_DATA_CPUS = 1.0
"""Left free: without it the tasks that stream the data never start."""


@dataclass(frozen=True)
class Demand:
    """What the workers of a run hold."""

    workers: int
    cpus: float
    """Of one worker."""
    gpus: float
    """Of one worker."""

    @property
    def worker(self) -> Resources:
        """One worker's resources."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        return f"{self.workers} workers of {self.cpus:g} CPU{gpus} each, and 1 CPU for data tasks"


def cluster_nodes() -> list[Resources]:
    """The resources of each living node of the initialised Ray."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def demand(scale: ScaleSettings, nodes: Sequence[Resources]) -> Demand:
    """What a run asks of these nodes; gpus_per_worker auto takes one where there are any."""
    gpus = scale.gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if any(node.get("GPU", 0.0) > 0 for node in nodes) else 0.0
    return Demand(scale.workers, float(scale.cpus_per_worker), float(gpus))


def fitting_workers(wanted: Demand, nodes: Sequence[Resources]) -> int:
    """How many such workers the nodes hold beside a CPU for the data tasks."""
    most = held(wanted, nodes)
    left = sum(node.get("CPU", 0.0) for node in nodes) - _DATA_CPUS
    return max(0, min(most, int(left / wanted.cpus)))


def held(wanted: Demand, nodes: Sequence[Resources]) -> int:
    """How many such workers the nodes hold, each on one node."""
    return sum(_on_node(wanted, node) for node in nodes)


def check_fits(wanted: Demand, nodes: Sequence[Resources]) -> None:
    """Ray would wait for ever for what the cluster does not have.

    Raises:
        InputError: what is missing, and what would fit.
    """
    fits = fitting_workers(wanted, nodes)
    if fits >= wanted.workers:
        return
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    missing = []
    if cpus < wanted.workers * wanted.cpus + _DATA_CPUS:
        missing.append(f"{wanted.workers * wanted.cpus + _DATA_CPUS - cpus:g} CPUs")
    if gpus < wanted.workers * wanted.gpus:
        missing.append(f"{wanted.workers * wanted.gpus - gpus:g} GPUs")
    lacks = " and ".join(missing) or "nodes large enough for a worker"
    cure = f"scale.workers={fits} would fit" if fits else "not one worker would fit"
    raise InputError(
        f"scale: {wanted} do not fit a cluster of {len(nodes)} nodes with {cpus:g} CPUs and "
        f"{gpus:g} GPUs: it lacks {lacks}; {cure}, or add nodes"
    )


def _on_node(wanted: Demand, node: Resources) -> int:
    rooms = [node.get(kind, 0.0) / amount for kind, amount in wanted.worker.items() if amount]
    return int(min(rooms))
