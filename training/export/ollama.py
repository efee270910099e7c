"""Writes a Modelfile, with which Ollama runs an exported model: its template and its stops.

Ollama has templates of its own in Go. The one that is written is made of what the chat template
puts around each turn, and is only written if it renders a conversation as the chat template does.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..data.chat import ChatTemplate, chat_template_of
from ..data.shapes import Message, RowError

MODELFILE = "Modelfile"
_ROLES = ("system", "user", "assistant")
_MARK = {role: f"finray-{role}" for role in _ROLES}


@dataclass(frozen=True)
class TurnTexts:
    """What a chat template writes around turns."""

    opening: dict[str, str]
    """Before the content of a turn, by role."""
    closing: dict[str, str]
    """Behind the content of a turn, by role."""
    unsaid: str
    """Before the first turn of a conversation without a system message."""
    prompt: str
    """Behind the last turn, where the answer begins."""

    def render(self, messages: list[Message]) -> str:
        """A conversation with an answer to come."""
        text = "" if messages[0]["role"] == "system" else self.unsaid
        for message in messages:
            role = message["role"]
            text += f"{self.opening[role]}{message['content']}{self.closing[role]}"
        return text + self.prompt

    def go(self) -> str:
        """The same as a template of Ollama."""
        turns = "".join(
            f'{{{{ {"else " if number else ""}if eq .Role "{role}" }}}}'
            f"{self.opening[role]}{{{{ .Content }}}}{self.closing[role]}"
            for number, role in enumerate(_ROLES)
        )
        unsaid = f"{{{{ if not .System }}}}{self.unsaid}{{{{ end }}}}" if self.unsaid else ""
        return f"{unsaid}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{self.prompt}"


def check_template(folder: Path) -> None:
    """Refuse a model or an adapter for whose chat template no Modelfile can be written.

    Raises:
        InputError: it has no chat template, or one that Ollama cannot express.
    """
    turn_texts(_tokenizer_in(folder))


def write_modelfile(folder: Path, source: str) -> None:
    """Write a Modelfile beside an exported model.

    Args:
        folder: the exported folder of a whole model.
        source: what Ollama loads, relative to the folder: `.` or a GGUF file.

    Raises:
        InputError: the model has no chat template, or one that Ollama cannot express.
    """
    tokenizer = _tokenizer_in(folder)
    texts = turn_texts(tokenizer)
    lines = [f"FROM {source}", f'TEMPLATE """{texts.go()}"""']
    lines += [f"PARAMETER stop {json.dumps(stop)}" for stop in stops_of(folder, tokenizer)]
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _tokenizer_in(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def stops_of(folder: Path, tokenizer: Any) -> list[str]:
    """The tokens that end an answer, as text: those of generation_config.json, else the
    tokenizer's."""
    file = folder / "generation_config.json"
    ids = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.is_file() else None
    listed = ids if isinstance(ids, list) else [tokenizer.eos_token_id if ids is None else ids]
    return [tokenizer.convert_ids_to_tokens(number) for number in listed if number is not None]


def turn_texts(tokenizer: Any) -> TurnTexts:
    """What the tokenizer's chat template writes around turns.

    Raises:
        InputError: there is no template, or it does more than that.
    """
    try:
        template = chat_template_of(tokenizer, None)
    except InputError:
        raise InputError(
            "--ollama: the model has no chat template; leave --ollama out, and write a Modelfile "
            "for texts to continue"
        ) from None
    bos = tokenizer.bos_token or ""
    try:
        texts = _texts(template, bos)
        is_right = all(_is_right(texts, template, talk, bos) for talk in _talks())
    except (RowError, ValueError):
        is_right = False
    if not is_right:
        raise InputError(
            "--ollama: the chat template does more than put texts around turns, so no template of "
            "Ollama's equals it; leave --ollama out, and write the TEMPLATE by hand"
        )
    return texts


def _texts(template: ChatTemplate, bos: str) -> TurnTexts:
    """The texts around turns, if there is nothing else; `_is_right` decides on that."""

    def around(*roles: str) -> list[str]:
        """What stands before, between and behind the contents of a conversation."""
        text = _rendered(template, [_message(role) for role in roles], bos, with_prompt=False)
        pieces = []
        for role in roles:
            before, text = text.split(_MARK[role], 1)
            pieces.append(before)
        return [*pieces, text]

    head, closing_user = around("user")
    _, before_answer, closing_answer = around("user", "assistant")
    after_answer = around("user", "assistant", "user")[2]
    opening_user = after_answer.removeprefix(closing_answer)
    opening_system, between, _ = around("system", "user")
    talk = [_message("user")]
    whole = _rendered(template, talk, bos)
    return TurnTexts(
        opening={
            "system": opening_system,
            "user": opening_user,
            "assistant": before_answer.removeprefix(closing_user),
        },
        closing={
            "system": between.removesuffix(opening_user),
            "user": closing_user,
            "assistant": closing_answer,
        },
        unsaid=head.removesuffix(opening_user),
        prompt=whole.removeprefix(_rendered(template, talk, bos, with_prompt=False)),
    )


def _is_right(texts: TurnTexts, template: ChatTemplate, talk: list[Message], bos: str) -> bool:
    return texts.render(talk) == _rendered(template, talk, bos)


def _talks() -> list[list[Message]]:
    """Conversations that Ollama and the chat template must render alike."""
    orders = (
        ("user",),
        ("system", "user"),
        ("user", "assistant", "user"),
        ("system", "user", "assistant", "user", "assistant", "user"),
    )
    return [[_message(role) for role in roles] for roles in orders]


def _message(role: str) -> Message:
    return {"role": role, "content": _MARK[role]}


def _rendered(
    template: ChatTemplate, talk: list[Message], bos: str, with_prompt: bool = True
) -> str:
    """Without the token that begins a text, which Ollama adds itself.

    Raises:
        ValueError: the text has signs that a Modelfile reads as its own.
    """
    text = template.render(talk, add_generation_prompt=with_prompt).removeprefix(bos)
    if '"""' in text or "{{" in text:
        raise ValueError(text)
    return text
