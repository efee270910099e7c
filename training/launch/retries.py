"""One attempt after another, where something went wrong that another attempt can cure.

Out of memory: the next attempt takes half the microbatch, and twice as many of them. Losses are
normalised by the whole batch, so the steps stay the same.

Not finite: the next attempt starts from the last good checkpoint. A fault of the hardware is gone
then; the same steps failing again end the run.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..common.errors import RunError
from ..common.storage import Folder
from ..engine.restart import Restart
from ..models.dtypes import free_memory
from ..records.recorder import update_run
from ..records.run_folder import Record, read_run

if TYPE_CHECKING:
    from ..engine.task import Job, Outcome

_SIZE = "micro_batch_size"


def persevere(job: "Job", launch: "Callable[[Job], Outcome]") -> "Outcome":
    """Launch attempts until one ends for good.

    Args:
        job: the run. Where an earlier attempt had to halve its microbatch, this one starts so.
        launch: carries out one attempt, in this process or on workers.
    """
    noted = (read_run(Folder(job["run"])) or {}).get(_SIZE)
    if noted is not None:
        job = _with_size(job, min(noted, _size(job)))
    failed: set[int] = set()
    while True:
        outcome = launch(job)
        restart = outcome.get("restart")
        if restart is None:
            return outcome
        free_memory()
        try:
            if restart["cause"] == "memory":
                job = _halved(job, restart)
            else:
                _roll_back(job, restart, failed)
        except RunError as error:
            return {"status": "failed", "error": str(error), "exit_code": error.exit_code}


def _halved(job: "Job", restart: Restart) -> "Job":
    size, step = _size(job), restart["steps"][-1]
    if size == 1:
        raise RunError(
            f"step {step}: {restart['found']}, with optim.micro_batch_size 1 already. What takes "
            "less memory: model.gradient_checkpointing true, a shorter data.max_length, "
            "model.quantize nf4 beside an adapter, or a smaller adapter.rank"
        )
    half = (size + 1) // 2
    _note(
        job,
        step,
        f"{restart['found']}; going on with micro_batch_size {half} instead of {size}, and the "
        "same batch",
        {_SIZE: half},
    )
    return _with_size(job, half)


def _roll_back(job: "Job", restart: Restart, failed: set[int]) -> None:
    """Go on from the last checkpoint, once for each step: `failed` holds those that had it."""
    steps = restart["steps"]
    if not failed.isdisjoint(steps):
        raise RunError(
            f"step {steps[-1]}: {restart['found']}, again after a restart from the last checkpoint"
            f". {restart['rows']}. A lower optim.learning_rate, a longer optim.warmup_ratio or a "
            "smaller optim.max_grad_norm usually cures it, or leaving out a row that is at fault"
        )
    failed.update(steps)
    _note(job, steps[-1], f"{restart['found']}; back to the last checkpoint", {})


def _note(job: "Job", step: int, reason: str, facts: Record) -> None:
    def change(record: Record) -> None:
        record.update(facts)
        record["restarts"] = [*record.get("restarts", []), {"step": step, "reason": reason}]

    update_run(Folder(job["run"]), change)


def _size(job: "Job") -> int:
    return int(job["recipe"]["optim"][_SIZE])


def _with_size(job: "Job", size: int) -> "Job":
    changed = copy.deepcopy(job)
    changed["recipe"]["optim"][_SIZE] = size
    return changed
