"""The loss and its gradient, against independent computations."""

import copy
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import multiprocessing
from transformers import AutoModelForCausalLM, TrainerCallback

from finray.training.arguments import training_arguments
from finray.training.data.batching import IGNORED, Batch, accumulation_steps, collate, microbatches
from finray.training.data.prepared import Prepared
from finray.training.data.stream import Sequence, share
from finray.training.objectives.objective import Setup
from finray.training.objectives.tokens import (
    TokenObjective,
    measure,
    to_log_probabilities,
    token_loss,
)
from finray.training.recipe import Recipe
from finray.training.storage import Folder
from finray.training.trainer import StepMeasures, StreamTrainer

BATCH = 8


def make_sequences(count: int, seed: int = 0) -> list[Sequence]:
    """Packed sequences of random documents, about half of whose tokens bear loss."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        lengths = random.integers(2, 14, size=random.integers(1, 5)).astype(np.int32)
        size = int(lengths.sum())
        trainable = random.random(size) < 0.5
        trainable[np.concatenate(([0], np.cumsum(lengths)[:-1]))] = False
        trainable[1] = True
        tokens = random.integers(3, 250, size).astype(np.int32)
        made.append(Sequence(tokens, lengths, trainable, np.array([number])))
    return made


def documents(sequence: Sequence) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, trainable) of each document."""
    ids = torch.from_numpy(sequence.input_ids.astype(np.int64))
    trainable = torch.from_numpy(sequence.trainable)
    sizes = sequence.lengths.tolist()
    return list(zip(ids.split(sizes), trainable.split(sizes), strict=True))


def unpacked_loss(model: Any, sequences: list[Sequence]) -> torch.Tensor:
    """Mean loss over trainable tokens, one document at a time, token by token."""
    total, count = torch.zeros(()), 0
    for sequence in sequences:
        for ids, trainable in documents(sequence):
            log_probabilities = model(ids[None]).logits[0].log_softmax(-1)
            for at in range(1, len(ids)):
                if trainable[at]:
                    total = total - log_probabilities[at - 1, ids[at]]
                    count += 1
    return total / count


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def recipe(base: Path, **optim: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": str(base)},
            "data": {"train": [{"path": "/x"}]},
            "optim": {"batch_size": BATCH, "micro_batch_size": 2, **optim},
        }
    )


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_unpacked(tiny_model: Path, attention: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation=attention
    )
    sequences = make_sequences(4)
    batch = collate(sequences)
    logits = model(**batch.inputs, use_cache=False).logits
    loss = token_loss(to_log_probabilities(logits), batch.targets) / batch.units
    loss.backward()
    packed = gradients(model)
    model.zero_grad()
    expected = unpacked_loss(model, sequences)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert_close(packed, gradients(model))


def test_a_neighbour_changes_nothing(model: Any) -> None:
    """A document's logits are the same whatever it is packed with."""
    first, second = (make_sequences(1, seed)[0] for seed in (1, 2))
    joined = Sequence(
        np.concatenate([first.input_ids, second.input_ids]),
        np.concatenate([first.lengths, second.lengths]),
        np.concatenate([first.trainable, second.trainable]),
        np.array([0, 1]),
    )
    alone, together = collate([second]), collate([joined])
    kept = alone.targets.shape[1]
    with torch.no_grad():
        torch.testing.assert_close(
            model(**alone.inputs, use_cache=False).logits,
            model(**together.inputs, use_cache=False).logits[:, -kept:],
            atol=1e-5,
            rtol=1e-5,
        )


