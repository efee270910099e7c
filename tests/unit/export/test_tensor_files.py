"""Reading and writing of weights files, one tensor at a time."""

import json
import tempfile
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support.forking import ForkServer
from transformers import LlamaConfig

from finray.training.common.errors import InputError
from finray.training.common.progress import SILENT
from finray.training.export.tensor_files import (
    DTYPES,
    Output,
    TensorFiles,
    TensorInfo,
    write_model_files,
)

Tensors = dict[str, torch.Tensor]


@st.composite
def tensors(draw: st.DrawFn) -> Tensors:
    """Tensors of all types and any shapes, also empty ones and scalars."""
    names = draw(st.lists(st.text('ab.é"', min_size=1), min_size=1, max_size=6, unique=True))
    values_of: Tensors = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        values = torch.randint(0, 2, shape) if draw(st.booleans()) else torch.randn(shape) * 9
        values_of[name] = values.to(draw(st.sampled_from(list(DTYPES.values()))))
    return values_of


def outputs(values: Tensors) -> list[Output]:
    def give(value: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: value

    return [
        Output(name, TensorInfo(tuple(value.shape), value.dtype), give(value))
        for name, value in values.items()
    ]


@settings(max_examples=60, deadline=None)
@given(tensors(), st.integers(1, 200))
def test_what_is_written_is_read(values: Tensors, shard_bytes: int) -> None:
    """Both safetensors and `TensorFiles` read it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model_files(folder, outputs(values), SILENT, shard_bytes)
        expected: Tensors = {}
        for path in folder.glob("*.safetensors"):
            expected |= load_file(path)
        actual = TensorFiles(folder)
        assert expected.keys() == values.keys() == actual.info.keys()
        for key, value in values.items():
            assert torch.equal(expected[key], value) and expected[key].dtype == value.dtype
            assert torch.equal(actual.read(key), value)
            assert actual.info[key] == TensorInfo(tuple(value.shape), value.dtype)


def test_a_quantised_type_is_refused(tmp_path: Path) -> None:
    weight = torch.zeros(4, dtype=torch.float8_e4m3fn)
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="weight is stored as F8_E4M3"):
        TensorFiles(tmp_path)


def test_a_full_disk_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10, 5, 5)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="needs 16 bytes, but only 5 are free"):
        write_model_files(tmp_path, outputs({"a": torch.zeros(4)}), SILENT)
    assert not list(tmp_path.iterdir())


HIDDEN, WIDE, LAYERS = 512, 2048, 20
SHARD = 50_000_000

MERGES = """
import re, sys
from pathlib import Path
from finray.training.common.progress import SILENT
from finray.training.export.merge import merge

def resident(which):
    return int(re.search(which + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

base, adapter, small_base, small_adapter, out = map(Path, sys.argv[1:])
(out / "once").mkdir()
merge(small_base, small_adapter, out / "once", SILENT)  # loads what there is to load
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of the imports
before = resident("VmRSS")
(out / "large").mkdir()
merge(base, adapter, out / "large", SILENT, shard_bytes=50_000_000)
print(resident("VmHWM") - before)
"""


def make_base(folder: Path, layers: int) -> Path:
    """Write a Llama with random float32 weights, one tensor at a time."""
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=layers,
        num_attention_heads=8,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    sizes: dict[str, tuple[int, ...]] = {"model.norm": (HIDDEN,), **linear_layers(layers)}
    sizes |= dict.fromkeys(["model.embed_tokens", "lm_head"], (1000, HIDDEN))
    for number in range(layers):
        for kind in ("input", "post_attention"):
            sizes[f"model.layers.{number}.{kind}_layernorm"] = (HIDDEN,)
    parts = [
        Output(f"{name}.weight", TensorInfo(size, torch.float32), partial(torch.randn, size))
        for name, size in sizes.items()
    ]
    write_model_files(folder, parts, SILENT, shard_bytes=SHARD)
    return folder


def linear_layers(layers: int) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of all linear layers, by name."""
    square, up, down = (HIDDEN, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE)
    layer = {f"self_attn.{name}_proj": square for name in "qkvo"}
    layer |= {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down}
    return {f"model.layers.{n}.{name}": size for n in range(layers) for name, size in layer.items()}


def make_adapter(folder: Path, layers: int) -> Path:
    weights: Tensors = {}
    for name, (rows, columns) in linear_layers(layers).items():
        weights[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, columns)
        weights[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 4)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear").save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_memory_of_a_merge(tmp_path: Path, fork_server: ForkServer) -> None:
    """Merging 340 MB of weights takes less memory than one shard."""
    paths = [
        make_base(tmp_path / "base", LAYERS),
        make_adapter(tmp_path / "adapter", LAYERS),
        make_base(tmp_path / "small", 1),
        make_adapter(tmp_path / "small-adapter", 1),
        tmp_path,
    ]
    grown = fork_server.run(MERGES, *map(str, paths))
    index = json.loads((tmp_path / "large" / "model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] > 335_000_000
    # Of which one tensor is at most 4 MB; 30 MB were measured, with the adapter.
    assert int(grown) < SHARD
