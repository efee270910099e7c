"""Starting the workers of a run: in this process, or as a Ray Train worker group."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from .capacity import check_fits, cluster_nodes, demand
from .errors import RunError, last_line
from .loop import Job, Outcome, run_worker
from .recipe import ScaleSettings
from .run_folder import CHECKPOINTS_FOLDER
from .session import STOP_FILE, LocalSession, RaySession
from .stop import Stop
from .storage import Folder

T = TypeVar("T")

# Ray Train's own notes would be believed over the checkpoints themselves, and refuse a folder
# from which one was deleted. finray reads the checkpoints.
_RAY_NOTES = "checkpoint_manager_snapshot.json"


def launch_here(job: Job, stop: Stop) -> Outcome:
    """Train in this process, without Ray."""
    stop.armed = True
    return run_worker(job, LocalSession(Folder(job["run"]), stop.requested))


def launch_on_ray(
    job: Job, scale: ScaleSettings, stop: Stop, worker_env: dict[str, str]
) -> Outcome:
    """Train in a Ray Train worker group on the initialised Ray.

    Args:
        job: what the workers are told.
        scale: how many they are.
        stop: a request to save and end.
        worker_env: environment variables of the workers.

    Raises:
        InputError: the cluster can never hold the workers.
        RunError: the workers failed more often than `max_failures`.
    """
    trainer = _make_trainer(job, scale, worker_env)
    try:
        result = run_beside(trainer.fit, stop, lambda: Folder(job["run"]).write(STOP_FILE, b""))
    except Exception as error:
        raise RunError(_cause(error)) from error
    outcome: Outcome = result.return_value
    return outcome


def run_beside(work: Callable[[], T], stop: Stop, on_stop: Callable[[], None]) -> T:
    """Do work in a thread of its own, so that Ray leaves the signal handlers to finray.

    Args:
        work: what to do; its result is returned, and what it raises is raised.
        stop: armed from here on.
        on_stop: called once, when the stop is requested.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def carry() -> None:
        try:
            results.append(work())
        except Exception as error:  # noqa: BLE001 - carried to the waiting thread
            errors.append(error)

    thread = threading.Thread(target=carry, name="ray-work", daemon=True)
    stop.armed = True
    thread.start()
    told = False
    while thread.is_alive():
        thread.join(0.2)
        if stop.requested.is_set() and not told:
            on_stop()
            told = True
    if errors:
        raise errors[0]
    return results[0]


def _make_trainer(job: Job, scale: ScaleSettings, worker_env: dict[str, str]) -> Any:
    import ray.train
    from ray.train.torch import TorchTrainer

    run = Folder(job["run"])
    (run / CHECKPOINTS_FOLDER).delete(_RAY_NOTES)
    nodes = cluster_nodes()
    wanted = demand(scale, nodes)
    check_fits(wanted, nodes)
    return TorchTrainer(
        _ray_worker,
        train_loop_config=dict(job),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scale.workers, use_gpu=wanted.gpus > 0, resources_per_worker=wanted.worker
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS_FOLDER,
            storage_path=run.path,
            storage_filesystem=run.filesystem,
            worker_runtime_env={"env_vars": worker_env},
            failure_config=ray.train.FailureConfig(
                max_failures=scale.max_failures, controller_failure_limit=3
            ),
        ),
    )


def _ray_worker(job: dict[str, Any]) -> Outcome:
    told = Job(recipe=job["recipe"], run=job["run"], prepared=job["prepared"])
    told["until"] = job.get("until")
    return run_worker(told, RaySession(Folder(job["run"])))


def _cause(error: Exception) -> str:
    """The first failed worker's own error, without Ray's wrapping."""
    import ray.train

    if isinstance(error, ray.train.WorkerGroupError) and error.worker_failures:
        rank, failure = sorted(error.worker_failures.items())[0]
        return f"worker {rank} failed: {last_line(failure)}"
    return str(error)
