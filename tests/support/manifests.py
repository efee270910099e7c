"""What a Kubernetes API server and KubeRay's operator would say of a manifest, without either."""

import copy
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = "1.34"
SCHEMAS = Path(os.environ.get("FINRAY_KUBERAY_SCHEMAS", ROOT.parent / "shared" / "kuberay"))
_FILES = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}

needs_kuberay_schemas = pytest.mark.skipif(
    not all((SCHEMAS / name).is_file() for name in _FILES.values()),
    reason=f"KubeRay's custom resource definitions are not at {SCHEMAS}; name their folder in "
    "FINRAY_KUBERAY_SCHEMAS",
)


def recipe_text(job: dict[str, Any]) -> str:
    """The recipe as the head sees it in a file."""
    head, _ = pod_templates(job["spec"]["rayClusterSpec"])
    volumes = {volume["name"]: volume for volume in head["spec"]["volumes"]}
    (item,) = volumes["recipe"]["downwardAPI"]["items"]
    assert item["path"] == "recipe.yaml"
    path = re.fullmatch(r"metadata\.annotations\['(.*)'\]", item["fieldRef"]["fieldPath"])
    assert path is not None
    return str(head["metadata"]["annotations"][path[1]])


def check_builtin(manifest: dict[str, Any]) -> None:
    """Validate a manifest of Kubernetes' own kinds; unknown fields are errors."""
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def check_ray(manifest: dict[str, Any]) -> None:
    """Validate a RayCluster or RayJob as the API server does, then as the operator does."""
    schema = _schema(manifest["kind"])
    defaulted = copy.deepcopy(manifest)
    _apply_defaults(schema, defaulted)
    jsonschema.Draft7Validator(schema).validate(defaulted)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", manifest["metadata"]["name"])
    assert len(manifest["metadata"]["name"]) <= 47
    spec = manifest["spec"]
    if manifest["kind"] == "RayJob":
        _check_job_rules(spec)
        spec = spec["rayClusterSpec"]
    _check_cluster_rules(spec)
    for template in pod_templates(spec):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        check_builtin({**pod, "metadata": {**template["metadata"], "name": "pod"}})


def pod_templates(cluster_spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods of the head and of each worker group."""
    groups = [cluster_spec["headGroupSpec"], *cluster_spec["workerGroupSpecs"]]
    return [group["template"] for group in groups]


def _check_job_rules(spec: dict[str, Any]) -> None:
    """What KubeRay's operator refuses of a RayJob beyond its schema."""
    assert spec["shutdownAfterJobFinishes"] or not spec.get("suspend")
    assert spec["shutdownAfterJobFinishes"] or not spec.get("ttlSecondsAfterFinished")
    assert "deletionStrategy" not in spec or "ttlSecondsAfterFinished" not in spec
    if spec["submissionMode"] == "SidecarMode":
        assert "submitterPodTemplate" not in spec and "submitterConfig" not in spec
        head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        assert head.get("restartPolicy", "Never") == "Never"


def _check_cluster_rules(spec: dict[str, Any]) -> None:
    """What KubeRay's operator refuses of a RayCluster beyond its schema."""
    assert spec["authOptions"] == {"mode": "token"}
    assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52, 0)
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    if spec.get("enableInTreeAutoscaling"):
        assert spec["autoscalerOptions"]["version"] == "v2"
        for template in pod_templates(spec):
            assert template["spec"].get("restartPolicy", "Never") == "Never"


@lru_cache
def _schema(kind: str) -> dict[str, Any]:
    """The schema of version v1, in which unknown fields are errors instead of being dropped."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    definition = yaml.load((SCHEMAS / _FILES[kind]).read_text(encoding="utf-8"), loader)
    versions = {version["name"]: version for version in definition["spec"]["versions"]}
    schema: dict[str, Any] = versions["v1"]["schema"]["openAPIV3Schema"]
    _forbid_unknown(schema)
    return schema


def _forbid_unknown(schema: Any) -> None:
    if isinstance(schema, list):
        for child in schema:
            _forbid_unknown(child)
    if not isinstance(schema, dict):
        return
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
        for child in schema["properties"].values():
            _forbid_unknown(child)
    for key in ("items", "additionalProperties"):
        _forbid_unknown(schema.get(key))


def _apply_defaults(schema: dict[str, Any], value: Any) -> None:
    if isinstance(value, list):
        for item in value:
            _apply_defaults(schema.get("items", {}), item)
    if not isinstance(value, dict):
        return
    for name, child in schema.get("properties", {}).items():
        if "default" in child:
            value.setdefault(name, copy.deepcopy(child["default"]))
        if name in value:
            _apply_defaults(child, value[name])
