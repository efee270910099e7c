"""Run by each Python that starts with this folder in PYTHONPATH: a worker of Ray's is handed over.

The fork server of `forking.py` has its libraries loaded. This process waits for the worker's end,
and is named after it meanwhile: `forked-PID`.
"""

import os
import sys

SERVER = "FINRAY_TEST_FORK_SERVER"
"""The environment variable with the path of the server's socket."""
PROGRAMS = ("/workers/setup_worker.py", "/workers/default_worker.py")
"""The first one becomes the second one."""
NAMESPACES = ("net", "uts", "mnt", "pid")


def hand_over(address: str, arguments: list[str]) -> int:
    """The exit code of the worker, which has this process's streams, folder and namespaces."""
    import ctypes
    import json
    import socket

    reader, writer = os.pipe()
    spaces = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in NAMESPACES]
    # A job looks among its ancestors for Ray's interpreter, and the forked one has others.
    environment = {**os.environ, "python": sys.executable}
    task = {"module": "", "arguments": arguments, "environment": environment}
    task |= {"folder": os.getcwd(), "path": sys.path}  # noqa: PTH109
    message = json.dumps(task).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.connect(address)
        socket.send_fds(channel, [message], [0, 1, 2, *spaces, writer])
        channel.shutdown(socket.SHUT_WR)
        os.close(writer)
        pid = channel.recv(20)
    if not pid:
        return 1
    ctypes.CDLL(None).prctl(15, b"forked-" + pid, 0, 0, 0)
    return int(os.read(reader, 20) or 1)


if os.environ.get(SERVER) and "".join(sys.orig_argv[1:2]).endswith(PROGRAMS):
    os._exit(hand_over(os.environ[SERVER], sys.orig_argv[1:]))
