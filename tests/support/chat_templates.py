"""The chat templates that TRL ships, a small tokenizer for each, and conversations of shapes."""

import re
from importlib.resources import files
from typing import Any

from finray.training.data.render_settings import RenderSettings
from finray.training.data.rendering import Renderer

FOLDER = files("trl") / "chat_templates"
NAMES = sorted(
    file.name.removesuffix(".jinja")
    for file in FOLDER.iterdir()
    if file.name.endswith(".jinja") and not file.name.endswith("_training.jinja")
)
_MARK = re.compile(
    r"<\|[\w/ ]+\|?>|<[\w/]+\|>|<｜[^｜<>']+｜>|</?think>|</?tool_calls?>|</?tool_response>"
    r"|<start_of_turn>|<end_of_turn>|<end_of_utterance>"
)
WORDS = "one two three user assistant model system tool get_weather Paris Rome sunny rain\n\n"


def template(name: str) -> str:
    """A template that TRL ships."""
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_with(source: str) -> Any:
    """A byte-level tokenizer whose special tokens are those of a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    marks = sorted({*_MARK.findall(source)} - {"<s>", "</s>"})
    trainer = trainers.BpeTrainer(
        vocab_size=300 + len(marks),
        special_tokens=["<pad>", "<s>", "</s>", *marks],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([WORDS] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=source,
    )


def renderer_with(tokenizer: Any, **changes: Any) -> Renderer:
    """A renderer of long rows with the tokenizer's own chat template."""
    values = {
        "base": "/m",
        "revision": None,
        "trust_remote_code": False,
        "chat_template": None,
        "train_on_all": False,
        "split_overlong": False,
        "max_length": 100_000,
        "overlong": "drop",
    }
    return Renderer(tokenizer, RenderSettings(**{**values, **changes}))


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name."}},
                "required": ["city"],
            },
        },
    }
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(number: int, city: str) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": {"city": city}}
    return {"id": f"abcdefgh{number}", "type": "function", "function": function}


def result(number: int, text: str) -> dict[str, Any]:
    return {
        "role": "tool",
        "tool_call_id": f"abcdefgh{number}",
        "name": "get_weather",
        "content": text,
    }


PARIS = answer(None, tool_calls=[call(1, "Paris")])
ROME = answer(None, tool_calls=[call(2, "Rome")])
SUNNY, RAIN = result(1, "sunny, 21 degrees"), result(2, "rain, 9 degrees")
THOUGHT, SECOND = "It asks for one", "Now it asks for two"

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one answer": {"messages": [user("Q1"), answer("A1")]},
    "system": {"messages": [{"role": "system", "content": "S1"}, user("Q1"), answer("A1")]},
    "two answers": {"messages": [user("Q1"), answer("A1"), user("Q2"), answer("A2")]},
    "spaces": {"messages": [user("Q1"), answer("\n\n  A1 "), user("Q2"), answer(" 2")]},
    "thought": {"messages": [user("Q1"), answer("A1", reasoning_content=THOUGHT)]},
    "thoughts": {
        "messages": [
            user("Q1"),
            answer("A1", reasoning_content=THOUGHT),
            user("Q2"),
            answer("A2", reasoning_content=SECOND),
        ]
    },
    "unused tools": {"messages": [user("Q1"), answer("A1")], "tools": TOOLS},
    "call": {"messages": [user("Q1"), PARIS], "tools": TOOLS},
    "result": {"messages": [user("Q1"), PARIS, SUNNY, answer("A1")], "tools": TOOLS},
    "call with text": {
        "messages": [user("Q1"), {**PARIS, "content": "I look"}, SUNNY, answer("A1")],
        "tools": TOOLS,
    },
    "call with thought": {
        "messages": [
            user("Q1"),
            {**PARIS, "reasoning_content": THOUGHT},
            SUNNY,
            answer("A1", reasoning_content=SECOND),
        ],
        "tools": TOOLS,
    },
    "calls": {
        "messages": [
            *(user("Q1"), PARIS, SUNNY, ROME, RAIN, answer("A1")),
            *(user("Q2"), answer("A2")),
        ],
        "tools": TOOLS,
    },
    "parallel calls": {
        "messages": [
            user("Q1"),
            answer(None, tool_calls=[call(1, "Paris"), call(2, "Rome")]),
            *(SUNNY, RAIN, answer("A1")),
        ],
        "tools": TOOLS,
    },
}
