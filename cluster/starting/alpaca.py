"""The texts that Axolotl's Alpaca strategies write around instruction and answer."""

import json

from . import adapting
from .axolotl_rows import Rows
from .draft import Draft

_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)
_LIKE = frozenset(
    "alpaca alpaca_instruct gpteacher oasst alpaca_w_system context_qa summarizetldr jeopardy "
    "orcamini alpaca_chat creative_acr user_defined".split()
)
_STYLES = {
    "instruct": (("", "\\n\\n"), ("### Instruction:\\n", "\\n\\n"), "### Response:\\n", "\\n\\n"),
    "chat": (("SYSTEM: ", "\\n"), ("USER: ", "\\n"), "ASSISTANT:", "\\n"),
    "phi": (
        ("<|system|>\\n", "<|end|>\\n"), ("<|user|>\\n", "<|end|>\\n"), "<|assistant|>\\n", "\\n"
    ),
}  # fmt: skip
"""By Axolotl's style, as in alpaca:chat: texts around a system prompt and a question, before an
answer, and between an answer and the next question."""
_OWN_STYLES = {"alpaca_chat": "chat", "context_qa": "chat"}
_INPUT = "a row's input follows its instruction after an empty line"


def is_like_alpaca(rows: Rows) -> bool:
    """True if a strategy of Axolotl writes the text of all rows itself."""
    return bool(rows.strategies) and rows.strategies <= _LIKE


def write_template(draft: Draft, rows: Rows) -> None:
    """The template, as far as one can be written."""
    if rows.formats:
        _own_format(draft, rows)
        return
    styles = {*rows.styles} or {_OWN_STYLES.get(name, "instruct") for name in rows.strategies}
    style = min(styles)
    if len(styles) > 1 or style not in {*_STYLES, "chatml"}:
        draft.notes.append(
            f"styles of prompts {', '.join(sorted(styles))}: the model's own chat template stands "
            "in their place; data.chat_template takes another"
        )
        return
    if rows.strategies <= {"alpaca", "gpteacher"}:
        for source in draft.values["data.train"]:
            source.setdefault("system", _SYSTEM)
    if others := rows.strategies - {"alpaca", "alpaca_instruct", "alpaca_chat", "gpteacher"}:
        draft.notes.append(
            f"data.chat_template: Alpaca's texts; those of {', '.join(sorted(others))} differ"
        )
    if style == "chatml":
        adapting.chatml(draft)
        return
    note = f"the text that Axolotl's strategy writes ({style}); {_INPUT}"
    draft.put("data.chat_template", _of_style(style), note=note)


def _of_style(style: str) -> str:
    (before, after), (ask, asked), answer, between = _STYLES[style]
    return (
        "{% for message in messages %}{% if message.role == 'system' %}{{ "
        f"'{before}' + message.content + '{after}' }}}}"
        "{% elif message.role == 'user' %}{{ "
        f"'{ask}' + message.content + '{asked}' }}}}"
        "{% elif message.role == 'assistant' %}{{ "
        f"'{answer}' + message.content + eos_token }}}}"
        f"{{% if not loop.last %}}{{{{ '{between}' }}}}{{% endif %}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{answer}' }}}}{{% endif %}}"
    )


def _own_format(draft: Draft, rows: Rows) -> None:
    """The template of a format that the user defines."""
    before, found, after = rows.formats[0].partition("{instruction}")
    if not found or "{" in before + after:
        draft.notes.append(
            f"datasets.0.type.format: {json.dumps(rows.formats[0])}: the model's own chat "
            "template is used; data.chat_template sets another"
        )
        return
    if len(set(rows.formats)) > 1:
        draft.notes.append(
            f"data.chat_template: that of {json.dumps(rows.formats[0])}; other formats differ, and "
            f"{_INPUT}"
        )
    template = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ "
        f"{json.dumps(before)} + message.content + {json.dumps(after)} }}}}"
        "{% elif message.role == 'system' %}{{ message.content + '\\n' }}"
        "{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}"
    )
    draft.put("data.chat_template", template, note="datasets.0.type.format")
