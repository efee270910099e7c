"""What a call gives back: a run or a sweep as an object over its folder.

Nothing is kept in memory: each attribute reads the folder, so it is also up to date while another
process trains.
"""

import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...training.common.errors import InputError
from ...training.common.storage import Folder
from ...training.common.yaml_text import load_yaml
from ...training.config.recipe import Recipe
from ...training.records.report import write_report
from ...training.records.resume import written_recipe
from ...training.records.run_folder import (
    REPORT_FILE,
    UNREADABLE,
    FinishedRun,
    existing_run,
    finished_run,
    read_listed,
    read_metrics,
)
from ...tuning.sweep_folder import BEST_FILE, existing_sweep
from ..screens.summary import render_summary
from ..screens.sweep import render_sweep
from .recipes import load_recipe

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class PreparedData:
    """A prepared data set."""

    folder: str
    """Its folder or URI; the name is a hash of data, tokenizer and settings."""
    summary: dict[str, Any]
    """Rows read and dropped; sequences, documents and tokens of `train` and `eval`."""


@dataclass(frozen=True)
class Report:
    """A self-contained page; in a notebook it shows itself."""

    file: str
    """Its path or URI."""
    text: str
    """The page, as HTML."""

    def __str__(self) -> str:
        return self.file

    def __fspath__(self) -> str:
        return self.file

    def _repr_html_(self) -> str:
        page = html.escape(self.text, quote=True)
        return f'<iframe srcdoc="{page}" width="100%" height="720" frameborder="0"></iframe>'


class _Result:
    """A folder that finray wrote, local or in an object store."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    @property
    def name(self) -> str:
        """Its name, which is its folder's."""
        return self._folder.name

    @property
    def uri(self) -> str:
        """Its folder as an absolute path or a URI."""
        return self._folder.uri

    @property
    def folder(self) -> Path:
        """Its folder on this machine.

        Raises:
            InputError: it lies in an object store; `uri` names it.
        """
        if self._folder.local is None:
            raise InputError(f"{self._folder} is not a folder on this machine; use .uri")
        return self._folder.local

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


class RunResult(_Result):
    """A run: what it was, how far it is, and what it left."""

    @property
    def status(self) -> str:
        """running, finished, stopped or failed; unreadable if run.json cannot be read."""
        return str(self._listed.get("status"))

    @property
    def record(self) -> dict[str, Any]:
        """The content of run.json.

        Raises:
            InputError: the folder holds no run any more, or run.json is damaged.
        """
        return existing_run(self._folder)

    @property
    def recipe(self) -> Recipe:
        """The run's recipe, with every default.

        Raises:
            InputError: recipe.yaml is missing, or this finray does not take it.
        """
        return written_recipe(self._folder)

    @property
    def metrics(self) -> "pandas.DataFrame":
        """The lines of metrics.jsonl, one row each: `step`, `loss`, `eval_loss`, ..."""
        import pandas

        return pandas.DataFrame(read_metrics(self._folder))

    @property
    def report(self) -> Report:
        """report.html; it is written where it does not exist yet."""
        if not self._folder.exists(REPORT_FILE):
            write_report(self._folder)
        return _report(self._folder)

    def model(self, dtype: Literal["float32", "bfloat16", "float16"] | None = None) -> Any:
        """The trained model on the CPU: transformers' own, or PEFT's over its base.

        Args:
            dtype: type of the weights; by default the one that the run computed in.

        Raises:
            InputError: the run is not finished, or its base cannot be loaded.
        """
        return self._open(dtype).model

    def tokenizer(self) -> Any:
        """The tokenizer of the trained model.

        Raises:
            InputError: the run is not finished.
        """
        from transformers import AutoTokenizer

        with self._finished().local_result() as folder:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def summary(self, *, colour: bool = False) -> str:
        """How the run ended, what it improved, and where its results are."""
        return render_summary(self._folder, colour=colour)

    @property
    def _listed(self) -> dict[str, Any]:
        return read_listed(self._folder) or existing_run(self._folder)

    def _finished(self) -> FinishedRun:
        return finished_run(self._folder)

    def _open(self, dtype: str | None) -> Any:
        import torch

        from ...training.models.open_result import open_result

        run = self._finished()
        head = written_recipe(run.folder).method.head
        compute = getattr(torch, dtype or run.record["dtype"])
        return open_result(run, head, compute, str(self._folder))

    def __repr__(self) -> str:
        record = self._listed
        if record.get("status") == UNREADABLE:
            return f"RunResult({self.uri}: {UNREADABLE})"
        return (
            f"RunResult({self.uri}: {record.get('status')}, step {record.get('step')} of "
            f"{record.get('total_steps')})"
        )

    def __str__(self) -> str:
        return self.summary()


class SweepResult(_Result):
    """A sweep: its trials, and the best settings."""

    @property
    def status(self) -> str:
        """running, finished, stopped or failed."""
        return str(self.record["status"])

    @property
    def record(self) -> dict[str, Any]:
        """The content of sweep.json.

        Raises:
            InputError: the folder holds no sweep, or sweep.json is damaged.
        """
        return existing_sweep(self._folder)

    @property
    def trials(self) -> "pandas.DataFrame":
        """One row a trial: number, state, each objective, each searched setting, tokens."""
        import pandas

        record = self.record
        metrics = [objective["metric"] for objective in record["objectives"]]
        rows = [
            {
                "number": row["number"],
                "state": row["state"],
                **dict(zip(metrics, row["values"] or (), strict=False)),
                **row["settings"],
                "tokens": row["tokens"],
            }
            for row in record["trials"]
        ]
        return pandas.DataFrame(rows)

    @property
    def best(self) -> dict[str, Any]:
        """The best trial's settings by dotted key; of several objectives, of the first point of
        the Pareto front. Empty before a trial has finished."""
        record = self.record
        numbers = record["best"][:1]
        return next(
            (dict(row["settings"]) for row in record["trials"] if row["number"] in numbers), {}
        )

    @property
    def recipe(self) -> Recipe:
        """best.yaml, ready for `finray.train`; of several objectives, the best in the first.

        Raises:
            InputError: the sweep has not ended, or no trial has finished.
        """
        return load_recipe(load_yaml(_read(self._folder, BEST_FILE)))

    @property
    def report(self) -> Report:
        """report.html.

        Raises:
            InputError: the sweep has not ended yet.
        """
        return _report(self._folder)

    def __repr__(self) -> str:
        record = self.record
        return f"SweepResult({self.uri}: {record['status']}, {len(record['trials'])} trials)"

    def __str__(self) -> str:
        return render_sweep(self.record, self._folder)


def _report(folder: Folder) -> Report:
    return Report(str(folder / REPORT_FILE), _read(folder, REPORT_FILE))


def _read(folder: Folder, name: str) -> str:
    try:
        return folder.read(name).decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"{folder} has no {name} yet") from None
