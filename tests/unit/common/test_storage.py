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


@pytest.mark.parametrize(
    ("uri", "parent"),
    [
        ("/data/runs/a", "/data/runs"),
        ("/data/what?/a/", "/data/what?"),
        ("/data", "/"),
        ("/", "/"),
        ("file:///data/runs", "file:///data"),
        ("file:///data", "file:///"),
        ("s3://bucket/runs/a?scheme=http", "s3://bucket/runs?scheme=http"),
        ("s3://bucket/runs?scheme=http", "s3://bucket?scheme=http"),
        ("s3://bucket?endpoint_override=http://h/x", "s3://bucket?endpoint_override=http://h/x"),
    ],
)
def test_the_parent_keeps_the_query(uri: str, parent: str) -> None:
    assert Folder(uri).parent == Folder(parent)


@pytest.mark.parametrize(
    "name", ["a b", "50%25", "a#b", "what?x", "d\u00e9j\u00e0", "[1]*", "a=b&c"]
)
def test_any_name_of_a_local_folder(tmp_path: Path, name: str) -> None:
    folder = Folder(str(tmp_path / name)) / "run"
    folder.write("x", b"1")
    assert (tmp_path / name / "run" / "x").read_bytes() == b"1"
    assert (folder / "..").names() == ["run"] and folder.local == tmp_path / name / "run"


def test_a_file_is_no_storage(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    for uri in (f"{tmp_path}/notes.md", f"file://{tmp_path}/notes.md/deeper"):
        with pytest.raises(InputError, match=r"notes\.md is a file; give a folder"):
            Folder(uri).require_folder()
    Folder(f"{tmp_path}/new/deeper").require_folder()
    Folder(f"{tmp_path}/new/deeper").require_writable()
    assert list(tmp_path.iterdir()) == [tmp_path / "notes.md"]
    with pytest.raises(InputError, match=r"cannot be reached: .*; give another folder"):
        Folder(f"{tmp_path}/{'x' * 300}").require_folder()


def test_a_read_only_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(path: Path, mode: int) -> bool:
        asked.append((path, mode))
        return False

    monkeypatch.setattr(os, "access", refuse)
    with pytest.raises(InputError, match=rf"cannot write in {tmp_path}; give another folder"):
        Folder(f"{tmp_path}/new/deeper").require_writable()
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]
