"""Axolotl's prompt strategies for imitation: the columns that they read, the text they write."""

from collections.abc import Mapping
from dataclasses import dataclass, field

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)
_CONCISE = (
    "Below is an instruction from a USER that describes a task. The ASSISTANT writes a response "
    "that appropriately and concisely completes the request.\n\n"
)
_CONTEXT = "Use the following contextual information to concisely answer the question.\n"
_CREATIVE = (
    "Answer the following question in a comprehensive, in-depth, and creative way. Additionally "
    "your response should be relevant, accurate, and free of any ambiguity."
)
_QUESTION = {"instruction": "question", "output": "answer"}
_ORCA = {"instruction": "question", "output": "response", "system": "system_prompt"}


@dataclass(frozen=True)
class Strategy:
    """A prompt strategy."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Columns, by finray's names, that it reads under another name."""
    style: str = ""
    """The text that it writes around the fields; empty where it leaves that to a template."""
    system: str = ""
    """The system prompt that it writes before each row."""


CHATS = ("sharegpt", "chat_template", "pygmalion", "llama2_chat", "llama3")
TEXTS = ("completion", "pretrain")
_STRATEGIES: dict[str, Strategy] = {
    "alpaca": Strategy({}, "instruct", _ALPACA),
    "alpaca_instruct": Strategy({}, "instruct", _ALPACA),
    "alpaca_instruct.load_no_prompt": Strategy({}, "instruct"),
    "alpaca_chat": Strategy({}, "chat", _ALPACA),
    "alpaca_chat.load_concise": Strategy({}, "chat", _CONCISE),
    "alpaca_chat.load_qa": Strategy(_QUESTION, "chat", _CONCISE),
    "alpaca_chat.load_camel_ai": Strategy(
        {"instruction": "message_1", "output": "message_2"}, "chat", _CONCISE
    ),
    "alpaca_chat.load_no_prompt": Strategy({}, "chat"),
    "alpaca_w_system": Strategy({}, "chat"),
    "alpaca_w_system.load_chat": Strategy({}, "chat"),
    "alpaca_w_system.load_instruct": Strategy({}, "instruct"),
    "alpaca_w_system.load_open_orca": Strategy(_ORCA, "orca"),
    "alpaca_w_system.load_open_orca_chatml": Strategy(_ORCA, "chatml"),
    "gpteacher": Strategy({"output": "response"}, "instruct", _ALPACA),
    "oasst": Strategy({"instruction": "INSTRUCTION", "output": "RESPONSE"}, "instruct", _ALPACA),
    "jeopardy": Strategy({**_QUESTION, "input": "category"}, "instruct", _ALPACA),
    "summarizetldr": Strategy({"instruction": "article", "output": "summary"}, "tldr"),
    "context_qa": Strategy(
        {"instruction": "article", "input": "question", "output": "answer"}, "chat", _CONTEXT
    ),
    "context_qa.load_v2": Strategy(
        {"instruction": "context", "input": "question", "output": "answer"}, "context"
    ),
    "orcamini": Strategy(_ORCA, "orcamini"),
    "creative_acr.load_answer": Strategy({"output": "revision"}, "creative", _CREATIVE),
    "metharme": Strategy({"completion": "generation"}),
    **{name: Strategy() for name in (*CHATS, *TEXTS, "sharegpt_jokes", "sharegpt_simple")},
}
_OWN_WAYS = {
    "input_output": "segments of a text, each trained or not",
    "reflection": "an answer, a reflection on it, and a corrected answer",
    "explainchoice": "a question with choices, and an explanation",
    "concisechoice": "a question with choices, and an explanation",
    "context_qa.load_404": "an article and a question that it does not answer",
    "creative_acr.load_critique": "scores and critiques of an answer",
    "creative_acr.load_revise": "an answer, its critiques, and a revision",
    "zephyr.nectar": "ranked answers to a prompt",
    "messages.chat": "messages with a flag for each part",
}
"""What the rows of a strategy hold that no shape of finray has."""


def strategy_of(name: str) -> Strategy | None:
    """A strategy by its name, with that of its loader; None for others."""
    stem, _, loader = name.partition(".")
    plain = loader in ("", "load", "load_default") or stem in (*CHATS, *TEXTS)
    return _STRATEGIES.get(stem if plain else name)


def why_none(kind: str) -> str:
    """Why nothing comes of a strategy, and what the user can do."""
    rows = _OWN_WAYS.get(kind.partition(":")[0])
    if rows is None:
        rows = "a strategy that finray import does not know"
    return f"{kind}: {rows}; map of the source makes them one of finray's shapes"
