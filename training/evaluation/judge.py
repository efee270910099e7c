"""A judge at an OpenAI-compatible address: scores answers, and chooses between two."""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any, Literal, TypeVar

from ..common.errors import InputError, RunError
from ..common.formatting import one_line
from ..common.secrets import redact
from ..rl.rewards.reward import Turns, as_text

TOKEN = "FINRAY_JUDGE_TOKEN"
"""The variable that holds the judge's token; else OPENAI_API_KEY."""
_AT_ONCE = 8
_TRIES = 4
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 60.0
"""Seconds of a pause at most, also where a judge asks for more."""
_TIMEOUT = 120.0
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w|\.\d)")
_OF_TEN = re.compile(r"(?<=\d)\s*(?:/|out of)\s*10\b")
_THOUGHT = "</think>"
_SCORE = (
    "You grade an assistant's answer. Consider whether it is correct, complete and does what was "
    "asked{reference}. Answer with one JSON object and nothing else: "
    '{{"score": N}}, where N is a whole number from 1 (useless) to 10 (perfect).'
)
_CHOOSE = (
    "You compare two answers, A and B, to the same request. Consider which is more correct, more "
    "complete and more useful{reference}. Their order and their length mean nothing. Answer with "
    'one JSON object and nothing else: {"winner": "A"}, {"winner": "B"} or {"winner": "tie"}.'
)

Verdict = Literal["A", "B", "tie"]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class SilentJudgeError(RunError):
    """The judge cannot be reached, or refuses every request: asking it more is of no use."""


@dataclass(frozen=True)
class Judge:
    """A judge, and how it is reached."""

    address: str
    """Address of the API, such as http://host:8000/v1."""
    model: str
    pause: float = _FIRST_PAUSE
    """Seconds before the second try; each further one waits twice as long."""

    def score(self, prompt: Turns, answer: str, reference: str | None) -> float:
        """A score from 1 to 10.

        Raises:
            SilentJudgeError: the judge does not answer.
            RunError: not with a score.
        """
        text = self._ask(_SCORE.format(reference=_by(reference)), prompt, reference, [answer])
        said = _said(text)
        value = _parsed(said, "score").get("score", said)
        number: Any = _only_number(value) if isinstance(value, str) else value
        if type(number) not in (int, float) or not 1 <= number <= 10:
            raise RunError(f"the judge gave no score from 1 to 10: {_shown(said)}")
        return float(number)

    def prefer(
        self, prompt: Turns, first: str, second: str, reference: str | None
    ) -> Literal["first", "second", "tie"]:
        """The better of two answers: that which wins in both orders, else a tie.

        Raises:
            SilentJudgeError: the judge does not answer.
            RunError: not with a choice.
        """
        ahead = self._choose(prompt, first, second, reference)
        behind = self._choose(prompt, second, first, reference)
        if (ahead, behind) == ("A", "B"):
            return "first"
        return "second" if (ahead, behind) == ("B", "A") else "tie"

    def _choose(self, prompt: Turns, a: str, b: str, reference: str | None) -> Verdict:
        asked = _CHOOSE.replace("{reference}", _by(reference))
        said = _said(self._ask(asked, prompt, reference, [a, b]))
        value = str(_parsed(said, "winner").get("winner", "")).strip().strip("\"'").lower()
        verdicts: dict[str, Verdict] = {"a": "A", "b": "B", "tie": "tie"}
        if value not in verdicts:
            raise RunError(f"the judge chose neither A, B nor tie: {_shown(said)}")
        return verdicts[value]

    def _ask(self, system: str, prompt: Turns, reference: str | None, answers: list[str]) -> str:
        parts = [f"[Request]\n{as_text(prompt)}"]
        parts += [] if reference is None else [f"[Reference answer]\n{reference}"]
        names = ["Answer"] if len(answers) == 1 else ["Answer A", "Answer B"]
        parts += [f"[{name}]\n{text}" for name, text in zip(names, answers, strict=True)]
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": "\n\n".join(parts)},
        ]
        body = {"model": self.model, "messages": messages, "temperature": 0}
        reply = self._post(json.dumps(body).encode())
        try:
            text = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):  # null where a server keeps the thinking apart
            raise RunError(f"the judge at {self.address} sent no answer")
        return text

    def _post(self, body: bytes) -> Any:
        """The reply to a request; what may pass is tried again.

        Raises:
            SilentJudgeError: it does not answer.
        """
        url = f"{self.address.rstrip('/')}/chat/completions"
        token = os.environ.get(TOKEN) or os.environ.get("OPENAI_API_KEY")
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        pause = self.pause
        for attempt in range(1, _TRIES + 1):
            request = urllib.request.Request(url, body, headers)
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.reason}{_explained(error)}{self._remedy(error)}"
                may_pass = error.code in _AGAIN
                pause = max(pause, _asked_pause(error))
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                problem, may_pass = str(reason) or type(error).__name__, True
            except ValueError:
                problem, may_pass = "its reply is not JSON; does the address end in /v1?", True
            if not may_pass or attempt == _TRIES:
                break
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        tries = f" after {attempt} tries" if attempt > 1 else ""
        raise SilentJudgeError(
            redact(f"the judge at {self.address} does not answer{tries}: {problem}")
        )

    def _remedy(self, error: urllib.error.HTTPError) -> str:
        if error.code in (401, 403):
            return f"; set ${TOKEN}"
        if error.code == 404:
            return f"; does the address end in /v1, and is {self.model} a model there?"
        return ""


