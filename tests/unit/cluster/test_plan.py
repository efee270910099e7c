"""`finray plan`: placements on GPUs that are not here."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.real_models import LLAMA_8B, QWEN3_4B_CONFIG, write_config

import finray
from finray.cluster.api.planning import _nearest, place, plan
from finray.cluster.cards import CARDS, link_of, parse_gpus
from finray.cluster.cli.main import main
from finray.cluster.memory_fit import host_bytes
from finray.cluster.placements import placements, quantisations, with_settings
from finray.cluster.screens.plan import render
from finray.training.common.errors import InputError
from finray.training.config.recipe import Recipe, load_recipe, recipe_from_dict
from finray.training.models.devices import Room
from finray.training.models.memory_estimate import estimate, sizes_of
from finray.training.models.speed import Device, seconds_per_step, training_flops

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finray.cluster.gpus.gpus_here", tuple)


def values(base: Path, data: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "run",
        "model": {"base": str(base)},
        "adapter": {"rank": 4},
        "data": {"train": [{"path": str(data)}], "max_length": 64},
        "optim": {"batch_size": 8},
        "storage": str(base.parent / "storage"),
        **changes,
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("h100:8", ("h100", 8)),
        ("H100", ("h100", 1)),
        ("RTX 4090:2", ("rtx4090", 2)),
        ("4090", ("rtx4090", 1)),
        ("A100-40GB", ("a100-40", 1)),
        ("NVIDIA-L40S", ("l40s", 1)),
        ("h100 80gb:8", ("h100", 8)),
        ("A100-PCIE-40GB", ("a100-40", 1)),
        ("a10080", ("a100", 1)),
        # as nvidia-smi has them
        ("Tesla T4", ("t4", 1)),
        ("Tesla V100-SXM2-16GB", ("v100-16", 1)),
        ("Tesla V100-SXM2-32GB:4", ("v100", 4)),
        ("NVIDIA A10G", ("a10g", 1)),
        ("NVIDIA A40", ("a40", 1)),
        ("NVIDIA RTX A6000", ("a6000", 1)),
        ("NVIDIA RTX 6000 Ada Generation", ("rtx6000ada", 1)),
        ("NVIDIA A100-SXM4-40GB", ("a100-40", 1)),
        ("NVIDIA A100-SXM4-80GB", ("a100", 1)),
        ("NVIDIA A100 80GB PCIe", ("a100", 1)),
        ("NVIDIA H100 80GB HBM3", ("h100", 1)),
        ("NVIDIA H100 PCIe", ("h100-pcie", 1)),
        ("h100 : 8", ("h100", 8)),
        ("NVIDIA H100 NVL:2", ("h100-nvl", 2)),
        ("h100-94", ("h100-nvl", 1)),
        ("NVIDIA H200 NVL", ("h200", 1)),
        ("NVIDIA H200", ("h200", 1)),
        ("NVIDIA L4", ("l4", 1)),
        ("NVIDIA L40S", ("l40s", 1)),
        ("NVIDIA GeForce RTX 4090", ("rtx4090", 1)),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", ("pro6000", 1)),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", ("pro6000", 1)),
    ],
)
def test_names_of_cards(text: str, expected: tuple[str, int]) -> None:
    card, count = parse_gpus(text)
    assert (card.name, count) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rxt4090",
            r"--gpu rxt4090: there is no such card; did you mean rtx4090\? \(a100-40",
        ),
        ("h10", r"--gpu h10: there is no such card \("),
        ("h800", r"--gpu h800: there is no such card \("),
        ("b100", r"--gpu b100: there is no such card \("),
        ("rtx5080", r"--gpu rtx5080: there is no such card \("),
        ("RTX A1000", r"there is no such card \("),
        ("Tesla P100-PCIE-16GB", r"there is no such card \("),
        ("RTX 4090 Ti", r"did you mean rtx4090\?"),
        ("NVIDIA A10", r"did you mean a10g\?"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb:2", "takes whole cards, and no MIG slices of one"),
        ("1g.10gb", "takes whole cards"),
        ("A100-SXM-64GB", r"did you mean a100\?"),
        ("a100-800", r"did you mean a100\?"),
        ("RTX PRO 6000 Mobile", r"did you mean pro6000\?"),
        ("abacus", r"--gpu abacus: there is no such card \("),
        ("gtx1080", r"--gpu gtx1080: there is no such card \("),
        ("h100x8", r"did you mean h100:8\?"),
        ("8 x RTX 4090", r"did you mean rtx4090:8\?"),
        ("4:a100-40", r"did you mean a100-40:4\?"),
        ("4090x2", r"did you mean rtx4090:2\?"),
        ("2x4090", r"did you mean rtx4090:2\?"),
        ("h100x0", r"did you mean h100\?"),
        ("5000xh100", r"--gpu 5000xh100: there is no such card \("),
        ("8xabacus", r"there is no such card \("),
        (
            "h100:0",
            "--gpu h100:0: expected the number of GPUs, 1 to 4096, behind the colon: h100:8",
        ),
        ("h100:4097", "1 to 4096"),
        ("h100:-1", "1 to 4096"),
        ("h100:2.5", "1 to 4096"),
        ("h100:", "behind the colon"),
        ("h100:x", "behind the colon"),
        ("", "there is no such card"),
    ],
)
def test_what_is_no_card_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_gpus(text)


def test_every_card_is_complete() -> None:
    """The larger of a pair has more of everything that decides."""
    assert len(CARDS) == 21
    for card in CARDS.values():
        assert 14 < card.gib < 180 and 60 < card.tflops < 2500 and 0.2 < card.bandwidth < 8
    assert CARDS["h200"].bytes > CARDS["h100"].bytes > CARDS["a100-40"].bytes
    assert [card.gigabytes for card in CARDS.values()][:6] == [40, 80, 80, 80, 94, 141]
    assert not CARDS["t4"].has_bfloat16 and CARDS["a100"].has_bfloat16


def test_the_operations_are_those_of_the_formula() -> None:
    """4 operations a frozen weight and 6 an adapter's; 12 layers x width x half the length."""
    settings = recipe_from_dict(
        {
            "name": "r",
            "model": "/m",
            "adapter": {"rank": 16},
            "data": {"train": [{"path": "/x"}], "max_length": 8192},
        }
    )
    head, attention = 128_256 * 4096, 6 * 32 * 4096 * 8192
    expected = 4 * (LLAMA_8B.linear + head) + 6 * LLAMA_8B.trained + attention
    assert training_flops(settings, LLAMA_8B) == expected
    device = Device(flops=1e15, bandwidth=3e12, link=4e11)

    def seconds(recipe: Recipe, workers: int = 1) -> float:
        return seconds_per_step(recipe, LLAMA_8B, device, 0.4, 8192 * 32, workers)

    plain = seconds(settings)
    assert plain == pytest.approx(8192 * 32 * expected / 4e14)
    forward = 2 * (LLAMA_8B.linear + head) + attention / 3
    again = seconds(settings.with_placement(4, True))
    assert again == pytest.approx(8192 * 32 * (expected + forward) / 4e14)
    eight = seconds(settings, 8)
    gradients = 2 * 7 / 8 * LLAMA_8B.trained * 2
    assert eight == pytest.approx(plain / 8 + gradients / 4e11 / 2)


