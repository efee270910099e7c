"""Experiment trackers: one small class for each, over the tracker's own client.

A client runs in a process beside the driver (`tracking_program`), so that nothing it does, hangs in
or raises reaches the training. Each is given lines of metrics.jsonl in their order.
"""

import os
import re
import uuid
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol

PROJECT = "finray"
"""Project or experiment where the environment names none."""

_REFUSED = re.compile(r"[^\w./ -]", re.ASCII)
_LONGEST_NAME = 250
"""Characters of a name that MLflow takes."""

Line = tuple[int, dict[str, float]]
"""(step, values)"""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run when it starts."""

    name: str
    kind: str
    """run, sweep or trial."""
    folder: Path
    """A folder on this machine for the client's own files."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Settings by dotted key."""
    tags: Sequence[str] = ()
    sweep: str | None = None
    """Name of the sweep that it belongs to, or is."""
    parent: str | None = None
    """Id of the sweep's own run."""


class Tracker(Protocol):
    """A client, for one run."""

    def open(self, run: TrackedRun, earlier_id: str | None) -> str:
        """Start a run, or resume it under its id; returns the id, which is noted at once.

        Another id than the known one means that the tracker has nothing of the run.
        """

    def describe(self, run: TrackedRun) -> None:
        """Send what `open` has not sent of the settings; comes after it, each time."""

    def log(self, lines: Sequence[Line]) -> None:
        """Send lines."""

    def add(self, path: Path, name: str, kind: str) -> None:
        """Send a file or a folder; kind is report, recipe or model."""

    def close(self, status: str) -> None:
        """End the run: finished, stopped, failed or pruned."""


class MlflowTracker:
    """MLflow, at MLFLOW_TRACKING_URI, in the experiment MLFLOW_EXPERIMENT_NAME."""

    _ENDS = {"finished": "FINISHED", "failed": "FAILED"}
    _MOST = 1000
    """Values in one request, at most."""
    _MOST_PARAMS = 100
    _LONGEST = 500
    """Characters of a parameter that servers of all versions keep."""

    def __init__(self) -> None:
        # Its own limits are 7 retries of 2 minutes each; what could not be sent is sent later.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient

        self._client = MlflowClient()
        self._id = ""

    def open(self, run: TrackedRun, earlier_id: str | None) -> str:
        """See `Tracker`."""
        if earlier_id is not None and self._goes_on(earlier_id):
            self._id = earlier_id
            return earlier_id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        existing = self._client.get_experiment_by_name(name)
        experiment = (
            self._client.create_experiment(name) if existing is None else existing.experiment_id
        )
        tags = {"finray.kind": run.kind, **{_accepted(f"tag.{tag}"): "true" for tag in run.tags}}
        if run.parent is not None:
            tags["mlflow.parentRunId"] = run.parent
        self._id = self._client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
        return self._id

    def _goes_on(self, earlier_id: str) -> bool:
        """Resume a run; False if this server has none of this id, as another one may."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.update_run(earlier_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def describe(self, run: TrackedRun) -> None:
        """See `Tracker`; a parameter that is there stays, as MLflow changes none."""
        from mlflow.entities import Param

        there = self._client.get_run(self._id).data.params
        names: dict[str, str] = {}
        for key in run.config:
            names[_free(_accepted(key), names)] = key
        params = [
            Param(name, str(run.config[key])[: self._LONGEST])
            for name, key in names.items()
            if name not in there
        ]
        for start in range(0, len(params), self._MOST_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + self._MOST_PARAMS])

    def log(self, lines: Sequence[Line]) -> None:
        """See `Tracker`."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [
            Metric(_accepted(key), value, now, step)
            for step, line in lines
            for key, value in line.items()
        ]
        for start in range(0, len(values), self._MOST):
            self._client.log_batch(self._id, metrics=values[start : start + self._MOST])

    def add(self, path: Path, name: str, kind: str) -> None:
        """See `Tracker`."""
        if path.is_dir():
            self._client.log_artifacts(self._id, str(path), name)
        else:
            self._client.log_artifact(self._id, str(path))

    def close(self, status: str) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id, self._ENDS.get(status, "KILLED"))


def _accepted(name: str) -> str:
    """A name that MLflow's servers take: a short path of letters, digits and _-. with spaces."""
    parts = _REFUSED.sub("_", name)[:_LONGEST_NAME].split("/")
    return "/".join(part for part in parts if part.strip("."))


def _free(name: str, taken: Container[str]) -> str:
    """A name beside others: two settings may differ only in what MLflow refuses."""
    numbers = (f"{name[: _LONGEST_NAME - 5]}_{number}" for number in count(2))
    return next(one for one in chain((name,), numbers) if one not in taken)


class WandbTracker:
    """Weights & Biases, in the project WANDB_PROJECT; a sweep's runs form a group."""

    def __init__(self) -> None:
        import wandb

        self._wandb = wandb
        self._run: Any = None

    def open(self, run: TrackedRun, earlier_id: str | None) -> str:
        """See `Tracker`."""
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=earlier_id or uuid.uuid4().hex[:8],
            resume="allow",
            name=run.name,
            group=run.sweep,
            job_type=run.kind,
            tags=list(run.tags),
            config=dict(run.config),
            dir=str(run.folder),
            settings=self._wandb.Settings(console="off", silent=True),
            reinit="create_new",
        )
        return str(self._run.id)

    def describe(self, run: TrackedRun) -> None:
        """See `Tracker`; `open` sends all."""

    def log(self, lines: Sequence[Line]) -> None:
        """See `Tracker`."""
        for step, values in lines:
            self._run.log(values, step=step)

    def add(self, path: Path, name: str, kind: str) -> None:
        """See `Tracker`."""
        artifact = self._wandb.Artifact(f"{self._run.id}-{name}", type=kind)
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def close(self, status: str) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=1 if status == "failed" else 0)


class TrackioTracker:
    """Trackio, here, at TRACKIO_SERVER_URL or in the space TRACKIO_SPACE_ID; its id is the name."""

    def __init__(self) -> None:
        import trackio

        self._trackio = trackio
        self._run: Any = None

    def open(self, run: TrackedRun, earlier_id: str | None) -> str:
        """See `Tracker`."""
        name = f"{run.sweep}/{run.name}" if run.kind == "trial" else run.name
        self._run = self._trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or PROJECT,
            name=earlier_id or name,
            group=run.sweep,
            config={**run.config, "kind": run.kind, "tags": ",".join(run.tags)},
            resume="never" if earlier_id is None else "allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        return str(self._run.name)

    def describe(self, run: TrackedRun) -> None:
        """See `Tracker`; `open` sends all."""

    def log(self, lines: Sequence[Line]) -> None:
        """See `Tracker`."""
        for step, values in lines:
            self._run.log(values, step=step)

    def add(self, path: Path, name: str, kind: str) -> None:
        """See `Tracker`."""
        self._run.log_artifact(path, name=name, type=kind)

    def close(self, status: str) -> None:
        """See `Tracker`."""
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
    "wandb": WandbTracker,
}
"""By the name in `log.to`."""
