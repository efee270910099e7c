"""The texts that Axolotl's Alpaca strategies write around instruction and answer."""

import json

from . import adapting
from .axolotl_rows import Rows
from .draft import Draft

Texts = tuple[tuple[str, str], tuple[str, str], str, str]
"""Texts around a system prompt and a question, before an answer, and between an answer and the next
question, as a template writes them in quotes."""
_STYLES: dict[str, Texts] = {
    "instruct": (("", "\\n\\n"), ("### Instruction:\\n", "\\n\\n"), "### Response:\\n", "\\n\\n"),
    "chat": (("SYSTEM: ", "\\n"), ("USER: ", "\\n"), "ASSISTANT:", "\\n"),
    "phi": (
        ("<|system|>\\n", "<|end|>\\n"), ("<|user|>\\n", "<|end|>\\n"), "<|assistant|>\\n", "\\n"
    ),
    "orca": (("### System:\\n", "\\n"), ("### Human:\\n", "\\n"), "### Assistant:\\n", "\\n"),
    "orcamini": (
        ("### System:\\n", "\\n\\n"), ("### User:\\n", "\\n\\n"), "### Response:\\n", "\\n\\n"
    ),
    "tldr": (
        ("", "\\n"), ("USER: Summarize the following article as a TL;DR.\\n", "\\n"), "ASSISTANT:",
        "\\n",
    ),
    "creative": (("", "\\n"), ("USER: ", "\\n"), "ASSISTANT:", "\\n"),
    "context": (("", ""), ("Context: ", "\\n"), "Answer: ", "\\n"),
}  # fmt: skip
"""By the style of a strategy."""
_INPUT = "a row's input follows its instruction after an empty line"


def writes_texts(rows: Rows) -> bool:
    """True if strategies of Axolotl write the text of all rows themselves."""
    return bool(rows.styles) and "" not in rows.styles


def write_template(draft: Draft, rows: Rows) -> None:
    """The template, as far as one can be written."""
    style = min(rows.styles)
    if style == "own" and len(rows.styles) == 1:
        _own_format(draft, rows)
    elif len(rows.styles) > 1 or style not in {*_STYLES, "chatml"}:
        draft.notes.append(
            f"styles of prompts {', '.join(sorted(rows.styles))}: the model's own chat template "
            "stands in their place; data.chat_template takes another"
        )
        return
    elif style == "chatml":
        adapting.chatml(draft)
    else:
        note = f"the text that Axolotl's strategy writes ({style}); {_INPUT}"
        draft.put("data.chat_template", template_of(_STYLES[style]), note=note)
    for source, system in zip(rows.sources, rows.systems, strict=True):
        if system:
            source.setdefault("system", system)


def template_of(texts: Texts) -> str:
    """The chat template that writes these texts."""
    (before, after), (ask, asked), answer, between = texts
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
    before, placeholder, after = rows.formats[0].partition("{instruction}")
    if not placeholder or "{" in before + after:
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
    opened, _, closed = map(json.dumps, rows.system_format.partition("{system}"))
    template = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ "
        f"{json.dumps(before)} + message.content + {json.dumps(after)} }}}}"
        f"{{% elif message.role == 'system' %}}{{{{ {opened} + message.content + {closed} }}}}"
        "{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}"
    )
    draft.put("data.chat_template", template, note="datasets.0.type.format")
