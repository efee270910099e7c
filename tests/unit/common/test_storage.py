"""Folders: atomic writes, on a local path and through a pyarrow filesystem."""

import os
from pathlib import Path

import pytest

from finray.training.common.errors import InputError
from finray.training.common.storage import Folder


@pytest.fixture(params=["path", "uri"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "f") if request.param == "path" else f"file://{tmp_path}/f")


def test_write_read_list_delete(folder: Folder) -> None:
    assert not folder.exists() and folder.names() == []
    folder.write("a/b.txt", b"one")
    folder.write("a/b.txt", b"two")
    assert folder.read("a/b.txt") == b"two"
    assert folder.files() == ["a/b.txt"] and (folder / "a").names() == ["b.txt"]
    folder.delete("a")
    folder.delete("a")
    assert folder.files() == []
    with pytest.raises(FileNotFoundError):
        folder.read("a/b.txt")


def test_upload_and_download(folder: Folder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "x").write_bytes(b"x")
    folder.upload(source)
    folder.download(tmp_path / "back")
    assert (tmp_path / "back" / "deep" / "x").read_bytes() == b"x"


def test_a_failed_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(str(tmp_path))
    folder.write("a", b"old")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        folder.write("a", b"new")
    assert folder.read("a") == b"old" and folder.names() == ["a"]


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(InputError, match="cannot open storage"):
        Folder("nope://x").names()


def test_children_of_a_uri_keep_its_query() -> None:
    root = Folder("s3://bucket/runs?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1")
    child = root / "a" / "b"
    assert child.path == "bucket/runs/a/b" and child.name == "b"
    assert child.uri.endswith(
        "/runs/a/b?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    )
    assert child.filesystem is root.filesystem
