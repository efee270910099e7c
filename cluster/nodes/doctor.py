"""Checks of every node of a cluster; runs on the cluster, as a job."""

import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...training.common.errors import InputError
from ...training.common.versions import installed_versions
from ...training.launch.network import interface_of
from ..gpus import Gpu, gpus_here
from .probes import Line, on_every_node, render_lines, try_storage
from .token import probe

_MAX_SKEW_SECONDS = 2.0
_METRICS_SECONDS = 2.0
_HEAD_METRICS = (44217, 44227)
"""Ports of the autoscaler and of the dashboard on the head."""


@dataclass(frozen=True)
class _Node:
    """What a node reports."""

    versions: dict[str, str]
    interface: str
    """Network interface that has the node's Ray address."""
    gpus: tuple[Gpu, ...]
    clock: float
    """Seconds since 1970."""


def main(storage: str | None) -> int:
    """Print the checks; returns exit code 2 if one failed, else 0."""
    import ray

    context = ray.init(address="auto", log_to_driver=False, logging_level="error")
    lines = [*examine(storage), _dashboard(f"http://{context.dashboard_url}")]
    print(render_lines(lines))
    return 0 if all(line.is_good for line in lines) else InputError.exit_code


def examine(storage: str | None) -> list[Line]:
    """Check the initialised cluster.

    Args:
        storage: a folder or URI that all nodes must share; None skips that check.
    """
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    names = {node["NodeID"]: node["NodeName"] for node in alive}
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in alive}
    # The first round starts the worker processes; the second is quick enough to compare clocks.
    on_every_node(_inspect_node, names, lambda id: (addresses[id],))
    skews, nodes = {}, {}
    for id, name in names.items():
        before = time.time()
        nodes[id] = on_every_node(_inspect_node, {id: name}, lambda id: (addresses[id],))[id]
        after = time.time()
        skews[id] = max(before - nodes[id].clock, nodes[id].clock - after, 0.0)
    lines = [_node_line(names[id], addresses[id], node, skews[id]) for id, node in nodes.items()]
    lines += [_versions(names, nodes), _metrics(alive)]
    return lines if storage is None else [*lines, try_storage(storage)]


def _inspect_node(address: str) -> _Node:
    return _Node(installed_versions(), interface_of(address) or "unknown", gpus_here(), time.time())


def _node_line(name: str, address: str, node: _Node, skew: float) -> Line:
    gpus = "; ".join(map(str, node.gpus)) or "no GPU"
    is_good = skew <= _MAX_SKEW_SECONDS
    clock = f"clock within {max(skew, 0.1):.1f} s" if is_good else f"clock is {skew:.1f} s off"
    return Line("node", is_good, f"{name} at {address} on {node.interface}: {gpus}; {clock}")


def _versions(names: dict[str, str], nodes: dict[str, _Node]) -> Line:
    ours = installed_versions()
    faults = [
        f"{names[id]} has {name} {version}, the head {ours[name]}"
        for id, node in nodes.items()
        for name, version in node.versions.items()
        if version != ours[name]
    ]
    same = ", ".join(f"{name} {version}" for name, version in ours.items())
    return Line("versions", not faults, "; ".join(faults) or f"{same} on every node")


def _metrics(nodes: Sequence[dict[str, Any]]) -> Line:
    """Ray's figures for Prometheus, which it serves to everyone; it has no setting for that."""
    addresses = [
        f"{node['NodeManagerAddress']}:{port}"
        for node in nodes
        for port in (node["MetricsExportPort"], *(_HEAD_METRICS if _is_head(node) else ()))
    ]
    answering = [address for address in addresses if _serves_metrics(address)]
    if not answering:
        return Line("metrics", True, "no port serves metrics")
    text = f"{', '.join(answering)}: /metrics answers without a token; close them in a firewall"
    return Line("metrics", True, text, warns=True)


def _is_head(node: dict[str, Any]) -> bool:
    return "node:__internal_head__" in node["Resources"]


def _serves_metrics(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=_METRICS_SECONDS):
            return True
    except (OSError, ValueError):
        return False


def _dashboard(url: str) -> Line:
    if probe(url) == "token":
        return Line("dashboard", True, f"{url} requires a token")
    return Line(
        "dashboard",
        False,
        f"{url} answers without a token: anyone who reaches it can run code here; start Ray with "
        "RAY_AUTH_MODE=token",
    )
