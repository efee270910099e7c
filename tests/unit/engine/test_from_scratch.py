"""The teaching loop recipes/from_scratch.py computes finray's losses."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from support.cases import mostly_slow

from finray.training.config.recipe import load_recipe
from finray.training.data.stream import Slice, stream
from finray.training.launch.in_process import InProcessLauncher
from finray.training.run import prepare_data, train

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
QUICKSTART = RECIPES / "quickstart"
ROWS, STEPS = 176, 22
LONGEST = 100
"""Lines of the loop; it is there to be read."""


@pytest.fixture(params=mostly_slow(("tiny", "quickstart"), ("tiny",)))
def base_and_rows(
    request: pytest.FixtureRequest, tiny_model: Path, chat_file: Path
) -> tuple[Path, Path]:
    if request.param == "tiny":
        return tiny_model, chat_file
    return QUICKSTART / "base", QUICKSTART / "train.jsonl"


@pytest.mark.long
def test_its_losses_are_those_of_finray(
    base_and_rows: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, rows = base_and_rows
    lines = rows.read_text(encoding="utf-8").splitlines()[:ROWS]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines), encoding="utf-8")
    recipe = load_recipe(
        QUICKSTART / "sft.yaml",
        (
            *(f"storage={tmp_path}", f"model.base={base}", f"data.train.0.path={data}"),
            *("data.eval=[]", "data.max_length=128", "data.packing=false", "model.dtype=float32"),
            *("scale.workers=0", "eval.every_steps=null", "eval.samples=0"),
            *("log.every_steps=1", "log.to=[]"),
        ),
    )
    train(recipe, InProcessLauncher())
    metrics = (tmp_path / "quickstart/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    expected = [row["loss"] for row in map(json.loads, metrics) if "loss" in row]
    assert len(expected) == STEPS and expected[-1] < expected[0] - 0.1

    prepared = prepare_data(recipe)
    split, size = prepared.manifest.train, recipe.optim.batch_size
    order = stream(Slice(prepared.files, split, recipe.seed, size, 0, 1, 0, STEPS), on_ray=False)
    in_order = tmp_path / "in-order.jsonl"
    in_order.write_text("\n".join(lines[sequence.rows[0]] for sequence in order), encoding="utf-8")
    options = ["--base", base, "--rows", in_order, "--out", tmp_path / "adapter"]
    monkeypatch.setattr(sys, "argv", ["from_scratch.py", *map(str, options)])
    runpy.run_path(str(RECIPES / "from_scratch.py"), run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert losses == pytest.approx(expected, abs=1e-5)
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_it_stays_short() -> None:
    assert len((RECIPES / "from_scratch.py").read_text(encoding="utf-8").splitlines()) <= LONGEST
