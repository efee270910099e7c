"""A run that is started again: finished, changed, longer or over; and check, which foresees it."""

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import finray
from finray.cluster.cli.main import main
from finray.training.config.recipe import Recipe
from finray.training.engine.trainer_arguments import rate_factor

Settings = dict[str, Any]


@pytest.fixture
def settings(tiny_model: Path, chat_file: Path, tmp_path: Path) -> Settings:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(chat_file.read_bytes())
    return {
        "name": "run",
        "model": {"base": str(tiny_model)},
        "adapter": {"rank": 4, "dropout": 0.1},
        "data": {"train": [{"path": str(rows)}], "max_length": 64},
        "optim": {
            "learning_rate": 1e-2,
            "max_steps": 6,
            "batch_size": 8,
            "micro_batch_size": 4,
            "schedule": "constant",
            "warmup_ratio": 0.0,
        },
        "scale": {"workers": 0},
        "checkpoint": {"every_steps": 4},
        "log": {"every_steps": 1},
        "storage": str(tmp_path / "runs"),
    }


def weights(run: finray.RunResult) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "adapter" / "adapter_model.safetensors")


def equal(first: finray.RunResult, second: finray.RunResult) -> bool:
    here, there = weights(first), weights(second)
    return here.keys() == there.keys() and all(torch.equal(here[n], there[n]) for n in here)


def train(settings: Settings, *changes: str, **options: Any) -> finray.RunResult:
    return finray.train(settings, changes, quiet=True, **options)


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["optim.max_steps=6"], ["optim.max_steps=10"]),
        (["optim.max_steps=null", "optim.epochs=0.5"], ["optim.max_steps=null", "optim.epochs=1"]),
        (["optim.max_steps=6"], ["optim.max_steps=null", "optim.epochs=1"]),
    ],
)
def test_a_longer_run_equals_the_undisturbed_one(
    settings: Settings, before: list[str], after: list[str]
) -> None:
    rows = Path(settings["data"]["train"][0]["path"])
    rows.write_text("".join(rows.read_text("utf-8").splitlines(keepends=True)[:120]), "utf-8")
    first = train(settings, *before)
    done = first.record["step"]
    longer = train(settings, *after)
    undisturbed = train(settings, *after, "name=undisturbed")
    assert (
        longer.status == "finished" and longer.record["step"] == undisturbed.record["step"] > done
    )
    assert equal(longer, undisturbed)


@pytest.mark.long
def test_another_schedule_needs_a_word(settings: Settings) -> None:
    cosine = ["optim.schedule=cosine", "optim.warmup_ratio=0.5"]
    train(settings, *cosine)
    more = [*cosine, "optim.max_steps=10"]
    for call in (finray.train, finray.check):
        with pytest.raises(finray.InputError) as caught:
            call(settings, more)
        assert "optim.max_steps: 10 steps now, 6 before" in str(caught.value)
        assert "--longer" in str(caught.value) and "--fresh" in str(caught.value)
    assert finray.check(settings, more, longer=True)["state"] == "resumes at step 6"
    run = train(settings, *more, longer=True)
    rates = run.metrics.dropna(subset=["learning_rate"]).set_index("step")["learning_rate"]
    # Warm-up over half of each schedule, then half a cosine; a rate is that of its own step.
    first = [0, 1 / 3, 2 / 3, 1, *((1 + math.cos(math.pi * k / 3)) / 2 for k in (1, 2))]
    second = [0, 1 / 2, 1, (1 + math.cos(math.pi / 2)) / 2]
    assert rates.tolist() == pytest.approx([1e-2 * factor for factor in (*first, *second)])
    assert run.record["schedule"] == [6, 10] and "to step 6, then to step 10" in run.report.text
    assert train(settings, *more) == run, "a third call has nothing to do"


def test_fewer_steps_than_are_done(settings: Settings) -> None:
    train(settings)
    with pytest.raises(finray.InputError, match=r"is at step 6 already"):
        train(settings, "optim.max_steps=5")


def test_one_schedule_is_transformers_own(settings: Settings) -> None:
    recipe = Recipe.model_validate(settings)
    assert rate_factor(recipe, [10]) is None
    factor = rate_factor(recipe, [4, 10])
    assert factor is not None and [factor(step) for step in range(10)] == [1.0] * 10