def test_the_worker_with_most_rows_counts() -> None:
    """3 workers have 11 of 32 rows at most, and 20 have 2."""
    settings = recipe_from_dict(
        {
            "name": "r",
            "model": "/m",
            "adapter": {"rank": 16},
            "data": {"train": [{"path": "/x"}], "max_length": 512},
        }
    )
    device = Device(flops=1e15, bandwidth=3e12, link=1e30)
    seconds = [
        seconds_per_step(settings, LLAMA_8B, device, 0.4, 32 * 512, workers)
        for workers in (1, 3, 20)
    ]
    assert [seconds[0] / each for each in seconds[1:]] == pytest.approx([32 / 11, 16])


@pytest.mark.parametrize("rollout", ["transformers", "vllm"])
def test_the_worker_with_most_prompts_samples_longest(rollout: str) -> None:
    """Of 3 prompts with 8 completions each, one of 2 workers has 16, in one batch of up to 64."""
    online = {"kind": "grpo", "rewards": [{"file": "/x.py:f"}], "beta": 0.0, "max_completion": 100}
    settings = recipe_from_dict(
        {
            "name": "r",
            "model": "/m",
            "adapter": {"rank": 16},
            "method": {**online, "generations": 8, "rollout": rollout},
            "data": {"train": [{"path": "/x"}], "max_length": 512},
            "optim": {"batch_size": 24},
        }
    )
    sizes, device = LLAMA_8B, Device(flops=1e30, bandwidth=3e12, link=1e30)
    cache = 2 * 32 * sizes.keys * 512 * 2
    for workers, completions in ((1, 24), (2, 16), (3, 8)):
        read = 2 * (sizes.linear + sizes.frozen) + completions * cache / 2
        seconds = seconds_per_step(settings, sizes, device, 0.4, 24 * 512, workers)
        assert seconds == pytest.approx(100 * read / 1.5e12)


