"""`finray chat` on a terminal: reads messages, and shows answers as they are written."""

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...training.common.errors import FinrayError
from ...training.common.formatting import count, printable

if TYPE_CHECKING:
    from ...training.evaluation.chatting import Conversation, Reply
    from ...training.evaluation.opened import Opened

HELP = """\
  /system TEXT   another system prompt; without TEXT none
  /tool TEXT     the result of a tool that the model has called
  /reset         forget the conversation
  /forget        leave out its oldest turns
  /exit          end, as Ctrl-D does; Ctrl-C stops an answer"""
_HOW = {
    "stopped": "stopped",
    "length": "cut off at --max-tokens",
    "context": "cut off: the model's context is full; /forget or /reset",
}
_DIM, _BOLD, _RED = "2", "1", "31"


class ChatScreen:
    """A conversation on a terminal, or line by line from a file.

    Args:
        conversation: with the model.
        base: answers beside it; None for the model alone.
        read: reads a message; raises EOFError at the end.
        is_terminal: use colours and a prompt.
    """

    def __init__(
        self,
        conversation: "Conversation",
        base: "Opened | None" = None,
        read: Callable[[str], str] = input,
        is_terminal: bool | None = None,
    ) -> None:
        self._conversation = conversation
        self._base = base
        self._read = read
        terminal = sys.stdout.isatty() and sys.stdin.isatty()
        self._is_terminal = terminal if is_terminal is None else is_terminal

    def run(self, head: str) -> None:
        """Chat until the end of the input, or /exit.

        Args:
            head: what is shown first.
        """
        if self._is_terminal:
            self._line(head, _BOLD)
            self._line(HELP, _DIM)
        while True:
            try:
                text = self._read("\n> " if self._is_terminal else "").strip()
            except EOFError:
                break
            except KeyboardInterrupt:  # an empty line; the chat goes on
                self._line("\n(Ctrl-D or /exit ends)", _DIM)
                continue
            if text in ("/exit", "/quit"):
                break
            if text:
                self._act(text)

    def _act(self, text: str) -> None:
        """Follow a command, or answer a message."""
        word, _, rest = text.partition(" ")
        rest = rest.strip()
        if word == "/help":
            self._line(HELP, _DIM)
        elif word == "/reset":
            self._conversation.reset()
            self._line("(a new conversation)", _DIM)
        elif word == "/system":
            self._conversation.system = rest
            self._conversation.reset()
            self._line("(a new conversation with this system prompt)", _DIM)
        elif word == "/forget":
            self._forget()
        elif word == "/tool" and not self._conversation.takes_results:
            self._line("this model's chat template renders no results of tools", _RED)
        elif word == "/tool":
            self._say("tool", rest)
        elif word.startswith("/") and word[1:].isalpha():
            self._line(f"there is no {word}; /help lists the commands", _RED)
        else:
            self._say("user", text)

    def _forget(self) -> None:
        turns = self._conversation.turns
        left_out = self._conversation.forget()
        self._line(f"({count(left_out)} turns left out)", _DIM)
        if turns and turns[-1]["role"] != "assistant":
            self._answer()

    def _say(self, role: str, text: str) -> None:
        foreign, own = self._conversation.marks(text)
        for mark in foreign:
            self._line(f"({mark} is a mark of another chat template: plain text here)", _DIM)
        for mark in own:
            self._line(f"({mark} is a special token of this model, and read as one)", _DIM)
        self._conversation.add(role, text)
        self._answer()

    def _answer(self) -> None:
        """Show the answers; what cannot be answered waits for /forget or /reset."""
        from ...training.evaluation.chatting import FullContextError

        turns = self._conversation.turns
        try:
            if self._base is not None:
                self._line("base", _DIM)
                self._show(self._conversation.answer(self._piece, self._base))
                self._line("tuned", _DIM)
            self._show(self._conversation.answer(self._piece))
        except FullContextError as error:
            if any(turn["role"] == "assistant" for turn in turns):
                remedy = "/forget leaves out the oldest turns and answers, /reset starts over"
            else:
                turns.pop()
                remedy = "the message is too long; send a shorter one"
            self._line(f"{error}; {remedy}", _RED)
        except FinrayError as error:
            turns.pop()
            self._line(f"{error}; the message is left out", _RED)

    def _piece(self, text: str) -> None:
        # Control characters of an answer would change the terminal.
        print(printable(text), end="", flush=True)

    def _show(self, reply: "Reply") -> None:
        print()
        for call in reply.calls:
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            self._line(f"(calls {call['name']} with {arguments}; /tool gives its result)", _DIM)
        if reply.how:
            self._line(f"({_HOW[reply.how]})", _DIM)

    def _line(self, text: str, colour: str) -> None:
        shown = printable(text)
        print(f"\x1b[{colour}m{shown}\x1b[0m" if self._is_terminal else shown, flush=True)
