"""Digests of weights: what they notice in a small and in a large file, and that they are cached."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finray.training.common.storage import Folder
from finray.training.config import base_digest

NAME = "model.safetensors"


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as large: a tensor of 1 MB, and a short one."""
    monkeypatch.setattr(base_digest, "_WHOLE", 1000)
    generator = np.random.default_rng(0)
    values = generator.standard_normal(250_000, dtype=np.float32)
    save_file({"long": values, "short": values[:3].copy()}, tmp_path / NAME)
    return tmp_path


def digest(folder: Path) -> str:
    return base_digest.file_digests(Folder(str(folder)), [NAME])[NAME]


@pytest.mark.parametrize("name", ["long", "short"])
def test_a_scaled_tensor_is_noticed_in_a_large_file(large: Path, name: str) -> None:
    before, tensors = digest(large), load_file(large / NAME)
    save_file({**tensors, name: tensors[name] * np.float32(1.05)}, large / NAME)
    assert digest(large) != before
    save_file(tensors, large / NAME)
    assert digest(large) == before


@pytest.mark.parametrize("place", [0, 125_000, 249_999])
def test_the_ends_and_the_middle_of_a_tensor_count(large: Path, place: int) -> None:
    before, tensors = digest(large), load_file(large / NAME)
    tensors["long"][place] += 1
    save_file(tensors, large / NAME)
    assert digest(large) != before


def test_a_name_and_a_type_count(large: Path) -> None:
    before, tensors = digest(large), load_file(large / NAME)
    save_file({"other": tensors["long"], "short": tensors["short"]}, large / NAME)
    renamed = digest(large)
    save_file({**tensors, "long": tensors["long"].view(np.int32)}, large / NAME)
    assert len({before, renamed, digest(large)}) == 3


def test_every_bit_of_a_small_file_counts(tmp_path: Path) -> None:
    values = np.zeros(10_000, np.float32)
    save_file({"a": values}, tmp_path / NAME)
    before = digest(tmp_path)
    values[7_777] = 1e-9
    save_file({"a": values}, tmp_path / NAME)
    assert digest(tmp_path) != before


def test_an_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).write_bytes(b"1")
    monkeypatch.setattr(base_digest, "_CACHEABLE_SECONDS", -1.0)
    first = digest(tmp_path)
    monkeypatch.setattr(base_digest, "_compute", lambda *_: pytest.fail("read again"))
    assert digest(tmp_path) == first
    monkeypatch.undo()
    monkeypatch.setattr(base_digest, "_CACHEABLE_SECONDS", -1.0)
    (tmp_path / NAME).write_bytes(b"2")
    os.utime(tmp_path / NAME, ns=(0, 0))
    assert digest(tmp_path) != first
