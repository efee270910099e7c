"""Whether a cluster can hold a run's workers, and what would fit."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..common.errors import InputError
from ..config.sections import ScaleSettings

Resources = dict[str, float]
"""A node's resources by Ray's names: CPU, GPU, …"""


@dataclass(frozen=True)
class Demand:
    """What the workers of a run hold. The tasks that stream its data hold no CPU."""

    least: int
    most: int
    cpus: float
    """Of one worker."""
    gpus: float
    """Of one worker."""

    @property
    def worker(self) -> Resources:
        """One worker's resources."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}

    def __str__(self) -> str:
        count = str(self.most) if self.least == self.most else f"{self.least} to {self.most}"
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        return f"{count} workers of {self.cpus:g} CPU{gpus} each"


def cluster_nodes() -> list[Resources]:
    """The resources of each node of the initialised Ray that lives and will stay."""
    import ray

    leaving = draining_nodes()
    return [
        dict(node["Resources"])
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    ]


def draining_nodes() -> frozenset[str]:
    """Ids of the nodes that will be taken away: a spot instance's notice, `ray drain-node`."""
    # Ray has no public word for it; its own Train asks the same.
    from ray._private.state import state

    return frozenset(state.get_draining_nodes())


def demand(scale: ScaleSettings, nodes: Sequence[Resources]) -> Demand:
    """What a run asks of these nodes; gpus_per_worker auto takes one where there are any."""
    gpus = scale.gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if any(node.get("GPU", 0.0) > 0 for node in nodes) else 0.0
    cpus = float(scale.cpus_per_worker)
    return Demand(scale.least_workers, scale.most_workers, cpus, float(gpus))


def fitting_workers(wanted: Demand, nodes: Sequence[Resources]) -> int:
    """How many such workers the nodes hold."""
    return sum(_on_node(wanted, node) for node in nodes)


def check_fits(wanted: Demand, nodes: Sequence[Resources]) -> int:
    """Ray would wait for ever for what the cluster does not have.

    Returns:
        How many workers there is room for, at most `wanted.most`.

    Raises:
        InputError: not even `wanted.least`: what is missing, and what would fit.
    """
    fits = fitting_workers(wanted, nodes)
    if fits >= wanted.least:
        return min(fits, wanted.most)
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    missing = []
    if cpus < wanted.least * wanted.cpus:
        missing.append(f"{wanted.least * wanted.cpus - cpus:g} CPUs")
    if gpus < wanted.least * wanted.gpus:
        missing.append(f"{wanted.least * wanted.gpus - gpus:g} GPUs")
    lacks = " and ".join(missing) or "nodes large enough for a worker"
    cure = f"scale.workers={fits} would fit" if fits else "not one worker would fit"
    raise InputError(
        f"scale: {wanted} do not fit a cluster of {len(nodes)} nodes with {cpus:g} CPUs and "
        f"{gpus:g} GPUs: it lacks {lacks}; {cure}, or add nodes"
    )


def ask_autoscaler(wanted: Demand | None) -> None:
    """Where the cluster has an autoscaler, it brings and keeps nodes for the workers; None ends it.

    Otherwise it would keep them after the run.
    """
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[] if wanted is None else [wanted.worker] * wanted.most)


def _on_node(wanted: Demand, node: Resources) -> int:
    rooms = [node.get(kind, 0.0) / amount for kind, amount in wanted.worker.items() if amount]
    return int(min(rooms))
