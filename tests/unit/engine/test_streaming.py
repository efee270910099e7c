"""A run on streamed data: the same run after a stop in the middle of a window."""

from pathlib import Path
from typing import Any

import pytest
from support.cases import mostly_slow
from support.harness import assert_same_result, losses, metrics
from support.streamed import make_windows_small, method_of, method_rows, write_lines

from finray.training.common.errors import InputError
from finray.training.config.methods import METHODS
from finray.training.config.recipe import Recipe
from finray.training.launch.in_process import InProcessLauncher
from finray.training.records.run_folder import existing_run
from finray.training.run import prepare_data, run_folder, run_prepared, train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five windows an epoch."""
    make_windows_small(monkeypatch, FIRST_BYTES=4096, WINDOW_BYTES=8192)


def make(
    model: Path, data: Path, storage: Path, name: str, kind: str = "sft", steps: int = 30
) -> Recipe:
    return Recipe.model_validate(
        {
            "method": method_of(kind),
            "name": name,
            "model": {"base": str(model)},
            "adapter": {"rank": 4, "dropout": 0.1},
            "data": {
                "train": [{"path": str(data)}],
                "holdout": 0.2,
                "max_length": 128,
                "prepare": "streaming",
            },
            "optim": {"batch_size": 4, "micro_batch_size": 2, "max_steps": steps},
            "log": {"every_steps": 1, "to": []},
            "scale": {"workers": 0},
            "storage": str(storage),
        }
    )


def go(recipe: Recipe, until: int | None = None) -> dict[str, Any]:
    run_prepared(recipe, prepare_data(recipe), InProcessLauncher(), until=until)
    return existing_run(run_folder(recipe))


@pytest.mark.long
def test_segments_make_the_same_run(tiny_model: Path, chat_file: Path, tmp_path: Path) -> None:
    single, parts = (make(tiny_model, chat_file, tmp_path, name) for name in ("whole", "parts"))
    record = go(single)
    assert record["status"] == "finished"
    for until in (7, 17):
        assert go(parts, until)["step"] == until
    assert go(parts)["status"] == "finished"
    assert_same_result(tmp_path / "parts", tmp_path / "whole")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    lines = [line for line in metrics(tmp_path / "whole") if "data_wait" in line]
    assert len(lines) == 30 and all(line["data_wait"] >= 0 for line in lines)
    epochs = [line["epoch"] for line in lines]
    assert epochs == sorted(epochs) and epochs[-1] > 1
    assert epochs == [line["epoch"] for line in metrics(tmp_path / "parts") if "data_wait" in line]
    assert (tmp_path / "whole/windows").exists()
    assert sorted(path.name for path in (tmp_path / "whole/windows").iterdir()) == ["counts.json"]


@pytest.mark.long
@pytest.mark.parametrize("kind", mostly_slow(sorted(METHODS.keys() - {"sft"}), ["dpo", "grpo"]))
def test_each_method_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Stopped in the middle of a window."""
    make_windows_small(monkeypatch, FIRST_BYTES=2048, WINDOW_BYTES=1024)
    data = write_lines(tmp_path / "rows.jsonl", method_rows(kind, 40))
    whole, parts = (make(tiny_model, data, tmp_path, name, kind, 14) for name in ("whole", "parts"))
    assert go(whole)["status"] == "finished"
    assert go(parts, 6)["step"] == 6
    assert go(parts)["status"] == "finished"
    assert_same_result(tmp_path / "parts", tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 14


def test_data_that_changes_is_named(tiny_model: Path, chat_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_bytes(chat_file.read_bytes())
    recipe = make(tiny_model, data, tmp_path, "run")
    go(recipe, 5)
    data.write_bytes(chat_file.read_bytes().replace(b"After 7 ", b"After 8 "))
    with pytest.raises(InputError, match=rf"data: .*changed since .* Restore {data}, "):
        train(recipe, InProcessLauncher())