def test_frozen_layers_have_no_backward_pass() -> None:
    """2 operations a weight of 30 of 32 layers, 6 of the others, 4 of the head.

    Checkpointing computes the others alone again, a reference all of them once.
    """
    text = {
        "name": "r",
        "model": "/m",
        "freeze": {"last_layers": 2},
        "data": {"train": [{"path": "/x"}], "max_length": 8192},
    }
    layer, head = LLAMA_8B.linear // 32, 128_256 * 4096
    sizes = replace(LLAMA_8B, linear=30 * layer, frozen=2 * head, trained=2 * layer)
    attention = 2 * 4096 * 8192
    expected = 30 * 2 * layer + 2 * 6 * layer + 4 * head + attention * (32 + 2 * 2)
    plain = recipe_from_dict(text)
    assert training_flops(plain, sizes) == pytest.approx(expected)
    device, forward = Device(1e15, 3e12, 4e11), 2 * (32 * layer + head) + attention * 32
    referring = recipe_from_dict({**text, "method": {"kind": "dpo"}})
    for recipe, beside in (
        (plain, 0.0),
        (plain.with_placement(4, True), forward * 2 / 32),
        (referring, forward),
        (referring.with_placement(4, True), forward * (1 + 2 / 32)),
    ):
        seconds = seconds_per_step(recipe, sizes, device, 0.4, 8192, 1)
        assert seconds == pytest.approx(8192 * (expected + beside) / 4e14)


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_float16_is_not_sharded(dtype: str) -> None:
    """A T4 has no bfloat16, and shards have no scaled gradients."""
    text = {
        "name": "r",
        "model": {"base": "/m", "dtype": dtype},
        "adapter": {"rank": 16},
        "data": {"train": [{"path": "/x"}], "max_length": 512},
    }
    recipe = recipe_from_dict(text)
    card = CARDS["t4" if dtype == "auto" else "h100"]
    placed = list(placements(recipe, "none", LLAMA_8B, Room(card.bytes, card.has_bfloat16), 4))
    assert {one.strategy for one in placed} == {"one GPU", "ddp"}


def test_the_nearest_card_may_shard() -> None:
    """All of eight billion weights: T4s take float16, which is not sharded; larger cards do not."""
    text = {"name": "r", "model": "/m", "data": {"train": [{"path": "/x"}]}}
    sizes = replace(LLAMA_8B, linear=0, frozen=0, trained=8 * 10**9)
    near = _nearest(recipe_from_dict(text), {"none": sizes}, CARDS["t4"], 4)
    assert near is not None and near.startswith("--gpu a100-40:4 (")


def test_completions_are_trained_on(tiny_model: Path, tmp_path: Path) -> None:
    """As long as they may be, with prompts as long as they are."""
    rows = [{"prompt": f"How much is {number} + 1?"} for number in range(40)]
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "rewards.py").write_text("def worth(**_): return []\n", encoding="utf-8")
    method = {
        "kind": "grpo",
        "rollout": "vllm",  # which need not be installed here
        "rewards": [{"file": f"{tmp_path}/rewards.py:worth"}],
        "generations": 4,
        "max_completion": 80,
    }
    recipe = values(tiny_model, data, method=method)
    recipe["data"]["max_length"] = 128
    planned = plan(recipe, gpu="l4")
    assert planned["note"] is None
    row = planned["placements"][0]
    prompt = planned["tokens"] / 40
    assert planned["steps"] == 20 and 5 < prompt < 48
    assert row["tokens_per_second"] * row["seconds_per_step"] == pytest.approx(8 * (prompt + 80))


