"""Rewards: values of functions, messages of failures, and texts for classifiers."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from finray.training.common.errors import InputError, RunError
from finray.training.config.rewards import FunctionReward, ModelReward, TrlReward, resolve_reward
from finray.training.data.examples import rules_of
from finray.training.data.shapes import Completion, Conversation, Question
from finray.training.data.stream import Sequence
from finray.training.rl.rewards.classifiers import load_classifier
from finray.training.rl.rewards.functions import UserFunctionReward
from finray.training.rl.rewards.reward import Completions, columns_of
from finray.training.rl.rollouts.rollout import Rollout
from finray.training.rl.scoring import _completions

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
        (
            "    import sys\n    return [sys.exit() if c == '22' else 1.0 for c in completions]\n",
            "the function called sys.exit(None)",
        ),
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


@pytest.mark.parametrize(
    ("returned", "kind"),
    [
        ("None", "NoneType"),
        ("1.0", "float"),
        ("'111'", "str"),
        ("{1: 1.0, 2: 2.0, 3: 3.0}", "dict"),
        ("{0.1, 0.2, 0.3}", "set"),
        ("frozenset({0.1, 0.2, 0.3})", "frozenset"),
        ("{1: 1.0, 2: 2.0, 3: 3.0}.values()", "dict_values"),
        ("(1.0 for _ in completions)", "generator"),
        ("map(len, completions)", "map"),
        ("b'123'", "bytes"),
        ("numpy.float64(3)", "float64"),
        ("numpy.array(3.0)", "ndarray"),
        ("torch.tensor(3.0)", "Tensor"),
    ],
)
def test_what_is_no_list(returned: str, kind: str) -> None:
    body = f"    import numpy, torch\n    return {returned}\n"
    expected = f"it returned {kind}; expected a list of floats"
    with pytest.raises(RunError, match=expected):
        function(body).score(ASKED)
    assert function(body, may_fail=True).score(ASKED).values == [None] * 3


@pytest.mark.parametrize(
    "returned",
    [
        "(1.0, 2.0, 3.0)",
        "[True, 2, 3.0]",
        "numpy.array([1.0, 2.0, 3.0], numpy.float32)",
        "torch.tensor([1.0, 2.0, 3.0])",
        "collections.deque([1.0, 2.0, 3.0])",
    ],
)
def test_lists_of_any_kind(returned: str) -> None:
    body = f"    import collections, numpy, torch\n    return {returned}\n"
    assert function(body).score(ASKED).values == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("value", ["10 ** 400", "-(10 ** 400)", "float('inf')"])
def test_numbers_beyond_all_floats(value: str) -> None:
    with pytest.raises(RunError, match="expected a finite number or None"):
        function(f"    return [{value}, 1.0, 2.0]\n").score(ASKED)


def test_a_function_that_ends_the_process_is_a_failure() -> None:
    with pytest.raises(RunError, match=r"called sys.exit\(3\)"):
        function("    import sys\n    sys.exit(3)\n").score(ASKED)


def test_a_function_changes_only_its_own_copies() -> None:
    """Neither what is trained nor what the next function gets."""
    asked = Completions(
        prompts=[[{"role": "user", "content": "one?"}]],
        completions=[[{"role": "assistant", "content": "1"}]],
        completion_ids=[[5, 6]],
        columns={"level": [{"deep": [7]}]},
    )
    before = copy.deepcopy(asked)
    body = (
        "    prompts[0][0]['content'] = 'x'\n    completions[0].clear()\n"
        "    completion_ids[0].append(7)\n    level[0]['deep'][0] = 8\n    level.clear()\n"
        "    prompts.clear()\n    return [1.0]\n"
    )
    assert function(body).score(asked).values == [1.0]
    assert asked == before


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
        resolve_reward(reward, (tmp_path,), "method.rewards.2")
    assert str(caught.value).startswith("method.rewards.2.file: ")


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
            {"prompt": "a", "reference": "mine"},
            Question("a"),
            "a",
            {"reference": "mine"},
        ),
        (
            {"prompt": "a", "completion": "b", "reference": ["mine", 1]},
            Completion("a", "b"),
            "a",
            {"reference": ["mine", 1]},
        ),
        (
            {"prompt": "a", "completion": "b", "reference": None},
            Completion("a", "b"),
            "a",
            {"reference": "b"},
        ),
        (
            {"prompt": "a", "completion": "b", "chosen": "c", "response": "d"},
            Question("a"),  # with format: prompt
            "a",
            {"completion": "b", "chosen": "c", "response": "d", "reference": None},
        ),
        (
            {"instruction": "a", "input": "x", "output": "b", "completions": 1},
            Completion("a", "b"),
            "a",
            {"reference": "b"},
        ),
    ],
)
def test_columns_of_a_row(row: Any, shape: Any, prompt: Any, columns: Any) -> None:
    assert rules_of("grpo").extra(row, shape, ()) == {"prompt": prompt, "columns": columns}


def test_prompt_and_completion_are_the_whole_text() -> None:
    """The space at a prompt's end is sampled with the completion's first token."""
    rows = [
        Sequence(*[np.zeros(1, np.int32)] * 4, extra=json.dumps(extra))
        for extra in (
            {"prompt": "Answer: ", "columns": {}, "cut": " "},
            {"prompt": "Answer: ", "columns": {}, "cut": " "},
            {"prompt": "Answer:", "columns": {}},
        )
    ]
    scored = _completions(rows, [Rollout([1], True)] * 3, [" yes", "no", " yes"])
    assert scored.completions == ["yes", "no", " yes"]
    assert scored.prompts == ["Answer: ", "Answer: ", "Answer:"]


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


@pytest.mark.filterwarnings("ignore")
def test_a_prompt_may_hold_the_first_token_already(classifier: Path) -> None:
    reward = load_classifier(
        ModelReward(model=str(classifier), label="good"), torch.float32, torch.device("cpu")
    )
    read = reward.classifier
    core = read.tokenizer.backend_tokenizer
    bos = read.tokenizer.eos_token
    core.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, read.tokenizer.eos_token_id)]
    )
    read.tokenizer.bos_token = bos
    assert read.ids("one", "two") == read.ids(f"{bos}one", "two")
    assert read.ids("one", "two")[0] == read.tokenizer.bos_token_id


def test_a_label_must_be_one_of_the_classifiers(classifier: Path) -> None:
    config = json.loads((classifier / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "bad", "1": "good"}
    for label in (None, "best"):
        with pytest.raises(InputError, match="bad, good"):
            load_classifier(
                ModelReward(model=str(classifier), label=label), torch.float32, torch.device("cpu")
            )


def trl_reward(name: str, **options: float) -> UserFunctionReward:
    return UserFunctionReward(TrlReward(trl=name, options=options), may_fail=False)  # type: ignore[arg-type]


def test_rewards_of_trl() -> None:
    """Plain texts and conversations; options; the reference as the solution."""
    texts = ["<think>a</think>b", "b", "c c c c"]
    asked = Completions(["?"] * 3, texts, [[1], [1] * 8, [1] * 16], {"reference": ["b"] * 3})
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    for completions in (texts, chats):
        scored = trl_reward("think_format_reward").score(
            Completions(asked.prompts, completions, asked.completion_ids, asked.columns)
        )
        assert scored.values == [1.0, 0.0, 0.0]
    punished = trl_reward(
        "get_soft_overlong_punishment", max_completion_len=12, soft_punish_cache=8
    )
    assert punished.score(asked).values == [0.0, -0.5, -1.0]
    assert punished.name == "soft_overlong_punishment"
    repeated = trl_reward("get_repetition_penalty_reward", ngram_size=2, max_penalty=-0.5)
    last = repeated.score(asked).values[2]
    assert last is not None and -0.5 < last < -0.3


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"trl": "get_soft_overlong_punishment"}, "needs options: max_completion_len, soft_punish"),
        ({"trl": "think_format_reward", "options": {"x": 1}}, "has no x; its options: none"),
        ({"trl": "think"}, "accuracy_reward"),
    ],
)
def test_rewards_of_trl_that_are_refused(reward: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrlReward.model_validate(reward)
