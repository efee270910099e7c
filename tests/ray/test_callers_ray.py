"""A Ray that the caller has initialised is used, and is there afterwards."""

from pathlib import Path
from typing import Any

import pytest
import ray
from safetensors.torch import load_file

import finray

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def test_a_run_on_the_callers_ray(
    local_ray: None, tiny_model: Path, chat_file: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "name": "on-ray",
        "model": {"base": tiny_model},
        "adapter": {"rank": 4},
        "data": {"train": [{"path": chat_file}], "max_length": 64},
        "optim": {"max_steps": 3, "batch_size": 8, "micro_batch_size": 4},
        "scale": {"workers": 1},
        "storage": tmp_path / "runs",
    }
    node = ray.get_runtime_context().get_node_id()
    run = finray.train(settings, quiet=True)
    assert run.status == "finished" and run.record["nodes"] == [node]
    assert ray.is_initialized() and ray.get(ray.put(1)) == 1
    local = finray.train(settings, {"name": "local"}, local=True, quiet=True)
    results = [
        load_file(each.folder / "adapter/adapter_model.safetensors") for each in (run, local)
    ]
    assert all((results[0][name] == results[1][name]).all() for name in results[0])

    with pytest.raises(finray.InputError, match="has initialised Ray already"):
        finray.train(settings, {"name": "elsewhere"}, address="10.0.0.1:6379")
    assert ray.is_initialized()
