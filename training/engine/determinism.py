"""Equal results of equal computations on a GPU, where some kernels add up in any order."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

VARIABLES = {
    # Read by cuBLAS at its first product, and by transformers for flash attention's kernels.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
}


@contextmanager
def deterministic(active: bool) -> Iterator[None]:
    """Inside, if it is active, torch takes kernels that compute the same every time.

    An operation that has no such kernel raises an error.
    """
    if not active:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    variables = {name: os.environ.get(name) for name in VARIABLES}
    os.environ.update(VARIABLES)
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