@pytest.mark.long
def test_a_finished_run_says_so(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(settings)
    files = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    assert finray.train(settings) == run
    assert "run: finished already on 20" in capsys.readouterr().err
    assert finray.check(settings)["state"].startswith("finished already on 20")
    assert files == {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}


@pytest.mark.long
def test_started_over(settings: Settings) -> None:
    settings["optim"]["max_steps"] = 2
    first = train(settings)
    before = weights(first)
    for number in (1, 2):
        run = train(settings, f"seed={number}", fresh=True)
        assert run.status == "finished" and run.recipe.seed == number
    names = [each.name for each in finray.runs(settings["storage"])]
    assert names == ["run.1", "run.2", "run"]
    old = finray.runs(settings["storage"])[0]
    assert old.recipe.seed == 0 and all(torch.equal(weights(old)[n], before[n]) for n in before)


@pytest.mark.long
def test_a_refused_start_over_moves_nothing(settings: Settings) -> None:
    run = train(settings)
    gpu = ["scale.workers=1", "scale.gpus_per_worker=1"]
    with pytest.raises(finray.InputError, match="lacks 1 GPUs"):
        train(settings, *gpu, fresh=True)
    assert finray.runs(settings["storage"]) == [run]


def change_rows(settings: Settings) -> None:
    path = Path(settings["data"]["train"][0]["path"])
    path.write_text(path.read_text(encoding="utf-8").replace("comes", "goes"), encoding="utf-8")


def spoil_rows(settings: Settings) -> None:
    path = Path(settings["data"]["train"][0]["path"])
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:200], *["{oops"] * 40]) + "\n", encoding="utf-8")


def spoil_storage(settings: Settings) -> None:
    path = Path(settings["storage"])
    path.write_text("a file", encoding="utf-8")


def set_value(*changes: str) -> Callable[[Settings], None]:
    def apply(settings: Settings) -> None:
        for change in changes:
            section, _, rest = change.partition(".")
            key, _, value = rest.partition("=")
            settings.setdefault(section, {})[key] = json.loads(value)

    return apply


NEW: dict[str, Callable[[Settings], None]] = {
    "bad rows behind the first ones": spoil_rows,
    "a storage that is a file": spoil_storage,
    "fewer packed sequences than a step takes": set_value(
        "optim.batch_size=150", "data.max_length=128"
    ),
    "no row left to train on": set_value("data.holdout=0.999"),
    "a GPU that is not here": set_value("scale.workers=1", "scale.gpus_per_worker=1"),
    "half precision without a GPU": set_value('model.dtype="float16"'),
    "a module that is not there": set_value('adapter.targets=["q_prj"]'),
}
AGAIN: dict[str, Callable[[Settings], None]] = {
    "another rank": set_value("adapter.rank=8"),
    "another rate": set_value("optim.learning_rate=0.5"),
    "other data": change_rows,
    "fewer steps": set_value("optim.max_steps=3"),
}


def refusals(settings: Settings, folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What `check` and `train` print, each of which ends with exit code 2."""
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")
    printed = []
    for command in ("check", "train"):
        code = main([command, str(path)])
        message = capsys.readouterr().err
        assert code == 2, f"{command}: {message}"
        printed.append(re.sub(r"/[0-9a-f]{32}/", "/", message.strip().splitlines()[-1]))
    return printed


@pytest.mark.long
@pytest.mark.parametrize("case", NEW)
def test_check_refuses_what_train_refuses(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    NEW[case](settings)
    at_check, at_train = refusals(settings, tmp_path, capsys)
    assert at_check == at_train


@pytest.mark.long
def test_check_refuses_a_changed_run(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each change alone, to one run, which no refusal changes."""
    train(settings)
    rows = Path(settings["data"]["train"][0]["path"])
    trained = rows.read_bytes()
    for case, change in AGAIN.items():
        changed = copy.deepcopy(settings)
        change(changed)
        at_check, at_train = refusals(changed, tmp_path, capsys)
        assert at_check == at_train and "--fresh" in at_check, case
        rows.write_bytes(trained)
