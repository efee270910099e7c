"""`finray k8s render`: valid manifests, the recipe's resources, and what is refused."""

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonschema import ValidationError
from support.manifests import ROOT, check_ray, needs_kuberay_schemas, pod_templates, recipe_text

from finray.cluster.cli.main import main
from finray.cluster.kubernetes.overlays import overlay_names
from finray.cluster.kubernetes.render import (
    LARGEST_RECIPE,
    RETRIES,
    Target,
    memory_note,
    object_name,
    render,
)
from finray.cluster.nodes.head import DRAIN_SECONDS, Head, joining_lines
from finray.training.common.errors import InputError, RunError
from finray.training.config.recipe import Recipe, load_recipe, recipe_from_dict

OVERLAYS = overlay_names()
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True)
SECRETS = {
    "HF_TOKEN": "planted-token-of-the-hub",
    "AWS_SECRET_ACCESS_KEY": "/planted/secret+key",
    "WANDB_API_KEY": "planted0123456789",
}


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "run",
        "model": {"base": "owner/model"},
        "data": {"train": [{"path": "s3://bucket/rows.jsonl"}]},
        "scale": {"workers": 2},
        "storage": "s3://bucket/runs",
    }
    return Recipe.model_validate({**values, **changes})


def rendered(of: Recipe, overlay: str = "cpu", **target: str) -> dict[str, Any]:
    """The RayJob, which is all that there is: nothing outlives it."""
    text = render(of, Target(overlay, target.pop("namespace", "finray"), **target))
    (job,) = yaml.safe_load_all(text)
    assert job["kind"] == "RayJob"
    return dict(job)


def workers(job: dict[str, Any]) -> dict[str, Any]:
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return dict(group)


def limits(group: dict[str, Any]) -> dict[str, str]:
    return dict(group["template"]["spec"]["containers"][0]["resources"]["limits"])


@pytest.mark.long
@needs_kuberay_schemas
@settings(max_examples=25, deadline=None)
@given(
    name=NAMES,
    overlay=st.sampled_from(OVERLAYS),
    count=st.integers(1, 64),
    cpus=st.integers(1, 96),
    gpus=st.sampled_from(["auto", 1]),
    shared=st.booleans(),
)
def test_every_recipe_makes_valid_manifests(
    name: str, overlay: str, count: int, cpus: int, gpus: Any, shared: bool
) -> None:
    of = recipe(
        name=name,
        scale={
            "workers": count,
            "cpus_per_worker": cpus,
            "gpus_per_worker": "auto" if overlay == "cpu" else gpus,
        },
        data={"train": [{"path": "hf://datasets/owner/rows/train.parquet"}]},
        optim={"batch_size": 64},
        storage="/mnt/finray/runs" if shared else "gs://bucket/runs",
    )
    job = rendered(of, overlay)
    check_ray(job)

    travelled = recipe_from_dict(yaml.safe_load(recipe_text(job)))
    explicit = 0.0 if overlay == "cpu" else 1.0 if gpus == "auto" else gpus
    scale = of.scale.model_copy(update={"gpus_per_worker": explicit})
    assert travelled == of.model_copy(update={"scale": scale})
    assert job["spec"]["jobId"] == name

    group = workers(job)
    starts = 0 if overlay.startswith("gpu") else count
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (
        *(starts, starts),
        count,
    )
    assert int(limits(group)["cpu"]) == cpus + 1
    assert int(limits(group).get("nvidia.com/gpu", 0)) == explicit
    for pod in pod_templates(job["spec"]["rayClusterSpec"]):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert ("persistentVolumeClaim" in volumes["storage"]) == shared
        assert pod["spec"]["terminationGracePeriodSeconds"] >= 300
        for kind in ("requests", "limits"):
            assert "ephemeral-storage" in pod["spec"]["containers"][0]["resources"][kind]
        assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory"}


@pytest.mark.long
@settings(max_examples=30, deadline=None)
@example("\x85")
@given(st.text(st.characters(codec="utf-8")))
def test_every_text_is_unchanged(text: str) -> None:
    template = "{{ messages }}" + text
    of = recipe(data={"train": [{"path": "s3://bucket/rows"}], "chat_template": template})
    travelled = recipe_from_dict(yaml.safe_load(recipe_text(rendered(of))))
    assert travelled.data.chat_template == template


