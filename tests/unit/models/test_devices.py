"""Devices other than the CPU and NVIDIA's, by stand-ins of torch's own queries."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.training_args import ParallelMode

from finray.cluster import gpus
from finray.cluster.gpus import Gpu, gpus_here, kind_here
from finray.cluster.launcher import check_machine
from finray.training.common.errors import InputError
from finray.training.common.progress import SILENT
from finray.training.config.models import ModelSettings
from finray.training.config.recipe import Recipe
from finray.training.engine.optimizer import SkippingAdamW
from finray.training.engine.trainer_arguments import training_arguments
from finray.training.launch.local_workers import _devices
from finray.training.models import devices
from finray.training.models.dtypes import choose_dtype

SIZE = 16 * 2**30


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes torch find two devices of a kind here, and nvidia-smi none."""

    def install(kind: str) -> None:
        properties = SimpleNamespace(name=f"A {kind}", total_memory=SIZE)
        accelerator = SimpleNamespace(type=kind)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: kind == "cuda")
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind != "cpu")
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: accelerator)
        for module in (torch.cuda, torch.xpu):
            monkeypatch.setattr(module, "device_count", lambda: 2)
            monkeypatch.setattr(module, "get_device_properties", lambda _: properties)
            monkeypatch.setattr(module, "is_bf16_supported", lambda including_emulation: True)
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: SIZE)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: True)
        monkeypatch.setattr(gpus, "_nvidia_gpus", tuple)
        monkeypatch.setattr(gpus, "_DEVICE_FILES", ("/dev/null",))

    monkeypatch.delenv(devices.VARIABLE, raising=False)
    return install


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(devices.VARIABLE, raising=False)
    yield
    assert devices.VARIABLE not in os.environ


def recipe(**changes: Any) -> Recipe:
    values = {"name": "x", "model": "/none", "data": {"train": "/x"}}
    return Recipe.model_validate({**values, **changes})


@pytest.mark.parametrize(
    ("kind", "listed"),
    [
        ("cuda", (Gpu("A cuda", SIZE),) * 2),  # AMD's, or NVIDIA's without nvidia-smi
        ("xpu", (Gpu("A xpu", SIZE, "xpu"),) * 2),
        ("mps", (Gpu("Apple GPU", SIZE, "mps"),)),
        ("npu", (Gpu("npu", 0, "npu"),)),
        ("cpu", ()),
    ],
)
def test_what_torch_has_is_found(kind: str, listed: tuple[Gpu, ...], has: Any) -> None:
    has(kind)
    assert gpus_here() == listed and kind_here() == devices.device_kind() == kind


@pytest.mark.parametrize(("kind", "where"), [("cuda", "cuda"), ("mps", "cpu"), ("cpu", "cpu")])
def test_where_matrices_are_decomposed(kind: str, where: str, has: Any) -> None:
    has(kind)
    assert devices.decomposing_device().type == where
    with devices.on_cpu(True):
        assert devices.decomposing_device().type == "cpu"


def test_torch_is_not_asked_where_no_driver_is(has: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    has("xpu")
    monkeypatch.setattr(gpus, "_DEVICE_FILES", ("/none",))
    assert gpus_here() == ()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("cuda", "bfloat16"), ("xpu", "bfloat16"), ("mps", "bfloat16"), ("cpu", "float32")],
)
def test_the_compute_type(kind: str, dtype: str, has: Any) -> None:
    has(kind)
    assert choose_dtype(ModelSettings(base="x")) == dtype
    with devices.on_cpu(True):
        assert choose_dtype(ModelSettings(base="x")) == "float32"


def test_an_emulated_bfloat16_is_not_chosen(has: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """T4, V100 and RTX 20xx emulate it; torch says so when it is asked."""
    has("cuda")
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(
            module, "is_bf16_supported", lambda including_emulation=True: including_emulation
        )
    assert choose_dtype(ModelSettings(base="x")) == "float16"
    has("xpu")
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda including_emulation=True: False)
    assert choose_dtype(ModelSettings(base="x")) == "float16"


