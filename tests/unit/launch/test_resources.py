"""Tests whether workers fit the nodes, and which number would fit."""

from typing import Any

import pytest

from finray.training.common.errors import InputError
from finray.training.config.sections import ScaleSettings
from finray.training.launch.resources import (
    WorkerRequest,
    check_fits,
    fitting_workers,
    worker_request,
)
from finray.tuning.concurrency import trials_that_fit

GPU_NODE = {"CPU": 8.0, "GPU": 4.0}
CPU_NODE = {"CPU": 16.0}


@pytest.mark.parametrize(
    ("cpus", "gpus", "nodes", "fits"),
    [
        (1, 0, [{"CPU": 4.0}], 4),
        (1, 1, [GPU_NODE, CPU_NODE], 4),  # CPUs of a node without GPUs do not help
        (8, 1, [GPU_NODE, CPU_NODE], 1),
        (3, 0, [{"CPU": 4.0}, {"CPU": 4.0}], 2),  # no worker spans two nodes
        (1, 0.5, [GPU_NODE], 8),
    ],
)
def test_how_many_fit(cpus: float, gpus: float, nodes: list[dict[str, float]], fits: int) -> None:
    assert fitting_workers(WorkerRequest(99, 99, cpus, gpus), nodes) == fits


def test_what_is_missing_and_what_would_fit() -> None:
    with pytest.raises(InputError, match=r"lacks 4 CPUs; scale\.workers=4 would fit"):
        check_fits(WorkerRequest(8, 8, 1, 0), [{"CPU": 4.0}])
    with pytest.raises(InputError, match=r"lacks 4 GPUs; scale\.workers=4 would fit"):
        check_fits(WorkerRequest(8, 8, 1, 1), [GPU_NODE, CPU_NODE])
    with pytest.raises(
        InputError, match="for a worker; ask for less, as not one worker fits, or add"
    ):
        check_fits(WorkerRequest(1, 1, 6, 0), [{"CPU": 4.0}, {"CPU": 4.0}])


def test_as_many_as_fit_between_the_bounds() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 3.0}]
    assert check_fits(WorkerRequest(2, 16, 2, 0), nodes) == 3
    assert check_fits(WorkerRequest(2, 2, 2, 0), nodes) == 2
    with pytest.raises(InputError, match=r"4 to 16 workers of 2 CPU each do not fit"):
        check_fits(WorkerRequest(4, 16, 2, 0), nodes)


def test_gpus_are_taken_where_there_are_any() -> None:
    scale = ScaleSettings(workers=2)
    assert worker_request(scale, [CPU_NODE, GPU_NODE]).gpus == 1.0
    assert worker_request(scale, [CPU_NODE]).gpus == 0.0
    assert worker_request(ScaleSettings(gpus_per_worker=0.0), [GPU_NODE]).gpus == 0.0


@pytest.mark.parametrize(
    ("scale", "nodes", "held"),
    [
        ({"cpus_per_worker": 2}, [{"CPU": 3}, {"CPU": 3}], 2),
        ({"workers": 0}, [{"CPU": 4}], 4),
        ({"gpus_per_worker": 0.25}, [{"CPU": 16, "GPU": 2}], 8),
        ({}, [{"CPU": 16, "GPU": 2}], 2),
        ({"workers": 2}, [{"CPU": 4}], 1),  # who follows the workers takes a little too
        ({"workers": 2}, [{"CPU": 2}], 0),
        ({"workers": 2}, [{"CPU": 8}], 3),
        ({"workers": (2, 4)}, [{"CPU": 10}], 2),
        ({"workers": (2, 4)}, [{"CPU": 3}], 1),
    ],
)
def test_trials_that_a_cluster_holds(
    scale: dict[str, Any], nodes: list[dict[str, float]], held: int
) -> None:
    assert trials_that_fit(ScaleSettings(**scale), nodes) == held
