"""How Ray Train's workers form their torch process group, over the interface that all of them
reach.

Ray Train's own TorchConfig does as much, but loads torch in the driver and in the controller too:
seconds before the workers start.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ray.train.backend import Backend, BackendConfig

from .network import Place, free_port, join_group

_LEAVE_SECONDS = 5.0


@dataclass
class ProcessGroup(BackendConfig):
    """See `network.join_group`."""

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
        worker_group.execute(_join, *worker_group.execute_single(0, _meeting_point))

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


def _join(address: str, port: int) -> None:
    """Runs in every worker."""
    import ray
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    place = Place(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        node_rank=context.get_node_rank(),
        address=address,
        port=port,
        device=str(get_device()),
    )
    join_group(place, ray.util.get_node_ip_address())


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
