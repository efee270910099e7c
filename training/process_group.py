"""How Ray Train's workers form their torch process group, over the interface that all of them
reach.

Ray Train's own TorchConfig does as much, but loads torch in the driver and in the controller too:
seconds before the workers start.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ray.train.backend import Backend, BackendConfig

from .network import choose_interface, free_port

_TIMEOUT_SECONDS = 1800
_LEAVE_SECONDS = 5.0


@dataclass
class ProcessGroup(BackendConfig):
    """NCCL where the workers have GPUs, else gloo."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What the controller calls."""
        return _Backend

    @property
    def train_func_context(self) -> Any:
        """What a worker trains in."""
        return _own_device


class _Backend(Backend):
    # Peers reach each other's memory only where each sees all of the node's GPUs.
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        address, port = worker_group.execute_single(0, _meeting_point)
        worker_group.execute(_join, "nccl" if gpus > 0 else "gloo", address, port)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        import ray
        from ray.exceptions import GetTimeoutError

        try:
            ray.get(worker_group.execute_async(_leave), timeout=_LEAVE_SECONDS)
        except GetTimeoutError:
            return  # one of them hangs in a collective; their processes are ended next


def _meeting_point() -> tuple[str, int]:
    """Runs in the first worker: where all meet."""
    import ray

    return ray.util.get_node_ip_address(), free_port()


def _join(backend: str, address: str, port: int) -> None:
    """Runs in every worker."""
    import ray.train
    import torch.distributed as dist
    from ray.train.torch import get_device

    choose_interface()
    context = ray.train.get_context()
    places = {
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "NODE_RANK": context.get_node_rank(),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "ACCELERATE_TORCH_DEVICE": get_device(),
    }
    os.environ.update({name: str(value) for name, value in places.items()})
    dist.init_process_group(backend, timeout=timedelta(seconds=_TIMEOUT_SECONDS))


def _leave() -> None:
    """Runs in every worker, before its process is ended."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _own_device() -> Iterator[None]:
    """The thread's current GPU is the worker's: it sees those of the whole node."""
    import torch
    from ray.train.torch import get_device

    if torch.cuda.is_available():
        torch.cuda.set_device(get_device())
    yield
