"""The manifests and the Dockerfile that ship in k8s/."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.manifests import ROOT, check_builtin, check_ray, needs_kuberay_schemas

from finray.cluster.kubernetes.overlays import overlay_names, ray_cluster

K8S = ROOT / "k8s"
OVERLAYS = overlay_names()
KUSTOMIZATIONS = ["namespace", "base", "gpu", *(f"overlays/{name}" for name in OVERLAYS)]
BUILTIN = {
    *("Namespace", "ServiceAccount", "NetworkPolicy", "PersistentVolumeClaim"),
    "PodDisruptionBudget",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on PATH")


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def files_of(folder: Path) -> set[Path]:
    """Files that a kustomization refers to, with those of the kustomizations below it."""
    (kustomization,) = documents(folder / "kustomization.yaml")
    names = [*kustomization["resources"], *(p["path"] for p in kustomization.get("patches", []))]
    matches = {folder / "kustomization.yaml"}
    for path in ((folder / name).resolve() for name in names):
        matches |= files_of(path) if path.is_dir() else {path}
    return matches


def kustomize(folder: Path) -> list[Any]:
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def test_the_overlays() -> None:
    assert OVERLAYS == ["cpu", "gpu", "gpu-spot-elastic", "kueue"]


def test_every_file_is_part_of_an_overlay() -> None:
    used = {path for name in OVERLAYS for path in files_of(K8S / "overlays" / name)}
    assert all(path.is_file() for path in used)
    assert used == set(K8S.rglob("*.yaml"))


@pytest.mark.parametrize("folder", KUSTOMIZATIONS)
def test_every_patch_has_a_target(folder: str) -> None:
    (kustomization,) = documents(K8S / folder / "kustomization.yaml")
    files = files_of(K8S / folder)
    kinds = {
        document["kind"] for path in files for document in documents(path) if "kind" in document
    }
    for patch in kustomization.get("patches", []):
        assert patch["target"]["kind"] in kinds
        (operations,) = documents(K8S / folder / patch["path"])
        assert {operation["op"] for operation in operations} <= {"add", "replace"}


@needs_kuberay_schemas
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_ray_cluster_of_an_overlay_is_valid(overlay: str) -> None:
    check_ray(ray_cluster(overlay))


@needs_kubectl
@needs_kuberay_schemas
@pytest.mark.parametrize("folder", KUSTOMIZATIONS)
def test_what_kustomize_makes_is_valid(folder: str) -> None:
    manifests = kustomize(K8S / folder)
    for manifest in manifests:
        if manifest["kind"] == "RayCluster":
            check_ray(manifest)
        # No schema of Kueue's own kinds is at hand.
        elif not manifest["apiVersion"].startswith("kueue.x-k8s.io/"):
            check_builtin(manifest)
    kinds = {manifest["kind"] for manifest in manifests}
    assert kinds >= BUILTIN
    assert ("RayCluster" in kinds) == (folder != "namespace")
    namespaces = {manifest["metadata"].get("namespace", "finray") for manifest in manifests}
    assert namespaces == {"finray"}


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_finray_reads_an_overlay_as_kustomize_does(overlay: str) -> None:
    made = [each for each in kustomize(K8S / "overlays" / overlay) if each["kind"] == "RayCluster"]
    for cluster in made:
        del cluster["metadata"]["namespace"]
    assert made == [ray_cluster(overlay)]


def test_only_the_namespace_and_the_operator_reach_ray() -> None:
    (policy,) = documents(K8S / "namespace" / "network-policy.yaml")
    assert policy["spec"]["podSelector"] == {} and policy["spec"]["policyTypes"] == ["Ingress"]
    namespace, operator = policy["spec"]["ingress"]
    assert namespace == {"from": [{"podSelector": {}}]}
    (source,) = operator["from"]
    assert "kuberay-system" in source["namespaceSelector"]["matchLabels"].values()
    assert [port["port"] for port in operator["ports"]] == [8265]


def test_no_manifest_holds_a_secret() -> None:
    for path in K8S.rglob("*.yaml"):
        for document in documents(path):
            assert not isinstance(document, dict) or document.get("kind") != "Secret", path
        assert not re.search(r"hf_[A-Za-z0-9]{16}|AKIA[A-Z0-9]{16}|stringData", path.read_text())


def test_the_ray_version_is_the_pinned_one() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ray=={ray_cluster('cpu')['spec']['rayVersion']}" in pins


def test_every_file_is_in_the_wheel() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["finray.k8s"]
    shipped = {path for pattern in patterns for path in K8S.glob(pattern)}
    present = {path for path in K8S.rglob("*") if path.is_file()}
    assert shipped == {path for path in present if path.suffix not in (".py", ".pyc")}


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continued lines joined."""
    lines = (K8S / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    pairs = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(name.upper(), " ".join(arguments.split())) for name, arguments in pairs]


def test_the_image_runs_as_its_own_user() -> None:
    stages = [index for index, (name, _) in enumerate(instructions()) if name == "FROM"]
    final = instructions()[stages[-1] :]
    assert len(stages) == 2
    users = [arguments for name, arguments in final if name == "USER"]
    head = ray_cluster("cpu")["spec"]["headGroupSpec"]["template"]["spec"]["securityContext"]
    assert users == [f"{head['runAsUser']}:{head['runAsGroup']}"] and head["runAsUser"] != 0
    copied = [arguments for name, arguments in final if name == "COPY"]
    assert copied and all(arguments.startswith("--from=build ") for arguments in copied)
    # KubeRay's probes call it.
    assert any("wget" in arguments for name, arguments in final if name == "RUN")


def test_the_image_installs_pinned_versions_only() -> None:
    runs = [arguments for name, arguments in instructions() if name == "RUN"]
    installs = [command for run in runs for command in run.split("&&") if "pip install" in command]
    dependencies, finray = installs
    assert "--constraint constraints.txt" in dependencies
    assert "--no-deps ." in finray


def test_the_build_context_holds_what_is_copied_and_no_more() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {
        source
        for name, arguments in instructions()
        if name == "COPY" and not arguments.startswith("--from")
        for source in arguments.split()[:-1]
    }
    assert "*" in ignored and copied == allowed
    assert all((ROOT / source).exists() for source in copied)
    packages = PROJECT["tool"]["setuptools"]["packages"]
    assert {name.split(".")[1] for name in packages if name != "finray"} <= copied


def test_the_image_takes_no_secret() -> None:
    settings = [arguments for name, arguments in instructions() if name in ("ARG", "ENV")]
    assert not [each for each in settings if re.search(r"TOKEN|SECRET|PASSWORD|KEY", each, re.I)]
