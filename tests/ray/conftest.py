"""A local Ray for the tests of a file; other files of the same process must not see it."""

import os
import warnings
from collections.abc import Iterator

import pytest
from support.forking import ForkServer

from finray.cluster.nodes.ray_start import START_VARIABLES, start_ray


@pytest.fixture(scope="module")
def local_ray(fork_server: ForkServer) -> Iterator[None]:
    for name, value in START_VARIABLES.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own imports warn of what they deprecate
        import ray

        start_ray(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )
    yield
    ray.shutdown()
