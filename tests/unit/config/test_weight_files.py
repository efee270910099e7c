"""`finray check` reads the headers of weights: damaged, foreign and incomplete ones are named."""

import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from finray.cluster.cli.main import main
from finray.training.common.errors import InputError
from finray.training.common.storage import Folder
from finray.training.config.weight_checks import check_adapter_weights
from finray.training.config.weight_files import read_header, read_weights

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

Damage = Callable[[Path], object]


def change_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def shift(header: dict[str, Any]) -> None:
    entry = header["model.norm.weight"]
    entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]


def change_config(base: Path, **values: Any) -> None:
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **values}), encoding="utf-8")


def change_tensors(base: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(base / WEIGHTS)
    change(tensors)
    save_file(tensors, base / WEIGHTS)


def pickled(base: Path) -> None:
    (base / WEIGHTS).rename(base / "pytorch_model.bin")


def pickled_under_the_name(base: Path) -> None:
    with zipfile.ZipFile(base / WEIGHTS, "w") as archive:
        archive.writestr("archive/data.pkl", b"1")


def sharded(base: Path) -> None:
    """Split the weights into two files and an index."""
    tensors = load_file(base / WEIGHTS)
    (base / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, base / file)
    mapping = {name: file for file, own in parts.items() for name in own}
    (base / INDEX).write_text(json.dumps({"weight_map": mapping}), encoding="utf-8")


def without_a_shard(base: Path) -> None:
    sharded(base)
    (base / "b.safetensors").unlink()


def with_a_cut_shard(base: Path) -> None:
    sharded(base)
    cut(base / "b.safetensors")


def with_a_foreign_shard(base: Path) -> None:
    sharded(base)
    shutil.copy(base / "a.safetensors", base / "b.safetensors")


def cut(file: Path, to: int = -10) -> None:
    file.write_bytes(file.read_bytes()[:to])


DAMAGES: dict[str, tuple[Damage, str]] = {
    "none": (
        lambda base: (base / WEIGHTS).unlink(),
        "{base}: there are no weights: neither model.safetensors nor",
    ),
    "empty": (lambda base: (base / WEIGHTS).write_bytes(b""), "{base}/{w}: the file is empty"),
    "cut": (lambda base: cut(base / WEIGHTS), "{base}/{w}: cut off: its tensors end at byte"),
    "cut header": (
        lambda base: cut(base / WEIGHTS, 100),
        "{base}/{w}: not a safetensors file, or cut off inside its header (100 bytes)",
    ),
    "longer": (
        lambda base: (base / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes() + b"\0"),
        "{base}/{w}: damaged: its tensors end at byte",
    ),
    "text": (
        lambda base: (base / WEIGHTS).write_text("<html>404: not found, whatever</html>"),
        "{base}/{w}: not a safetensors file",
    ),
    "header": (
        lambda base: (base / WEIGHTS).write_bytes(struct.pack("<Q", 4) + b"[12]"),
        "{base}/{w}: damaged: its header is not that of a safetensors file",
    ),
    "offsets": (
        lambda base: change_header(base / WEIGHTS, shift),
        "{base}/{w}: damaged: the place of ",
    ),
    "shape": (
        lambda base: change_header(
            base / WEIGHTS, lambda header: header["model.norm.weight"].update(shape=[31])
        ),
        "{base}/{w}: damaged: the place of model.norm.weight does not agree with its shape [31]",
    ),
    "folder": (
        lambda base: ((base / WEIGHTS).unlink(), (base / WEIGHTS).mkdir()),
        "{base}/{w}: cannot read the weights",
    ),
    "pickled": (pickled, "{base}/pytorch_model.bin: pickled weights can run code"),
    "pickled inside": (pickled_under_the_name, "{base}/{w}: a pickled file, which can run code"),
    "pointer": (
        lambda base: (base / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "{base}/{w}: a pointer of Git LFS",
    ),
    "missing shard": (without_a_shard, "{base}/{i}: names b.safetensors, which is not there (1 of"),
    "cut shard": (with_a_cut_shard, "{base}/b.safetensors: cut off"),
    "foreign shard": (with_a_foreign_shard, "{base}/b.safetensors: lacks the tensor"),
    "index": (
        lambda base: (sharded(base), (base / INDEX).write_text("[]")),
        "{base}/{i}: not an index of weights",
    ),
    "vocabulary": (
        lambda base: change_config(base, vocab_size=999),
        "{base}/config.json: vocab_size is 999, but model.embed_tokens.weight is stored as [",
    ),
    "width": (
        lambda base: change_config(base, hidden_size=64),
        "{base}/config.json: hidden_size is 64, but model.embed_tokens.weight is stored as [",
    ),
    "layers": (
        lambda base: change_config(base, num_hidden_layers=5),
        "{base}: the weights lack layer 2 (3 in all): config.json says num_hidden_layers 5",
    ),
    "tensor": (
        lambda base: change_tensors(base, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "{base}: the weights lack model.layers.1.mlp.up_proj.weight (1 in all)",
    ),
    "classifier": (
        lambda base: change_config(base, architectures=["LlamaForSequenceClassification"]),
        "{base}: a classifier, such as a reward model",
    ),
    "score": (
        lambda base: change_tensors(
            base, lambda t: t.update({"score.weight": np.ones((1, 32), np.float32)})
        ),
        "{base}: a classifier, such as a reward model",
    ),
}
"""By what is wrong with a base: how it is made so, and what the message says."""


def recipe_file(folder: Path, base: Path, data: Path, **values: Any) -> Path:
    content = {
        "name": "run",
        "model": {"base": str(base)},
        "adapter": {"rank": 2},
        "data": {"train": [{"path": str(data)}], "max_length": 128},
        "optim": {"batch_size": 8},
        "scale": {"workers": 0},
        "storage": str(folder / "runs"),
        **values,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder / "recipe.yaml"


@pytest.mark.parametrize("what", DAMAGES)
def test_check_names_the_file_and_its_fault(
    tiny_model: Path,
    chat_file: Path,
    tmp_path: Path,
    what: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    damage, message = DAMAGES[what]
    damage(base)
    assert main(["check", str(recipe_file(tmp_path, base, chat_file))]) == 2
    error = capsys.readouterr().err
    assert "model.base: " + message.format(base=base, w=WEIGHTS, i=INDEX) in error
    assert error.count("\n") == 1


@pytest.mark.long
def test_whole_weights_are_accepted(tiny_model: Path, chat_file: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    before = read_weights(Folder(str(base)))
    sharded(base)
    assert {name: (t.dtype, t.shape) for name, t in read_weights(Folder(str(base))).items()} == {
        name: (entry.dtype, entry.shape) for name, entry in before.items()
    }
    assert main(["check", str(recipe_file(tmp_path, base, chat_file))]) == 0
    random = {"kind": "pretrain", "init": "random"}
    path = recipe_file(tmp_path, base, chat_file, method=random, adapter=None)
    for file in base.glob("*.safetensors*"):
        file.unlink()
    assert main(["check", str(path)]) == 0


def test_a_header_agrees_with_the_library(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.zeros((0, 4), np.int64),
        "c": np.array(1.5, np.float16),
        "d": np.array([True, False]),
    }
    save_file(arrays, tmp_path / WEIGHTS)
    content = (tmp_path / WEIGHTS).read_bytes()
    entries = read_header(Folder(str(tmp_path)), WEIGHTS)
    for name, array in arrays.items():
        entry = entries[name]
        assert entry.shape == array.shape
        assert content[entry.start : entry.stop] == array.tobytes()


def test_a_reference_is_checked_under_its_own_key(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "pairs.jsonl"
    row = json.dumps({"prompt": "one", "chosen": "two", "rejected": "three"})
    data.write_text(f"{row}\n" * 40, encoding="utf-8")
    reference = shutil.copytree(tiny_model, tmp_path / "reference")
    method = {"kind": "dpo", "reference_model": str(reference)}
    path = recipe_file(tmp_path, tiny_model, data, method=method)
    assert main(["check", str(path)]) == 0
    cut(reference / WEIGHTS)
    assert main(["check", str(path)]) == 2
    assert f"method.reference_model: {reference}/{WEIGHTS}: cut off" in capsys.readouterr().err


def adapter_tensors() -> dict[str, Any]:
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    return {
        f"{prefix}.lora_A.weight": np.ones((2, 32), np.float32),
        f"{prefix}.lora_B.weight": np.ones((32, 2), np.float32),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.clear(), "holds no tensors"),
        (lambda tensors: tensors.popitem(), "has no lora_B of its rank"),
        (
            lambda tensors: tensors.update(
                {name: value[:, :1].copy() for name, value in tensors.items() if "lora_B" in name}
            ),
            "has no lora_B of its rank",
        ),
    ],
)
def test_an_adapter_is_checked(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    file = tmp_path / "adapter_model.safetensors"
    tensors = adapter_tensors()
    save_file(tensors, file)
    check_adapter_weights(tmp_path, "model.adapter")
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(InputError, match=rf"model\.adapter: {file}: .*{message}"):
        check_adapter_weights(tmp_path, "model.adapter")


def test_a_cut_adapter_is_named(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    save_file(adapter_tensors(), file)
    cut(file)
    with pytest.raises(InputError, match=rf"model\.adapter: {file}: cut off"):
        check_adapter_weights(tmp_path, "model.adapter")
