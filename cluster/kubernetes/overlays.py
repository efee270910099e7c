"""The Kubernetes overlays that ship with finray, read as kustomize reads them.

Only what the shipped files use is understood: `resources`, and JSON patches (RFC 6902) of the
RayCluster. So a RayJob has the same pods as the interactive cluster of the same overlay.
"""

from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import yaml

from ... import k8s
from ...training.common.errors import InputError

Manifest = dict[str, Any]
"""A Kubernetes object."""


def overlay_names() -> list[str]:
    """Names of the shipped overlays, sorted."""
    return sorted(folder.name for folder in _shipped("overlays").iterdir() if folder.is_dir())


def ray_cluster(overlay: str) -> Manifest:
    """The RayCluster of an overlay.

    Raises:
        InputError: there is no such overlay.
    """
    names = overlay_names()
    if overlay not in names:
        raise InputError(f"--overlay {overlay}: there is none; choose {', '.join(names)}")
    return _kustomize(f"overlays/{overlay}")


def _kustomize(folder: str) -> Manifest:
    """The one RayCluster among a kustomization's resources, patched."""
    kustomization = _read(f"{folder}/kustomization.yaml")[0]
    clusters = [
        cluster
        for name in kustomization["resources"]
        for cluster in _ray_clusters(_normal(f"{folder}/{name}"))
    ]
    cluster = clusters[0]
    for patch in kustomization.get("patches", []):
        if patch["target"]["kind"] == "RayCluster":
            for operation in _read(f"{folder}/{patch['path']}")[0]:
                _apply(cluster, operation)
    return cluster


def _ray_clusters(path: str) -> list[Manifest]:
    if path.endswith(".yaml"):
        return [document for document in _read(path) if document["kind"] == "RayCluster"]
    return [] if path == "namespace" else [_kustomize(path)]


def _apply(document: Manifest, operation: dict[str, Any]) -> None:
    """Apply one operation of a JSON patch, `add` or `replace`."""
    *parents, last = operation["path"].removeprefix("/").split("/")
    target: Any = document
    for part in parents:
        target = target[int(part) if isinstance(target, list) else part]
    if isinstance(target, list) and last == "-":
        target.append(operation["value"])
    else:
        target[last] = operation["value"]


def _read(path: str) -> list[Any]:
    return list(yaml.safe_load_all(_shipped(path).read_text(encoding="utf-8")))


def _shipped(path: str) -> Traversable:
    return files(k8s).joinpath(*path.split("/"))


def _normal(path: str) -> str:
    """The path without `..`, which resources of a zipped package do not resolve."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)
