"""Equal results of equal computations on a GPU, where some kernels add up in any order."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..models.devices import DETERMINISTIC


@contextmanager
def deterministic(active: bool) -> Iterator[None]:
    """Inside, if it is active, torch takes kernels that compute the same every time.

    An operation that has no such kernel raises an error.
    """
    if not active:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    variables = {name: os.environ.get(name) for name in DETERMINISTIC}
    os.environ.update(DETERMINISTIC)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        for name, value in variables.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
