"""Which interface workers on several machines talk over.

gloo binds what the machine's name resolves to, on many machines a loopback address: the other
workers then wait for it in vain. The interface that carries a node's Ray address is reached by all.
"""

import os
import socket

_SIOCGIFADDR = 0x8915
_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def interface_of(address: str) -> str | None:
    """The name of the interface with this IPv4 address; None where there is none."""
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(
                    probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15])
                )
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def choose_interface() -> None:
    """Runs in a Ray worker, before its process group forms; what the user has set stays."""
    import ray

    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        for variable in _VARIABLES:
            os.environ.setdefault(variable, name)


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
