"""Runs attempts until the run is finished, stopped or failed.

Workers fail, or the cluster changes: the next attempt resumes from the last checkpoint.

Out of memory in a step: the next attempt uses half the microbatch size, in rows or in tokens, and
twice as many microbatches. Losses are normalised by the global batch, so the steps stay the same.
Out of memory in an evaluation: its batches are halved. Elsewhere, a retry would not help.

Damaged data: it is prepared again before the next attempt.

Checkpoint: the next attempt resumes from an older one.

Not finite: the next attempt resumes from the last good checkpoint. That helps if the hardware was
the cause; if the same steps fail again, the run fails.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast

from ..common.background import Stop
from ..common.errors import RunError
from ..common.progress import Progress
from ..common.storage import Folder
from ..config.recipe import recipe_from_dict
from ..config.sections import ANSWERS_AT_ONCE
from ..data.tasks import RunTasks, run_in_process
from ..engine.task import RetryRequest, WorkerResult, WorkerTask
from ..models.devices import Room
from ..records import checkpoint
from ..records.recorder import update_run
from ..records.run_folder import CHECKPOINTS_FOLDER, Record, read_run

_ROWS, _TOKENS = "micro_batch_size", "micro_batch_tokens"
_PARTS: Literal["evaluation_parts"] = "evaluation_parts"


class AttemptEndedError(Exception):
    """An attempt ended before the run did; another one may resume it.

    Args:
        cause: why it ended, for run.json.
        is_failure: True if it counts towards `scale.max_failures`.
        hint: more text for the user's message, such as the place of the workers' output.
        repeats_as: a text that is equal for the same failure at the same point of the run; None
            if a restart may help though it was the same.
    """

    def __init__(
        self,
        cause: str,
        is_failure: bool = True,
        hint: str = "",
        repeats_as: str | None = None,
    ) -> None:
        super().__init__(f"{cause}{hint}")
        self.repeats_as = repeats_as
        self.cause = cause
        self.is_failure = is_failure


class Launcher(Protocol):
    """Starts the workers of a run: in this process, in local processes or on Ray."""

    stop: Stop
    """Requested when the run should save and end."""
    max_failures: int
    """Failures in a row without a new checkpoint that a run survives."""
    room: Room | None = None
    """What a worker's GPU offers; None without one, or if its memory is not known."""
    run_tasks: RunTasks = staticmethod(run_in_process)
    """Runs the tasks that prepare data beside the workers."""

    def attempt(self, task: WorkerTask) -> WorkerResult:
        """Train until the attempt ends.

        Raises:
            AttemptEndedError: another attempt may resume the run.
        """

    def wait_until_ready(self, progress: Progress) -> None:
        """Wait until another attempt can start, or a stop is requested.

        Raises:
            RunError: no attempt can start in time.
        """


@dataclass
class FailurePolicy:
    """How many failures without progress a run survives.

    Args:
        checkpoints: the folder of the checkpoints; a new one is progress.
        limit: number of failures in a row without progress that are allowed.
    """

    checkpoints: Folder
    limit: int
    _failures: int = 0
    _newest: str | None = None
    _repeats_as: str | None = None

    def is_repeated(self, end: AttemptEndedError) -> bool:
        """True if the last failure was the same one, so that a retry would not help."""
        before, self._repeats_as = self._repeats_as, end.repeats_as
        return before is not None and before == end.repeats_as

    def should_retry(self) -> bool:
        """Record a failure. Returns True if another attempt is allowed."""
        try:
            newest = checkpoint.newest(self.checkpoints)
        except OSError:  # an unavailable storage shows no progress
            newest = self._newest
        self._failures = self._failures + 1 if newest == self._newest else 1
        self._newest = newest
        return self._failures <= self.limit


def run_with_retries(
    task: WorkerTask, launcher: Launcher, progress: Progress, prepare_again: Callable[[], None]
) -> WorkerResult:
    """Run attempts until one finishes, is stopped, or fails in a way that a retry cannot fix.

    Args:
        task: the run. It starts with the microbatch size that an earlier driver reduced.
        launcher: makes an attempt.
        progress: receives messages on restarts and waiting.
        prepare_again: called before the next attempt if the prepared data is damaged.

    Raises:
        RunError: the workers failed too often, or cannot start again.
        InputError: damaged data cannot be prepared again.
    """
    run, stop = Folder(task["run"]), launcher.stop
    policy = FailurePolicy(run / CHECKPOINTS_FOLDER, launcher.max_failures)
    # A new process is not needed to prepare data again, so it is done once in any case.
    data_policy = FailurePolicy(run / CHECKPOINTS_FOLDER, max(1, launcher.max_failures))
    remedies = _Remedies(run, prepare_again, data_policy)
    task = remedies.resume(task)
    stop.armed = True
    while not stop.requested.is_set():
        try:
            result = launcher.attempt(task)
            if "retry" not in result:
                return result
            task = remedies.apply(task, result["retry"])
        except _NoRemedyError as error:
            return WorkerResult(status="failed", error=str(error), exit_code=error.exit_code)
        except AttemptEndedError as end:
            if end.is_failure and policy.is_repeated(end):
                raise RunError(f"{end}; it happened again after a restart") from end
            if end.is_failure and (stop.requested.is_set() or not policy.should_retry()):
                raise RunError(str(end)) from end
            progress.status(f"restarting the workers: {end}")
            task = cast(WorkerTask, {**task, "cause": end.cause})
        launcher.wait_until_ready(progress)
    return WorkerResult(status="stopped", error=None, exit_code=130)


class _NoRemedyError(RunError):
    """A retry cannot fix the failure."""


