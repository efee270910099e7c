"""The resources that a run's workers need, and whether they fit into a cluster."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..common.errors import InputError
from ..config.sections import ScaleSettings

Resources = dict[str, float]
"""A node's resources by Ray's names: CPU, GPU, …"""


@dataclass(frozen=True)
class WorkerRequest:
    """Number and resources of a run's workers. The tasks that stream the data hold no CPU."""

    min: int
    max: int
    cpus: float
    """CPUs of one worker."""
    gpus: float
    """GPUs of one worker; may be a fraction."""

    @property
    def worker(self) -> Resources:
        """One worker's resources."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}

    def __str__(self) -> str:
        count = str(self.max) if self.min == self.max else f"{self.min} to {self.max}"
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        return f"{count} workers of {self.cpus:g} CPU{gpus} each"


def cluster_nodes() -> list[Resources]:
    """Resources of each node of the initialised Ray that is alive and not draining."""
    import ray

    leaving = draining_nodes()
    return [
        dict(node["Resources"])
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    ]


def draining_nodes() -> frozenset[str]:
    """Ids of the nodes that will be removed, after a spot notice or `ray drain-node`."""
    # Ray has no public API for it; Ray Train itself uses this one.
    from ray._private.state import state

    return frozenset(state.get_draining_nodes())


def worker_request(scale: ScaleSettings, nodes: Sequence[Resources]) -> WorkerRequest:
    """The workers of a run on these nodes; gpus_per_worker auto takes one if there are any."""
    gpus = scale.gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if any(node.get("GPU", 0.0) > 0 for node in nodes) else 0.0
    cpus = float(scale.cpus_per_worker)
    return WorkerRequest(scale.least_workers, scale.most_workers, cpus, float(gpus))


def fitting_workers(request: WorkerRequest, nodes: Sequence[Resources]) -> int:
    """Number of workers of this size that fit on the nodes."""
    return sum(_on_node(request, node) for node in nodes)


def check_fits(request: WorkerRequest, nodes: Sequence[Resources]) -> int:
    """Refuse workers that the cluster cannot hold: Ray would wait for them for ever.

    Returns:
        How many workers fit, at most `request.max`.

    Raises:
        InputError: fewer than `request.min` fit; the message lists what is missing.
    """
    fits = fitting_workers(request, nodes)
    if fits >= request.min:
        return min(fits, request.max)
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    missing = []
    if cpus < request.min * request.cpus:
        missing.append(f"{request.min * request.cpus - cpus:g} CPUs")
    if gpus < request.min * request.gpus:
        missing.append(f"{request.min * request.gpus - gpus:g} GPUs")
    lacks = " and ".join(missing) or "nodes large enough for a worker"
    remedy = f"scale.workers={fits} would fit" if fits else "ask for less, as not one worker fits"
    raise InputError(
        f"scale: {request} do not fit a cluster of {len(nodes)} nodes with {cpus:g} CPUs and "
        f"{gpus:g} GPUs: it lacks {lacks}; {remedy}, or add nodes"
    )


def request_from_autoscaler(request: WorkerRequest | None) -> None:
    """Let an autoscaler, if the cluster has one, add and keep nodes for the workers.

    None ends the request: it would otherwise keep the nodes after the run.
    """
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[] if request is None else [request.worker] * request.max)


def _on_node(request: WorkerRequest, node: Resources) -> int:
    fits = [node.get(kind, 0.0) / amount for kind, amount in request.worker.items() if amount]
    return int(min(fits))
