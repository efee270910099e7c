"""Trains in Ray Train worker groups on an initialised Ray."""

import threading
from contextlib import suppress
from typing import Any, Self, cast

from ..common.background import Stop, run_while_watching
from ..common.errors import in_one_line
from ..common.imports import uncollected
from ..common.progress import Progress
from ..common.secrets import redact
from ..common.storage import Folder
from ..config.sections import ScaleSettings
from ..data.tasks import RunOnRayData
from ..engine.context import STOP_FILE, watch_stop_file
from ..engine.hangs import STOPPED, hang_files, hang_message, hang_repeats_as
from ..engine.heartbeat import Heartbeat
from ..engine.task import RetryError, RetryRequest, WorkerResult, WorkerTask, repeats_as
from ..models.devices import Room
from ..records.run_folder import CHECKPOINTS_FOLDER
from .elastic import ClusterWatcher, wait_for_capacity
from .resources import check_fits, cluster_nodes, request_from_autoscaler, worker_request
from .retries import AttemptEndedError, Launcher


class RayLauncher(Launcher):
    """Starts a worker group for each attempt, with as many workers as fit.

    As a context manager it requests nodes for the workers from the cluster's autoscaler.

    Args:
        scale: the recipe's `scale` section.
        stop: requested when the run should save and end.
        worker_env: environment variables of the workers.
        room: what a worker's GPU offers; None without one.

    Raises:
        InputError: the cluster can never hold the workers.
    """

    def __init__(
        self,
        scale: ScaleSettings,
        stop: Stop,
        worker_env: dict[str, str],
        room: Room | None = None,
    ) -> None:
        self.stop = stop
        self.room = room
        self.max_failures = scale.max_failures
        self.run_tasks = RunOnRayData.beside_workers(scale.prepare)
        self._node_wait = scale.node_wait
        self._worker_env = worker_env
        nodes = cluster_nodes()
        self._request = worker_request(scale, nodes)
        self._workers = check_fits(self._request, nodes)
        if not self._request.gpus and scale.gpus_per_worker == 0:
            # Ray leaves the GPUs of a node visible to workers that have none.
            self._worker_env = {**worker_env, "CUDA_VISIBLE_DEVICES": ""}

    def __enter__(self) -> Self:
        if self._workers < self._request.max:
            request_from_autoscaler(self._request)
        return self

    def __exit__(self, *_: object) -> None:
        request_from_autoscaler(None)

    def attempt(self, task: WorkerTask) -> WorkerResult:
        """Train in one worker group until it ends; it saves and ends when the cluster changes."""
        run = Folder(task["run"])
        run.delete(STOP_FILE)  # the stop request that ended the previous attempt
        hangs = hang_files(run)
        watcher = ClusterWatcher(run, self._request, self._workers)
        try:
            result = self._fit(task, run, watcher)
        except Exception as error:
            if (request := _retry_request(error)) is not None:
                return WorkerResult(status="retry", error=None, exit_code=1, retry=request)
            hang = _new_hang(run, hangs)
            raise AttemptEndedError(
                hang or _cause(error),
                is_failure=not _is_preemption(error),
                repeats_as=hang_repeats_as(hang) if hang else _repeats_as(error),
            ) from error
        is_restart = result["status"] == "stopped" and not self.stop.requested.is_set()
        if is_restart and watcher.reason is not None:
            raise AttemptEndedError(watcher.reason, is_failure=False)
        return result

    def wait_until_ready(self, progress: Progress) -> None:
        """Wait until the cluster holds enough workers again."""
        workers = wait_for_capacity(self._request, self._node_wait, self.stop, progress)
        self._workers = workers or self._workers

    def _fit(self, task: WorkerTask, run: Folder, watcher: ClusterWatcher) -> WorkerResult:
        is_stopping = False

        def stop_if_due() -> None:
            nonlocal is_stopping
            if is_stopping or not (self.stop.requested.is_set() or watcher.has_reason()):
                return
            try:
                run.write(STOP_FILE, b"")
            except OSError:
                return  # the storage is unavailable for a moment: the next tick tries again
            is_stopping = True

        trainer = self._make_trainer(task, run)
        result: WorkerResult = run_while_watching(
            trainer.fit, self.stop, on_tick=stop_if_due
        ).return_value
        return result

    def _make_trainer(self, task: WorkerTask, run: Folder) -> Any:
        import ray.train
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        from .ray_backend import ProcessGroup

        # Like TorchTrainer, but without torch in the driver and in the controller.
        return DataParallelTrainer(
            _ray_worker,
            train_loop_config=dict(task),
            backend_config=ProcessGroup(),
            scaling_config=ray.train.ScalingConfig(
                num_workers=self._workers,
                use_gpu=self._request.gpus > 0,
                resources_per_worker=self._request.worker,
            ),
            run_config=ray.train.RunConfig(
                name=CHECKPOINTS_FOLDER,
                storage_path=run.path,
                storage_filesystem=run.filesystem,
                worker_runtime_env={"env_vars": self._worker_env},
                # `run_with_retries` makes the next attempt, with as many workers as fit then.
                failure_config=ray.train.FailureConfig(
                    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                ),
            ),
        )