def test_bfloat16_on_a_card_that_emulates_it_is_noted(tiny_model: Path, chat_file: Path) -> None:
    recipe = values(tiny_model, chat_file)
    recipe["model"]["dtype"] = "bfloat16"
    assert "emulates bfloat16" in plan(recipe, gpu="t4")["note"]
    assert plan(recipe, gpu="l4")["note"] is None


def test_each_note_is_a_line(tiny_model: Path, chat_file: Path, tmp_path: Path) -> None:
    """Without the tokenizer the data, which is here, has no number of steps."""
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(tiny_model / "config.json", base)
    recipe = values(base, chat_file)
    recipe["model"]["dtype"] = "bfloat16"
    lines = render(plan(recipe, gpu="t4")).splitlines()
    assert lines[0] == "run on 1 x T4 16 GB, at 40% of their 16-bit speed; steps unknown"
    assert lines[1].startswith("note: ") and "without a tokenizer" in lines[1]
    assert lines[2].startswith("note: model.dtype: ") and lines[3] == ""


def test_only_the_configuration_is_needed(
    tiny_model: Path, chat_file: Path, tmp_path: Path
) -> None:
    """The weights may be where the GPUs are."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "model.safetensors").unlink()
    planned = plan(values(base, chat_file), gpu="l4")
    assert planned["note"] is None and planned["steps"]


def test_what_fills_a_card_comes_last(
    tiny_model: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator's own pieces may not fit beside it, so `auto` would not take it either."""
    recipe = values(tiny_model, chat_file, adapter={"rank": 4, "init": "orthogonal"})
    recipe["optim"] = {"batch_size": 1, "micro_batch_size": 1}
    plain, saving = plan(recipe, gpu="l4")["placements"]
    assert plain["peak"] > saving["peak"] and not plain["is_tight"]
    small = replace(CARDS["l4"], gib=(plain["peak"] + 2**10) / 2**30)
    monkeypatch.setitem(CARDS, "l4", small)
    share = plain["peak"] / small.bytes - 1e-9
    monkeypatch.setattr("finray.training.models.placement.SHARE", share)
    planned = plan(recipe, gpu="l4")
    assert [row["is_tight"] for row in planned["placements"]] == [False, True]
    assert planned["best"] == saving["settings"] and "  tight  " in render(planned)


def test_the_first_worker_loads_the_whole_model() -> None:
    """It hands out shards; what is trained is gathered there when it is saved."""
    text = {"name": "r", "model": "/m", "data": {"train": [{"path": "/x"}]}}
    scale = {"workers": 8, "strategy": "fsdp"}
    adapter = recipe_from_dict({**text, "adapter": {"rank": 16}, "scale": scale})
    beside = 8 * 2**30
    base = 2 * (LLAMA_8B.linear + LLAMA_8B.frozen + LLAMA_8B.trained)
    assert host_bytes(adapter, LLAMA_8B, "bfloat16") == base + beside
    full = replace(LLAMA_8B, linear=0, frozen=0, trained=8 * 10**9)
    whole = host_bytes(recipe_from_dict({**text, "scale": scale}), full, "bfloat16")
    assert whole == 12 * full.trained + beside
    assert host_bytes(adapter, LLAMA_8B, "bfloat16", is_first=False) == beside
    copied = adapter.with_strategy("ddp")
    assert host_bytes(copied, LLAMA_8B, "bfloat16", is_first=False) == base + beside


