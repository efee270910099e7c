"""How many trials a cluster holds at a time, and what each takes of it."""

from collections.abc import Sequence

from ..training.common.errors import InputError
from ..training.config.sections import ScaleSettings
from ..training.launch.resources import Resources, cluster_nodes, demand, fitting_workers

_DRIVER_CPUS = 0.1
"""Of a trial that only starts and follows Ray Train workers; Ray Tune does not take 0."""


def slot_resources(scale: ScaleSettings) -> dict[str, float]:
    """What a trial's own process takes."""
    if scale.most_workers > 1:
        return {"CPU": _DRIVER_CPUS}
    return demand(scale, cluster_nodes()).worker


def decide_concurrency(wanted: int | str, scale: ScaleSettings) -> int:
    """Trials at a time on the initialised Ray.

    Raises:
        InputError: where it can never hold so many, or not even one.
    """
    nodes = cluster_nodes()
    most = trials_held(scale, nodes)
    if wanted == "auto" and most:
        return most
    if most < 1 or int(wanted) > most:
        one = demand(scale, nodes)
        gpus = f" and {one.gpus:g} GPU" if one.gpus else ""
        workers = f"{one.least} x " if one.least > 1 else ""
        raise InputError(
            f"concurrency: {wanted} trials of {workers}{one.cpus:g} CPU{gpus} each are wanted, and "
            f"the cluster of {len(nodes)} nodes holds {most} at a time; lower concurrency or "
            "scale, or add nodes"
        )
    return int(wanted)


def trials_held(scale: ScaleSettings, nodes: Sequence[Resources]) -> int:
    """How many trials the nodes hold at a time, each with as many workers as it may have."""
    one = demand(scale, nodes)
    if one.most <= 1:
        return fitting_workers(one, nodes)
    have = sum(node.get("CPU", 0.0) for node in nodes)
    trials = 0
    for workers in (one.most, one.least):
        with_driver = int(have / (workers * one.cpus + _DRIVER_CPUS))
        trials = trials or min(fitting_workers(one, nodes) // workers, with_driver)
    return trials
