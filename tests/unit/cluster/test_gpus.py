"""GPU memory before a run: the run fits, fits in smaller parts, or does not fit."""

import re
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finray.cluster.gpus import Gpu, gpus_here, judge
from finray.cluster.preflight import memory_lines
from finray.training.config.recipe import Recipe, recipe_from_dict
from finray.training.models.memory_estimate import Sizes

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

H100 = Gpu("NVIDIA H100", 80 * 2**30)
SMALL = Gpu("NVIDIA T4", 15 * 2**30)
LLAMA_8B = Sizes(
    linear=6_979_321_856,
    frozen=1_050_939_392,
    trained=41_943_040,
    cast=41_943_040,
    layers=32,
    hidden=4096,
    queries=4096,
    keys=1024,
    inner=14336,
    ranks=112,
    heads=32,
    vocabulary=128_256,
)


def recipe(**settings: Any) -> Recipe:
    return recipe_from_dict(
        {
            "name": "run",
            "model": {"base": "/m", **settings.pop("model", {})},
            "adapter": {"rank": 16},
            "data": {"train": [{"path": "/rows.jsonl"}], "max_length": 8192},
            "optim": {"micro_batch_size": settings.pop("micro_batch_size", 4)},
            **settings,
        }
    )


def test_it_fits() -> None:
    verdict = judge(recipe(micro_batch_size=1), LLAMA_8B, [H100, H100])
    assert verdict.fits and not verdict.is_tight
    assert re.match(r"about 7\d\.\d GiB of a GPU: weights 15\.0 GiB", verdict.text)


def test_smaller_parts_fit() -> None:
    verdict = judge(recipe(), LLAMA_8B, [H100])
    assert verdict.fits and verdict.is_tight
    assert "model.gradient_checkpointing=true, or with optim.micro_batch_size=" in verdict.text
    assert "there is 80.0 GiB" in verdict.text


def test_it_does_not_fit_but_other_settings_do() -> None:
    verdict = judge(recipe(data={"train": [{"path": "/r"}], "max_length": 1024}), LLAMA_8B, [SMALL])
    assert not verdict.fits
    assert "at microbatch 1 with gradient checkpointing it still needs 1" in verdict.text
    assert "model.quantize=nf4" in verdict.text
    half = judge(recipe(micro_batch_size=1), LLAMA_8B, [H100], share=0.5)
    assert half.is_tight and "there is 40.0 GiB" in half.text


def test_shards_are_counted_where_workers_share_the_weights() -> None:
    def advice(**scale: Any) -> str:
        rows = {"train": [{"path": "/r"}], "max_length": 512}
        settings = recipe(data=rows, micro_batch_size=1, scale={"workers": 4, **scale})
        return judge(settings, LLAMA_8B, [SMALL]).text

    whole, shared = advice(strategy="ddp"), advice(strategy="fsdp")
    assert "weights 15.0 GiB" in whole and "scale.strategy=fsdp" in whole
    # a quarter of all, and for a moment embedding, head and two of 32 layers
    weights = re.search(r"weights (\d+\.\d) GiB", shared)
    assert weights is not None
    assert float(weights[1]) == pytest.approx(15.0 / 4 + 1.96 + 2 * 13.1 / 32, abs=0.15)
    assert advice() == shared, "auto comes to shards"


def test_autocast_keeps_no_copies_of_shards() -> None:
    """Full fine-tuning of 8 billion weights: of 16 bytes each, 120 GiB, 15 lie on each of 8."""
    whole = replace(LLAMA_8B, linear=0, frozen=0, trained=8_030_261_248, cast=8_030_261_248)
    values = recipe(micro_batch_size=1).model_dump(mode="json")
    values.update(adapter=None, scale={"workers": 8})
    values["model"]["gradient_checkpointing"] = True
    values["data"]["max_length"] = 1024
    verdict = judge(recipe_from_dict(values), whole, [H100])
    assert verdict.fits and not verdict.is_tight
    assert re.match(r"about 2\d\.\d GiB of a GPU", verdict.text), verdict.text


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


def test_the_output_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus_here() == ()
    command = tmp_path / "nvidia-smi"
    command.write_text(
        "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'Tesla T4, 15360'\n", "utf-8"
    )
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    assert gpus_here() == (
        Gpu("NVIDIA H100 80GB HBM3", 81559 * 2**20),
        Gpu("Tesla T4", 15 * 2**30),
    )
    command.write_text("#!/bin/sh\nexit 9\n", "utf-8")
    assert gpus_here() == ()
