"""GPU memory before a run: the run fits, fits in smaller parts, or does not fit."""

import os
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.real_models import LLAMA_8B

import finray
from finray.cluster import gpus
from finray.cluster.environment import worker_environment
from finray.cluster.gpus import Gpu, gpus_here, visible_gpus
from finray.cluster.launcher import check_machine
from finray.cluster.memory_fit import judge, memory_text
from finray.cluster.preflight import memory_lines
from finray.training.common.errors import InputError
from finray.training.common.progress import SILENT, Progress
from finray.training.config.recipe import Recipe, recipe_from_dict
from finray.training.models import devices
from finray.training.models.logit_memory import HeadFacts
from finray.training.models.memory_estimate import MemoryEstimate, estimate, sizes_of

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BOTH = {"none": LLAMA_8B, "nf4": LLAMA_8B}
"""Sizes by quantisation."""
H100 = Gpu("NVIDIA H100", 80 * 2**30)
SMALL = Gpu("NVIDIA T4", 15 * 2**30)


def recipe(**settings: Any) -> Recipe:
    return recipe_from_dict(
        {
            "name": "run",
            "model": {
                "base": "/m",
                "gradient_checkpointing": False,
                **settings.pop("model", {}),
            },
            "adapter": {"rank": 16},
            "data": {
                "train": [{"path": "/rows.jsonl"}],
                "max_length": settings.pop("max_length", 8192),
                "packing": settings.pop("packing", False),
            },
            "optim": {"micro_batch_size": settings.pop("micro_batch_size", 4)},
            **settings,
        }
    )


GIB = 2**30


