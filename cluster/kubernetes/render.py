"""The manifest of a run on Kubernetes: a RayJob, and nothing beside it that would outlive it."""

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import yaml

from ...training.common.errors import InputError
from ...training.common.yaml_text import dump_yaml
from ...training.config.places import locates
from ...training.config.recipe import Recipe
from ...training.config.sections import ScaleSettings
from .overlays import Manifest, ray_cluster
from .portable import check_reachable

LONGEST_NAME = 47
"""Characters; KubeRay's limit for a RayJob, whose name it extends."""
LARGEST_RECIPE = 200 * 2**10
"""Bytes; Kubernetes' limit for all annotations of an object is 256 KiB."""
RETRIES = 3

_GPU = "nvidia.com/gpu"
_RECIPE_FOLDER = "/etc/finray"
_ANNOTATION = "finray.dev/recipe"


@dataclass(frozen=True)
class Target:
    """Where and with what the pods run."""

    overlay: str
    namespace: str
    image: str | None = None
    """None: the overlay's own."""
    memory: str | None = None
    """Of a worker's pod, as a Kubernetes quantity; None: the overlay's own."""
    least_memory: int = 0
    """Bytes that a worker's pod gets at least; 0 unless GPUs are chosen with --gpu."""
    disk: str | None = None
    """Ephemeral storage of every pod, likewise."""


@locates
def render(recipe: Recipe, target: Target) -> str:
    """The manifest of a run, as YAML: a RayJob that holds the recipe.

    Args:
        recipe: as `load_recipe` gives it.
        target: where it runs.

    Raises:
        InputError: the target is not valid, or the recipe holds a secret, names a path of this
            machine, trains without workers, asks for GPUs that the overlay does not have, or is
            too large.
    """
    _check(target)
    cluster = ray_cluster(target.overlay)
    shared = check_reachable(recipe, _mount(cluster))
    recipe = _with_overlay_gpus(recipe, cluster, target)
    name = object_name(recipe.name)
    _fit_cluster(cluster, recipe.scale, target)
    _name_pods(cluster, name)
    _mount_recipe(cluster, recipe)
    if not shared:
        _leave_out_claim(cluster)
    metadata = {
        "name": name,
        "namespace": target.namespace,
        "labels": {
            "app.kubernetes.io/part-of": "finray",
            "app.kubernetes.io/instance": name,
        },
    }
    job = _ray_job(metadata, recipe.name, cluster)
    return yaml.dump(job, Dumper=_Dumper, sort_keys=False, width=100)


def object_name(run: str) -> str:
    """A Kubernetes name (DNS label that starts with a letter) of a run's name.

    A name that is not valid unchanged gets eight digits of its hash, so that different runs
    have different names; so does one that ends like that already.
    """
    if re.fullmatch(rf"[a-z]([a-z0-9-]{{0,{LONGEST_NAME - 2}}}[a-z0-9])?", run) and not re.search(
        r"-[0-9a-f]{8}$", run
    ):
        return run
    stem = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if not stem[:1].isalpha():
        stem = f"run-{stem}"
    digest = hashlib.sha256(run.encode()).hexdigest()[:8]
    return f"{stem[: LONGEST_NAME - 9].rstrip('-')}-{digest}"


def _check(target: Target) -> None:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", target.namespace):
        raise InputError(
            f"--namespace {target.namespace}: expected small letters, digits and '-', at most 63"
        )
    for option, amount in (("--memory", target.memory), ("--disk", target.disk)):
        if amount and not re.fullmatch(r"[1-9][0-9]*([kMGT]|[KMGT]i)?", amount):
            raise InputError(f"{option} {amount}: expected a quantity such as 64Gi")


def _with_overlay_gpus(recipe: Recipe, cluster: Manifest, target: Target) -> Recipe:
    """The recipe with `gpus_per_worker` as a number, which `auto` means on this overlay."""
    scale = recipe.scale
    overlay_gpus = _GPU in _container(_worker_group(cluster))["resources"]["limits"]
    if target.least_memory and not overlay_gpus:
        raise InputError(
            f"--gpu: the overlay {target.overlay} has no GPUs; choose --overlay gpu, or leave out "
            "--gpu"
        )
    if scale.most_workers == 0:
        raise InputError(
            "scale.workers: 0 trains in the driver's own process, and a RayJob has workers; add "
            "--set scale.workers=1"
        )
    gpus = float(overlay_gpus) if scale.gpus_per_worker == "auto" else scale.gpus_per_worker
    if gpus != int(gpus):
        raise InputError(
            f"scale.gpus_per_worker: {gpus:g}: a pod takes whole GPUs; give a whole number"
        )
    if gpus and not overlay_gpus:
        raise InputError(
            f"scale.gpus_per_worker: {gpus:g}, and the overlay has no GPUs; choose --overlay gpu"
        )
    if overlay_gpus and not gpus:
        raise InputError("scale.gpus_per_worker: 0, and the overlay has GPUs; choose --overlay cpu")
    return recipe.model_copy(update={"scale": scale.model_copy(update={"gpus_per_worker": gpus})})


