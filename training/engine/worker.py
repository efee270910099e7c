"""One worker's part of a run: the same code in this process, in a local process and on Ray.

    choose a checkpoint → load the model → evaluate the base → train → evaluate → write the result

All ranks do these steps together; rank 0 also records the run and writes the result.
"""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from ..common.errors import FinrayError
from ..common.logs import chosen_level, start_logging
from ..common.scratch import scratch_folder
from ..common.storage import Folder
from ..common.uploader import Uploader
from ..config.adapter_folder import RESULT_FOLDER
from ..config.recipe import recipe_from_dict
from ..data.prepared import DamagedDataError
from ..models import import_peft  # noqa: F401 - before what loads peft
from ..models.base_cache import BaseCache
from ..models.composite import name_of_class
from ..models.devices import accelerator_kind, check_device, device_kind, own_device
from ..models.dtypes import choose_dtype
from ..models.first_worker import made_once
from ..models.loading import (
    Model,
    count_parameters,
    grown_embedding,
    load_model,
    load_tokenizer,
)
from ..models.out_of_memory import is_out_of_memory
from ..models.placement import choose_strategy
from ..models.stopping import turn_end
from ..models.targets import coverage_of
from ..models.weights import gather_weights, save_result
from ..objectives.objective import Setup
from ..records import checkpoint
from ..records.recorder import RunRecorder
from ..records.run_folder import CHECKPOINTS_FOLDER
from .checkpointer import Checkpointer, SaveState
from .context import WorkerContext
from .determinism import deterministic
from .failures import memory_request, note_step, reading, retry_requests
from .heartbeat import Phase
from .held_out_answers import HeldOutAnswers
from .methods import objective_of
from .progress import PROGRESS_FILE, StepTimer, TrainingProgress
from .task import Report, RetryError, RetryRequest, WorkerResult, WorkerTask
from .trainer import StepMeasures, StreamTrainer, check_state
from .trainer_arguments import rate_factor, training_arguments
from .worker_rows import WorkerRows, open_data


