"""The Python face: runs and sweeps from mappings and files, their results, errors, interrupts."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import finray
from finray.cluster.screens import progress_display
from finray.cluster.screens.progress import ProgressWatcher


@pytest.fixture
def settings(tiny_model: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe of eight steps, as a notebook would write it."""
    return {
        "name": "run",
        "model": {"base": tiny_model},
        "adapter": {"rank": 4},
        "data": {"train": [{"path": chat_file}], "holdout": 0.1, "max_length": 64},
        "optim": {"learning_rate": 1e-3, "max_steps": 8, "batch_size": 8, "micro_batch_size": 4},
        "scale": {"workers": 0},
        "checkpoint": {"every_steps": 4},
        "log": {"every_steps": 1},
        "storage": str(tmp_path / "runs"),
    }


def weights(run: finray.RunResult) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "adapter" / "adapter_model.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.long
def test_a_run_from_a_mapping(settings: dict[str, Any], tmp_path: Path) -> None:
    run = finray.train(settings, {"optim.learning_rate": 2e-3}, quiet=True)
    assert (run.name, run.status, run.folder) == ("run", "finished", tmp_path / "runs" / "run")
    assert run.recipe.optim.learning_rate == 2e-3 and run.record["step"] == 8
    text = (run.folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 8 and run.metrics["loss"].dropna().tolist() == losses

    model, tokenizer = run.model(), run.tokenizer()
    own = AutoTokenizer.from_pretrained(settings["model"]["base"])
    assert tokenizer.get_vocab() == own.get_vocab()
    inputs = tokenizer("What comes after 7?", return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(settings["model"]["base"])
    alone = PeftModel.from_pretrained(base, run.folder / "adapter")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, alone(**inputs).logits)

    page = run.report._repr_html_()
    assert page.startswith("<iframe srcdoc=") and "&lt;html" in page and "<script" not in page
    assert Path(run.report).read_text(encoding="utf-8") == run.report.text
    assert "run finished: 8 steps" in str(run) and "finished, step 8 of 8" in repr(run)
    assert "<pre>" in run._repr_html_()

    assert finray.train(settings, {"optim.learning_rate": 2e-3}, quiet=True) == run
    merged = finray.export(run, tmp_path / "merged", merge=True, quiet=True)
    whole = AutoModelForCausalLM.from_pretrained(merged.folder)
    with torch.no_grad():
        torch.testing.assert_close(whole(**inputs).logits, alone(**inputs).logits)


@pytest.mark.long
def test_training_twice_in_a_process_changes_nothing(settings: dict[str, Any]) -> None:
    first = finray.train(settings, quiet=True)
    torch.manual_seed(1234)
    second = finray.train(settings, {"name": "again"}, quiet=True)
    assert equal(weights(first), weights(second))
    assert [run.name for run in finray.runs(Path(first.uri).parent)] == ["run", "again"]


@pytest.mark.long
def test_a_recipe_that_is_loaded_already(settings: dict[str, Any], tmp_path: Path) -> None:
    recipe = finray.load_recipe(settings)
    assert finray.load_recipe(recipe) is recipe
    changed = finray.load_recipe(recipe, ["optim.batch_size=16", "method={kind: orpo}"])
    assert changed.optim.batch_size == 16 and changed.method.kind == "orpo"
    assert changed.model == recipe.model and changed.storage == recipe.storage
    outlook = finray.check(recipe)
    assert outlook["steps"] == 8 and outlook["sources"][0]["rows"] == 240
    prepared = finray.prepare(recipe, quiet=True)
    assert Path(prepared.folder).is_dir()
    assert finray.check(recipe)["data"]["tokens"] == prepared.summary["train"]["tokens"]


WRONG = [
    ({"optim.learnin_rate": 1}, "changes: optim.learnin_rate: unknown key; did you mean"),
    ({"optim.batch_size": "many"}, "changes: optim.batch_size"),
    ({"data.train": [{"path": "absent.jsonl"}]}, "absent.jsonl"),
    (
        {"data.train.7.path": "absent.jsonl"},
        "changes: the recipe has no key or list item 'data.train.7.path'",
    ),
    (["optim.batch_size"], "expected key=value"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
@pytest.mark.parametrize("call", [finray.train, finray.check, finray.prepare])
def test_wrong_settings(call: Any, settings: Any, changes: Any, message: str) -> None:
    with pytest.raises(finray.InputError) as caught:
        call(settings, changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not Path(settings["storage"]).exists()


def test_a_wrong_key_of_a_mapping_and_a_missing_file(settings: dict[str, Any]) -> None:
    with pytest.raises(finray.InputError, match=r"settings: colour: unknown key"):
        finray.train({**settings, "colour": "red"})
    with pytest.raises(finray.InputError, match=r"settings: data: the key 1 is not text"):
        finray.train({**settings, "data": {1: 2}})
    with pytest.raises(finray.InputError, match=r"absent\.yaml: cannot read the file"):
        finray.train("absent.yaml")
    with pytest.raises(finray.InputError, match="no such run"):
        finray.export("absent", "to")


def test_errors_hold_no_secret() -> None:
    error = finray.RunError("cannot read s3://key:swordfish@bucket/rows.jsonl")
    assert "bucket" in str(error) and "swordfish" not in str(error)


@pytest.fixture
def interrupt_at_step(settings: dict[str, Any]) -> Iterator[threading.Thread]:
    """Sends Ctrl-C to this process once a run has logged its second step."""
    metrics = Path(settings["storage"]) / "interrupted" / "metrics.jsonl"

    def watch() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if metrics.exists() and metrics.read_bytes().count(b'"loss"') >= 2:
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield thread
    thread.join(60)


@pytest.mark.long
def test_an_interrupt_saves_and_the_next_call_goes_on(
    settings: dict[str, Any], interrupt_at_step: threading.Thread
) -> None:
    before = signal.getsignal(signal.SIGINT)
    settings["optim"]["max_steps"] = 24
    settings["checkpoint"]["every_steps"] = 1000
    interrupted = {**settings, "name": "interrupted"}
    with pytest.raises(finray.Interrupted, match="the same command resumes"):
        finray.train(interrupted, quiet=True)
    assert signal.getsignal(signal.SIGINT) is before
    (run,) = finray.runs(settings["storage"])
    assert run.status == "stopped" and 2 <= run.record["step"] < 24
    run = finray.train(interrupted, quiet=True)
    assert run.status == "finished" and run.record["step"] == 24
    assert equal(weights(run), weights(finray.train(settings, quiet=True)))


def test_a_call_in_another_thread(settings: dict[str, Any]) -> None:
    done: list[finray.RunResult] = []
    thread = threading.Thread(target=lambda: done.append(finray.train(settings, quiet=True)))
    thread.start()
    thread.join(120)
    assert done[0].status == "finished"


class Handle:
    """The place of a notebook's cell where a display draws."""

    drawn: list[str]

    def __init__(self) -> None:
        type(self).drawn = []

    def display(self, content: dict[str, str], raw: bool) -> None:
        self.update(content, raw)

    def update(self, content: dict[str, str], raw: bool) -> None:
        assert raw
        self.drawn.append(content["text/html"])


@pytest.mark.long
def test_a_notebook_shows_one_line_that_moves(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "IPython", type("I", (), {}))
    display = type("D", (), {"DisplayHandle": Handle})
    monkeypatch.setitem(__import__("sys").modules, "IPython.display", display)
    monkeypatch.setattr(progress_display, "PLAIN_SECONDS", 0.0)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    settings["eval"] = {"every_steps": 4}
    finray.train(settings)
    assert "step 8/8" in Handle.drawn[-1] and '<progress max="8" value="8">' in Handle.drawn[-1]
    assert "held-out loss" in Handle.drawn[-1]


def test_the_watcher_is_plain_without_a_terminal() -> None:
    assert isinstance(ProgressWatcher()._display, progress_display.PlainDisplay)