def _fit_cluster(cluster: Manifest, scale: ScaleSettings, target: Target) -> None:
    """Give each training worker a pod, with one more CPU for the tasks that feed it.

    Where there is an autoscaler, they come when the driver asks for them, not before.
    """
    group = _worker_group(cluster)
    scales = cluster["spec"].get("enableInTreeAutoscaling", False)
    group.update(
        replicas=0 if scales else scale.most_workers,
        minReplicas=0 if scales else scale.least_workers,
        maxReplicas=scale.most_workers,
    )
    amounts = {"cpu": str(scale.cpus_per_worker + 1)}
    if scale.gpus_per_worker:
        amounts[_GPU] = str(int(float(scale.gpus_per_worker)))
    if target.memory:
        amounts["memory"] = target.memory
    resources = _container(group)["resources"]
    if not target.memory and target.least_memory > _bytes(resources["limits"]["memory"]):
        amounts["memory"] = _gib(target.least_memory)
    for kind in ("requests", "limits"):
        resources[kind].update(amounts)
    for each in _groups(cluster):
        if target.image:
            _container(each)["image"] = target.image
        if target.disk:
            for kind in ("requests", "limits"):
                _container(each)["resources"][kind]["ephemeral-storage"] = target.disk


def memory_note(target: Target) -> str | None:
    """What to know of a memory that is less than a worker needs; None without that."""
    if not target.memory or _bytes(target.memory) >= target.least_memory:
        return None
    return (
        f"--memory {target.memory} is less than {_gib(target.least_memory)}, which a worker may "
        "take of its machine's memory"
    )


def _gib(size: int) -> str:
    return f"{-(-size // 2**30)}Gi"


def _bytes(quantity: str) -> int:
    """Bytes of a quantity such as 64Gi."""
    number = quantity.rstrip("kKMGTi")
    unit = quantity.removeprefix(number)
    step = 1024 if unit.endswith("i") else 1000
    return int(number) * int(step ** " kMGT".index(unit[:1].replace("K", "k") or " "))


def _name_pods(cluster: Manifest, name: str) -> None:
    for group in _groups(cluster):
        group["template"]["metadata"]["labels"]["app.kubernetes.io/instance"] = name


def _mount_recipe(cluster: Manifest, recipe: Recipe) -> None:
    """Mount the recipe on the head, where the driver runs; it is an annotation of that pod."""
    text = dump_yaml(recipe.model_dump(mode="json"))
    size = len(text.encode())
    if size > LARGEST_RECIPE:
        raise InputError(
            f"the recipe is {size:,} bytes with the files in it, and a pod's annotations hold "
            f"{LARGEST_RECIPE:,}; put its large parts at s3://…, gs://… or into the image"
        )
    template = cluster["spec"]["headGroupSpec"]["template"]
    template["metadata"].setdefault("annotations", {})[_ANNOTATION] = text
    source = {"fieldPath": f"metadata.annotations['{_ANNOTATION}']"}
    items = [{"path": "recipe.yaml", "fieldRef": source}]
    template["spec"]["volumes"].append({"name": "recipe", "downwardAPI": {"items": items}})
    _container(cluster["spec"]["headGroupSpec"])["volumeMounts"].append(
        {"name": "recipe", "mountPath": _RECIPE_FOLDER, "readOnly": True}
    )


def _leave_out_claim(cluster: Manifest) -> None:
    """Replace the shared volume by a local one, for a run that uses an object store alone."""
    for group in _groups(cluster):
        for volume in group["template"]["spec"]["volumes"]:
            if volume.pop("persistentVolumeClaim", None):
                volume["emptyDir"] = {}


def _ray_job(metadata: Manifest, run: str, cluster: Manifest) -> Manifest:
    labels = {**metadata["labels"], **cluster["metadata"].get("labels", {})}
    spec = cluster["spec"]
    head = spec["headGroupSpec"]["template"]["spec"]
    head["restartPolicy"] = "Never"
    # A queue suspends the job, not the cluster that the job starts later.
    suspend = {"suspend": True} if spec.pop("suspend", False) else {}
    return {
        "apiVersion": cluster["apiVersion"],
        "kind": "RayJob",
        "metadata": {**metadata, "labels": labels},
        "spec": {
            **suspend,
            "entrypoint": f"finray k8s run {_RECIPE_FOLDER}/recipe.yaml",
            "jobId": run,
            # A submitter in its own pod can hang when the head dies.
            "submissionMode": "SidecarMode",
            # Each retry is a new cluster; the run's name and storage stay, so that it resumes.
            "backoffLimit": RETRIES,
            "preRunningDeadlineSeconds": 3600,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": spec,
        },
    }


def _mount(cluster: Manifest) -> str:
    """Where the pods see the shared volume."""
    mounts = _container(_worker_group(cluster))["volumeMounts"]
    return str(next(mount["mountPath"] for mount in mounts if mount["name"] == "storage"))


def _groups(cluster: Manifest) -> list[Manifest]:
    return [cluster["spec"]["headGroupSpec"], _worker_group(cluster)]


def _worker_group(cluster: Manifest) -> Manifest:
    group: Manifest = cluster["spec"]["workerGroupSpecs"][0]
    return group


def _container(group: Manifest) -> Manifest:
    container: Manifest = group["template"]["spec"]["containers"][0]
    return container


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines readably, and no aliases."""

    def ignore_aliases(self, _: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