def test_placements_of_a_small_model(tiny_model: Path, chat_file: Path) -> None:
    planned = plan(values(tiny_model, chat_file), gpu="l4:2")
    rows = planned["placements"]
    kinds = {(row["strategy"], row["workers"], row["quantize"]) for row in rows}
    assert kinds == {
        (strategy, workers, quantize)
        for strategy, workers in [("one GPU", 1), ("ddp", 2), ("fsdp", 2)]
        for quantize in ("none", "nf4")
    }
    assert len(rows) == 12 and all(row["fits"] for row in rows)
    assert planned["steps"] and planned["tokens"]
    speeds = [row["seconds_per_step"] for row in rows]
    assert speeds == sorted(speeds)
    best = rows[0]
    assert planned["best"] == best["settings"] and not best["gradient_checkpointing"]
    assert best["gpu_hours"] == pytest.approx(best["hours"] * best["workers"])
    # The settings are those of a recipe that is valid.
    assert plan(values(tiny_model, chat_file), planned["best"], gpu="l4:2")["best"]
    text = render({**planned, "placements": [{**best, "hours": 0.0008, "gpu_hours": 1234.4}]})
    assert text.split("\n\n")[1].endswith("  0.0008  1,234")
    large = {
        **best,
        "workers": 64,
        "strategy": "fsdp",
        "peak": 141 * 2**30,
        "hours": 1234.5,
        "gpu_hours": 79_008.0,
    }
    text = render({**planned, "placements": [{**large, "tokens_per_second": 1_234_567.0}]})
    table = text.split("\n\n")[1].splitlines()
    assert max(map(len, table)) <= 80 and len(table) == 3
    text = render(planned)
    assert text.startswith("run on 2 x L4 24 GB, at 40% of their 16-bit speed; ")
    assert "with the best, a worker takes up to 8.0 GiB of host memory" in text
    sharded = next(row for row in rows if row["strategy"] == "fsdp")
    sharded = {**sharded, "host": 2**35}
    assert "the first worker takes up to 32.0 GiB, and each other 8.0 GiB, of host memory" in (
        render({**planned, "placements": [sharded]})
    )
    assert text.endswith("best: " + " ".join(f"--set {one}" for one in planned["best"]))


@pytest.mark.parametrize(("count", "workers"), [(16, {1, 8, 16}), (64, {1, 8, 32}), (3, {1, 3})])
def test_more_gpus_are_never_slower(count: int, workers: set[int]) -> None:
    """A node's GPUs are tried alone, and no more than a step has rows for."""
    settings = recipe_from_dict(
        {
            "name": "r",
            "model": "/m",
            "adapter": {"rank": 16},
            "data": {"train": [{"path": "/x"}], "max_length": 512},
            "optim": {"batch_size": 32},
        }
    )
    room = Room(CARDS["h100"].bytes)
    placed = list(placements(settings, "none", LLAMA_8B, room, count))
    assert {one.workers for one in placed} == workers

    def fastest(count: int) -> float:
        return min(
            seconds_per_step(
                *(one.recipe, LLAMA_8B, Device(1e15, 3e12, link_of(CARDS["h100"], one.workers))),
                *(0.4, 32 * 512, one.workers),
            )
            for one in placements(settings, "none", LLAMA_8B, room, count)
        )

    assert fastest(count) <= fastest(8 if count > 8 else 2)


def test_what_fits_nowhere_gets_the_nearest(tmp_path: Path, tiny_model: Path) -> None:
    """Two layers of a wide model, 1.9 billion weights, all of them trained; no data is needed."""
    wide = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 2}
    base = write_config({**QWEN3_4B_CONFIG, **wide, "vocab_size": 1000}, tmp_path / "model")
    recipe = values(base, tmp_path / "none.jsonl", optim={"batch_size": 8, "max_steps": 10})
    recipe.pop("adapter")
    planned = plan(recipe, gpu="t4")
    assert planned["best"] is None and planned["steps"] == 10 and planned["note"] is not None
    assert all(not row["fits"] for row in planned["placements"])
    assert planned["nearest"].startswith("--gpu rtx5090:1 (")
    assert render(planned).endswith(f"none fits; the nearest that would: {planned['nearest']}")


