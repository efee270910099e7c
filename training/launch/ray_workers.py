"""Starting the workers of a run: in this process, or as a Ray Train worker group."""

from collections.abc import Callable
from concurrent.futures import wait
from typing import Any, TypeVar, cast

from ..common.background import beside
from ..common.errors import RunError, last_line
from ..common.secrets import redact
from ..common.stop import Stop
from ..common.storage import Folder
from ..config.sections import ScaleSettings
from ..engine.context import STOP_FILE, LocalSession, RaySession
from ..engine.restart import AttemptOver, Restart
from ..engine.task import Job, Outcome
from ..records.run_folder import CHECKPOINTS_FOLDER
from .elastic import Patience, Watch, await_room
from .resources import Demand, ask_autoscaler, check_fits, cluster_nodes, demand

T = TypeVar("T")


def launch_here(job: Job, stop: Stop) -> Outcome:
    """Train in this process, without Ray."""
    from ..engine.worker import run_worker

    stop.armed = True
    return run_worker(job, LocalSession(Folder(job["run"]), stop.requested))


def launch_on_ray(
    job: Job,
    scale: ScaleSettings,
    stop: Stop,
    worker_env: dict[str, str],
    tell: Callable[[str], None],
) -> Outcome:
    """Train in Ray Train worker groups on the initialised Ray, one after the other as needed.

    Args:
        job: what the workers are told.
        scale: how many they are.
        stop: a request to save and end.
        worker_env: environment variables of the workers.
        tell: called with why the workers start anew, and what is waited for.

    Raises:
        InputError: the cluster can never hold the workers.
        RunError: the workers failed more often than `max_failures`, or their nodes are gone for
            longer than `node_wait`.
    """
    wanted = demand(scale, cluster_nodes())
    workers = check_fits(wanted, cluster_nodes())
    if workers < wanted.most:
        ask_autoscaler(wanted)
    try:
        return _attempts(job, scale, wanted, workers, stop, worker_env, tell)
    finally:
        ask_autoscaler(None)


def _attempts(
    job: Job,
    scale: ScaleSettings,
    wanted: Demand,
    workers: int | None,
    stop: Stop,
    worker_env: dict[str, str],
    tell: Callable[[str], None],
) -> Outcome:
    run = Folder(job["run"])
    patience = Patience(run / CHECKPOINTS_FOLDER, scale.max_failures)
    while workers is not None:
        watch = Watch(run, wanted, workers)
        try:
            outcome = _attempt(job, _make_trainer(job, wanted, workers, worker_env), stop, watch)
        except Exception as error:
            if (restart := _restart_of(error)) is not None:
                return Outcome(status="restart", error=None, exit_code=1, restart=restart)
            cause = _cause(error)
            if not _is_preemption(error) and not patience.bears():
                raise RunError(cause) from error
        else:
            if outcome["status"] != "stopped" or watch.reason is None or stop.requested.is_set():
                return outcome
            cause = watch.reason
        run.delete(STOP_FILE)
        tell(f"starting the workers anew: {cause}")
        job = cast(Job, {**job, "cause": cause})
        workers = await_room(wanted, scale.node_wait, stop, tell)
    return Outcome(status="stopped", error=None, exit_code=130)


def _attempt(job: Job, trainer: Any, stop: Stop, watch: Watch) -> Outcome:
    """One worker group, until it ends; it is asked to save and end where there is a reason to."""
    run = Folder(job["run"])
    asked = False

    def look() -> None:
        nonlocal asked
        if asked or not (stop.requested.is_set() or watch.sees_reason()):
            return
        try:
            run.write(STOP_FILE, b"")
        except OSError:
            return  # a storage that is away for a moment: the next look tries again
        asked = True

    outcome: Outcome = run_beside(trainer.fit, stop, meanwhile=look).return_value
    return outcome


def run_beside(
    work: Callable[[], T],
    stop: Stop,
    on_stop: Callable[[], None] = lambda: None,
    meanwhile: Callable[[], None] = lambda: None,
) -> T:
    """Do work in a thread of its own, so that Ray leaves the signal handlers to finray.

    Args:
        work: what to do; its result is returned, and what it raises is raised.
        stop: armed from here on.
        on_stop: called once, when the stop is requested.
        meanwhile: called several times a second.
    """
    stop.armed = True
    outcome = beside(work, "ray-work")
    told = False
    while not outcome.done():
        wait((outcome,), 0.2)
        if stop.requested.is_set() and not told:
            on_stop()
            told = True
        meanwhile()
    return outcome.result()


def _make_trainer(job: Job, wanted: Demand, workers: int, worker_env: dict[str, str]) -> Any:
    import ray.train
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from .ray_backend import ProcessGroup

    run = Folder(job["run"])
    # What TorchTrainer is, less torch in the driver and in the controller.
    return DataParallelTrainer(
        _ray_worker,
        train_loop_config=dict(job),
        backend_config=ProcessGroup(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=wanted.gpus > 0, resources_per_worker=wanted.worker
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS_FOLDER,
            storage_path=run.path,
            storage_filesystem=run.filesystem,
            worker_runtime_env={"env_vars": worker_env},
            # Another attempt is made here, with as many workers as then fit.
            failure_config=ray.train.FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
        ),
    )


def _ray_worker(job: dict[str, Any]) -> Outcome:
    from ..engine.worker import run_worker

    outcome = run_worker(cast(Job, job), RaySession(Folder(job["run"])))
    if outcome["status"] == "restart":
        # Raised, as other ranks may wait for this one in a collective.
        raise AttemptOver(outcome["restart"])
    return outcome


def _restart_of(error: Exception) -> Restart | None:
    """What a worker asks of the next attempt, where one ended because of that."""
    import ray.train

    if isinstance(error, ray.train.WorkerGroupError):
        for failure in error.worker_failures.values():
            if isinstance(failure, AttemptOver):
                return failure.restart
    return None


def _cause(error: Exception) -> str:
    """The first failed worker's own error, without Ray's wrapping."""
    import ray.train

    if isinstance(error, ray.train.WorkerGroupError) and error.worker_failures:
        rank, failure = sorted(error.worker_failures.items())[0]
        return redact(f"worker {rank} failed: {last_line(failure)}")
    return redact(last_line(error))


def _is_preemption(error: Exception) -> bool:
    """Whether the workers ended as their node was taken away."""
    import ray.exceptions
    import ray.train

    if isinstance(error, ray.train.WorkerGroupError):
        failures = error.worker_failures.values()
        return any(isinstance(e, ray.exceptions.RayActorError) and e.preempted for e in failures)
    return isinstance(error, ray.train.PreemptionError)