@needs_kuberay_schemas
def test_the_check_of_manifests_sees_faults() -> None:
    for key, value in (("entrypiont", "a"), ("backoffLimit", "three"), ("submissionMode", 1)):
        job = rendered(recipe())
        job["spec"][key] = value
        with pytest.raises(ValidationError):
            check_ray(job)
    job = rendered(recipe())
    workers(job)["template"]["spec"]["containers"][0]["resources"]["limit"] = {}
    with pytest.raises(ValidationError):
        check_ray(job)


@given(NAMES, NAMES)
def test_names_are_valid_and_distinct(first: str, second: str) -> None:
    for name in (object_name(first), object_name(second)):
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 47
    assert (object_name(first) == object_name(second)) == (first == second)


def test_a_name_that_is_valid_stays_and_another_gets_its_hash() -> None:
    assert object_name("support-lora") == "support-lora"
    assert object_name("Support.LoRA").startswith("support-lora-")
    assert object_name("1.5b").startswith("run-1-5b-")
    hashed = object_name("a.b")
    assert object_name(hashed) != hashed
    assert len({object_name("x" * 60 + end) for end in ("a", "b")}) == 2


def test_the_job_reads_its_recipe_and_resumes_under_a_fixed_name(tmp_path: Path) -> None:
    job = rendered(recipe(name="My.run"), image="registry/finray:7")
    spec = job["spec"]
    head, worker = pod_templates(spec["rayClusterSpec"])
    folder = "/etc/finray"
    assert spec["entrypoint"] == f"finray k8s run {folder}/recipe.yaml"
    assert {"name": "recipe", "mountPath": folder, "readOnly": True} in head["spec"]["containers"][
        0
    ]["volumeMounts"]
    assert "recipe" not in {volume["name"] for volume in worker["spec"]["volumes"]}
    assert spec["backoffLimit"] > 0

    copy = tmp_path / "recipe.yaml"
    copy.write_text(recipe_text(job), encoding="utf-8")
    assert load_recipe(copy).name == "My.run"
    assert load_recipe(copy).storage == "s3://bucket/runs"

    (budget,) = yaml.safe_load_all(
        (ROOT / "k8s/namespace/disruption-budget.yaml").read_text(encoding="utf-8")
    )
    selected = budget["spec"]["selector"]["matchLabels"]
    assert selected.pop("ray.io/node-type") == "head"
    assert selected.items() <= head["metadata"]["labels"].items()
    for pod in (head, worker):
        assert pod["spec"]["containers"][0]["image"] == "registry/finray:7"
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_overlays_differ_as_intended() -> None:
    gpu = rendered(recipe(), "gpu")
    queued = rendered(recipe(), "kueue")
    spot = rendered(recipe(), "gpu-spot-elastic")
    assert "suspend" not in gpu["spec"]
    assert queued["spec"]["suspend"] and "suspend" not in queued["spec"]["rayClusterSpec"]
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "finray"
    assert spot["spec"]["rayClusterSpec"]["autoscalerOptions"]["version"] == "v2"
    keys = {each["key"] for each in workers(spot)["template"]["spec"]["tolerations"]}
    assert {"nvidia.com/gpu", "cloud.google.com/gke-spot"} <= keys
    assert "enableInTreeAutoscaling" not in queued["spec"]["rayClusterSpec"]