def test_the_best_settings_are_valid_in_the_recipe(tiny_model: Path, chat_file: Path) -> None:
    """Of a recipe for CPUs and shards, with modules that cannot be quantised."""
    recipe = values(
        *(tiny_model, chat_file),
        adapter={"rank": 4, "modules_to_save": ["mlp.up_proj"]},
        scale={"workers": 2, "strategy": "fsdp", "gpus_per_worker": 0},
    )
    planned = plan(recipe, gpu="l4")
    assert {row["quantize"] for row in planned["placements"]} == {"none"}
    settled = load_recipe(recipe, planned["best"])
    assert (settled.scale.workers, settled.scale.strategy) == (1, "ddp")
    assert settled.scale.gpus_per_worker == "auto"


@pytest.mark.parametrize(
    ("gpu", "changes"),
    [
        ("l4:3", {}),
        ("h100:1000", {"optim": {"batch_size": 7, "micro_batch_tokens": 200}}),
        ("v100:2", {"method": {"kind": "dpo"}, "scale": {"workers": [2, 6]}}),
    ],
    ids=["odd count", "more than rows", "elastic"],
)
def test_every_placement_is_planned_again_to_the_same_figures(
    tiny_model: Path, gpu: str, changes: dict[str, Any]
) -> None:
    """With its settings in the recipe: the same peak, and hours that fit it."""
    recipe = values(tiny_model, Path("/missing.jsonl"), **changes)
    recipe["optim"] = {"batch_size": 8, **changes.get("optim", {}), "max_steps": 90}
    planned = plan(recipe, gpu=gpu)
    card, count = parse_gpus(gpu)
    compute = "bfloat16" if card.has_bfloat16 else "float16"
    assert planned["steps"] == 90
    for row in planned["placements"]:
        assert row["workers"] <= count
        assert row["hours"] == pytest.approx(90 * row["seconds_per_step"] / 3600)
        assert row["gpu_hours"] == pytest.approx(row["hours"] * row["workers"])
        settled = load_recipe(recipe, row["settings"])
        assert settled.microbatch == row["micro_batch_size"]
        assert estimate(settled, sizes_of(settled), compute).peak == row["peak"]
    assert plan(recipe, planned["best"], gpu=gpu)["placements"][0] == planned["placements"][0]


def test_what_cannot_be_sharded_in_4_bits(tmp_path: Path, chat_file: Path) -> None:
    """Bamba's code reads packed weights past their layers; FSDP holds no such weights."""
    from transformers import BambaConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_indices": [1]}
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
    BambaConfig(vocab_size=256, **sizes, **heads, **mamba).save_pretrained(tmp_path / "base")
    recipe = values(tmp_path / "base", chat_file, optim={"batch_size": 8, "max_steps": 1})
    rows = plan(recipe, gpu="l4:2")["placements"]
    sharded = {row["quantize"] for row in rows if row["strategy"] == "fsdp"}
    assert sharded == {"none"} and {row["quantize"] for row in rows} == {"none", "nf4"}


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_plan_gives_each_worker_a_gpu(share: float) -> None:
    """Of a recipe for CPUs, or one whose worker has half of a GPU."""
    text = {
        "name": "r",
        "model": "/m",
        "adapter": {"rank": 16},
        "data": {"train": [{"path": "/x"}], "max_length": 512},
        "scale": {"gpus_per_worker": share},
    }
    recipe, room = recipe_from_dict(text), Room(CARDS["h100"].bytes)
    for placed in placements(recipe, "none", LLAMA_8B, room, 2):
        settled = load_recipe(text, placed.settings)
        assert settled.scale.gpus_per_worker == "auto"
        assert settled.scale.workers == placed.workers


def test_a_loss_of_each_pass_keeps_its_microbatch() -> None:
    """What shares a forward pass decides on such a loss, so the GPU must not."""
    text = {
        "name": "r",
        "model": "/m",
        "adapter": {"rank": 16},
        "method": {"kind": "dpo", "losses": {"aot": 1.0}},
        "data": {"train": [{"path": "/x"}], "max_length": 512},
        "optim": {"micro_batch_size": 2},
    }
    room = Room(CARDS["h100"].bytes)
    placed = placements(recipe_from_dict(text), "none", LLAMA_8B, room, 2)
    assert {one.rows for one in placed} == {2}
    with pytest.raises(InputError, match=r"optim.micro_batch_size auto: the loss \(bnpo, aot"):
        load_recipe(text, ["optim.micro_batch_size=auto"])


