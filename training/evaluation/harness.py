"""Tasks of EleutherAI's lm-evaluation-harness, as measures of a model."""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..common.errors import InputError, RunError, in_one_line
from ..common.logs import limit
from ..records.run_folder import Record
from .opened import Opened

_NO_METRICS = ("alias", "sample_len", "sample_count", "name")
_DEVIATIONS = 1.96
"""Standard errors of a mean in a 95 % interval."""


class Harness:
    """Tasks with their data.

    Args:
        names: of tasks, groups and tags of the harness, or YAML files of tasks.
        rows: rows of each task at most; None for all.
        at_once: rows in a batch.

    Raises:
        InputError: there is no such task, or its data cannot be loaded.
    """

    def __init__(self, names: Sequence[str], rows: int | None, at_once: int) -> None:
        os.environ.setdefault("TQDM_DISABLE", "1")  # read as tqdm is imported
        limit("lm_eval", logging.ERROR)
        from lm_eval.tasks import TaskManager

        self.names = list(names)
        self._rows, self._at_once = rows, at_once
        self._manager = TaskManager()
        for name in names:
            try:
                self._manager.load([name])
            # A task's own code, YAML and data set raise whatever they like.
            except Exception as error:  # noqa: BLE001
                raise InputError(
                    f"--tasks: {name}: {in_one_line(error)}; `lm-eval ls tasks` lists the tasks"
                ) from None

    def measure(self, opened: Opened) -> list[Record]:
        """The measures of a model: name, value, interval (95 %, or None), count and mode.

        Raises:
            RunError: a task fails.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with opened.active(), _quiet():
            model = HFLM(
                pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=self._at_once
            )
            try:
                results = simple_evaluate(
                    model=model,
                    tasks=self.names,
                    limit=self._rows,
                    task_manager=self._manager,
                    log_samples=False,
                )
            except Exception as error:
                raise RunError(
                    f"--tasks: lm-evaluation-harness fails: {in_one_line(error)}; correct the "
                    "task, or leave it out"
                ) from error
        return list(measures_of(results))


def measures_of(results: dict[str, Any]) -> Iterator[Record]:
    """The harness' results as measures."""
    for task, values in results["results"].items():
        higher = results.get("higher_is_better", {}).get(task, {})
        count = results.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if name in _NO_METRICS or name.endswith("_stderr") or not _is_number(value):
                continue
            error = values.get(f"{name}_stderr,{kind}")
            yield {
                "name": f"{task} {name}" + ("" if kind in ("", "none") else f" {kind}"),
                "value": float(value),
                "interval": _DEVIATIONS * error if _is_number(error) and error else None,
                "count": count,
                "mode": "min" if higher.get(name) is False else "max",
            }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness' warnings on a model that is loaded already."""
    logger = logging.getLogger("lm_eval")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
