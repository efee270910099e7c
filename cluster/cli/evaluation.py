"""`finray generate`, `eval` and `chat`: what a trained model says, and how good it is."""

import argparse

from ...training.common.errors import RunError
from ..api.answers import evaluate as measure
from ..api.answers import generate as write_answers


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
        quiet=options.quiet,
    )
    from ..screens.answers import render_generated

    print(render_generated(summary, as_json=options.json))


def evaluate(options: argparse.Namespace) -> None:
    """Measure a trained model on rows with answers."""
    result = measure(
        *(options.model, options.data),
        metrics=options.metrics,
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
        quiet=options.quiet,
    )
    from ..screens.answers import render_evaluation

    print(render_evaluation(result.record, result.folder, as_json=options.json))
    if result.problems:
        raise RunError("\n".join(result.problems))