def test_the_nearest_may_be_more_gpus() -> None:
    """All of eight billion weights with gradients and moments, 128 GiB, on GPUs of 80."""
    text = {
        "name": "r",
        "model": "/m",
        "data": {"train": [{"path": "/x"}], "max_length": 131_072},
    }
    recipe, sizes = recipe_from_dict(text), replace(LLAMA_8B, linear=0, frozen=0, trained=8 * 10**9)
    near = _nearest(recipe, {"none": sizes}, CARDS["h100"], 1)
    assert near is not None
    _, gpu, *settings = near.replace("--set ", "").split()
    settled = load_recipe(text, settings)
    assert gpu == f"h100:{settled.scale.workers}" and settled.scale.strategy == "fsdp"
    assert estimate(settled, sizes).peak <= CARDS["h100"].bytes


def test_the_nearest_may_be_more_gpus_of_a_larger_card() -> None:
    """All of 40 billion weights, 600 GiB: no card holds them, and T4s do not shard."""
    recipe = recipe_from_dict({"name": "r", "model": "/m", "data": {"train": [{"path": "/x"}]}})
    sizes = {"none": replace(LLAMA_8B, linear=0, frozen=0, trained=40 * 10**9)}
    near = _nearest(recipe, sizes, CARDS["t4"], 1)
    assert near is not None and near.startswith("--gpu b200:4 (")
    room = Room(CARDS["b200"].bytes)
    fewer = placements(recipe, "none", sizes["none"], room, 2)
    assert min(estimate(one.recipe, sizes["none"]).peak for one in fewer) > room.bytes
    long = with_settings(recipe, "data", max_length=2**20)
    near = _nearest(long, sizes, CARDS["t4"], 1)
    assert near is not None and near.startswith("--gpu b200:4 --set scale.workers=4 ")
    settled = load_recipe(long.model_dump(mode="json"), near.replace("--set ", "").split()[2:])
    assert settled.data.max_length < 2**20
    assert estimate(settled, sizes["none"]).peak <= room.bytes
    vast = {"none": replace(sizes["none"], trained=4 * 10**13)}
    assert _nearest(recipe, vast, CARDS["t4"], 1) is None


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_the_nearest_is_quantised(quantize: str) -> None:
    recipe = recipe_from_dict(
        {
            "name": "r",
            "model": {"base": "/m", "quantize": quantize},
            "adapter": {"rank": 16},
            "data": {"train": [{"path": "/x"}], "max_length": 65_536},
        }
    )
    both = dict.fromkeys(quantisations(recipe), LLAMA_8B)
    nearest = _nearest(recipe, both, CARDS["t4"], 1)
    assert nearest is not None
    settled = load_recipe(recipe.model_dump(mode="json"), nearest.replace("--set ", "").split())
    assert settled.model.quantize == "nf4" and settled.data.max_length < 65_536
    fits = estimate(settled, LLAMA_8B, "float16").peak <= CARDS["t4"].bytes
    longer = settled.data.model_copy(update={"max_length": 2 * settled.data.max_length})
    longest = settled.model_copy(update={"data": longer})
    assert fits and estimate(longest, LLAMA_8B, "float16").peak > CARDS["t4"].bytes


def test_the_python_face(tiny_model: Path, chat_file: Path) -> None:
    recipe = values(tiny_model, chat_file)
    planned = finray.plan(recipe, {"optim.batch_size": 16}, gpu="l4:2", utilisation=0.3)
    assert planned["utilisation"] == 0.3 and planned["gpus"] == 2
    faulty: list[Any] = [8, None, ("h100", 8), "h100:many", "h100:0", "h100:8:2"]
    for gpu in faulty:
        with pytest.raises(finray.InputError, match="expected"):
            finray.plan(recipe, gpu=gpu)
    shares: list[Any] = [0, 1.5, -1, float("nan"), "0.4", True]
    for share in shares:
        with pytest.raises(finray.InputError, match="expected a share above 0 and up to 1"):
            finray.plan(recipe, gpu="l4", utilisation=share)
    with pytest.raises(finray.InputError, match="a sweep has no single plan"):
        finray.plan({"name": "s", "recipe": recipe}, gpu="l4")


