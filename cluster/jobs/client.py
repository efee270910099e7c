"""Runs and sweeps as Ray jobs: submit, follow, stop and fetch them with Ray's own client."""

import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...training.common.errors import InputError, RunError
from ...training.common.formatting import one_line
from ...training.common.logs import limit
from ...training.common.scratch import scratch_folder
from ...training.config.recipe import Recipe
from ...tuning.sweep import LoadedSweep
from ..nodes.token import authenticate, wrong_token
from .results import unpack
from .staging import LAUNCHER, LIMIT_MIB, add_finray, stage, stage_sweep

ACTIVE = ("PENDING", "RUNNING")
POLL_SECONDS = 1.0

_RUN, _STORAGE, _DIGEST = "finray_run", "finray_storage", "finray_digest"
# Time for a run to save, between the request to stop and the kill.
_STOP_SECONDS = 180


@dataclass(frozen=True)
class Job:
    """One attempt at a run or sweep on a cluster."""

    id: str
    """Submission id: the run's name, and for later attempts ~2, ~3 and so on behind it, which no
    run's name contains."""
    run: str
    """Name of the run or sweep."""
    storage: str
    digest: str
    """Hash of the recipe and its staged files; see `staging.Staged`."""
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str
    exit_code: int | None
    """Exit code of `finray train` or `finray tune` there; None while it runs."""
    started_ms: int
    """Milliseconds since 1970."""

    @property
    def attempt(self) -> int:
        """Number of this attempt; the first is 1."""
        return int(self.id.removeprefix(self.run).removeprefix("~") or 1)


@dataclass(frozen=True)
class Submitted:
    """The result of a submission."""

    job: Job
    is_new: bool
    """False if the same run is already active or has finished."""
    notes: tuple[str, ...]


