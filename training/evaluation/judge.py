"""A judge at an OpenAI-compatible address: scores answers, and chooses between two."""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
_TIMEOUT = 120.0
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_NUMBER = re.compile(r"(?<![\d.])(10|[1-9])(?:\.0+)?(?![\d.])")
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


@dataclass(frozen=True)
class Judge:
    """A judge, and how it is reached."""

    address: str
    """Of the API: http://host:8000/v1."""
    model: str
    pause: float = _FIRST_PAUSE
    """Seconds before the second try; each further one waits twice as long."""

    def score(self, prompt: Turns, answer: str, reference: str | None) -> float:
        """A score from 1 to 10.

        Raises:
            RunError: the judge does not answer, or not with a score.
        """
        text = self._ask(_SCORE.format(reference=_by(reference)), prompt, reference, [answer])
        value = _parsed(text).get("score")
        if not isinstance(value, int | float) or not 1 <= value <= 10:
            match = _NUMBER.search(text)
            if match is None:
                raise RunError(f"the judge gave no score from 1 to 10: {one_line(text)[:200]!r}")
            value = int(match[1])
        return float(value)

    def prefer(
        self, prompt: Turns, first: str, second: str, reference: str | None
    ) -> Literal["first", "second", "tie"]:
        """The better of two answers: that which wins in both orders, else a tie.

        Raises:
            RunError: the judge does not answer, or not with a choice.
        """
        ahead = self._choose(prompt, first, second, reference)
        behind = self._choose(prompt, second, first, reference)
        if (ahead, behind) == ("A", "B"):
            return "first"
        return "second" if (ahead, behind) == ("B", "A") else "tie"

    def _choose(self, prompt: Turns, a: str, b: str, reference: str | None) -> Verdict:
        asked = _CHOOSE.replace("{reference}", _by(reference))
        text = self._ask(asked, prompt, reference, [a, b])
        value = str(_parsed(text).get("winner", "")).strip().strip("\"'").lower()
        verdicts: dict[str, Verdict] = {"a": "A", "b": "B", "tie": "tie"}
        if value not in verdicts:
            raise RunError(f"the judge chose neither A, B nor tie: {one_line(text)[:200]!r}")
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
            return str(reply["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError):
            raise RunError(f"the judge at {self.address} sent no answer") from None

    def _post(self, body: bytes) -> Any:
        """The reply to a request; what may pass is tried again.

        Raises:
            RunError: it does not answer.
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
                problem = f"{error.code} {error.reason}"
                may_pass = error.code in _AGAIN
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = getattr(error, "reason", error)
                problem, may_pass = str(reason) or type(error).__name__, True
            if not may_pass or attempt == _TRIES:
                break
            time.sleep(pause)
            pause *= 2
        tries = f" after {attempt} tries" if attempt > 1 else ""
        remedy = f"; set ${TOKEN}" if problem.startswith("401") else ""
        raise RunError(
            redact(f"the judge at {self.address} does not answer{tries}: {problem}{remedy}")
        )


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
            f"--judge: {address} is no address; give that of an OpenAI-compatible API, such as "
            "http://127.0.0.1:8000/v1"
        )
    if not model:
        raise InputError("--judge: name the judge's model with --judge-model")
    return Judge(address, model)


def _by(reference: str | None) -> str:
    return "" if reference is None else ", measured by the reference answer"


def _parsed(text: str) -> dict[str, Any]:
    """The first JSON object in a text; empty without one."""
    start = text.find("{")
    try:
        value = json.JSONDecoder().raw_decode(text, start)[0] if start >= 0 else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def ask_all(
    items: Sequence[_Item],
    ask: Callable[[_Item], _Result],
    keep: Callable[[_Item, _Result], None],
) -> str:
    """Ask a judge about several items at once, and keep each verdict as it comes.

    Returns:
        Why the first item has no verdict; empty if all have one. Once the judge does not answer,
        the others are not asked.
    """
    problem = ""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for first in range(0, len(items), _AT_ONCE):
            part = items[first : first + _AT_ONCE]
            futures = [(item, pool.submit(ask, item)) for item in part]
            for item, future in futures:
                try:
                    keep(item, future.result())
                except RunError as error:
                    problem = problem or str(error)
            if "does not answer" in problem:
                return problem
    return problem