class _Grab(TrainerCallback):  # type: ignore[misc]
    """Keeps the gradient that the optimizer is about to use."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.gradients = gradients(model)


def one_step(
    model: Any, settings: Recipe, scratch: Path, rank: int, world_size: int
) -> tuple[dict[str, torch.Tensor], float]:
    """The gradient and the logged loss of one optimizer step over BATCH sequences."""
    sequences = make_sequences(BATCH)
    first = sum(share(BATCH, other, world_size) for other in range(rank))
    mine = sequences[first : first + share(BATCH, rank, world_size)]
    micro = settings.optim.micro_batch_size
    losses: list[float] = []

    objective = TokenObjective(
        Setup(
            settings,
            model,
            None,
            Prepared(Folder(str(scratch)), Mock()),
            rank,
            world_size,
            torch.device("cpu"),
        )
    )

    def rows() -> Any:
        return microbatches(
            iter(mine), len(mine), micro, accumulation_steps(BATCH, micro, world_size)
        )

    def after_step(_: StepMeasures) -> bool:
        losses.append(trainer.take_loss(1))
        assert trainer.counts.units == sum(int(s.trainable.sum()) for s in sequences)
        assert trainer.counts.tokens == sum(len(s.input_ids) for s in sequences)
        return False

    trainer = StreamTrainer(
        model,
        training_arguments(settings, 1, world_size, scratch),
        objective=objective,
        passes=1,
        rows=rows,
        after_step=after_step,
        is_logged=lambda step: True,
        stop_requested=lambda: False,
    )
    grab = _Grab()
    trainer.add_callback(grab)
    trainer.train()
    return grab.gradients, losses[0]


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_the_step_is_that_of_the_whole_batch(
    tiny_model: Path, model: Any, tmp_path: Path, micro: int
) -> None:
    settings = recipe(tiny_model, micro_batch_size=micro, max_grad_norm=0)
    measured, loss = one_step(copy.deepcopy(model), settings, tmp_path, 0, 1)
    reference = copy.deepcopy(model)
    expected = unpacked_loss(reference, make_sequences(BATCH))
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), abs=1e-5)
    assert_close(measured, gradients(reference))


def _rank(rank: int, world_size: int, base: str, folder: str) -> None:
    import os

    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    # accelerate asks for these; the group below meets in a file.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = recipe(Path(base), max_grad_norm=0)
    measured, loss = one_step(model, settings, Path(folder), rank, world_size)
    torch.save({"gradients": measured, "loss": loss}, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_gradients_agree_whatever_the_workers(
    tiny_model: Path, model: Any, tmp_path: Path, world_size: int
) -> None:
    settings = recipe(tiny_model, max_grad_norm=0)
    expected, loss = one_step(copy.deepcopy(model), settings, tmp_path, 0, 1)
    arguments = (world_size, str(tiny_model), str(tmp_path))
    # Forked: a fresh process would spend most of its time importing torch.
    multiprocessing.start_processes(_rank, arguments, nprocs=world_size, start_method="fork")
    for rank in range(world_size):
        saved = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        assert saved["loss"] == pytest.approx(loss, abs=1e-5)
        for name, gradient in saved["gradients"].items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)


def test_a_batch_without_loss_has_no_gradient(model: Any) -> None:
    silent = make_sequences(1)[0]
    nothing = Sequence(
        silent.input_ids, silent.lengths, np.zeros_like(silent.trainable), silent.rows
    )
    batch: Batch = collate([nothing])
    own = copy.deepcopy(model)
    logits = own(**batch.inputs, use_cache=False).logits
    loss = token_loss(to_log_probabilities(logits), batch.targets)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(float(gradient.abs().max()) == 0.0 for gradient in gradients(own).values())


def test_measures_against_their_definitions() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 50, 17)
    targets = torch.randint(0, 17, (2, 50))
    targets[:, ::5] = logits[:, ::5].argmax(-1)
    targets[0, :20] = IGNORED
    (correct, count), (entropy, _) = measure(to_log_probabilities(logits), targets).tolist()
    wanted = targets != IGNORED
    distribution = torch.distributions.Categorical(logits=logits[wanted])
    assert count == int(wanted.sum())
    assert correct == int((logits.argmax(-1) == targets)[wanted].sum()) > 0
    assert entropy == pytest.approx(float(distribution.entropy().sum()), rel=1e-5)