def test_a_process_trains_on_one_device_however_many_it_sees(tmp_path: Path) -> None:
    """The Trainer would wrap the model in DataParallel."""
    arguments = training_arguments(recipe(scale={"workers": 0}), 1, tmp_path)
    assert arguments.n_gpu == 0
    arguments._n_gpu = 2
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 4
    assert arguments.parallel_mode == ParallelMode.NOT_PARALLEL


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("xpu", ["xpu:0", "xpu:1"]), ("cuda", ["cuda:0", "cuda:1"]), ("mps", ["mps", "mps"])],
)
def test_the_device_of_each_worker(kind: str, expected: list[str]) -> None:
    assert _devices(1.0, 2, kind) == expected
    assert _devices(0.0, 2, kind) == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("npu", {}, "of kind npu: finray trains on cuda, xpu, mps and cpu"),
        ("mps", {"scale": {"workers": 2}}, "so scale.workers must be 1"),
        (
            "mps",
            {"model": {"base": "/none", "quantize": "nf4"}, "adapter": "lora"},
            "model.quantize nf4 is not supported there",
        ),
        ("mps", {"method": {"kind": "dpo"}}, "method dpo computes in float64"),
    ],
)
def test_what_a_device_cannot_do_is_refused_before_a_start(
    kind: str, changes: dict[str, Any], message: str, has: Any
) -> None:
    has(kind)
    with pytest.raises(InputError, match=message) as caught:
        check_machine(recipe(**changes), SILENT)
    text = str(caught.value)
    assert text.startswith("scale.gpus_per_worker: ") and text.endswith("set 0 to train on the CPU")
    assert "\n" not in text
    scale = {**changes.get("scale", {}), "gpus_per_worker": 0}
    devices.check_device(recipe(**{**changes, "scale": scale}), "cpu", kind)


@pytest.mark.parametrize("kind", ["cpu", "xpu", "mps"])
def test_an_attention_kernel_that_is_not_here_is_refused(
    kind: str, has: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a start, and by the name of the setting."""
    model = {"model": {"base": "/none", "attention": "flash_attention_2"}}
    if kind != "cpu":
        has(kind)
    cause = (
        f"model.attention: flash_attention_2 needs a GPU of kind cuda, .* on {kind} here; remove"
    )
    with pytest.raises(InputError, match=f"^{cause}"):
        check_machine(recipe(**model), SILENT)
    installed: set[str] = set()
    monkeypatch.setattr(devices, "find_spec", lambda name: name if name in installed else None)
    with pytest.raises(InputError, match="the package flash-attn, which is not installed here"):
        devices.check_device(recipe(**model), "cuda", "cuda")
    for package in ("flash_attn", "kernels"):
        installed.add(package)
        devices.check_device(recipe(**model), "cuda", "cuda")
        installed.clear()


def test_no_device_lies_idle_in_silence() -> None:
    with pytest.raises(InputError, match="has a device of kind mps here, which this worker does"):
        devices.check_device(recipe(), "cpu", "mps")
    devices.check_device(recipe(), "cpu", "cpu")


def test_a_choice_of_the_cpu_ends_with_its_run(anywhere: None) -> None:
    with devices.on_cpu(True):
        assert devices.device_kind() == "cpu" and os.environ[devices.VARIABLE] == "cpu"


def test_steps_are_skipped_on_devices_whose_kernel_reads_no_flag() -> None:
    """The device is a stand-in: only its type is asked for."""
    optimizer = SkippingAdamW([{"params": [torch.nn.Parameter(torch.zeros(1))]}], lr=0.1)
    for value in (0.0, 1.0):

        class Flag:
            device = torch.device("mps")

            def __bool__(self, value: float = value) -> bool:
                return value > 0

        optimizer.found_inf = Flag()  # type: ignore[assignment]
        assert optimizer._skips_on_host() is (value > 0) and optimizer.found_inf is None
