"""Processes forked from one that has the libraries loaded: most of a start is imports.

server (loads the libraries) → command → spawner, forked while the command is single-threaded →
worker processes. Each has its own session or group, streams, environment and folder, and real
signals; exit codes come back over a pipe.

Ray's workers are forked by the server, too: each that Ray starts hands itself over
(`handing_over/sitecustomize.py`), and waits for the forked one's end.

    python forking.py FD LISTENING      # serves requests from these sockets
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

COMMAND = "finray.cluster.cli.main"
WORKER = "finray.training.launch.worker_process"
WORKER_TITLE = "finray-worker"
"""Name of a forked worker process; its command line is the server's."""
HANDING_OVER = Path(__file__).parent / "handing_over"
SERVER = "FINRAY_TEST_FORK_SERVER"
FORKED = "forked-"
"""The name of a process that waits for a worker of Ray's ends with the worker's id.

As in the program of `HANDING_OVER`.
"""
LIBRARIES = (
    # First what each worker loads: it does without torch's compiler.
    *("finray.training.models.base_cache", "finray.training.engine.worker"),
    *("pyarrow.dataset", "pyarrow.fs", "pyarrow.json", "yaml", "rich.progress", "jinja2"),
    *("torch.distributed.fsdp", "torch.utils.tensorboard", "transformers.trainer"),
    *("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto"),
    *("transformers.models.auto.tokenization_auto", "peft.tuners.lora", "bitsandbytes"),
    *("peft.utils.transformers_weight_conversion", "torch.utils.serialization.config"),
    *("finray.cluster.cli.train", "finray.cluster.launcher", "finray.cluster.cli.check"),
    *("finray.cluster.screens.progress", "finray.cluster.screens.summary"),
    *("finray.training.run", "finray.training.export.export"),
    WORKER,
    # What Ray loads of others.
    *("click", "google.protobuf.message", "pandas", "pydantic", "rich.console", "yaml"),
)
_SET_NAME = 15
_PACKET = 1 << 20


