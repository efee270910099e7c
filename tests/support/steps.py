"""One optimizer step of any method, here or by several forked workers."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe
from finray.training.data.batching import in_batches
from finray.training.data.prepared import Prepared
from finray.training.data.stream import Sequence, share
from finray.training.engine.methods import objective_of
from finray.training.engine.trainer import Counts, StepMeasures, StreamTrainer
from finray.training.engine.trainer_arguments import training_arguments
from finray.training.models.placement import choose_strategy
from finray.training.objectives.objective import Setup

Gradients = dict[str, torch.Tensor]


def make_sequences(count: int, seed: int = 0) -> list[Sequence]:
    """Packed sequences of random documents, about half of whose tokens count in the loss."""
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


def gradients(model: Any) -> Gradients:
    """The full gradients by name. All ranks of a sharded model must call this together."""
    existing = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {
        name: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
        for name, gradient in existing.items()
    }


class _Grab(TrainerCallback):  # type: ignore[misc]
    """Keeps the gradient that the optimizer is about to use."""

    def __init__(self) -> None:
        self.gradients: Gradients = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.gradients = gradients(model)


def make_setup(settings: Recipe, model: Any, folder: Path, rank: int, world_size: int) -> Setup:
    """Without prepared data."""
    prepared, cpu = Prepared(Folder(str(folder)), Mock()), torch.device("cpu")
    strategy = choose_strategy(settings, world_size, cpu)
    return Setup(
        *(settings, model, None, prepared, rank, world_size, cpu, strategy), isolation="documents"
    )


def one_step(
    model: Any, settings: Recipe, rows: list[Sequence], scratch: Path, rank: int, world_size: int
) -> tuple[Gradients, dict[str, float], Counts]:
    """The gradient, the logged loss and measures, and the counts of a step over all rows."""
    first = sum(share(len(rows), other, world_size) for other in range(rank))
    own_rows = rows[first : first + share(len(rows), rank, world_size)]
    logged: dict[str, float] = {}

    def after_step(step: StepMeasures) -> bool:
        taken = trainer.take_logged(1, step.grad_norm)
        logged.update(loss=taken.loss, **taken.measures)
        return False

    setup = make_setup(settings, model, scratch, rank, world_size)
    objective = objective_of(setup)
    if setup.strategy == "fsdp":
        setup.place(model)
    trainer = StreamTrainer(
        model,
        training_arguments(settings, 1, scratch),
        objective=objective,
        passes=1,
        rows=lambda: in_batches(iter(own_rows), len(own_rows)),
        after_step=after_step,
        is_logged=lambda step: True,
        stop_requested=lambda: False,
    )
    grab = _Grab()
    trainer.add_callback(grab)
    trainer.train()
    return grab.gradients, logged, trainer.counts


def by_workers(
    world_size: int, folder: Path, work: Callable[[int, int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """What `work(rank, world_size)` returns in each of some workers that talk by gloo."""
    # Forked: a fresh process would spend most of its time importing torch.
    arguments = (world_size, str(folder), work)
    multiprocessing.start_processes(_rank, arguments, nprocs=world_size, start_method="fork")
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(world_size)]


def _rank(
    rank: int, world_size: int, folder: str, work: Callable[[int, int], dict[str, Any]]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    # accelerate asks for these; the group below meets in a file.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    torch.save(work(rank, world_size), f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()
