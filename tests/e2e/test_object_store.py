"""A run whose storage is an object store, spoken to over S3's own protocol."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import pytest
from pyarrow.fs import FileSelector, S3FileSystem
from safetensors.numpy import load
from support.harness import Finray, losses, wait_until

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class Store:
    """A server on loopback, with an empty bucket."""

    filesystem: S3FileSystem
    query: str
    """Of its URIs."""
    server: subprocess.Popen[bytes]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        filesystem = S3FileSystem(
            endpoint_override=f"127.0.0.1:{port}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        filesystem.create_dir("bucket")
        query = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        yield Store(filesystem, query, server)
    finally:
        server.kill()
        server.wait(30)


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the object store did not start")


def test_stop_and_resume_in_an_object_store(finray: Finray, store: Store) -> None:
    """It stops answering for a while, too."""
    filesystem = store.filesystem
    finray.run("train", finray.recipe(name="disk"))
    recipe = finray.recipe(storage=f"s3://bucket/runs?{store.query}")

    def names() -> list[str]:
        selector = FileSelector("bucket/runs/run", recursive=True, allow_not_found=True)
        return [info.path for info in filesystem.get_file_info(selector)]

    def content(name: str) -> bytes:
        with filesystem.open_input_stream(f"bucket/runs/run/{name}") as stream:
            return bytes(stream.read())

    command = finray.start("train", recipe)
    wait_until(lambda: any(name.endswith("rank-0.json") for name in names()), "a checkpoint")
    command.interrupt()
    assert command.wait() == 130, command.output()
    earlier = set(names())
    command = finray.start("train", recipe)
    wait_until(lambda: any("step-" in name for name in {*names()} - earlier), "a save", brief=True)
    store.server.send_signal(signal.SIGSTOP)
    time.sleep(6)
    store.server.send_signal(signal.SIGCONT)
    assert command.wait() == 0, command.output()
    assert "resumed from step-" in command.output()
    assert json.loads(content("run.json"))["last_saved_step"] == 30

    on_disk = finray.folder / "runs" / "disk"
    ours = load(content("adapter/adapter_model.safetensors"))
    theirs = load((on_disk / "adapter/adapter_model.safetensors").read_bytes())
    assert all((ours[key] == theirs[key]).all() for key in theirs)
    lines = [json.loads(line) for line in content("metrics.jsonl").splitlines()]
    assert {line["step"]: line["loss"] for line in lines if "loss" in line} == losses(on_disk)
    assert any(name.endswith("report.html") for name in names())