def before_all_else(folder: Path) -> str:
    """A PYTHONPATH with this folder first."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


@dataclass(frozen=True)
class Task:
    """What a forked process runs."""

    module: str
    """Its `main` is called; empty for a program."""
    arguments: list[str]
    environment: dict[str, str]
    folder: str
    new_session: bool = False
    """Else only a process group of its own."""
    program: str = ""
    """Python source."""
    path: list[str] = field(default_factory=list)
    """Where modules are searched, if a file of Python is to run: the first argument."""


class Forked:
    """As much of `subprocess.Popen` as is used of it, for a process that a server forked."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None
        self._status = status
        self._lock = threading.Lock()

    def __del__(self) -> None:
        os.close(self._status)

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None and select.select([self._status], [], [], 0)[0]:
                # No code: the server itself was killed.
                self.returncode = int(os.read(self._status, 20) or -signal.SIGKILL)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = None if end is None else max(0.0, end - time.monotonic())
            if left == 0.0:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            select.select([self._status], [], [], left)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The side of the one that asks; one request at a time."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lock = threading.Lock()

    @classmethod
    def launch(cls) -> "ForkServer":
        """A new server, which ends with this process; it loads the libraries meanwhile."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        address = f"{tempfile.mkdtemp(prefix='finray-fork-')}/socket"
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs, listening:
            listening.bind(address)
            listening.listen(100)
            files = [theirs.fileno(), listening.fileno()]
            server = subprocess.Popen(
                [sys.executable, "-P", __file__, *map(str, files)],
                pass_fds=files,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                # Arrow's allocator would start a thread.
                env={**os.environ, "JE_ARROW_MALLOC_CONF": "background_thread:false"},
            )
        made = cls(ours)
        made.process, made.address = server, address
        return made

    process: subprocess.Popen[bytes] | None = None
    address: str = ""

    def environment(self) -> dict[str, str]:
        """Where Ray is started with it, its workers are forked."""
        return {"PYTHONPATH": before_all_else(HANDING_OVER), SERVER: self.address}

    def close(self) -> None:
        self._channel.close()
        if self.process is not None:
            self.process.wait(60)
            shutil.rmtree(Path(self.address).parent)

    def start(self, task: Task, stdin: int, stdout: int, stderr: int) -> Forked:
        """Fork a process with these streams; it has its session or group when this returns."""
        reader, writer = os.pipe()
        message = json.dumps(asdict(task)).encode()
        try:
            with self._lock:
                socket.send_fds(self._channel, [message], [stdin, stdout, stderr, writer])
                answer = self._channel.recv(_PACKET)
        finally:
            os.close(writer)
        assert answer, "the fork server is gone"
        return Forked(int(answer), reader)

    def start_worker(self, environment: dict[str, str], stderr: IO[bytes] | None) -> Forked:
        """A worker process, with pipes to its orders and from its answers."""
        (orders, stdin), (stdout, answers) = os.pipe(), os.pipe()
        log = 2 if stderr is None else stderr.fileno()
        task = Task(WORKER, [], environment, str(Path.cwd()))
        try:
            worker = self.start(task, orders, answers, log)
        finally:
            os.close(orders)
            os.close(answers)
        worker.stdin, worker.stdout = os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb")
        return worker

    def run(self, program: str, *arguments: str, seconds: float = 120) -> str:
        """Run Python source to a good end; returns what it printed."""
        task = Task("", list(arguments), dict(os.environ), str(Path.cwd()), program=program)
        with tempfile.TemporaryFile() as out, Path(os.devnull).open("rb") as nothing:
            code = self.start(task, nothing.fileno(), out.fileno(), out.fileno()).wait(seconds)
            out.seek(0)
            printed = out.read().decode()
        assert code == 0, printed
        return printed


def fork_workers(server: ForkServer) -> type[subprocess.Popen[bytes]]:
    """A `Popen` that asks the server for worker processes, and starts all else itself."""

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __new__(cls, args: Any, *_: Any, **options: Any) -> Any:
            if WORKER in args:
                return server.start_worker(options["env"], options["stderr"])
            return super().__new__(cls)

    return Popen


def serve(channel: socket.socket, listening: socket.socket | None = None) -> Task | None:
    """Fork for each request: returns its task in the child, and None at the end in the server."""
    children: dict[int, int] = {}
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    gc.collect()
    gc.freeze()
    gc.enable()
    sources: list[Any] = [channel, reader, *([listening] if listening else [])]
    while True:
        ready, _, _ = select.select(sources, [], [])
        if reader in ready:
            os.read(reader, 1000)
            _reap(children)
        if channel in ready:
            answer = channel
            message, streams, _, _ = socket.recv_fds(channel, _PACKET, 4)
            if not message:
                return None
        elif listening in ready and listening is not None:
            answer, _ = listening.accept()
            message, streams = _received(answer)
            if not message:  # it was killed before it could ask
                answer.close()
                continue
        else:
            continue
        *streams, status = streams
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in (reader, writer, *children.values()):
                os.close(other)
            task = Task(**json.loads(message))
            os.setsid() if task.new_session else os.setpgid(0, 0)
            answer.send(str(os.getpid()).encode())
            _become(task, streams, status)
            channel.close()
            answer.close()
            return task
        children[pid] = status
        if answer is not channel:
            answer.close()
        for stream in streams:
            os.close(stream)


def _received(channel: socket.socket) -> tuple[bytes, list[int]]:
    """A request that is as long as its environment, and its files; none of one that stops."""
    channel.settimeout(10)
    message: bytes = b""
    files: list[int] = []
    with suppress(OSError):
        message, files, _, _ = socket.recv_fds(channel, _PACKET, 8)
        while part := channel.recv(_PACKET):
            message += part
        return message, files
    for file in files:
        os.close(file)
    return b"", []


def _reap(children: dict[int, int]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        pipe = children.pop(pid)
        with suppress(BrokenPipeError):  # who waits for it was killed
            os.write(pipe, str(os.waitstatus_to_exitcode(status)).encode())
        os.close(pipe)


def _become(task: Task, files: list[int], status: int) -> None:
    streams, spaces = files[:3], files[3:]
    _enter(spaces)
    os.close(status)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(task.folder)
    os.environ.clear()
    os.environ.update(task.environment)
    if task.path:
        sys.path[:] = task.path
    if task.module == WORKER:
        ctypes.CDLL(None).prctl(_SET_NAME, WORKER_TITLE.encode(), 0, 0, 0)
    if task.module == WORKER or task.path:
        _customise()


def _enter(spaces: list[int]) -> None:
    """Go to the namespaces of another host; a process of its own number waits here meanwhile."""
    others = [space for space in spaces if not _is_own(space)]
    for space in others:
        if ctypes.CDLL(None, use_errno=True).setns(space, 0):
            raise OSError(ctypes.get_errno(), "the namespace of a host cannot be entered")
    if others and (child := os.fork()):
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)  # as a shell says it
    if others:
        os.setpgid(0, 0)
    for space in spaces:
        os.close(space)


def _is_own(space: int) -> bool:
    name = str(Path(f"/proc/self/fd/{space}").readlink())
    return str(Path(f"/proc/self/ns/{name.partition(':')[0]}").readlink()) == name


def _customise() -> None:
    """Run the sitecustomize.py of PYTHONPATH, as Python does when it starts."""
    for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        file = Path(folder, "sitecustomize.py")
        if folder and file.exists():
            exec(compile(file.read_text("utf-8"), file, "exec"), {"__name__": file.stem})
            return


def _fork_spawner() -> Task | None:
    """None in the command, whose worker processes are forked from now on; a task in each."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        subprocess.Popen = fork_workers(ForkServer(ours))  # type: ignore[misc]
        return None
    ours.close()
    os.setpgid(0, 0)  # Ctrl-C does not reach it
    return serve(theirs) or _end()


def _go_on(execute: Callable[..., NoReturn]) -> Callable[..., None]:
    """Runs the program of a Ray worker in this process, which would load Ray again.

    Another interpreter, folder or setting of Ray's needs a process of its own.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}

    def execvp(file: str, args: list[str]) -> None:
        after = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
        words = shlex.split(args[-1])
        if words[:2] != ["exec", sys.executable] or words[2].startswith("-") or before != after:
            execute(file, args)
        _run_file(words[2:])
        sys.exit()

    return execvp


def _run_file(arguments: list[str]) -> None:
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def _end() -> NoReturn:
    os._exit(0)


def main() -> None:
    gc.disable()
    channel, listening = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    sys.argv = [COMMAND]
    for name in LIBRARIES:
        importlib.import_module(name)
    sys.path.append(str(Path(__file__).parents[1]))
    importlib.import_module("support.rehearsed").without_child()
    sys.path.pop()
    os.fsync = lambda _: None  # as in conftest.py
    assert "ray" not in sys.modules, "Ray reads its environment when it is loaded"
    task = serve(channel, listening) or _end()
    listening.close()
    if task.module == COMMAND:
        task = _fork_spawner() or task
    if task.path:
        os.execvp = _go_on(os.execvp)  # type: ignore[assignment]
        _run_file(task.arguments)
        return
    sys.argv = [task.module, *task.arguments]
    if task.program:
        exec(task.program, {"__name__": "__main__"})
        return
    sys.exit(importlib.import_module(task.module).main())


if __name__ == "__main__":
    main()
