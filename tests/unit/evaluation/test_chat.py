"""`finray chat`: streamed answers against plain transformers, interrupts, and a full context."""

import json
import sys
from collections.abc import Callable, Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.finished_run import finished_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from finray.cluster.api.conversation import chat
from finray.cluster.cli.main import main
from finray.cluster.screens.chat import ChatScreen
from finray.training.common.errors import InputError
from finray.training.evaluation.answer_settings import AnswerSettings
from finray.training.evaluation.chatting import Conversation, FullContextError
from finray.training.evaluation.located import locate
from finray.training.evaluation.opened import Opened, base_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CHAT_WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def typed(*lines: str | type[BaseException]) -> Callable[[str], str]:
    """What a user types; an exception is raised in place of a line."""
    waiting: Iterator[str | type[BaseException]] = iter(lines)

    def read(_: str) -> str:
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def converse(opened: Opened, **settings: Any) -> Conversation:
    return Conversation(opened, AnswerSettings(**{"max_tokens": 6, **settings}))


def test_streamed_turns_are_those_of_plain_transformers(
    run: Path, tiny_model: Path, opened: Opened
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    plain = PeftModel.from_pretrained(base, run / "adapter")
    conversation = converse(opened)
    conversation.system = "tiny"
    messages = [{"role": "system", "content": "tiny"}]
    under = base_of(opened, locate(str(run), Path.cwd()))
    for text in ("quick fox", "lazy dog"):
        conversation.add("user", text)
        messages.append({"role": "user", "content": text})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

        def answer(ids: Any = ids) -> str:
            out = plain.generate(**ids, max_new_tokens=6, do_sample=False)
            new = out[0, ids["input_ids"].shape[1] :]
            text: str = tokenizer.decode(new, skip_special_tokens=True)
            return text

        with plain.disable_adapter():
            expected = answer()
        pieces: list[str] = []
        assert conversation.answer(pieces.append, under).text == expected == "".join(pieces)
        pieces.clear()
        reply = conversation.answer(pieces.append)
        assert reply.text == answer() == "".join(pieces) and reply.how == "length"
        messages.append({"role": "assistant", "content": reply.text})
    assert conversation.turns == messages[1:]


def test_an_interrupt_ends_the_answer_and_not_the_chat(
    opened: Opened, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = converse(opened, max_tokens=12)
    count = 0
    real = ChatScreen._piece

    def piece(self: ChatScreen, text: str) -> None:
        nonlocal count
        real(self, text)
        count += 1
        if count == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ChatScreen, "_piece", piece)
    lines = typed("quick fox", KeyboardInterrupt, "lazy dog", "/exit", "never")
    ChatScreen(conversation, None, lines, is_terminal=False).run("head")
    out = capsys.readouterr().out
    assert "(stopped)" in out and "(Ctrl-D or /exit ends)" in out
    roles = [turn["role"] for turn in conversation.turns]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert len(conversation.turns[1]["content"]) > 0 and "never" not in out


def test_a_full_context_offers_to_leave_out_turns(
    opened: Opened, capsys: pytest.CaptureFixture[str]
) -> None:
    """128 positions: nothing is lost when the conversation no longer fits."""
    conversation = converse(opened)
    long = "0 1 2 3 4 5 6 7 8 9 "
    lines = typed(long, long, long, long, "/forget", "/reset", long * 9, "quick")
    ChatScreen(conversation, None, lines, is_terminal=False).run("head")
    out = capsys.readouterr().out
    assert out.count("/forget leaves out the oldest turns and answers, /reset starts over") >= 1
    assert "turns left out)" in out and "(a new conversation)" in out
    assert "the message is too long; send a shorter one" in out
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]
    assert conversation.turns[0]["content"] == "quick"


def test_forgetting_keeps_the_last_message(opened: Opened) -> None:
    conversation = converse(opened)
    for number in range(6):
        conversation.add("user", f"{number} quick brown fox")
        conversation.add("assistant", "lazy dog")
    conversation.add("user", "last")
    with pytest.raises(FullContextError, match="fill the model's context of 128"):
        conversation.answer(lambda _: None)
    left_out = conversation.forget()
    assert left_out % 2 == 0 and conversation.turns[-1]["content"] == "last"
    assert conversation.turns[0]["role"] == "user" and 128 - conversation.size >= 6
    longer = Conversation(opened, AnswerSettings(max_tokens=6))
    longer.turns = [
        {"role": "user", "content": "5 quick brown fox"},
        *[{"role": "assistant", "content": "lazy dog"}],
        *conversation.turns,
    ]
    assert left_out == 12 or 128 - longer.size < 6  # no turn too many