def run_worker(
    task: WorkerTask,
    context: WorkerContext,
    report: Report | None = None,
    bases: BaseCache | None = None,
) -> WorkerResult:
    """Train one worker's part of a run.

    Args:
        task: the run.
        context: this worker's rank and stop requests.
        report: receives measures while the run trains; None for no reports.
        bases: frozen bases of earlier runs in this process; None keeps nothing.

    Returns:
        The result. finray's own errors and requests for a retry are results too; every other error
        is raised.
    """
    start_logging()
    transformers.utils.logging.set_verbosity(chosen_level() or logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    worker: TrainingWorker | None = None
    try:
        is_deterministic = bool(task["recipe"].get("deterministic"))
        with (
            scratch_folder("run") as scratch,
            Uploader() as uploads,
            deterministic(is_deterministic),
        ):
            with _no_room_to_load():
                worker = TrainingWorker(task, context, scratch, uploads, report, bases)
            is_finished = worker.fit()
    except DamagedDataError as error:
        return _retry(RetryRequest(cause="data", steps=[], rows="", problem=str(error)))
    except FinrayError as error:
        return WorkerResult(status="failed", error=str(error), exit_code=error.exit_code)
    except RetryError as error:
        return _retry(error.request)
    except SystemExit as end:
        message = f"the user's or a model's code ended the process: sys.exit({end.code!r})"
        return WorkerResult(status="failed", error=message, exit_code=1)
    except Exception as error:
        note_step(error, None if worker is None else worker.progress.step + 1)
        raise
    if is_finished:
        return WorkerResult(status="finished", error=None, exit_code=0)
    return WorkerResult(status="stopped", error=None, exit_code=130)


@contextmanager
def _no_room_to_load() -> Iterator[None]:
    """Inside, a lack of memory leaves the block as `RetryError`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, FinrayError) or not is_out_of_memory(error):
            raise
        raise RetryError(memory_request(error, "loading", 1)) from None


def _retry(request: RetryRequest) -> WorkerResult:
    return WorkerResult(status="retry", error=request["problem"], exit_code=1, retry=request)


class TrainingWorker:
    """Holds all parts that one worker needs to train; `fit` trains.

    Args:
        task: the run.
        context: this worker's rank and stop requests.
        scratch: a folder on this machine's disk.
        uploads: uploads checkpoints and the result.
        report: receives measures while the run trains; None for no reports.
        bases: frozen bases of earlier runs in this process; None keeps nothing.
    """

    def __init__(
        self,
        task: WorkerTask,
        context: WorkerContext,
        scratch: Path,
        uploads: Uploader,
        report: Report | None,
        bases: BaseCache | None,
    ) -> None:
        self.recipe = recipe_from_dict(task["recipe"])
        self.run_folder = Folder(task["run"])
        self.context = context
        self.heartbeat = context.heartbeat
        self.phase: Phase = "loading"
        self._begin("loading")
        self.scratch = scratch
        self.uploads = uploads
        self.report = report
        self.bases = bases
        self.until = task.get("until")
        self.prepared = open_data(task["prepared"])
        self.rows = WorkerRows(self.recipe, self.prepared, context, self.run_folder)
        self.total_steps = self.recipe.total_steps(self.prepared.manifest.train.sequences)
        self.schedule = task.get("schedule") or [self.total_steps]
        self.eval_metrics: dict[str, float] = {}
        self.stopped = False

        checkpoints = self.run_folder / CHECKPOINTS_FOLDER
        choice = self._agree_on_checkpoint(checkpoints, task.get("unusable", {}))
        self.rows.need(choice.step)
        check_device(self.recipe, device_kind(), accelerator_kind())
        transformers.set_seed(self.recipe.seed)
        self.tokenizer = load_tokenizer(self.recipe)
        notices: list[str] = []
        self.strategy = choose_strategy(self.recipe, context.world_size, own_device())
        self.model = self._load_model(task, notices)
        self.checkpoint = _fetch(checkpoints, choice, scratch)
        self.progress = _progress_of(self.checkpoint)
        self.progress.watch(self.recipe.watched)
        self.checkpointer = self._make_checkpointer(checkpoints, choice)
        arguments = training_arguments(self.recipe, self.total_steps, scratch)
        setup = self._setup(task, arguments.device)
        self.objective = objective_of(setup)
        self.parameters = count_parameters(self.model)
        self.adapted = coverage_of(self.model)
        if self.strategy == "fsdp":  # without sharding the Trainer places the model
            setup.place(self.model)
        self.trainer = self._make_trainer(arguments)
        self.timer = StepTimer(self.progress)
        self.first_step = self.progress.step + 1
        self.recorder = self._start_recorder(choice, task.get("cause"), notices)
        self.answers = HeldOutAnswers(
            setup, self.trainer, self.recorder, partial(self._begin, "evaluation")
        )

    def fit(self) -> bool:
        """Train to the end or to a requested stop; True if the run is finished.

        Raises:
            RetryError: another attempt may complete the run.
            FinrayError: the run cannot continue.
        """
        retries = retry_requests(
            *(self.rows.origins, self.progress, self._record_last_skipped),
            phase=lambda: self.phase,
        )
        # The recorder closes last: it records what ends the attempt.
        with self.recorder or nullcontext(), retries:
            if self.checkpoint is None:
                with self.timer.paused():
                    self._evaluate_base()
            if self.progress.step < self.total_steps and not self._ends_early:
                self.trainer.train(resume_from_checkpoint=self.checkpoint)
            else:  # all steps are done, only the result is missing
                self.trainer.load_weights(str(self.checkpoint))
            if self.stopped:
                self._begin("save", self.progress.step)
                self.checkpointer.close()
            else:
                self._finish()
        return not self.stopped

    # the start

    def _agree_on_checkpoint(
        self, checkpoints: Folder, unusable: dict[str, str]
    ) -> checkpoint.Choice:
        """Rank 0's choice for all ranks: they resume from the same checkpoint, or fail together."""
        choices: list[checkpoint.Choice | FinrayError | None] = [None]
        if self.context.rank == 0:
            try:
                choice = checkpoint.choose(checkpoints, unusable)
                checkpoint.delete_after(checkpoints, choice.step)
                choices = [choice]
            except FinrayError as error:
                choices = [error]
        if self.context.world_size > 1:
            dist.broadcast_object_list(choices, src=0)
        if isinstance(choices[0], FinrayError):
            raise choices[0]
        assert choices[0] is not None
        return choices[0]

    def _load_model(self, task: WorkerTask, notices: list[str]) -> Model:
        """The model to train, on the CPU; `notices` receives what is worth a line of the record."""
        placed = self.recipe.with_strategy(self.strategy)
        head, left_out = self.recipe.method.head, task.get("left_out", ())
        load = partial(load_model, placed, head, self.bases, notices.append, left_out)
        return made_once(self.recipe, self.strategy, load)

    def _setup(self, task: WorkerTask, device: torch.device) -> Setup:
        """The parts of the run that its objective needs."""
        return Setup(
            recipe=self.recipe,
            model=self.model,
            tokenizer=self.tokenizer,
            prepared=self.prepared,
            rank=self.context.rank,
            world_size=self.context.world_size,
            device=device,
            strategy=self.strategy,
            isolation=task.get("isolation"),
            shares_prefixes=task.get("shares_prefixes", False),
            evaluation_parts=task.get("evaluation_parts", 1),
            beat=self.heartbeat.beat,
        )

    def _make_checkpointer(self, checkpoints: Folder, choice: checkpoint.Choice) -> Checkpointer:
        return Checkpointer(
            checkpoints,
            self.scratch,
            rank=self.context.rank,
            world_size=self.context.world_size,
            settings=self.recipe.checkpoint,
            watched=self.recipe.watched,
            uploads=self.uploads,
            before_publishing=self._flush_records,
            gather=self._gather,
            on_saved=self._record_saves,
            last_step=None if choice.name is None else choice.step,
        )

    def _gather(self, value: str | None) -> list[str | None]:
        values = [value] * self.context.world_size
        if self.context.world_size > 1:
            dist.all_gather_object(values, value, group=self.trainer.cpu_group)
        return values

    def _make_trainer(self, arguments: transformers.TrainingArguments) -> StreamTrainer:
        return StreamTrainer(
            self.model,
            arguments,
            objective=self.objective,
            passes=self.recipe.method.repeats,
            rows=lambda: self.rows.training(self.progress.step, self.total_steps),
            after_step=self._after_step,
            is_logged=self._is_logged,
            on_phase=self._enter,
            stop_requested=self._stop_requested,
            flags=lambda: (self.checkpointer.is_idle,),
            rate_factor=rate_factor(self.recipe, self.schedule),
            lora_plus_ratio=self.recipe.optim.lora_plus_ratio,
            max_skipped_steps=self.recipe.optim.max_skipped_steps,
        )

    def _start_recorder(
        self, choice: checkpoint.Choice, cause: str | None, notices: list[str]
    ) -> RunRecorder | None:
        """The recorder of rank 0; None on the other ranks."""
        if self.context.rank != 0:
            return None
        recorder = RunRecorder(self.run_folder, self.recipe, self.progress.step)
        facts = {
            "total_steps": self.total_steps,
            "parameters": {
                **self.parameters,
                "adapter": self.recipe.adapter_kind,
                "quantize": self.recipe.model.quantize,
            },
            "nodes": sorted(set(self.context.nodes)),
            "device": self.trainer.args.device.type,
            "dtype": choose_dtype(self.recipe.model),
            "model_class": name_of_class(self.model, self.recipe.method.head),
            **grown_embedding(self.recipe, self.model),
            "strategy": self.strategy,
            **({"adapted": self.adapted} if self.adapted else {}),
            **({"notices": notices} if notices else {}),
        }
        recorder.start(choice, self.context.world_size, facts, cause)
        return recorder

    # while it trains

    def _stop_requested(self) -> bool:
        """True if the run should save and stop after the next step."""
        is_due = self.until is not None and self.progress.step + 1 >= self.until
        return is_due or self.context.stop_requested()

    def _is_saved(self, step: int) -> bool:
        return step % self.recipe.checkpoint.every_steps == 0 or step == self.total_steps

    def _is_logged(self, step: int) -> bool:
        # Saved steps are always logged, so that a resumed run averages over the same steps.
        return step % self.recipe.log.every_steps == 0 or self._is_saved(step)

    def _is_evaluated(self, step: int) -> bool:
        every = self.recipe.eval.every_steps
        due = step == self.total_steps or (every is not None and step % every == 0)
        return due and self.rows.are_held_out

    def _after_step(self, measures: StepMeasures) -> bool:
        """Log, evaluate and save if that is due; True if the training ends after this step."""
        step, counts = measures.step, self.trainer.counts
        self.progress.step = step
        self.progress.tokens += counts.tokens
        if counts.flags[0] == self.context.world_size:
            self.checkpointer.wait()
        if self._is_logged(step) or counts.stop:
            self._log(measures)
        if self._is_evaluated(step):
            with self.timer.paused():
                self._evaluate()
        ends = self._ends_early
        if self._is_saved(step) or counts.stop or ends:
            with self.timer.paused():
                self._save()
        self.stopped = counts.stop and step < self.total_steps and not ends
        return self.stopped or ends

    @property
    def _ends_early(self) -> bool:
        """True if the watched metric has not improved for too long; the same on every rank."""
        patience = self.recipe.eval.patience
        return patience is not None and self.progress.waited >= patience

    def _enter(self, phase: Phase) -> None:
        """Report a phase of the next step."""
        step = self.progress.step + 1
        if phase == "rollout" and not self.recipe.method.samples_online:
            self.phase = "step"  # not reported: the worker may wait for others that save
            return
        is_first = phase == "step" and step == self.first_step
        self._begin("first step" if is_first else phase, step)

    def _begin(self, phase: Phase, step: int = 0) -> None:
        """Note a phase, and report it."""
        self.phase = phase
        self.heartbeat.enter(phase, step)

    def _log(self, measures: StepMeasures) -> None:
        steps = measures.step - self.timer.step
        logged = self.trainer.take_logged(steps, measures.grad_norm)
        skipped, empty = logged.skipped, self.trainer.take_empty_steps()
        speed = self.timer.tick(self.progress)
        line = {
            "step": measures.step,
            "epoch": self.rows.epoch_at(self.progress.step),
            "loss": logged.loss,
            "learning_rate": measures.learning_rate,
            "grad_norm": logged.grad_norm,
            "tokens_per_second": round(speed, 1),
            "data_wait": round(self.trainer.take_data_wait(steps), 6),
            "seconds": round(self.progress.seconds, 3),
            **logged.measures,
            **({"skipped": len(skipped)} if skipped else {}),
            **({"unrewarded": len(empty)} if empty else {}),
        }
        with self.timer.paused():
            self._record_skipped(skipped, "not finite")
            self._record_skipped(empty, "no reward")
            self._record_line(line)
        if self.recorder is not None:
            self.recorder.add_rollouts(measures.step, self.objective.examples())
        self.trainer.skipped.check()

    def _record_skipped(self, steps: list[int], reason: str) -> None:
        if self.recorder is not None and steps:
            rows = [(step, self.rows.origins(step)) for step in steps]
            self.recorder.add_skipped(rows, reason)

    def _record_last_skipped(self) -> None:
        self._record_skipped(self.trainer.skipped.take_steps(), "not finite")

    def _evaluate(self) -> None:
        measured = {**self._measure(), **self.answers.measure(self.progress.step)}
        self.eval_metrics = {"step": self.progress.step, **measured}
        watched = self.recipe.watched
        self.progress.measured(measured.get(watched.name), watched)
        self._record_line({"epoch": self.rows.epoch_at(self.progress.step), **self.eval_metrics})

    def _measure(self) -> dict[str, float]:
        self._begin("evaluation", self.progress.step)
        together = self.strategy == "fsdp"
        rows = self.rows.held_out(self.objective.evaluated, together, self.trainer.cpu_group)
        return self.trainer.evaluate_held_out(rows)

    def _record_line(self, line: dict[str, float]) -> None:
        """Write a line of metrics, and report it."""
        if self.recorder is None:
            return
        line = {**line, "tokens": self.progress.tokens}
        self.recorder.log(line)
        if self.report is not None:
            # If all steps were skipped there is no loss.
            self.report({k: v for k, v in line.items() if k != "loss" or math.isfinite(v)})

    def _save(self) -> None:
        step = self.progress.step
        self._begin("save", step)
        name = self.recipe.watched.name
        is_fresh = self.eval_metrics.get("step") == step and name in self.eval_metrics
        metrics = {name: self.eval_metrics[name]} if is_fresh else {}
        self.checkpointer.save(step, self._write_state, metrics)

    def _write_state(self, folder: Path) -> None:
        self.trainer.write_state(folder)
        if self.context.rank == 0:
            (folder / PROGRESS_FILE).write_text(json.dumps(asdict(self.progress)))

    def _flush_records(self) -> None:
        """Write all metrics before the checkpoint is published; runs in the upload's thread."""
        if self.recorder is not None:
            self.recorder.flush()

    def _record_saves(self, state: SaveState) -> None:
        if self.recorder is not None:
            self.recorder.update(self.progress.step, self.progress.tokens, **state.as_record())

    # before and after

    def _evaluate_base(self) -> None:
        """Record held-out measures and answers of the model before the first step."""
        if not self.rows.are_held_out:
            return
        fingerprint = self.prepared.manifest.fingerprint
        if self.bases is None:
            measured = self._measure()
        else:
            measured = self.bases.measured(self.recipe, fingerprint, self._measure)
        answered = self.answers.measure(self.progress.step)
        measured.update({**answered, **self.answers.record(self.progress.step, "before")})
        if self.recorder is not None:
            self.recorder.log_base(measured)

    def _finish(self) -> None:
        """Evaluate the trained model and write it."""
        step = self.progress.step
        if self._is_evaluated(step) and self.eval_metrics.get("step") != step:
            self._evaluate()
        matches = self.answers.record(step, "after")
        self._begin("save", step)
        self.checkpointer.close()
        weights = gather_weights(self.model)
        if self.recorder is None:
            return
        if self._ends_early and step < self.total_steps:
            self.recorder.set_over(self._why_early())
        if matches:
            self.recorder.log({"step": step, "epoch": self.rows.epoch_at(step), **matches})
        name = RESULT_FOLDER if self.recipe.trains_adapter else "model"
        target = self.scratch / name
        end = turn_end(self.tokenizer)
        is_chat = end is not None and self.rows.hold(end)
        save_result(self.recipe, self.model, self.tokenizer, target, weights, is_chat=is_chat)
        self.uploads.do(lambda: self._publish_result(name), self.run_folder)
        self.recorder.set_result(name)

    def _why_early(self) -> str:
        progress, name = self.progress, self.recipe.watched.name
        best = "it was never a number"
        if progress.best is not None:
            best = f"the best was {progress.best:.6g} at step {progress.best_step}"
        return f"{name} has not improved for {progress.waited} measurements (eval.patience); {best}"

    def _publish_result(self, name: str) -> None:
        if self.recorder is not None:
            self.recorder.check_folder()
        self.run_folder.delete(name)
        (self.run_folder / name).upload(self.scratch / name)


def _fetch(checkpoints: Folder, choice: checkpoint.Choice, scratch: Path) -> str | None:
    """Path of the checkpoint on this node, downloaded if necessary; None without a checkpoint."""
    if choice.name is None:
        return None
    folder = checkpoints / choice.name
    local = folder.local
    if local is None:
        local = scratch / choice.name
        folder.download(local)
    return str(local)


def _progress_of(checkpoint_path: str | None) -> TrainingProgress:
    """The position of a checkpoint, which its Trainer's state must share."""
    if checkpoint_path is None:
        return TrainingProgress()
    folder = Path(checkpoint_path)
    with reading(folder, PROGRESS_FILE):
        progress = TrainingProgress(**json.loads((folder / PROGRESS_FILE).read_bytes()))
        if progress.step != checkpoint.step_of(folder.name):
            raise ValueError(f"it is of step {progress.step}")
    check_state(folder, progress.step)
    return progress