def test_a_recipe_is_placed(tiny_model: Path, chat_file: Path) -> None:
    """The best placement's settings, under those that the caller states."""
    recipe = values(tiny_model, chat_file)
    best = finray.plan(recipe, gpu="l4:2")["best"]
    placed, memory = place(recipe, gpu="l4:2")
    assert placed == load_recipe(recipe, best) and memory > 8 * 2**30
    placed, _ = place(recipe, {"optim.micro_batch_size": 1}, gpu="l4:2")
    assert placed.optim.micro_batch_size == 1
    with pytest.raises(InputError, match=r"scale.workers: 4, and --gpu l4:2 has 2"):
        place(recipe, {"scale.workers": 4}, gpu="l4:2")


@pytest.mark.long
def test_kubernetes_gets_pods_for_the_best_placement(
    tmp_path: Path, tiny_model: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's folder is on this machine, so the check of paths is left out."""
    monkeypatch.setattr("finray.cluster.kubernetes.render.check_reachable", lambda *_: True)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(values(tiny_model, chat_file)), encoding="utf-8")
    command = ["k8s", "render", str(file), "--to", str(tmp_path / "job.yaml")]

    def rendered(*more: str) -> tuple[dict[str, Any], dict[str, Any]]:
        assert main([*command, *more]) == 0
        cluster = yaml.safe_load((tmp_path / "job.yaml").read_text())["spec"]["rayClusterSpec"]
        group = cluster["workerGroupSpecs"][0]
        return group, group["template"]["spec"]["containers"][0]["resources"]["limits"]

    group, limits = rendered("--gpu", "l4:4")
    assert group["maxReplicas"] == 4
    assert (limits["nvidia.com/gpu"], limits["memory"]) == ("1", "64Gi")
    monkeypatch.setattr("finray.cluster.memory_fit._PROCESS_BYTES", 100 * 2**30)
    assert rendered("--gpu", "l4:4")[1]["memory"] == "101Gi"
    assert rendered("--gpu", "l4:4", "--memory", "32Gi")[1]["memory"] == "32Gi"
    assert rendered()[1]["memory"] == "64Gi"
    assert main([*command, "--gpu", "l5"]) == 2


def test_what_fits_nowhere_is_not_rendered(tmp_path: Path, tiny_model: Path) -> None:
    wide = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 2}
    base = write_config({**QWEN3_4B_CONFIG, **wide, "vocab_size": 1000}, tmp_path / "model")
    recipe = values(base, tmp_path / "none.jsonl", optim={"batch_size": 8, "max_steps": 10})
    recipe.pop("adapter")
    with pytest.raises(InputError, match=r"the nearest that would fit: --gpu rtx5090:1 \("):
        place(recipe, gpu="t4")


def test_the_command(
    tiny_model: Path, chat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(values(tiny_model, chat_file)), encoding="utf-8")
    assert main(["plan", str(file), "--gpu", "h100", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["gpu"] == "H100 80 GB" and planned["gpus"] == 1
    changes = ["--set", "optim.learning_rate=1e-3", "--set", "scale.workers=1"]
    assert main(["plan", str(file), "--gpu", "h100", *changes]) == 0
    # Copied alone, the last line gives the run that was planned.
    settings = " ".join(f"--set {setting}" for setting in planned["best"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"best: --set optim.learning_rate=1e-3 {settings}"
    assert main(["plan", str(file), "--gpu", "h100", "--utilisation", "40"]) == 2
    assert "--utilisation 40.0: expected a share above 0 and up to 1" in capsys.readouterr().err
    assert main(["plan", str(file)]) == 2
    assert "plan needs --gpu" in capsys.readouterr().err


def test_a_model_that_is_not_here_is_refused(chat_file: Path) -> None:
    recipe = values(Path("none/at-all"), chat_file)
    with pytest.raises(InputError, match=r"model.base: the configuration of none/at-all is not"):
        plan(recipe, gpu="h100")
