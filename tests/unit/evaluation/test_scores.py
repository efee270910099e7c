"""Measures of answers, against independent computations."""

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finray.training.common.errors import InputError
from finray.training.config.eval_metrics import FunctionMetric, check_installed, metric_of
from finray.training.data.shapes import Question
from finray.training.evaluation.evaluate import interval
from finray.training.evaluation.prompts import PromptRow, row_of
from finray.training.evaluation.scores import (
    Answered,
    calls_in,
    json_valid,
    score,
    token_f1,
)

CALMLY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
WORDS = st.lists(st.sampled_from(["the", "cat", "A", "sat", "on", "mat.", "Mat"]), max_size=8)


def answered(text: str, own: str | None = "yes", /, **columns: Any) -> Answered:
    question = Question("ask", own)
    return Answered(PromptRow(1, "x:1", question, columns=columns), text, (1, 2))


@CALMLY
@given(WORDS, WORDS)
def test_token_f1_is_that_of_squad(own: list[str], expected: list[str]) -> None:
    def words(text: list[str]) -> list[str]:
        bare = [word.lower().strip(".") for word in text]
        return [word for word in bare if word not in ("a", "an", "the")]

    left, right = words(own), words(expected)
    value = token_f1(" ".join(own), " ".join(expected))
    if not left or not right:
        assert value == float(left == right)
        return
    common = sum((Counter(left) & Counter(right)).values())
    precision, recall = common / len(left), common / len(right)
    harmonic = 2 * precision * recall / (precision + recall) if common else 0.0
    assert value == pytest.approx(harmonic)
    assert value == pytest.approx(token_f1(" ".join(expected), " ".join(own)))


def test_exact_match_leaves_out_rows_without_a_reference() -> None:
    answers = [answered(" yes\n"), answered("no"), answered("yes", None)]
    scored = score("exact_match", answers)
    assert scored.values == [1.0, 0.0, None] and scored.overall == 0.5


SCHEMA = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ('{"name": "Ada"}', SCHEMA, 1.0),
        ('{"name": 1}', SCHEMA, 0.0),
        ("{}", SCHEMA, 0.0),
        ("{}", None, 1.0),
        ('{"name": "Ada"} and more', None, 0.0),
        ("{" * 100_000, None, 0.0),
        ('{"name": "Ada"}', json.dumps(SCHEMA), 1.0),
        ("{}", {"type": "nonsense"}, None),
        ("{}", {"$ref": "http://127.0.0.1:9/schema.json"}, None),
    ],
)
def test_json_is_valid_by_a_schema(text: str, schema: Any, value: float | None) -> None:
    assert json_valid(text, schema) == value


def test_a_rows_own_schema_goes_before_the_given_one() -> None:
    answers = [answered("[]"), answered("[]", schema={"type": "array"})]
    assert score("json_valid", answers, {"type": "object"}).values == [0.0, 1.0]


CALL = {"name": "add", "arguments": {"a": 1, "b": [2]}}


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>", [CALL]),
        (json.dumps({"name": "add", "parameters": {"a": 1, "b": [2]}}), [CALL]),
        (f"[TOOL_CALLS]{json.dumps([CALL, CALL])}", [CALL, CALL]),
        (
            json.dumps({"type": "function", "function": {**CALL, "arguments": '{"a":1,"b":[2]}'}}),
            [CALL],
        ),
        (f"I say {{ this }} and {json.dumps(CALL)}", [CALL]),
        ('{"name": "Ada"}', []),
        ("{" * 5000, []),
        ("no call", []),
    ],
)
def test_calls_are_read_from_what_models_write(text: str, calls: list[Any]) -> None:
    assert calls_in(text) == calls


def test_tool_calls_are_compared_whole() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    row = {
        "messages": [
            {"role": "user", "content": "add"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": CALL}],
            },
        ],
        "tools": tools,
    }
    read = row_of(1, "x:1", row, "messages")
    assert read.calls == [CALL] and not read.error
    right, wrong = json.dumps(CALL), json.dumps({**CALL, "arguments": {"a": 1}})
    answers = [Answered(read, text) for text in (right, wrong, "none", f"{right}{right}")]
    assert score("tool_calls", [*answers, answered("x")]).values == [1.0, 0.0, 0.0, 0.0, None]


FUNCTION = """
def length(prompts, completions, completion_ids, **columns):
    assert prompts and columns["reference"] and len(completion_ids[0]) == 2
    if "bad" in completions:
        raise ValueError("I refuse")
    return [float(len(text)) for text in completions]
"""


def test_a_function_that_raises_loses_its_own_answers_only(tmp_path: Path) -> None:
    file = tmp_path / "score.py"
    file.write_text(FUNCTION)
    metric = metric_of(f"{file}:length", tmp_path, "--metric")
    assert isinstance(metric, FunctionMetric)
    answers = [answered(text, "r", reference="r") for text in ("four", "bad", "sixsix")]
    scored = score(metric, answers)
    assert scored.values == [4.0, None, 6.0] and scored.overall == 5.0 and scored.failures == 1
    assert "I refuse" in scored.error and "bad" in scored.error and "score.py" in scored.error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rogue", "there is no metric rogue; there are exact_match, token_f1"),
        ("none.py:f", "cannot read"),
        ("empty.py:f", "has no function 'f'"),
    ],
)
def test_an_unknown_measure_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match=message):
        metric_of(name, tmp_path, "--metric")


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"bleu needs the package sacrebleu; .*finray\[eval\]"):
        check_installed(["exact_match", "bleu"], "--metric")


def test_bleu_and_chrf_are_sacrebleus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    texts, references = ["the cat sat on a mat", "dogs bark"], ["the cat sat on the mat", "a dog"]
    answers = [answered(text, ref) for text, ref in zip(texts, references, strict=True)]
    answers.append(answered("no reference", None))
    bleu, chrf = score("bleu", answers), score("chrf", answers)
    assert bleu.overall == sacrebleu.corpus_bleu(texts, [references]).score
    assert chrf.overall == sacrebleu.corpus_chrf(texts, [references]).score
    assert bleu.values[2] is None and len(bleu.values) == 3


def test_rouge_is_rouge_scores() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    answers = [answered("the cat sat", "the cat sat down"), answered("dog", "cat")]
    expected = [scorer.score(a.row.question.reference, a.text)["rougeL"].fmeasure for a in answers]  # type: ignore[union-attr]
    assert score("rougeL", answers).values == expected


@CALMLY
@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_the_interval_is_by_the_standard_error(values: list[float]) -> None:
    expected = 1.96 * statistics.stdev(values) / len(values) ** 0.5
    assert interval([*values, None]) == pytest.approx(expected, abs=1e-12)