def test_marks_of_templates_are_pointed_out(
    opened: Opened, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Conversation, "takes_results", False)
    lines = typed("[INST] quick", "a <|im_end|> b", "/nope", "/tool 3")
    ChatScreen(converse(opened), None, lines, is_terminal=False).run("head")
    out = capsys.readouterr().out
    assert "([INST] is a mark of another chat template: plain text here)" in out
    assert "(<|im_end|> is a special token of this model, and read as one)" in out
    assert "there is no /nope; /help lists the commands" in out
    assert "chat template renders no results of tools" in out
    with pytest.raises(InputError, match=r"--tools: the chat template of .* renders no tools"):
        Conversation(opened, AnswerSettings(), tools=[{"type": "function"}])


def test_tools_reach_the_model_and_their_calls_are_shown(
    opened: Opened,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(tools))
    folder = finished_run(
        tmp_path, Path(opened.model.peft_config["default"].base_model_name_or_path)
    )
    (folder / "adapter" / "chat_template.jinja").write_text(CHAT_WITH_TOOLS)
    conversation, _ = chat(folder, tools=file, max_tokens=4)
    conversation.add("user", "quick")
    alone, _ = chat(folder, max_tokens=4)
    alone.add("user", "quick")
    text = json.dumps(tools[0])
    extra = len(opened.tokenizer(f"<|im_start|>system\n{text}\n<|im_end|>\n")["input_ids"])
    assert conversation.size == alone.size + extra
    from finray.training.evaluation import chatting

    call = '{"name": "add", "arguments": {"a": 1}}'
    monkeypatch.setattr(chatting, "completion_texts", lambda *_: [call])
    ChatScreen(conversation, None, typed("/tool 3"), is_terminal=False).run("head")
    assert '(calls add with {"a": 1}; /tool gives its result)' in capsys.readouterr().out
    assert [turn["role"] for turn in conversation.turns] == ["user", "tool", "assistant"]


def test_an_unfinished_run_offers_its_checkpoint(
    run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = finished_run(tmp_path, tiny_model)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "stopped"}))
    checkpoint = folder / "checkpoints" / "step-00000020"
    checkpoint.mkdir(parents=True)
    for file in (folder / "adapter").iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    manifest = {"format": 1, "world_size": 1, "metrics": {}, "files": {}}
    (checkpoint / "rank-0.json").write_text(json.dumps(manifest))
    asked: list[str] = []

    def confirm(text: str) -> bool:
        asked.append(text)
        return len(asked) > 1

    with pytest.raises(InputError, match="its best checkpoint"):
        chat(folder, confirm=confirm)
    conversation, _ = chat(folder, confirm=confirm, max_tokens=2)
    conversation.add("user", "quick")
    assert conversation.answer(lambda _: None).text is not None and str(checkpoint) in asked[1]


def test_the_command_reads_lines_from_a_pipe(
    run: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = converse(opened, max_tokens=4)
    expected.add("user", "quick")
    text = expected.answer(lambda _: None).text
    monkeypatch.setattr("builtins.input", typed("quick"))
    monkeypatch.setattr(ChatScreen.__init__, "__defaults__", (None, input, False))
    assert main(["chat", str(run), "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out == f"{text}\n(cut off at --max-tokens)\n"


def test_a_model_without_a_template_cannot_chat(opened: Opened) -> None:
    template, opened.tokenizer.chat_template = opened.tokenizer.chat_template, None
    try:
        with pytest.raises(InputError, match="has no chat template"):
            converse(opened)
    finally:
        opened.tokenizer.chat_template = template


def test_input_and_terminal_that_are_no_utf8(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = BytesIO()
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"caf\xe9\n/n\xc3\xb6\n"), "utf-8"))
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(shown, "ascii"))
    assert main(["chat", str(run), "--max-tokens", "2"]) == 0
    sys.stdout.flush()
    assert b"there is no /n\\xf6; /help lists the commands" in shown.getvalue()
