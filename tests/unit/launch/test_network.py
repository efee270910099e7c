"""The process group: how long workers wait for each other, and which GPU is whose."""

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from finray.training.engine.heartbeat import ALLOWANCES
from finray.training.launch.network import LOOPBACK, Place, free_port, join_group
from finray.training.models.cpu_group import LONGEST, cpu_group


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of this process alone."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    join_group(Place(0, 1, 0, 1, 0, LOOPBACK, free_port(), "cpu"), LOOPBACK)
    yield
    dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def timeout(group: Any) -> timedelta:
    waits: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return waits


def test_a_slow_worker_is_waited_for_until_it_counts_as_hanging(joined: None) -> None:
    """By the group, at NCCL's meeting in its first collective, and by the CPUs' own groups."""
    meeting = dist.distributed_c10d._get_default_store().timeout
    waits = [timeout(dist.group.WORLD), meeting, timeout(cpu_group())]
    longest = timedelta(seconds=300 * max(ALLOWANCES.values()))
    assert waits == [LONGEST] * 3 and longest < LONGEST


def test_the_model_says_which_gpu_it_is_on(joined: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would name the one whose number is the local rank."""
    named: list[Any] = []
    monkeypatch.setattr(Accelerator, "multi_device", True)
    monkeypatch.setattr(
        torch.nn.parallel,
        "DistributedDataParallel",
        lambda model, device_ids, **_: named.append(device_ids) or model,
    )
    Accelerator(cpu=True).prepare_model(torch.nn.Linear(1, 1))
    assert named == [None]