@dataclass
class _Remedies:
    """Changes the next attempt's task according to a `RetryRequest`.

    Args:
        run: the run's folder.
        prepare_again: prepares damaged data again.
        data_policy: how often it may.
    """

    run: Folder
    prepare_again: Callable[[], None]
    data_policy: FailurePolicy
    _failed_steps: set[int] = field(default_factory=set)
    """Non-finite steps that have already caused a rollback."""

    def resume(self, task: WorkerTask) -> WorkerTask:
        """The task with the batch sizes that an earlier driver reduced, if it did."""
        record = read_run(self.run) or {}
        if (parts := record.get(_PARTS)) is not None:
            task = cast(WorkerTask, {**task, _PARTS: parts})
        key = _ROWS if task["recipe"].get("optim", {}).get(_TOKENS) is None else _TOKENS
        before = record.get(key)
        return task if before is None else _with_size(task, key, min(before, _size(task)[1]))

    def apply(self, task: WorkerTask, request: RetryRequest) -> WorkerTask:
        """The next attempt's task.

        Raises:
            _NoRemedyError: the next attempt would fail in the same way.
        """
        if request["cause"] == "memory":
            return self._save_memory(task, request)
        if request["cause"] == "data":
            return self._replace_data(task, request["problem"])
        if request["cause"] == "checkpoint":
            name = checkpoint.checkpoint_name(request["steps"][-1])
            unusable = {**task.get("unusable", {}), name: request["problem"]}
            return cast(WorkerTask, {**task, "unusable": unusable})
        self._roll_back(request)
        return task

    def _replace_data(self, task: WorkerTask, problem: str) -> WorkerTask:
        if not self.data_policy.should_retry():
            raise _NoRemedyError(f"{problem}; the next start prepares the data again")
        self.prepare_again()
        return cast(WorkerTask, {**task, "cause": problem})

    def _save_memory(self, task: WorkerTask, request: RetryRequest) -> WorkerTask:
        """The next attempt's task: with less at a time of what did not fit."""
        phase, problem = request.get("phase", "step"), request["problem"]
        if phase in ("first step", "step", "rollout"):
            return self._halve(task, request)
        if phase == "evaluation":
            return self._divide_evaluation(task, request)
        doing = "saving" if phase == "save" else "loading"
        raise _NoRemedyError(
            f"{problem} while {doing}, where a smaller microbatch does not help. What saves memory "
            "there: scale.strategy fsdp over more workers, model.quantize nf4 with an adapter, "
            "fewer trained weights, or a smaller model.base"
        )

    def _divide_evaluation(self, task: WorkerTask, request: RetryRequest) -> WorkerTask:
        parts, problem = task.get(_PARTS, 1), request["problem"]
        if parts >= max(recipe_from_dict(task["recipe"]).microbatch, ANSWERS_AT_ONCE):
            raise _NoRemedyError(
                f"{problem} in an evaluation of one row at a time. To save memory: a smaller "
                "eval.max_new_tokens, a shorter data.max_length, or model.quantize nf4 with an "
                "adapter"
            )
        reason = f"{problem} in the evaluation; continuing with its batches divided by {2 * parts}"
        self._record(request["steps"][-1] - 1, reason, {_PARTS: 2 * parts})
        return cast(WorkerTask, {**task, _PARTS: 2 * parts})

    def _halve(self, task: WorkerTask, request: RetryRequest) -> WorkerTask:
        recipe = recipe_from_dict(task["recipe"])
        step, problem = request["steps"][-1], request["problem"]
        key, size = _size(task)
        if key == _ROWS:  # more than a worker has are not there to halve
            size = min(size, recipe.rows_of_worker(recipe.scale.least_workers))
        least = 1 if key == _ROWS else recipe.tokens_per_row
        if size == least:
            recomputes = recipe.model.gradient_checkpointing is True
            raise _NoRemedyError(
                f"step {step}: {problem}, with optim.{key} {size} already. To save memory: "
                f"{'' if recomputes else 'model.gradient_checkpointing true, '}a shorter "
                "data.max_length, model.quantize nf4 with an adapter, or a smaller adapter.rank"
            )
        half = max((size + 1) // 2, least)
        reason = f"{problem}; continuing with {key} {half} instead of {size}, and the same batch"
        self._record(step, reason, {key: half})
        return _with_size(task, key, half)

    def _roll_back(self, request: RetryRequest) -> None:
        steps, problem = request["steps"], request["problem"]
        if not self._failed_steps.isdisjoint(steps):
            raise _NoRemedyError(
                f"step {steps[-1]}: {problem}, again after a restart from the last checkpoint. "
                f"{request['rows']}. A lower optim.learning_rate, a longer optim.warmup_ratio or a "
                "smaller optim.max_grad_norm usually helps; so does removing a bad row"
            )
        self._failed_steps.update(steps)
        self._record(steps[-1], f"{problem}; back to the last checkpoint", {})

    def _record(self, step: int, reason: str, facts: Record) -> None:
        def change(record: Record) -> None:
            record.update(facts)
            record["restarts"] = [*record.get("restarts", []), {"step": step, "reason": reason}]

        update_run(self.run, change)


def _size(task: WorkerTask) -> tuple[str, int]:
    """(setting, size) of a microbatch."""
    recipe = recipe_from_dict(task["recipe"])
    budget = recipe.optim.micro_batch_tokens
    return (_ROWS, recipe.microbatch) if budget is None else (_TOKENS, budget)


def _with_size(task: WorkerTask, key: str, size: int) -> WorkerTask:
    changed = copy.deepcopy(task)
    changed["recipe"]["optim"][key] = size
    return changed
