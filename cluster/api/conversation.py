"""What `finray chat` opens: a trained model to talk to."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ...training.common.errors import InputError, reason
from ...training.config.paths import resolve_path
from .recipes import prepare_process
from .trained import ModelSource, name_of

if TYPE_CHECKING:
    from ...training.data.rows import Row
    from ...training.evaluation.chatting import Conversation
    from ...training.evaluation.opened import Opened


def chat(
    model: ModelSource,
    *,
    base: bool = False,
    system: str = "",
    tools: str | os.PathLike[str] | None = None,
    max_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    confirm: Callable[[str], bool] = lambda _: False,
) -> "tuple[Conversation, Opened | None]":
    """Open a model for a conversation.

    Args:
        model: a run, a checkpoint or a model.
        base: open the model under the adapter, too.
        system: the system prompt.
        tools: a JSON file with the tools that the model may call.
        max_tokens, temperature, top_p, seed: as in `generate`.
        confirm: asked whether to take the best checkpoint of an unfinished run.

    Raises:
        InputError: there is no such model, it has no chat template, or the tools are none.
    """
    prepare_process()
    from ...training.evaluation.answer_settings import AnswerSettings
    from ...training.evaluation.located import UnfinishedRun, locate

    settings = AnswerSettings.of(
        "chat", max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    try:
        located = locate(name_of(model), Path.cwd())
    except UnfinishedRun as error:
        if not confirm(str(error)):
            raise
        located = locate(error.checkpoint, Path.cwd())
    offered = () if tools is None else _tools(tools)
    from ...training.models import import_peft  # noqa: F401, I001 - before what loads peft
    from ...training.evaluation.chatting import Conversation
    from ...training.evaluation.opened import base_of, open_located

    opened = open_located(located)
    conversation = Conversation(opened, settings, system, offered)
    return conversation, base_of(opened, located) if base else None


def _tools(place: str | os.PathLike[str]) -> "tuple[Row, ...]":
    """The tools in a JSON file.

    Raises:
        InputError: it cannot be read, or holds none.
    """
    from ...training.data.shapes import RowError
    from ...training.data.tool_fields import tools_of

    file = Path(resolve_path(os.fspath(place), Path.cwd()))
    try:
        return tools_of({"tools": json.loads(file.read_text(encoding="utf-8"))})
    except RowError as error:
        raise InputError(f"--tools: {file}: {error}; correct the file") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(
            f"--tools: cannot read {file}: {reason(error)}; give a JSON list of tools"
        ) from None