@pytest.mark.parametrize("overlay", ["gpu", "gpu-spot-elastic"])
def test_the_autoscaler_alone_reaches_the_api(overlay: str) -> None:
    spec = rendered(recipe(), overlay)["spec"]["rayClusterSpec"]
    (mount,) = spec["autoscalerOptions"]["volumeMounts"]
    assert mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount"
    for pod in pod_templates(spec):
        assert not pod["spec"]["automountServiceAccountToken"]
        for container in pod["spec"]["containers"]:
            assert mount["name"] not in {each["name"] for each in container["volumeMounts"]}
    head, worker = pod_templates(spec)
    assert mount["name"] in {volume["name"] for volume in head["spec"]["volumes"]}
    assert mount["name"] not in {volume["name"] for volume in worker["spec"]["volumes"]}
    assert "ephemeral-storage" in spec["autoscalerOptions"]["resources"]["limits"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_node_may_drain_for_almost_the_grace_period(overlay: str) -> None:
    for pod in pod_templates(rendered(recipe(), overlay)["spec"]["rayClusterSpec"]):
        env = {each["name"]: each["value"] for each in pod["spec"]["containers"][0]["env"]}
        assert env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == str(DRAIN_SECONDS)
        assert 0 < pod["spec"]["terminationGracePeriodSeconds"] - DRAIN_SECONDS <= 30
    line = joining_lines(Head(1, "head:6379", "http://127.0.0.1:8265"))
    assert f" RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S={DRAIN_SECONDS} ray start --block " in line


def test_memory_disk_and_namespace_are_taken() -> None:
    job = rendered(recipe(), "gpu", memory="200Gi", disk="1Ti", namespace="team-a")
    assert limits(workers(job))["memory"] == "200Gi"
    for pod in pod_templates(job["spec"]["rayClusterSpec"]):
        resources = pod["spec"]["containers"][0]["resources"]
        assert {resources[kind]["ephemeral-storage"] for kind in resources} == {"1Ti"}
    assert job["metadata"]["namespace"] == "team-a"


def test_less_memory_than_a_worker_needs_is_noted() -> None:
    """With --gpu alone, which needs an overlay with GPUs."""

    def note(memory: str | None) -> str | None:
        return memory_note(Target("gpu", "finray", memory=memory, least_memory=30 * 2**30))

    for memory in ("29Gi", "32G", "32000000k", "30000Mi", "64"):
        assert f"--memory {memory} is less than 30Gi" in (note(memory) or "")
    for memory in ("30Gi", "33G", "33000000k", "31000Mi", "1T", "1Ti", str(30 * 2**30), None):
        assert note(memory) is None
    with pytest.raises(InputError, match="--gpu: the overlay cpu has no GPUs"):
        rendered(recipe(), "cpu", least_memory=1)


def test_a_repeated_attempt_of_a_refused_run_ends_by_its_mark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as KubeRay repeats the job, and no more; a changed recipe is another job."""
    trained: list[argparse.Namespace] = []

    def train(options: argparse.Namespace) -> None:
        trained.append(options)
        raise InputError("data.train.0: no such file")

    monkeypatch.setattr("finray.cluster.cli.train.train", train)
    storage = tmp_path / "runs"
    command = ["k8s", "run", str(write(tmp_path, storage=str(storage)))]
    assert main(command) == 2 and len(trained) == 1
    assert (trained[0].address, trained[0].wait_for_nodes) == ("auto", 3600.0)
    capsys.readouterr()
    for _ in range(RETRIES):
        assert main(command) == 2
        message = "an earlier attempt of this job was refused: data.train.0: no such file"
        assert capsys.readouterr().err == f"finray: {message}\n"
    assert len(trained) == 1 and not list((storage / ".refused").iterdir())
    assert main(command) == 2 and len(trained) == 2
    write(tmp_path, storage=str(storage), seed=7)
    assert main(command) == 2 and len(trained) == 3


def test_a_run_that_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(_: argparse.Namespace) -> None:
        raise RunError("out of luck")

    monkeypatch.setattr("finray.cluster.cli.train.train", train)
    path = write(tmp_path, storage=str(tmp_path / "runs"))
    assert main(["k8s", "run", str(path)]) == 1 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overlay", "changes", "error"),
    [
        ("cpu", {"scale": {"workers": 0}}, "--set scale.workers=1"),
        ("cpu", {"scale": {"workers": 1, "gpus_per_worker": 1}}, "choose --overlay gpu"),
        ("gpu", {"scale": {"workers": 1, "gpus_per_worker": 0}}, "choose --overlay cpu"),
        ("gpu", {"scale": {"workers": 1, "gpus_per_worker": 0.5}}, "whole number"),
        ("tpu", {}, "choose cpu, gpu, gpu-spot-elastic, kueue"),
        ("cpu", {"storage": "/home/ada/runs"}, "storage: /home/ada/runs is on this machine"),
        ("cpu", {"storage": "file:///tmp/runs"}, "storage: /tmp/runs is on this machine"),
        ("cpu", {"storage": "/mnt/finray/../home"}, "storage: /mnt/finray/../home"),
        ("cpu", {"model": {"base": "/models/x"}}, "model.base: /models/x"),
    ],
)
def test_what_cannot_run_there_is_refused(
    overlay: str, changes: dict[str, Any], error: str
) -> None:
    with pytest.raises(InputError, match=re.escape(error)):
        render(recipe(**changes), Target(overlay, "finray"))


@pytest.mark.parametrize(
    "target",
    [Target("cpu", "Not_a_name"), Target("cpu", "a", memory="big"), Target("cpu", "a", disk="0")],
)
def test_a_target_that_kubernetes_would_refuse(target: Target) -> None:
    with pytest.raises(InputError, match="expected"):
        render(recipe(), target)


def test_every_local_path_is_named_at_once() -> None:
    of = recipe(
        model={"base": "/models/x"},
        data={"train": [{"path": "s3://a/b"}, {"path": "/c.jsonl"}], "eval": [{"path": "/d"}]},
    )
    with pytest.raises(InputError) as error:
        render(of, Target("cpu", "finray"))
    keys = [line.partition(":")[0] for line in str(error.value).splitlines()]
    assert keys == ["model.base", "data.train.1.path", "data.eval.0.path"]
    assert "hub id" in str(error.value) and "/mnt/finray/" in str(error.value)


def test_a_recipe_larger_than_a_pod_holds() -> None:
    large = recipe(data={**recipe().data.model_dump(), "chat_template": "{" + "x" * LARGEST_RECIPE})
    with pytest.raises(InputError, match="a pod's annotations hold 204,800"):
        render(large, Target("cpu", "finray"))


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    values = recipe(**changes).model_dump(mode="json")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_secrets_of_the_environment_stay_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "run.yaml"
    path = str(write(tmp_path))
    assert main(["k8s", "render", path, "--overlay", "cpu"]) == 0
    assert main(["k8s", "render", path, "--overlay", "cpu", "--to", str(out)]) == 0
    printed = capsys.readouterr()
    text = out.read_text(encoding="utf-8")
    assert text == printed.out and "kind: RayJob" in text
    assert not [value for value in SECRETS.values() if value in text + printed.err]
    assert "stringData" not in text and "kind: Secret" not in text
    assert "secretRef" in text


@pytest.mark.parametrize(
    ("secret", "storage"),
    [
        (secret, f"s3://bucket/{secret}")
        for secret in (*SECRETS.values(), "hf_abcdefghijklmnopqrstuvwxyz", "AKIAABCDEFGHIJKLMNOP")
    ]
    + [
        ("pa55/word", "s3://user:pa55/word@bucket/runs"),
        ("pa55word", "s3://bucket/runs?secret_key=pa55word"),
        ("pa55word", "s3://bucket/runs?region=a&X-Amz-Signature=pa55word"),
    ],
)
def test_a_secret_in_the_recipe_is_refused_and_not_repeated(
    secret: str,
    storage: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    recipe_file = str(write(tmp_path, storage=storage))
    assert main(["k8s", "render", recipe_file, "--overlay", "cpu"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and secret not in printed.err
    assert "storage: holds " in printed.err
    assert "finray-credentials" in printed.err


def test_a_secret_in_a_chat_template_is_refused_and_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "hf_abcdefghijklmnopqrstuvwxyz"
    (tmp_path / "chat.jinja").write_text("{{ messages }}" + secret, encoding="utf-8")
    data = {**recipe().data.model_dump(), "chat_template": "chat.jinja"}
    assert main(["k8s", "render", str(write(tmp_path, data=data)), "--overlay", "cpu"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and secret not in printed.err
    assert "data.chat_template: holds a Hugging Face token" in printed.err
    assert "finray-credentials" in printed.err


@pytest.mark.parametrize(
    "storage", ["s3://bucket/a@b", "s3://bucket/runs?region=eu-1&endpoint_override=http://s3:9000"]
)
def test_an_ordinary_uri_is_no_secret(storage: str) -> None:
    assert storage in recipe_text(rendered(recipe(storage=storage)))


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "absent" / "run.yaml"
    assert main(["k8s", "render", str(write(tmp_path)), "--to", str(out)]) == 2
    assert str(out) in capsys.readouterr().err
