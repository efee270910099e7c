"""Forms the process group of the workers, on a network interface that all of them reach.

gloo binds the address that the host name resolves to. On many machines that is a loopback address,
which workers on other machines cannot reach. The interface with the node's address in the cluster
is reachable from all nodes.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

from ..models.devices import VARIABLE

LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915
_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_BACKENDS = {"cuda": "nccl", "xpu": "xccl"}
_MEETING_SECONDS = 600
"""Time in which all workers must come."""


@dataclass(frozen=True)
class Place:
    """A worker's position in the process group, as torch's environment variables describe it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    address: str
    """Address of rank 0's node."""
    port: int
    """Port on rank 0's node where the workers meet."""
    device: str
    """The torch device that the worker trains on: cpu, cuda:1, mps."""


def join_group(place: Place, own_address: str) -> None:
    """Form the process group of all workers: NCCL on CUDA, XCCL on XPU, gloo on CPUs.

    Args:
        place: this worker's place.
        own_address: address of this node, on the interface that the others reach.
    """
    import torch.distributed as dist

    from ..models.cpu_group import LONGEST

    _choose_interface(own_address)
    places = {
        "RANK": place.rank,
        "WORLD_SIZE": place.world_size,
        "LOCAL_RANK": place.local_rank,
        "LOCAL_WORLD_SIZE": place.local_world_size,
        "NODE_RANK": place.node_rank,
        "MASTER_ADDR": place.address,
        "MASTER_PORT": place.port,
        VARIABLE: place.device,
        # accelerate would tell DDP that the GPU's number is the local rank; on a node with more
        # than ten GPUs, which Ray orders by the text of their numbers, it is another.
        "ACCELERATE_BYPASS_DEVICE_MAP": "true",
    }
    os.environ.update({name: str(value) for name, value in places.items()})
    store = dist.TCPStore(  # type: ignore[attr-defined]  # public, but not in its __all__
        place.address,
        place.port,
        place.world_size,
        is_master=place.rank == 0,
        timeout=timedelta(seconds=_MEETING_SECONDS),
    )
    dist.init_process_group(
        backend=_BACKENDS.get(place.device.partition(":")[0], "gloo"),
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=LONGEST,
    )
    # NCCL's workers meet here once more, at their first collective.
    store.set_timeout(LONGEST)


def interface_of(address: str) -> str | None:
    """The name of the interface with this IPv4 address; None if there is none."""
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(
                    probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15])
                )
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None


def _choose_interface(own_address: str) -> None:
    """Set the interface for gloo and NCCL, unless the user has set it."""
    name = interface_of(own_address)
    if name is not None:
        for variable in _VARIABLES:
            os.environ.setdefault(variable, name)


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
