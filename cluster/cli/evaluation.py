"""`finray generate`, `eval` and `chat`: what a trained model says, and how good it is."""

import argparse
import sys
from contextlib import redirect_stdout

from ...training.common.errors import RunError
from ..api.conversation import chat as open_chat
from ..api.evaluation import evaluate as measure
from ..api.generation import generate as write_answers


def generate(options: argparse.Namespace) -> None:
    """Answer the prompts of a file with a trained model."""
    summary = write_answers(
        *(options.model, options.prompts, options.to),
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        base=options.base,
        batch=options.batch,
        engine=options.engine,
        address=options.address,
        workers=options.workers,
        quiet=options.quiet,
    )
    from ..screens.answers import render_generated

    print(render_generated(summary, as_json=options.json))


def evaluate(options: argparse.Namespace) -> None:
    """Measure a trained model on rows with answers."""
    with redirect_stdout(sys.stderr):  # what the user's code writes in any way
        result = measure(
            *(options.model, options.data),
            metrics=options.metrics,
            tasks=options.tasks,
            loss=not options.no_loss,
            schema=options.schema,
            judge=options.judge,
            judge_model=options.judge_model,
            against=options.against,
            base=options.base,
            rows=options.rows,
            max_tokens=options.max_tokens,
            batch=options.batch,
            to=options.to,
            address=options.address,
            workers=options.workers,
            quiet=options.quiet,
        )
    from ..screens.answers import render_evaluation

    print(render_evaluation(result.record, result.folder, as_json=options.json))
    if result.problems:
        raise RunError("\n".join(result.problems))


def chat(options: argparse.Namespace) -> None:
    """Talk to a trained model."""
    conversation, base = open_chat(
        options.model,
        base=options.base,
        system=options.system,
        tools=options.tools,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        confirm=_confirm,
    )
    import readline  # noqa: F401 - `input` then edits lines and keeps a history

    from ..screens.chat import ChatScreen

    ChatScreen(conversation, base).run(f"{options.model}{' beside its base' if base else ''}")


def _confirm(text: str) -> bool:
    """Ask about an unfinished run's checkpoint; without a terminal the answer is no."""
    if not sys.stdin.isatty():
        return False
    return input(f"{text}\nTalk to the checkpoint? [Y/n] ").strip().lower() in ("", "y", "yes")