class Cluster:
    """The jobs of one cluster.

    Args:
        address: the dashboard's URL, such as http://head:8265.

    Raises:
        InputError: there is no answer, the token is missing or wrong, or the cluster requires
            none and other machines can reach it.
    """

    def __init__(self, address: str) -> None:
        authenticate(address)
        # Without this, Ray's client prefers RAY_ADDRESS to its argument.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
        self.address = address
        with self._plain_errors():
            from ray.job_submission import JobSubmissionClient

            for name in ("dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
                limit(f"ray.{name}", logging.WARNING)
            self._client = JobSubmissionClient(address)

    def submit(
        self,
        what: Recipe | LoadedSweep,
        on_cluster: tuple[str, ...] = (),
        limit_mib: float = LIMIT_MIB,
        python: str | None = None,
        wait_for_nodes: float = 0.0,
        log_level: str | None = None,
        *,
        fresh: bool = False,
        longer: bool = False,
    ) -> Submitted:
        """Submit a run or a sweep, unless it is active or has finished.

        Args:
            what: recipe or sweep, its paths absolute.
            on_cluster: folders of the nodes; files below them are not uploaded.
            limit_mib: largest sum of the uploaded files, in MiB.
            python: the interpreter on the head; None means the one that runs Ray's workers.
            wait_for_nodes: seconds to wait for an autoscaler to add missing nodes.
            log_level: how much the libraries log there; None for the default.
            fresh: start over, also after a finished run.
            longer: added steps get a learning-rate schedule of their own.

        Raises:
            InputError: as `staging.stage`, and if a run of this name with another recipe or
                other files is active.
        """
        if isinstance(what, LoadedSweep) and (fresh or longer):
            raise InputError("--fresh and --longer are for runs; give the sweep another name")
        if isinstance(what, Recipe) and what.scale.most_workers == 0:
            message = "scale.workers: 0 trains in one process, without Ray; set at least 1"
            raise InputError(what.located(message))
        with scratch_folder("job") as folder:
            if isinstance(what, Recipe):
                name, storage, verb = what.name, what.storage, "train"
                staged = stage(what, folder, on_cluster, limit_mib)
            else:
                name, storage, verb = what.sweep.name, what.sweep.storage, "tune"
                staged = stage_sweep(what, folder, on_cluster, limit_mib)
            last = self._last(name)
            if last is not None and last.status in ACTIVE and last.digest != staged.digest:
                raise InputError(
                    f"a run named {name} is {last.status} on {self.address} with other settings "
                    "or data; give this one another name, or stop that one (finray job stop "
                    f"{name})"
                )
            is_same = last is not None and last.digest == staged.digest
            if last is not None and is_same and _needs_no_attempt(last, fresh):
                return Submitted(last, False, ())
            attempt = 1 if last is None else last.attempt + 1
            id = name if attempt == 1 else f"{name}~{attempt}"
            facts = {_RUN: name, _STORAGE: storage, _DIGEST: staged.digest}
            words = [verb, "--wait-for-nodes", f"{wait_for_nodes:g}"]
            words += ["--fresh"] * fresh + ["--longer"] * longer
            words += ["--log-level", log_level] if log_level else []
            self._start(id, " ".join(words), folder, facts, python)
        return Submitted(self.job(name), True, staged.notes)

    def jobs(self) -> list[Job]:
        """finray's runs and sweeps on the cluster, in the order of their submission."""
        with self._plain_errors():
            details = self._client.list_jobs()
        jobs = [_job(detail) for detail in details if _RUN in (detail.metadata or {})]
        return sorted(jobs, key=lambda job: job.started_ms)

    def job(self, name: str) -> Job:
        """The last attempt of a run, or the attempt with this id.

        Raises:
            InputError: there is none; the message lists the existing runs.
        """
        jobs = self.jobs()
        matches = [job for job in jobs if job.run == name] or [
            job for job in jobs if job.id == name
        ]
        if not matches:
            names = ", ".join(sorted({job.run for job in jobs})) or "none"
            raise InputError(f"no run named {name} on {self.address}; existing runs: {names}")
        return max(matches, key=lambda job: job.attempt)

    def logs(self, job: Job) -> str:
        """Everything that the job has printed so far."""
        with self._plain_errors():
            return str(self._client.get_job_logs(job.id))

    def follow(self, job: Job, write: Callable[[str], object]) -> Job:
        """Pass what the job prints to `write` until it ends; returns the ended job."""
        seen = 0
        while True:
            now = self._attempt(job)
            text = self.logs(job)
            if len(text) > seen:
                write(text[seen:])
                seen = len(text)
            if now.status not in ACTIVE:
                return now
            time.sleep(POLL_SECONDS)

    def wait(self, job: Job) -> Job:
        """Wait until the job ends; returns the ended job."""
        while (now := self._attempt(job)).status in ACTIVE:
            time.sleep(POLL_SECONDS)
        return now

    def stop(self, job: Job) -> bool:
        """Request a run to save and exit; returns False if it has ended already."""
        with self._plain_errors():
            return bool(self._client.stop_job(job.id))

    def fetch(self, job: Job, target: Path) -> list[str]:
        """Download a run's metrics, report and result; returns the files' relative paths.

        They come through the Jobs API, because this machine may have no access to the storage.

        Raises:
            RunError: the cluster could not read them.
        """
        code, log = self.run(f"{job.run}~fetch", f"pack {shlex.quote(job.storage)} {job.run}")
        names = unpack(log, target)
        if names is None:
            raise RunError(
                f"cannot fetch {job.run} (exit code {code}): {_last_lines(log)}; check that the "
                f"cluster reads {job.storage}"
            )
        return names

    def run(self, name: str, what: str) -> tuple[int, str]:
        """Run a short command of `cli.job_entry` there; returns its exit code and output."""
        with scratch_folder("job") as folder:
            add_finray(folder)
            id = f"{name}~{time.time_ns()}"
            self._start(id, what, folder, {}, None)
        with self._plain_errors():
            while (detail := self._client.get_job_info(id)).status.value in ACTIVE:
                time.sleep(POLL_SECONDS / 2)
            log = str(self._client.get_job_logs(id))
            self._client.delete_job(id)
        return detail.driver_exit_code or 0, log

    def _start(
        self, id: str, what: str, folder: Path, facts: dict[str, str], python: str | None
    ) -> None:
        chosen = f"python={shlex.quote(python)} " if python else ""
        with self._plain_errors():
            self._client.submit_job(
                entrypoint=f"{chosen}sh {LAUNCHER} {what}",
                submission_id=id,
                metadata=facts,
                runtime_env={
                    "working_dir": str(folder),
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS)},
                },
            )

    def _last(self, run: str) -> Job | None:
        attempts = [job for job in self.jobs() if job.run == run]
        return max(attempts, key=lambda job: job.attempt, default=None)

    def _attempt(self, job: Job) -> Job:
        with self._plain_errors():
            return _job(self._client.get_job_info(job.id))

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Turn Ray's errors into finray's one-line messages."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise InputError(wrong_token(self.address)) from None
        except ConnectionError as error:
            raise RunError(
                f"{self.address} no longer answers: {one_line(str(error))}; check that the cluster "
                "runs, and run the same command"
            ) from None
        except RuntimeError as error:
            raise RunError(
                f"{self.address} refused the request: {_last_lines(str(error))}; finray cluster "
                f"doctor --address {self.address} shows its state"
            ) from None


def _needs_no_attempt(job: Job, fresh: bool) -> bool:
    """True if submitting the same again would change nothing."""
    return job.status in ACTIVE or (job.status == "SUCCEEDED" and not fresh)


def _job(detail: Any) -> Job:
    facts = detail.metadata
    return Job(
        id=detail.submission_id,
        run=facts[_RUN],
        storage=facts[_STORAGE],
        digest=facts[_DIGEST],
        status=str(detail.status.value),
        message=(detail.message or "").partition(", last available logs")[0],
        exit_code=detail.driver_exit_code,
        started_ms=detail.start_time or 0,
    )


def _last_lines(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-3:]) or "no reason given"
