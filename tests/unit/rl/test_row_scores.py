"""Scores of rows by the reward model of a finished run, as the stage `score` asks for them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.finished_run import finished_run

from finray.training.common.errors import InputError
from finray.training.common.storage import Folder
from finray.training.config.recipe import load_recipe
from finray.training.data.shapes import (
    Completion,
    Conversation,
    Example,
    LabelledExample,
    PreferencePair,
    Text,
)
from finray.training.inspection import inspect_recipe
from finray.training.models.open_result import open_result
from finray.training.records.run_folder import finished_run as read_finished
from finray.training.rl.row_scores import close_row_scorers, open_row_scorer

# transformers warns of what it and PEFT deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def reward(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("reward"), tiny_model, "score", run_name="reward")


def conversation(*texts: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(
        tuple({"role": roles[n % 2], "content": text} for n, text in enumerate(texts))
    )


def logit(run: Path, text: str) -> float:
    """The reward of a text, computed by transformers for it alone."""
    opened = open_result(read_finished(Folder(str(run))), "score", torch.float32, "here")
    ids = torch.tensor([opened.tokenizer(text, add_special_tokens=False).input_ids[-128:]])
    with torch.no_grad():
        return float(opened.model.eval()(input_ids=ids).logits[0, 0])


def test_rows_of_each_shape_are_scored_as_texts(reward: Path) -> None:
    long = "one two three " * 200
    rows: dict[str, tuple[Example, str]] = {
        "conversation": (
            conversation("one?", "two"),
            "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n",
        ),
        "completion": (Completion("one ", "two"), "one two<|im_end|>"),
        "labelled": (LabelledExample(Completion("a", "b"), False), "ab<|im_end|>"),
        "text": (Text("three four"), "three four<|im_end|>"),
        "long": (Text(long), f"{long}<|im_end|>"),  # its end
    }
    pair = PreferencePair(Completion("a", "b"), Completion("one ", "two"))
    score = open_row_scorer(str(reward))
    values = score([*(row for row, _ in rows.values()), pair])
    expected = [logit(reward, text) for _, text in rows.values()]
    assert values[:-1] == pytest.approx(expected, rel=1e-4)
    assert values[-1] == pytest.approx(expected[2] - expected[1], rel=1e-3)
    assert len({round(value, 6) for value in values}) == len(values)
    close_row_scorers()


def recipe_of(folder: Path, base: Path, run: str, **more: Any) -> Any:
    data = folder / "a.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 40)
    curate = [{"kind": "score", "run": run, "keep_top": 0.5}]
    values = {
        "name": "t",
        "model": str(base),
        "data": {"train": str(data), "curate": curate, "max_length": 64},
        "storage": str(folder / "runs"),
        **more,
    }
    return load_recipe(values)


def test_a_run_that_is_no_reward_model_is_refused(
    tmp_path: Path, tiny_model: Path, reward: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    finished_run(tmp_path, tiny_model, run_name="chat")
    with pytest.raises(InputError, match=r"data\.curate\.0\.run: .*/runs/chat is a run of method"):
        inspect_recipe(recipe_of(tmp_path, tiny_model, "runs/chat"))
    with pytest.raises(InputError, match=r"data\.curate\.0\.run: none of these folders exists"):
        recipe_of(tmp_path, tiny_model, "runs/none")
    (tmp_path / "r.py").write_text("def f(prompts, **columns):\n    return [1.0] * len(prompts)\n")
    rewards = [{"file": str(tmp_path / "r.py:f")}]
    grpo = {"kind": "grpo", "rewards": rewards, "max_completion": 8}
    with pytest.raises(InputError, match=r"rows of method grpo are prompts; score them with"):
        inspect_recipe(recipe_of(tmp_path, tiny_model, str(reward), method=grpo))
