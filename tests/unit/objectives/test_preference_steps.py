"""A step of the preference methods does not depend on the number of workers."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cases import mostly_slow
from support.steps import by_workers, make_setup, one_step

from finray.training.config.recipe import Recipe
from finray.training.data.batching import PADDING_ROW, in_batches
from finray.training.data.stream import Sequence
from finray.training.engine.methods import objective_of
from finray.training.models.first_worker import made_once
from finray.training.models.loading import load_model
from finray.training.objectives.references import Reference

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BATCH = 5
METHODS: list[dict[str, Any]] = [
    {"kind": "dpo", "losses": {"sigmoid": 1.0, "sft": 0.5}},
    {"kind": "kto"},
    {"kind": "orpo"},
    {"kind": "simpo"},
    {"kind": "reward", "center_coefficient": 0.1},
]


def make_rows(kind: str) -> list[Sequence]:
    random = np.random.default_rng(0)
    rows = []
    for number in range(BATCH):
        lengths = random.integers(6, 20, size=1 if kind == "kto" else 2).astype(np.int32)
        starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
        trainable = np.zeros(lengths.sum(), np.bool_)
        for start, length in zip(starts, lengths, strict=True):
            trainable[start + 3 : start + length] = True
        extra = {"kto": {"label": number % 2 == 0}, "reward": {"margin": number / 4}}.get(kind)
        rows.append(
            Sequence(
                random.integers(3, 250, lengths.sum()).astype(np.int32),
                lengths,
                trainable,
                np.array([number]),
                None if extra is None else json.dumps(extra),
            )
        )
    return rows


def make_recipe(
    tiny_model: Path, method: dict[str, Any], micro: int, strategy: str = "ddp"
) -> Recipe:
    return Recipe.model_validate(
        {
            "scale": {"workers": 2, "strategy": strategy},
            "name": "x",
            "model": {"base": str(tiny_model)},
            "adapter": {"rank": 4},
            "method": method,
            "data": {"train": [{"path": "/x"}], "max_length": 64},
            "optim": {"batch_size": BATCH, "micro_batch_size": micro, "max_grad_norm": 0},
        }
    )


def make_model(settings: Recipe) -> Any:
    """A model whose adapter is not zero, so that it differs from its reference."""
    torch.manual_seed(4)
    model = load_model(settings, settings.method.head)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["kind"])
@pytest.mark.parametrize(
    ("world_size", "strategy"),
    mostly_slow([(2, "ddp"), (3, "ddp"), (2, "fsdp")], quick={(3, "ddp")}),
)
def test_workers(
    tiny_model: Path, tmp_path: Path, method: dict[str, Any], world_size: int, strategy: str
) -> None:
    """Five rows, one per microbatch: the last worker has an empty microbatch."""
    rows, whole = make_rows(method["kind"]), make_recipe(tiny_model, method, BATCH)
    model = make_model(whole)
    expected, logged, counts = one_step(copy.deepcopy(model), whole, rows, tmp_path, 0, 1)
    assert counts.units == BATCH
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())
    settings = make_recipe(tiny_model, method, 1, strategy)

    def work(rank: int, world_size: int) -> dict[str, Any]:
        measured = one_step(copy.deepcopy(model), settings, rows, tmp_path, rank, world_size)
        return {"gradients": measured[0], "logged": measured[1]}

    for saved in by_workers(world_size, tmp_path, work):
        assert saved["logged"] == pytest.approx(logged, abs=1e-5)
        assert saved["gradients"].keys() == expected.keys()
        for name, gradient in saved["gradients"].items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)
    if method["kind"] == "kto":
        assert logged["kl"] > 0


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["kind"])
def test_held_out_rows(tiny_model: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    """Their measures do not depend on the size of the microbatches."""
    rows, settings = make_rows(method["kind"]), make_recipe(tiny_model, method, 2)
    model = make_model(settings).eval()
    objective = objective_of(make_setup(settings, model, tmp_path, 0, 1))
    with torch.no_grad():
        actual, expected = (
            objective.evaluate_held_out(in_batches(iter(rows), size), torch.device("cpu"))
            for size in (2, BATCH)
        )
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert actual[0, 1] == BATCH
    assert torch.isfinite(actual).all()


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["kind"])
def test_held_out_rows_of_a_sharded_model(
    tiny_model: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    """Two workers call the model equally often, though one has a row less."""
    rows = make_rows(method["kind"])

    def measure(strategy: str) -> list[dict[str, Any]]:
        settings = make_recipe(tiny_model, method, 1, strategy)
        model = make_model(settings)

        def work(rank: int, world_size: int) -> dict[str, Any]:
            setup = make_setup(settings, model, tmp_path, rank, world_size)
            objective = objective_of(setup)
            setup.place(model.eval())
            own = [[row] for row in rows[rank::world_size]]
            own += [[PADDING_ROW]] * (3 - len(own))
            with torch.no_grad():
                return {"total": objective.evaluate_held_out(iter(own), torch.device("cpu"))}

        folder = tmp_path / strategy
        folder.mkdir()
        return by_workers(2, folder, work)

    sharded, whole = measure("fsdp"), measure("ddp")
    torch.testing.assert_close(sharded, whole, atol=1e-5, rtol=1e-5)
    assert sum(saved["total"][0, 1] for saved in sharded) == BATCH


def test_sharded_full_fine_tuning_with_a_reference(tiny_model: Path, tmp_path: Path) -> None:
    """The reference is a copy of the model, and is sharded too; rank 0 alone loads and copies."""
    rows = make_rows("dpo")

    def full(micro: int, strategy: str) -> Recipe:
        settings = make_recipe(tiny_model, {"kind": "dpo"}, micro, strategy)
        return settings.model_copy(update={"adapter": None})

    whole = full(BATCH, "ddp")
    expected, logged, _ = one_step(load_model(whole), whole, rows, tmp_path, 0, 1)
    settings = full(1, "fsdp")

    def work(rank: int, world_size: int) -> dict[str, Any]:
        def make() -> Any:
            assert rank == 0
            return load_model(settings)

        model = made_once(settings, "fsdp", make)
        measured = one_step(model, settings, rows, tmp_path, rank, world_size)
        return {"gradients": measured[0], "logged": measured[1]}

    for saved in by_workers(2, tmp_path, work):
        assert saved["logged"] == pytest.approx(logged, abs=1e-5)
        torch.testing.assert_close(saved["gradients"], expected, atol=1e-5, rtol=1e-4)


def test_a_reference_in_16_bits_keeps_its_buffers(tiny_model: Path, tmp_path: Path) -> None:
    """Frequencies of positions, which transformers keeps in float32 in a model of 16 bits."""
    settings = make_recipe(tiny_model, {"kind": "dpo"}, 2)
    low = settings.model.model_copy(update={"dtype": "bfloat16"})
    full = settings.model_copy(update={"adapter": None, "model": low})
    model = load_model(full)
    reference = Reference(make_setup(full, model, tmp_path, 0, 1), None)._model
    assert {weight.dtype for weight in reference.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(dict(reference.named_buffers()), dict(model.named_buffers()))


def test_a_reference_is_left_as_it_was(tiny_model: Path, tmp_path: Path) -> None:
    """Full fine-tuning uses a copy as reference; an adapter needs no copy."""
    settings = make_recipe(tiny_model, {"kind": "dpo"}, 2)
    adapted = load_model(settings)
    held = sum(p.numel() for p in adapted.parameters())
    objective_of(make_setup(settings, adapted, tmp_path, 0, 1))
    assert sum(p.numel() for p in adapted.parameters()) == held
    full = settings.model_copy(update={"adapter": None})
    model = load_model(full)
    rows = make_rows("dpo")
    objective = objective_of(make_setup(full, model, tmp_path, 0, 1))
    before = objective.batches(0, rows)[0].extra["reference"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = objective.batches(1, rows)[0].extra["reference"]
    torch.testing.assert_close(before, after, atol=0, rtol=0)