@pytest.mark.parametrize(
    ("memory", "text", "named"),
    [
        ({}, "about 3.1 GiB of a GPU: ", "activations 1.1 GiB at microbatch 4"),
        (
            {"evaluation": 2 * GIB},
            "about 4.0 GiB of a GPU (most in the evaluation): ",
            "evaluation 2.0 GiB",
        ),
        (
            {"vllm": GIB, "generation": 3 * GIB},
            "about 6.0 GiB of a GPU (most in the generation): ",
            "generation 3.0 GiB, vLLM 1.0 GiB",
        ),
        (
            {"transient": GIB},
            "about 4.1 GiB of a GPU: ",
            "activations 1.1 GiB at microbatch 4, a weight while it computes 1.0 GiB",
        ),
    ],
)
def test_the_parts_of_the_memory_are_its_sum(memory: dict[str, int], text: str, named: str) -> None:
    """In the phase that takes most; no part of another phase is named."""
    line = memory_text(MemoryEstimate(GIB, GIB // 2, GIB + 2**27, **memory), recipe())
    parts = f"weights 1.0 GiB, gradients and optimizer 512 MiB, {named}, CUDA itself 512 MiB"
    assert line == text + parts


@pytest.mark.parametrize(
    ("quantize", "dora"),
    [("none", False), ("none", True), ("nf4", False), ("nf4", True), ("int8", False)],
)
def test_each_phase_has_parts_that_are_its_peak(quantize: str, dora: bool) -> None:
    """What is named adds up to the peak, to rounding; a step's names are no evaluation's."""
    values = recipe(model={"quantize": quantize}).model_dump(mode="json")
    settings = recipe_from_dict({**values, "adapter": {"rank": 16, "dora": dora}})
    memory = replace(estimate(settings, LLAMA_8B), generation=GIB, evaluation=2 * GIB)
    assert set(memory.phases) == {"loading", "step", "generation", "evaluation"}
    for phase, peak in memory.phases.items():
        parts = memory.parts(phase)
        assert sum(parts.values()) == peak and parts["weights"] == memory.weights
        assert ("activations" in parts) == (phase == "step")
        assert ("training" in parts) == (phase != "loading")
        assert (parts["transient"] > 0) == (quantize != "none" or dora)


def test_it_fits() -> None:
    verdict = judge(recipe(micro_batch_size=1), BOTH, [H100, H100])
    assert verdict.fits and not verdict.is_tight
    assert re.match(r"about 6\d\.\d GiB of a GPU: weights 15\.0 GiB", verdict.text)


def test_smaller_parts_fit() -> None:
    verdict = judge(recipe(), BOTH, [H100])
    assert verdict.fits and verdict.is_tight
    assert verdict.text.endswith("the nearest that fits: --set model.gradient_checkpointing=true")
    assert "there is 80.0 GiB" in verdict.text


def test_it_does_not_fit_but_other_settings_do() -> None:
    verdict = judge(recipe(max_length=1024), BOTH, [SMALL])
    assert not verdict.fits
    assert "at microbatch 1 with gradient checkpointing it still needs 1" in verdict.text
    nearest = "--set optim.micro_batch_size=1 --set model.gradient_checkpointing=true "
    assert verdict.text.endswith(f"the nearest that fits: {nearest}--set model.quantize=nf4")
    half = judge(recipe(micro_batch_size=1), BOTH, [H100], share=0.5)
    assert half.is_tight and "there is 40.0 GiB" in half.text


def test_shards_are_counted_where_workers_share_the_weights() -> None:
    def advice(**scale: Any) -> str:
        settings = recipe(max_length=512, micro_batch_size=1, scale={"workers": 4, **scale})
        return judge(settings, {"none": LLAMA_8B}, [SMALL]).text

    whole, shared = advice(strategy="ddp"), advice(strategy="fsdp")
    assert "weights 15.0 GiB" in whole and "--set scale.strategy=fsdp" in whole
    # a quarter of all, and for a moment embedding, head, two of 32 layers and all gradients
    weights = re.search(r"weights (\d+\.\d) GiB", shared)
    assert weights is not None
    assert float(weights[1]) == pytest.approx(15.0 / 4 + 1.96 + 2 * 13.1 / 32 + 0.16, abs=0.1)
    assert advice() == shared, "auto comes to shards"


def test_autocast_keeps_no_copies_of_shards() -> None:
    """Full fine-tuning of 8 billion weights: of 16 bytes each, 120 GiB, 15 lie on each of 8."""
    head = HeadFacts(trained=128_256 * 4096)
    trained = {"trained": 8_030_261_248, "cast": 8_030_261_248, "head": head}
    whole = replace(LLAMA_8B, linear=0, frozen=0, **trained)
    values = recipe(micro_batch_size=1).model_dump(mode="json")
    values.update(adapter=None, scale={"workers": 8})
    values["model"]["gradient_checkpointing"] = True
    values["data"]["max_length"] = 1024
    verdict = judge(recipe_from_dict(values), {"none": whole}, [H100])
    assert verdict.fits and not verdict.is_tight
    assert re.match(r"about 2\d\.\d GiB of a GPU", verdict.text), verdict.text


@pytest.mark.long
def test_the_smallest_gpu_counts(tiny_model: Path) -> None:
    values = recipe().model_dump(mode="json")
    values["model"]["base"] = str(tiny_model)
    tiny = recipe_from_dict(values)
    (line,) = memory_lines(tiny, [H100, Gpu("old", 2**28)])
    assert not line.is_good and "there is 256 MiB (old)" in line.text
    (line,) = memory_lines(tiny, [H100])
    assert line.is_good and not line.warns
    assert memory_lines(tiny, []) == ()
    values["scale"]["gpus_per_worker"] = 0
    assert memory_lines(recipe_from_dict(values), [H100]) == ()


def test_a_check_prints_the_nearest_settings_that_fit(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a line of --set, with which it fits."""
    values = {
        "name": "run",
        "model": {"base": str(tiny_model), "gradient_checkpointing": False},
        "data": {"train": [{"path": str(chat_file)}], "max_length": 64},
        "optim": {"batch_size": 64, "micro_batch_size": 64},
        "storage": str(tmp_path / "runs"),
    }
    written = recipe_from_dict(values)
    gpu = Gpu("tiny", estimate(written, sizes_of(written)).peak - 1)
    monkeypatch.setattr("finray.cluster.gpus.gpus_here", lambda: (gpu,))
    monkeypatch.setattr("finray.cluster.preflight.check_torch", lambda _: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (note,) = finray.check(values)["machine"]
    line = note.partition("the nearest that fits: ")[2]
    assert line.startswith("--set ")
    assert finray.check(values, line.replace("--set ", "").split())["machine"] == []


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Gpu, ...]]:
    """Puts an nvidia-smi in the path that answers these lines; returns what is understood."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "_DEVICE_FILES", ())
    count = [0]

    def put(lines: str, listing: str = "", script: str = "") -> tuple[Gpu, ...]:
        count[0] += 1
        command = tmp_path / "nvidia-smi"
        text = (
            script
            or f"if [ $1 = -L ]; then cat <<'E'\n{listing}\nE\nelse cat <<'E'\n{lines}\nE\nfi"
        )
        command.write_text(f"#!/bin/sh\n{text}\n", "utf-8")
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
        os.utime(command, ns=(count[0], count[0]))  # which decides whether it is asked again
        return gpus_here()

    return put


def test_the_output_of_nvidia_smi(answers: Callable[..., tuple[Gpu, ...]]) -> None:
    listed = answers(
        "NVIDIA H100 80GB HBM3, 81559, 9.0, GPU-1a, Disabled\nTesla T4, 15360, 7.5, GPU-2b, [N/A]"
    )
    assert listed == (
        Gpu("NVIDIA H100 80GB HBM3", 81559 * 2**20, uuid="GPU-1a"),
        Gpu("Tesla T4", 15 * 2**30, has_bfloat16=False, uuid="GPU-2b"),
    )
    slots = "NVIDIA GeForce GT 1030, 2048, 6.1, GPU-3c, [N/A]\nTesla T4, 15360, 7.5, GPU-2b, [N/A]"
    assert [gpu.uuid for gpu in answers(slots)] == ["GPU-2b", "GPU-3c"], "as CUDA counts them"
    assert answers("Tesla T4, 15360") == (Gpu("Tesla T4", 15 * 2**30),), "an older driver's"
    assert answers("No devices were found") == ()
    warned = "Tesla T4, 15360\nWARNING: infoROM is corrupted at gpu 0000:3B:00.0"
    assert answers(warned) == (Gpu("Tesla T4", 15 * 2**30),)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(size, None) for size in ("[N/A]", "[Not Supported]", "[GPU is lost]", "Unknown", "0", "")]
    + [("24564", 24564 * 2**20)],
)
def test_a_size_that_is_not_known_ends_nothing(
    size: str, expected: int | None, answers: Callable[..., tuple[Gpu, ...]], tiny_model: Path
) -> None:
    """A GPU with shared memory, or one that is lost."""
    (gpu,) = answers(f"NVIDIA GB10, {size}, [N/A], GPU-1, [N/A]")
    assert gpu == Gpu("NVIDIA GB10", expected, uuid="GPU-1")
    assert "NVIDIA GB10" in str(gpu)
    values = recipe().model_dump(mode="json")
    values["model"]["base"] = str(tiny_model)
    assert len(memory_lines(recipe_from_dict(values), [gpu])) == (expected is not None)


@pytest.mark.parametrize(
    "script", ["exit 9", "sleep 60", "kill -9 $$", "printf '\\377\\376'; exit 3", "exit 0"]
)
def test_an_nvidia_smi_that_fails_means_no_gpu(
    script: str, answers: Callable[..., tuple[Gpu, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "_SECONDS", 0.3)
    assert answers("", script=script) == ()


MIG = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1a)
  MIG 3g.40gb     Device  0: (UUID: MIG-c7)
  MIG 1g.10gb+me  Device  1: (UUID: MIG-d8)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2b)
  MIG 7g.80gb     Device  0: (UUID: MIG-e9)"""


def test_slices_of_a_gpu_are_the_gpus(
    answers: Callable[..., tuple[Gpu, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker has the memory of its slice, and a process sees one of them."""
    listed = answers(
        "NVIDIA H100 80GB HBM3, 81559, 9.0, GPU-1a, Enabled\n"
        "NVIDIA H100 80GB HBM3, 81559, 9.0, GPU-2b, Disabled",
        listing=MIG,
    )
    sizes = [gpu.bytes and round(gpu.bytes / 2**30, 1) for gpu in listed]
    assert sizes == [38.0, 9.5, 79.6]
    assert [gpu.is_slice for gpu in listed] == [True, True, False]
    assert visible_gpus() == listed[:1]
    for chosen, seen in {
        "MIG-d8": listed[1:2],
        "GPU-2b": listed[2:],
        "7": (),
        "": (),
        "-1": (),
        "GPU-2b,GPU-2b": (),  # as CUDA has it
    }.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert visible_gpus() == seen
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-c7")
    values = recipe().model_dump(mode="json")
    two = recipe_from_dict({**values, "scale": {"workers": 2}})
    with pytest.raises(InputError, match=r"^scale.workers: the GPUs here are MIG slices \(NVIDIA"):
        check_machine(two, SILENT)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_torch_that_finds_no_gpu_is_refused(
    workers: int, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is built for CPUs, or the driver is too old; a run would take its CPU in silence."""
    monkeypatch.setattr("finray.cluster.gpus.gpus_here", lambda: (H100,))
    monkeypatch.setattr("finray.training.models.devices.accelerator_kind", lambda: "cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    values = recipe(scale={"workers": workers}).model_dump(mode="json")
    values["model"]["base"] = str(tiny_model)
    message = (
        r"^scale.gpus_per_worker: the driver lists a GPU of kind cuda, and torch \S+ finds none"
    )
    with pytest.raises(InputError, match=message):
        check_machine(recipe_from_dict(values), SILENT)
    with pytest.raises(InputError, match=message):
        devices.use("cuda:0")
    values["scale"]["gpus_per_worker"] = 0
    check_machine(recipe_from_dict(values), SILENT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    values["scale"]["gpus_per_worker"] = "auto"
    check_machine(recipe_from_dict(values), SILENT)


@pytest.mark.long
def test_the_smallest_of_those_that_are_used_counts(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a card for a screen that lies idle."""
    screen = Gpu("NVIDIA GeForce GT 1030", 2**20, has_bfloat16=False)
    monkeypatch.setattr("finray.cluster.gpus.gpus_here", lambda: (H100, screen))
    monkeypatch.setattr("finray.training.models.devices.accelerator_kind", lambda: "cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    values = recipe(scale={"workers": 0}).model_dump(mode="json")
    values["model"]["base"] = str(tiny_model)
    room = check_machine(recipe_from_dict(values), SILENT).room
    assert room is not None and room.bytes == H100.bytes and room.has_bfloat16
    values["scale"]["workers"] = 2
    with pytest.raises(InputError, match=r"there is 1 MiB \(NVIDIA GeForce GT 1030\)"):
        check_machine(recipe_from_dict(values), SILENT)


def test_gpus_that_lie_idle_are_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finray.cluster.gpus.gpus_here", lambda: (H100,) * 4)
    monkeypatch.setattr("finray.cluster.preflight.check_torch", lambda _: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    notes: list[str] = []

    def tiny(**scale: Any) -> Recipe:
        values = recipe(scale=scale).model_dump(mode="json")
        values["model"]["base"] = str(tiny_model)
        return recipe_from_dict(values)

    class Noted(Progress):
        def note(self, message: str) -> None:
            notes.append(message)

    for workers, use in [(0, "the first; scale.workers=4 without --local"), (2, "the first 2; ")]:
        check_machine(tiny(workers=workers), Noted())
        assert notes.pop().startswith(f"4 GPUs are visible, and this run uses {use}")
    check_machine(tiny(workers=4), Noted())
    check_machine(tiny(workers=0, gpus_per_worker=0), Noted())
    assert notes == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (None, "expandable_segments:True"),
        ("PYTORCH_ALLOC_CONF", "backend:native"),
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64"),
    ],
)
def test_the_allocator_is_left_as_the_user_set_it(
    name: str | None, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in own})
    if name is not None:
        os.environ[name] = value
    env = worker_environment(recipe())
    assert {key: env[key] for key in own if key in env} == {name or own[0]: value}


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_deterministic_run_is_so_from_the_first_product_of_its_processes(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may be one of a stage of the data, before a worker starts."""
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    values = {**recipe().model_dump(mode="json"), "deterministic": deterministic}
    env = worker_environment(recipe_from_dict(values))
    for variables in (env, os.environ):
        assert variables.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