class RayContext:
    """One Ray Train worker of the run.

    Args:
        run: the run's folder; a stop file in it requests a stop.
        heartbeat: receives the worker's phases.
    """

    on_ray = True

    def __init__(self, run: Folder, heartbeat: Heartbeat) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.heartbeat = heartbeat
        self.nodes = _node_of_each_rank(self.world_size)
        self._stop = watch_stop_file(run) if self.rank == 0 else threading.Event()

    def stop_requested(self) -> bool:
        """True on rank 0 once there is a stop file; rank 0 passes it on in the step's counts."""
        return self._stop.is_set()


def _ray_worker(task: dict[str, Any]) -> WorkerResult:
    import ray.train

    from ..engine.guard import guarded

    with uncollected():
        from ..engine.worker import run_worker

    run, rank = Folder(task["run"]), ray.train.get_context().get_world_rank()
    timeout = task["recipe"]["scale"]["hang_timeout"]
    with guarded(run, rank, timeout, in_process=False) as heartbeat:
        result = run_worker(cast(WorkerTask, task), RayContext(run, heartbeat))
    if result["status"] == "retry":
        # An exception ends the other ranks too, which may wait for this one in a collective.
        raise RetryError(result["retry"])
    return result


def _node_of_each_rank(world_size: int) -> tuple[str, ...]:
    import ray
    import torch.distributed as dist

    nodes = [ray.get_runtime_context().get_node_id()] * world_size
    if world_size > 1:
        dist.all_gather_object(nodes, nodes[0])
    return tuple(nodes)


def _new_hang(run: Folder, before: set[str]) -> str | None:
    """The message of a worker that hung in this attempt; None if none did."""
    messages: list[str] = []
    with suppress(OSError):
        messages = [hang_message(run, name) for name in sorted(hang_files(run) - before)]
    stopped = [message for message in messages if STOPPED in message]
    return next(iter([*stopped, *messages]), None)


def _retry_request(error: Exception) -> RetryRequest | None:
    """The request for another attempt that ended the worker group; None if another error did."""
    import ray.train

    if isinstance(error, ray.train.WorkerGroupError):
        for failure in error.worker_failures.values():
            if isinstance(failure, RetryError):
                return failure.request
    return None


def _cause(error: Exception) -> str:
    """The first failed worker's own error, without Ray's wrapping."""
    import ray.train

    if isinstance(error, ray.train.WorkerGroupError) and error.worker_failures:
        rank, failure = sorted(error.worker_failures.items())[0]
        return redact(f"worker {rank} failed: {in_one_line(failure)}")
    return redact(in_one_line(error))


def _repeats_as(error: Exception) -> str | None:
    """See `AttemptEndedError`."""
    import ray.train

    failures = error.worker_failures if isinstance(error, ray.train.WorkerGroupError) else {}
    texts = (repeats_as(failure) for _, failure in sorted(failures.items()))
    return next((text for text in texts if text is not None), None)


def _is_preemption(error: Exception) -> bool:
    """True if the workers ended because their node was removed."""
    import ray.exceptions
    import ray.train

    if isinstance(error, ray.train.WorkerGroupError):
        failures = error.worker_failures.values()
        return any(isinstance(e, ray.exceptions.RayActorError) and e.preempted for e in failures)
    return isinstance(error, ray.train.PreemptionError)
