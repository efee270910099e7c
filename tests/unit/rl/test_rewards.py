"""Rewards: values of functions, messages of failures, and texts for classifiers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from finray.training.common.errors import InputError, RunError
from finray.training.config.rewards import FunctionReward, ModelReward, resolve_reward
from finray.training.data.examples import rules_of
from finray.training.data.shapes import Completion, Conversation, Question
from finray.training.rl.rewards.classifiers import load_classifier
from finray.training.rl.rewards.functions import UserFunctionReward
from finray.training.rl.rewards.reward import Completions, columns_of

ASKED = Completions(
    prompts=["one?", "two?", "three?"],
    completions=["1", "22", "333"],
    completion_ids=[[1], [2, 2], [3, 3, 3]],
    columns={"level": [7, 8, None]},
)


def function(body: str, may_fail: bool = False) -> UserFunctionReward:
    source = (
        f"import math\n\ndef f(prompts, completions, completion_ids, level, **columns):\n{body}"
    )
    return UserFunctionReward(FunctionReward(file="/u/rewards.py:f", source=source), may_fail)


def test_a_function_gets_what_trl_gives() -> None:
    body = (
        "    assert prompts == ['one?', 'two?', 'three?'] and level == [7, 8, None]\n"
        "    assert completion_ids == [[1], [2, 2], [3, 3, 3]] and not columns\n"
        "    return [len(completions[0]), None, 0.5]\n"
    )
    scored = function(body).score(ASKED)
    assert scored.values == [1.0, None, 0.5] and scored.failures == 0


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("    return [math.nan if c == '22' else 1.0 for c in completions]\n", "nan"),
        ("    return ['good' if c == '22' else 1.0 for c in completions]\n", "of type str"),
        ("    return [1 / (len(c) - 2) for c in completions]\n", "ZeroDivisionError"),
        ("    return [1.0] * (len(completions) - ('22' in completions))\n", "rewards for"),
    ],
)
def test_a_failure_shows_its_completion(body: str, reason: str) -> None:
    with pytest.raises(RunError) as caught:
        function(body).score(ASKED)
    message = str(caught.value)
    for part in (reason, "/u/rewards.py", "two?", "22", "on_reward_error"):
        assert part in message
    assert "one?" not in message and "three?" not in message
    scored = function(body, may_fail=True).score(ASKED)
    assert scored.values[1] is None and scored.failures == 1
    assert None not in (scored.values[0], scored.values[2])


def test_the_traceback_is_the_users() -> None:
    body = "    def deeper():\n        raise KeyError('my own')\n    return deeper()\n"
    with pytest.raises(RunError) as caught:
        function(body).score(ASKED)
    message = str(caught.value)
    assert "raise KeyError('my own')" in message
    assert "functions.py" not in message


@pytest.mark.parametrize("returned", ["None", "1.0", "'111'", "{1: 1.0}"])
def test_what_is_no_list(returned: str) -> None:
    with pytest.raises(RunError, match="expected a list of floats"):
        function(f"    return {returned}\n").score(ASKED)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def g(**columns):\n    return []\n", "has no function 'f'.*functions: g"),
        ("async def f(**columns):\n    return []\n", "rewards.py:1: f is an async"),
        ("x = 1\ndef f(completions):\n    return []\n", r"rewards.py:2: f must take \*\*columns"),
        ("def f(:\n", "rewards.py:1: not valid Python"),
        (None, "cannot read"),
    ],
)
def test_a_file_is_checked_without_being_run(
    tmp_path: Path, source: str | None, message: str
) -> None:
    if source is not None:
        (tmp_path / "rewards.py").write_text(f"{source}raise SystemExit\n", encoding="utf-8")
    reward = FunctionReward(file="rewards.py:f")
    with pytest.raises(InputError, match=message) as caught:
        resolve_reward(reward, (tmp_path,), "method.rewards[2]")
    assert str(caught.value).startswith("method.rewards[2].file: ")


def test_the_text_of_a_file_travels(tmp_path: Path) -> None:
    path = tmp_path / "rewards.py"
    text = "def f(prompts, **columns):\n    return [2.0] * len(prompts)\n"
    path.write_text(text, encoding="utf-8")
    reward = resolve_reward(FunctionReward(file="rewards.py:f"), (tmp_path,), "here")
    assert isinstance(reward, FunctionReward)
    assert reward.source == text and reward.path == str(path)
    path.unlink()
    assert UserFunctionReward(reward, False).score(ASKED).values == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("row", "shape", "prompt", "columns"),
    [
        (
            {"messages": [], "level": 3},
            Conversation(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})),
            [{"role": "user", "content": "a"}],
            {"level": 3, "reference": "b"},
        ),
        ({"prompt": "a", "completion": "b"}, Completion("a", "b"), "a", {"reference": "b"}),
        ({"prompt": "a", "input": 4}, Question("a"), "a", {"input": 4, "reference": None}),
        (
            {"instruction": "a", "input": "x", "output": "b", "completions": 1},
            Completion("a", "b"),
            "a",
            {"reference": "b"},
        ),
    ],
)
def test_columns_of_a_row(row: Any, shape: Any, prompt: Any, columns: Any) -> None:
    assert rules_of("grpo").extra(row, shape) == {"prompt": prompt, "columns": columns}


def test_rows_may_lack_columns() -> None:
    assert columns_of([{"a": 1}, {"b": 2}]) == {"a": [1, None], "b": [None, 2]}


@pytest.fixture(scope="module")
def classifier(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with two labels on the tiny model."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=2, id2label={0: "bad", 1: "good"}, dtype=torch.float32
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


# transformers warns of a new score head, which this test expects.
@pytest.mark.filterwarnings("ignore")
def test_a_classifier_reads_through_its_own_template(classifier: Path) -> None:
    reward = load_classifier(
        ModelReward(model=str(classifier), label="good"), torch.float32, torch.device("cpu")
    )
    questions = ["How many?", "And what is the name of the order?"]
    completions = Completions(
        prompts=[[{"role": "user", "content": question}] for question in questions],
        completions=[[{"role": "assistant", "content": "12345, Ada"}]] * 2,
        completion_ids=[[1], [1]],
        columns={},
    )
    model = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    expected = []
    for question in questions:
        text = (
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n12345, Ada<|im_end|>\n"
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        expected.append(float(model(input_ids=ids).logits[0, 1]))
    assert reward.score(completions).values == pytest.approx(expected, abs=1e-5)
    assert expected[0] != pytest.approx(expected[1], abs=1e-4)


def test_a_label_must_be_one_of_the_classifiers(classifier: Path) -> None:
    config = json.loads((classifier / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "bad", "1": "good"}
    for label in (None, "best"):
        with pytest.raises(InputError, match="bad, good"):
            load_classifier(
                ModelReward(model=str(classifier), label=label), torch.float32, torch.device("cpu")
            )
