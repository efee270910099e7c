"""Forms the torch process group of Ray Train's workers, with `network.join_group`.

Ray Train's own TorchConfig does that too, but imports torch in the driver and in the controller,
which delays the start by seconds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ray.train.backend import Backend, BackendConfig

from ..models.devices import use
from .network import Place, free_port, join_group

_SHUTDOWN_SECONDS = 5.0


@dataclass
class ProcessGroup(BackendConfig):
    """Ray Train's configuration for a torch process group made by `network.join_group`."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The class whose methods Ray Train's controller calls."""
        return _Backend

    @property
    def train_func_context(self) -> Any:
        """The context manager that a worker trains in."""
        return _own_device


class _Backend(Backend):
    # GPUs access each other's memory only if every worker sees all GPUs of the node.
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        worker_group.execute(_join, *worker_group.execute_single(0, _rendezvous_address))

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        import ray
        from ray.exceptions import GetTimeoutError

        try:
            ray.get(worker_group.execute_async(_leave), timeout=_SHUTDOWN_SECONDS)
        except GetTimeoutError:
            return  # a worker hangs in a collective; Ray ends the processes next


def _rendezvous_address() -> tuple[str, int]:
    """Address and port where the workers meet; runs in the first worker."""
    import ray

    return ray.util.get_node_ip_address(), free_port()


def _join(address: str, port: int) -> None:
    """Join the process group; runs in every worker."""
    import ray
    import ray.train

    context = ray.train.get_context()
    place = Place(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        node_rank=context.get_node_rank(),
        address=address,
        port=port,
        device=_device(),
    )
    join_group(place, ray.util.get_node_ip_address())


def _leave() -> None:
    """Leave the process group; runs in every worker before its process ends."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _own_device() -> Iterator[None]:
    """Inside, the thread's current GPU is the worker's own, as it sees all GPUs of the node."""
    use(_device())
    yield


def _device() -> str:
    """This worker's torch device; cpu for one that Ray gave no GPU, whatever the node has."""
    import ray
    from ray.train.torch import get_device

    return str(get_device()) if ray.get_gpu_ids() else "cpu"
