"""Measures of single answers, and of all of them together."""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..common.errors import RunError
from ..config.eval_metrics import FunctionMetric, MetricChoice, metric_name
from ..data.rows import Row
from ..data.shapes import Message
from ..records.run_folder import is_match
from ..rl.rewards.functions import UserFunctionReward
from ..rl.rewards.reward import Completions, columns_of
from .prompts import PromptRow

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARGUMENTS = ("arguments", "parameters", "args", "input")


@dataclass(frozen=True)
class Answered:
    """A row, and what a model answered."""

    row: PromptRow
    text: str
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scored:
    """A measure of a model's answers."""

    values: list[float | None]
    """One for each answer; None where it does not apply, or could not be computed."""
    overall: float | None
    """Of all answers together; None if none has a value."""
    failures: int = 0
    """Answers whose value could not be computed."""
    error: str = ""
    """Why the first of them could not."""


def score(metric: MetricChoice, answers: Sequence[Answered], schema: Any = None) -> Scored:
    """A measure of some answers.

    Args:
        metric: the measure.
        answers: rows with their answers.
        schema: a JSON schema that valid JSON must fit, unless the row has one in `schema`.
    """
    if isinstance(metric, FunctionMetric):
        return _by_function(metric, answers)
    if metric in ("bleu", "chrf"):
        return _by_sacrebleu(metric, answers)
    if metric.startswith("rouge"):
        return _by_rouge(metric, answers)
    if metric == "json_valid":
        return _mean([json_valid(a.text, a.row.columns.get("schema") or schema) for a in answers])
    if metric == "tool_calls":
        return _mean([_calls_match(answer) for answer in answers])
    compare = {"exact_match": _exact, "token_f1": token_f1}[metric]
    return _mean([_compared(answer, compare) for answer in answers])


def _mean(values: Sequence[float | None], failures: int = 0, error: str = "") -> Scored:
    present = [value for value in values if value is not None]
    overall = sum(present) / len(present) if present else None
    return Scored(list(values), overall, failures, error)


def reference_of(answer: Answered) -> str | None:
    """The row's reference answer; None without one."""
    return None if answer.row.question is None else answer.row.question.reference


def _compared(answer: Answered, compare: Callable[[str, str], float]) -> float | None:
    reference = reference_of(answer)
    return None if reference is None else compare(answer.text, reference)


def _exact(text: str, reference: str) -> float:
    return float(is_match(text, reference))


def token_f1(text: str, reference: str) -> float:
    """F1 of the words that both texts have, as SQuAD measures it (Rajpurkar and others, 2016):
    without capital letters, punctuation and articles."""
    own, expected = _words(text), _words(reference)
    common = sum((Counter(own) & Counter(expected)).values())
    if not own or not expected:
        return float(own == expected)
    return 2 * common / (len(own) + len(expected))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def json_valid(text: str, schema: Any = None) -> float | None:
    """1 if a text is JSON, and fits the schema if there is one; else 0. None for a row's schema
    that is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return 0.0
    if schema is None:
        return 1.0
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        rules = json.loads(schema) if isinstance(schema, str) else schema
        kind = validator_for(rules)
        kind.check_schema(rules)
        # The registry is empty, so that no schema is fetched from elsewhere.
        return float(kind(rules, registry=Registry()).is_valid(value))
    except (ValueError, SchemaError, Unresolvable, RecursionError):
        return None


def _calls_match(answer: Answered) -> float | None:
    """1 if the answer calls the tools that the reference calls, with the same arguments."""
    if answer.row.calls is None:
        return None
    expected = [_as_call(call) for call in answer.row.calls]
    return float(calls_in(answer.text) == expected)


def calls_in(text: str) -> list[Row]:
    """The calls in an answer: the JSON objects in it, or in lists, with a name and arguments.

    So most models write them: Qwen, Hermes, Llama, Mistral.
    """
    calls: list[Row] = []
    decoder = json.JSONDecoder()
    position = 0
    while (match := re.compile(r"[{\[]").search(text, position)) is not None:
        try:
            value, position = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            position = match.end()
            continue
        items = value if isinstance(value, list) else [value]
        calls += [_as_call(item) for item in items if _is_call(item)]
    return calls


def _is_call(value: Any) -> bool:
    call = _inner(value)
    return (
        isinstance(call, dict)
        and isinstance(call.get("name"), str)
        and (any(name in call for name in _ARGUMENTS))
    )


def _inner(value: Any) -> Any:
    return value["function"] if isinstance(value, dict) and "function" in value else value


def _as_call(value: Any) -> Row:
    call = _inner(value)
    arguments: Any = next((call[name] for name in _ARGUMENTS if name in call), {})
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    return {"name": call["name"], "arguments": arguments}


def _by_function(metric: FunctionMetric, answers: Sequence[Answered]) -> Scored:
    """The values of the user's function; one that raises leaves its answers without a value."""
    try:
        function = UserFunctionReward(metric, may_fail=True)
    except RunError as error:
        return Scored([None] * len(answers), None, len(answers), str(error))
    completions = completions_of(answers)
    scored = function.score(completions)
    problem = _first_error(metric, completions) if scored.failures else ""
    return _mean(scored.values, scored.failures, problem)


def _first_error(metric: FunctionMetric, completions: Completions) -> str:
    """What the function raises, with the answer that it raised for."""
    try:
        UserFunctionReward(metric, may_fail=False).score(completions)
    except RunError as error:
        return str(error).replace("the reward function", "the function").rpartition("\n")[0]
    return f"the function {metric.name} of {metric.path} failed"


def completions_of(answers: Sequence[Answered]) -> Completions:
    """Answers as reward functions get them."""
    prompts = [answer.row.turns for answer in answers]
    texts: list[str | list[Message]] = [
        answer.text if isinstance(prompt, str) else [{"role": "assistant", "content": answer.text}]
        for answer, prompt in zip(answers, prompts, strict=True)
    ]
    columns = columns_of([answer.row.columns for answer in answers])
    return Completions(prompts, texts, [list(answer.ids) for answer in answers], columns)


def _by_rouge(metric: str, answers: Sequence[Answered]) -> Scored:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([metric], use_stemmer=False)

    def f1(text: str, reference: str) -> float:
        return float(scorer.score(reference, text)[metric].fmeasure)

    return _mean([_compared(answer, f1) for answer in answers])


def _by_sacrebleu(metric: str, answers: Sequence[Answered]) -> Scored:
    """BLEU or chrF: of all answers as a corpus, and of each as a sentence."""
    from sacrebleu.metrics import BLEU, CHRF

    corpus = BLEU() if metric == "bleu" else CHRF()
    sentence = BLEU(effective_order=True) if metric == "bleu" else CHRF()
    values = [
        _compared(answer, lambda text, ref: float(sentence.sentence_score(text, [ref]).score))
        for answer in answers
    ]
    pairs = [(a.text, ref) for a in answers if (ref := reference_of(a)) is not None]
    if not pairs:
        return Scored(values, None)
    texts, references = map(list, zip(*pairs, strict=True))
    return Scored(values, float(corpus.corpus_score(texts, [references]).score))


def title_of(metric: MetricChoice | str) -> str:
    """A measure's title in tables."""
    from ..config.eval_metrics import ANSWER_METRICS

    name = metric if isinstance(metric, str) else metric_name(metric)
    fact = ANSWER_METRICS.get(name)
    return name.replace("_", " ") if fact is None else fact.title
