"""A conversation with a model: its turns, the room that is left, and streamed answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList, TextStreamer

from ..common.errors import InputError, RunError
from ..data.rendering import Prompt
from ..data.rows import Row
from ..data.shapes import ChatContext, Message, Question, RowError
from ..models.generation import completion_texts, generate_ids
from ..models.out_of_memory import first_line, is_out_of_memory
from ..rl.rollouts.sampling import Sampler
from .answer_settings import AnswerSettings
from .opened import Opened
from .scores import calls_in

Receive = Callable[[str], None]
"""Receives the next piece of an answer."""


class FullContextError(InputError):
    """The conversation leaves the model no room for an answer."""


@dataclass(frozen=True)
class Reply:
    """A model's answer in a conversation."""

    text: str
    """What was answered, up to where it was stopped."""
    how: str = ""
    """Why it did not end by itself: stopped, context or length; else empty."""
    calls: list[Row] = field(default_factory=list)
    """The tools that it calls, [{name, arguments}]."""


class _Stream(TextStreamer):
    """Passes on the words of an answer, and keeps its tokens."""

    def __init__(self, tokenizer: Any, receive: Receive) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._receive = receive
        self._is_prompt = True
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Receives the prompt, then each token."""
        if self._is_prompt:
            self._is_prompt = False
        else:
            self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receives text that later tokens do not change."""
        del stream_end
        if text:
            self._receive(text)


class Conversation:
    """Turns of a user and a model.

    Args:
        opened: the model.
        settings: how it answers.
        system: the system prompt; empty for none.
        tools: the tools that it may call.

    Raises:
        InputError: the model has no chat template, or one that renders no tools.
    """

    def __init__(
        self,
        opened: Opened,
        settings: AnswerSettings,
        system: str = "",
        tools: Sequence[Row] = (),
    ) -> None:
        if not opened.tokenizer.chat_template:
            raise InputError(
                f"{opened.name} has no chat template, so it knows no turns; `finray generate` "
                "continues plain texts"
            )
        if tools and not opened.renderer.traits.tools:
            raise InputError(
                f"--tools: the chat template of {opened.name} renders no tools, so the model would "
                "not see them; leave out --tools"
            )
        self._opened = opened
        self._settings = settings
        self._tools = tuple(tools)
        self.system = system
        """The system prompt; empty for none."""
        self.turns: list[Message] = []
        """The messages so far, without the system prompt."""

    @property
    def size(self) -> int:
        """Tokens of the conversation up to the next answer.

        Raises:
            RowError: the chat template does not accept the conversation.
        """
        return len(self._prompt().input_ids)

    @property
    def takes_results(self) -> bool:
        """True if the model can read the result of a tool."""
        return self._opened.renderer.traits.results

    def reset(self) -> None:
        """Forget all turns."""
        self.turns.clear()

    def forget(self) -> int:
        """Leave out the oldest turns until a quarter of the context is free for the answer; the
        last message of the user stays. Returns the number of turns left out."""
        room = min(self._settings.max_tokens, self._opened.context // 4)
        before = len(self.turns)
        while self._opened.context - self.size < room:
            later = [n for n, turn in enumerate(self.turns) if n and turn["role"] == "user"]
            if not later:
                break
            del self.turns[: later[0]]
        return before - len(self.turns)

    def marks(self, text: str) -> tuple[list[str], list[str]]:
        """What a message holds of templates: marks of others, and special tokens of the model."""
        added = self._opened.tokenizer.added_tokens_decoder.values()
        own = sorted({str(one) for one in added if one.special and str(one) in text})
        return self._opened.foreign_marks([text]), own

    def add(self, role: str, text: str) -> None:
        """Add a message of the user or of a tool."""
        self.turns.append({"role": role, "content": text})

    def answer(self, receive: Receive, base: Opened | None = None) -> Reply:
        """Answer the conversation; an interrupt ends the answer, which keeps what is there.

        Args:
            receive: gets the answer piece by piece.
            base: another model that answers instead; what it says is no part of the conversation.

        Raises:
            FullContextError: there is no room for an answer.
            InputError: the chat template does not accept the conversation.
            RunError: there is not enough memory.
        """
        opened = base or self._opened
        try:
            prompt = self._prompt()
        except RowError as error:
            raise InputError(str(error)) from None
        room = opened.context - len(prompt.input_ids)
        if room < 1:
            raise FullContextError(
                f"the conversation's {len(prompt.input_ids):,} tokens fill the model's context of "
                f"{opened.context:,}"
            )
        reply = self._generate(opened, prompt, min(room, self._settings.max_tokens), receive)
        if base is None:
            self.turns.append({"role": "assistant", "content": reply.text})
        return reply

    def _prompt(self) -> Prompt:
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        question = Question((*system, *self.turns), context=ChatContext(self._tools))
        return self._opened.renderer.question(question)

    def _generate(self, opened: Opened, prompt: Prompt, room: int, receive: Receive) -> Reply:
        stream = _Stream(opened.tokenizer, receive)
        how: dict[str, Any] = {"streamer": stream}
        ids = prompt.input_ids.tolist()
        if self._settings.temperature > 0:
            drawn = np.random.default_rng((self._settings.seed, len(self.turns))).random(room)
            uniform = torch.from_numpy(drawn[None]).to(opened.device)
            sampler = Sampler(self._settings, uniform, len(ids))
            how["logits_processor"] = LogitsProcessorList([sampler])
        try:
            with opened.active():
                (generated,) = generate_ids(
                    *(opened.model, opened.tokenizer, [ids], room, opened.stops), **how
                )
        except KeyboardInterrupt:
            stream.end()
            text = opened.tokenizer.decode(stream.ids, skip_special_tokens=True)
            return Reply(text, "stopped")
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(f"out of memory ({first_line(error)})") from None
        (text,) = completion_texts(opened.tokenizer, [generated])
        cut = "length" if room == self._settings.max_tokens else "context"
        calls = calls_in(text) if self._tools else []
        return Reply(text, "" if generated.ended else cut, calls)