def _explained(error: urllib.error.HTTPError) -> str:
    """What an API says about its refusal, as OpenAI's do: {error: {message}}."""
    with suppress(OSError, http.client.HTTPException, ValueError, RecursionError):
        content = json.loads(error.read())
        refusal = content.get("error", content) if isinstance(content, dict) else None
        said = refusal.get("message") if isinstance(refusal, dict) else refusal
        if isinstance(said, str) and said:
            return f" ({_cut(said)})"
    return ""


def _asked_pause(error: urllib.error.HTTPError) -> float:
    """The seconds that a judge asks to wait, as where it limits the rate; 0 if it asks for none."""
    with suppress(ValueError):
        return min(float(error.headers.get("Retry-After") or 0), _LONGEST_PAUSE)
    return 0.0


def judge_at(address: str | None, model: str) -> Judge | None:
    """The judge that a command names; None for none.

    Raises:
        InputError: the address is none, or the judge's model is missing.
    """
    if address is None:
        if model:
            raise InputError("--judge-model: belongs to --judge, the address; add that")
        return None
    if not address.startswith(("http://", "https://")):
        raise InputError(
            f"--judge: {address} is not an address; give that of an OpenAI-compatible API, such as "
            "http://127.0.0.1:8000/v1"
        )
    if not model:
        raise InputError("--judge: name the judge's model with --judge-model")
    return Judge(address, model)


def _by(reference: str | None) -> str:
    return "" if reference is None else ", measured by the reference answer"


def _said(text: str) -> str:
    """A reply without the thoughts before it; what was cut off while it thought says nothing."""
    if _THOUGHT in text:
        return text.rpartition(_THOUGHT)[2]
    return "" if text.lstrip().startswith("<think>") else text


def _parsed(text: str, key: str) -> dict[str, Any]:
    """The last JSON object in a text that has a key; empty without one."""
    last: dict[str, Any] = {}
    start, decoder = text.find("{"), json.JSONDecoder()
    while start >= 0:
        end = start + 1
        try:
            value, after = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):  # no object begins here, or one without end
            value = None
        if isinstance(value, dict) and key in value:
            last, end = value, after
        start = text.find("{", end)
    return last


def _only_number(text: str) -> float | None:
    """The number in a text, as in 8/10; None if there is none, or if there are several."""
    numbers = {float(number) for number in _NUMBER.findall(_OF_TEN.sub("", text))}
    return numbers.pop() if len(numbers) == 1 else None


def _cut(text: str) -> str:
    return one_line(text)[:200]


def _shown(text: str) -> str:
    return repr(_cut(text))


def ask_all(
    items: Sequence[_Item],
    ask: Callable[[_Item], _Result],
    keep: Callable[[_Item, _Result], None],
) -> str:
    """Ask a judge about several items at once, and keep each verdict as it comes.

    Who interrupts this does not wait for the judge.

    Returns:
        Why the first item has no verdict; empty if all have one. Once the judge does not answer,
        the others are not asked.
    """
    problems: dict[int, RunError] = {}
    for first in range(0, len(items), _AT_ONCE):
        numbers = range(first, min(first + _AT_ONCE, len(items)))
        futures = {_in_a_thread(ask, items[number]): number for number in numbers}
        for future in as_completed(futures):
            number = futures[future]
            try:
                verdict = future.result()
            except RunError as error:
                problems[number] = error
            else:
                keep(items[number], verdict)
        if any(isinstance(error, SilentJudgeError) for error in problems.values()):
            break
    return str(problems[min(problems)]) if problems else ""


def _in_a_thread(ask: Callable[[_Item], _Result], item: _Item) -> "Future[_Result]":
    """An executor's threads would be waited for at the end of the process."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(ask(item))
        except BaseException as error:  # noqa: BLE001 - `result` raises it
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
