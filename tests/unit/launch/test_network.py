"""How long workers wait for each other."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from finray.training.engine.heartbeat import ALLOWANCES
from finray.training.launch.network import LOOPBACK, Place, free_port, join_group
from finray.training.models.cpu_group import LONGEST, cpu_group


def _timeout(group: dist.ProcessGroup) -> timedelta:
    options = group._get_backend(torch.device("cpu")).options
    return options._timeout


def test_a_slow_worker_is_waited_for_until_it_counts_as_hanging(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the group, of NCCL's meeting at its first collective, and of the CPUs' own groups."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    join_group(Place(0, 1, 0, 1, 0, LOOPBACK, free_port(), "cpu"), LOOPBACK)
    try:
        waits = [
            _timeout(dist.group.WORLD),
            dist.distributed_c10d._get_default_store().timeout,
            _timeout(cpu_group()),
        ]
    finally:
        dist.destroy_process_group()
    longest = timedelta(seconds=300 * max(ALLOWANCES.values()))
    assert waits == [LONGEST] * 3 and longest < LONGEST
