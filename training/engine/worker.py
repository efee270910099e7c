"""One worker's part of a run: the same code in this process, in a local process and on Ray.

    choose a checkpoint → load the model → evaluate the base → train → evaluate → write the result

All ranks do these steps together; rank 0 also records the run and writes the result.
"""

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
import transformers

from ..common.errors import FinrayError, RunError
from ..common.storage import Folder
from ..common.uploader import Uploader
from ..config.adapter_folder import RESULT_FOLDER
from ..config.recipe import recipe_from_dict
from ..data.batching import Rows, accumulation_steps, in_batches, microbatches
from ..data.origin import rows_of_step
from ..data.prepared import Prepared, open_prepared
from ..data.stream import Slice, every_sequence, share, stream
from ..models import import_peft  # noqa: F401 - before what loads peft
from ..models.base_cache import BaseCache
from ..models.dtypes import choose_dtype
from ..models.generation import exact_match, generate_answers
from ..models.loading import check_packing_isolation, count_parameters, load_model, load_tokenizer
from ..models.sharding import choose_strategy
from ..models.weights import gather_weights, save_result
from ..objectives.objective import Setup
from ..records import checkpoint
from ..records.recorder import RunRecorder, as_number
from ..records.run_folder import CHECKPOINTS_FOLDER
from .checkpointer import Checkpointer, SaveState
from .context import WorkerContext
from .failures import retry_requests
from .methods import objective_of
from .progress import PROGRESS_FILE, StepTimer, TrainingProgress
from .task import Report, RetryError, WorkerResult, WorkerTask
from .trainer import StepMeasures, StreamTrainer
from .trainer_arguments import accumulation, training_arguments
from .watchdog import Watchdog, write_stacks


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
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory(prefix="finray-") as scratch, Uploader() as uploads:
            worker = TrainingWorker(task, context, Path(scratch), uploads, report, bases)
            is_finished = worker.fit()
    except FinrayError as error:
        return WorkerResult(status="failed", error=str(error), exit_code=error.exit_code)
    except RetryError as error:
        problem = error.request["problem"]
        return WorkerResult(status="retry", error=problem, exit_code=1, retry=error.request)
    if is_finished:
        return WorkerResult(status="finished", error=None, exit_code=0)
    return WorkerResult(status="stopped", error=None, exit_code=130)


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
        self.scratch = scratch
        self.uploads = uploads
        self.report = report
        self.bases = bases
        self.until = task.get("until")
        self.prepared = _open_prepared(task["prepared"])
        self.total_steps = self.recipe.total_steps(self.prepared.manifest.train.sequences)
        self.eval_metrics: dict[str, float] = {}
        self.stopped = False

        checkpoints = self.run_folder / CHECKPOINTS_FOLDER
        choice = self._agree_on_checkpoint(checkpoints)
        transformers.set_seed(self.recipe.seed)
        self.tokenizer = load_tokenizer(self.recipe)
        self.model = load_model(self.recipe, self.recipe.method.head, bases)
        if self.recipe.packs:
            check_packing_isolation(self.model)
        self.checkpoint = _fetch(checkpoints, choice, scratch)
        self.progress = _progress_of(self.checkpoint)
        self.checkpointer = self._make_checkpointer(checkpoints, choice)
        arguments = training_arguments(self.recipe, self.total_steps, context.world_size, scratch)
        self.strategy = choose_strategy(
            self.recipe, self.model, context.world_size, arguments.device
        )
        setup = Setup(
            recipe=self.recipe,
            model=self.model,
            tokenizer=self.tokenizer,
            prepared=self.prepared,
            rank=context.rank,
            world_size=context.world_size,
            device=arguments.device,
            strategy=self.strategy,
        )
        self.objective = objective_of(setup)
        self.parameters = count_parameters(self.model)
        if self.strategy == "fsdp":  # without sharding the Trainer places the model
            setup.place(self.model)
        self.trainer = self._make_trainer(arguments)
        self.timer = StepTimer(self.progress)
        self.watchdog = Watchdog(self.recipe.scale.hang_timeout, self._abort_hung_step)
        self.recorder = self._start_recorder(choice, task.get("cause"))

    def fit(self) -> bool:
        """Train to the end or to a requested stop; True if the run is finished.

        Raises:
            RetryError: another attempt may complete the run.
            FinrayError: the run cannot continue.
        """
        retries = retry_requests(
            self.recipe, self.prepared, self.progress, self._record_last_skipped
        )
        # The recorder closes last: it records what ends the attempt.
        with self.watchdog, self.recorder or nullcontext(), retries:
            if self.checkpoint is None:
                with self.timer.paused():
                    self._evaluate_base()
            if self.progress.step < self.total_steps:
                self.trainer.train(resume_from_checkpoint=self.checkpoint)
            else:  # all steps are done, only the result is missing
                self.trainer.load_weights(str(self.checkpoint))
            if self.stopped:
                self.checkpointer.close()
            else:
                self._finish()
        return not self.stopped

    # the start

    def _agree_on_checkpoint(self, checkpoints: Folder) -> checkpoint.Choice:
        """Rank 0's choice for all ranks: they resume from the same checkpoint, or fail together."""
        choices: list[checkpoint.Choice | FinrayError | None] = [None]
        if self.context.rank == 0:
            try:
                choice = checkpoint.choose(checkpoints)
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

    def _make_checkpointer(self, checkpoints: Folder, choice: checkpoint.Choice) -> Checkpointer:
        return Checkpointer(
            checkpoints,
            self.scratch,
            rank=self.context.rank,
            world_size=self.context.world_size,
            settings=self.recipe.checkpoint,
            watched=self.recipe.method.watched,
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
            rows=self._training_rows,
            after_step=self._after_step,
            is_logged=self._is_logged,
            stop_requested=self._stop_requested,
            flags=lambda: (self.checkpointer.is_idle,),
            lora_plus_ratio=self.recipe.optim.lora_plus_ratio,
            max_skipped_steps=self.recipe.optim.max_skipped_steps,
        )

    def _start_recorder(self, choice: checkpoint.Choice, cause: str | None) -> RunRecorder | None:
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
            "strategy": self.strategy,
        }
        recorder.start(choice, self.context.world_size, facts, cause)
        return recorder

    # the data

    def _training_rows(self) -> Iterator[Rows]:
        recipe, context = self.recipe, self.context
        per_step, passes = recipe.rows_per_step, recipe.method.repeats
        part = Slice(
            folder=self.prepared.files,
            split=self.prepared.manifest.train,
            seed=recipe.seed,
            batch_size=per_step,
            rank=context.rank,
            world_size=context.world_size,
            start_step=self.progress.step // passes,
            stop_step=-(-self.total_steps // passes),
        )
        return microbatches(
            stream(part, on_ray=context.on_ray),
            share(per_step, context.rank, context.world_size),
            recipe.optim.micro_batch_size,
            accumulation(recipe, context.world_size),
        )

    def _held_out_rows(self) -> Iterator[Rows]:
        split = self.prepared.manifest.eval
        assert split is not None
        context, size = self.context, self.recipe.optim.micro_batch_size
        sequences = every_sequence(self.prepared.files, split, context.rank, context.world_size)
        # Ranks of a sharded model compute together, so all need equally many batches.
        passes = accumulation_steps(split.sequences, size, context.world_size)
        return in_batches(sequences, size, at_least=passes if self.strategy == "fsdp" else 0)

    def _stop_requested(self) -> bool:
        """True if the run should save and stop after the next step."""
        is_due = self.until is not None and self.progress.step + 1 >= self.until
        return is_due or self.context.stop_requested()

    # after every step

    def _is_saved(self, step: int) -> bool:
        return step % self.recipe.checkpoint.every_steps == 0 or step == self.total_steps

    def _is_logged(self, step: int) -> bool:
        # Saved steps are always logged, so that a resumed run averages over the same steps.
        return step % self.recipe.log.every_steps == 0 or self._is_saved(step)

    def _is_evaluated(self, step: int) -> bool:
        every = self.recipe.eval.every_steps
        due = step == self.total_steps or (every is not None and step % every == 0)
        return due and self.prepared.manifest.eval is not None

    def _after_step(self, measures: StepMeasures) -> bool:
        """Log, evaluate and save if that is due; True if the training ends after this step."""
        step, counts = measures.step, self.trainer.counts
        self.progress.step = step
        self.progress.tokens += counts.tokens
        if counts.flags[0] == self.context.world_size:
            self.checkpointer.wait()
        if self._is_logged(step) or counts.stop:
            self._log(measures)
        self.watchdog.disarm()
        if self._is_evaluated(step):
            with self.timer.paused():
                self._evaluate()
        if self._is_saved(step) or counts.stop:
            with self.timer.paused():
                self._save()
        self.stopped = counts.stop and step < self.total_steps
        if not self.stopped and step < self.total_steps:
            self.watchdog.arm()
        return self.stopped

    def _abort_hung_step(self, seconds: float) -> None:
        step = self.progress.step + 1
        file = write_stacks(self.run_folder, self.context.rank, step)
        self.context.abort(
            f"step {step} did not end within {seconds:.0f} s; {self.run_folder / file} shows where "
            f"rank {self.context.rank} hangs. If steps really take so long, increase "
            "scale.hang_timeout"
        )

    def _epoch(self) -> float:
        return self.recipe.epoch_at(self.progress.step, self.prepared.manifest.train.sequences)

    def _log(self, measures: StepMeasures) -> None:
        loss, skipped = self.trainer.take_loss(measures.step - self.timer.step)
        measured = self.trainer.take_measures()
        speed = self.timer.tick(self.progress)
        line = {
            "step": measures.step,
            "epoch": self._epoch(),
            "loss": loss,
            "learning_rate": measures.learning_rate,
            "grad_norm": as_number(measures.grad_norm),
            "tokens_per_second": round(speed, 1),
            "seconds": round(self.progress.seconds, 3),
            **measured,
            **({"skipped": len(skipped)} if skipped else {}),
        }
        with self.timer.paused():
            self._record_skipped(skipped)
            self._record_line(line)
        if self.recorder is not None:
            self.recorder.add_rollouts(measures.step, self.objective.examples())
        self.trainer.skipped.check()

    def _record_skipped(self, steps: list[int]) -> None:
        if self.recorder is not None and steps:
            rows = [(step, rows_of_step(self.recipe, self.prepared, step)) for step in steps]
            self.recorder.add_skipped(rows)

    def _record_last_skipped(self) -> None:
        self._record_skipped(self.trainer.skipped.take_steps())

    def _evaluate(self) -> None:
        measured = self.trainer.evaluate_held_out(self._held_out_rows())
        self.eval_metrics = {"step": self.progress.step, **measured}
        self._record_line({"epoch": self._epoch(), **self.eval_metrics})

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
        name = self.recipe.method.watched.name
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
        if self.prepared.manifest.eval is None:
            return

        def measure() -> dict[str, float]:
            return self.trainer.evaluate_held_out(self._held_out_rows())

        fingerprint = self.prepared.manifest.fingerprint
        if self.bases is None:
            measured = measure()
        else:
            measured = self.bases.measured(self.recipe, fingerprint, measure)
        measured.update(self._answer("before"))
        if self.recorder is not None:
            self.recorder.log_base(measured)

    def _answer(self, when: str) -> dict[str, float]:
        """Answer the held-out samples greedily; returns `exact_match`, or nothing without samples.

        Args:
            when: before or after the training, for the record.
        """
        samples = self.prepared.samples(self.recipe.eval.samples)
        if not samples:
            return {}
        with self.trainer.compute_loss_context_manager():
            answers = generate_answers(
                self.model,
                self.tokenizer,
                [sample.prompt_ids for sample in samples],
                self.recipe.eval.max_new_tokens,
                self.context.rank,
                self.context.world_size,
            )
        if self.recorder is not None:
            texts = [
                {"row": sample.row, "prompt": sample.prompt, "reference": sample.reference}
                for sample in samples
            ]
            self.recorder.add_answers(texts, answers, when)
        return {"exact_match": exact_match(answers, [sample.reference for sample in samples])}

    def _finish(self) -> None:
        """Evaluate the trained model and write it."""
        step = self.progress.step
        if self._is_evaluated(step) and self.eval_metrics.get("step") != step:
            self._evaluate()
        matches = self._answer("after")
        self.checkpointer.close()
        weights = gather_weights(self.model)
        if self.recorder is None:
            return
        if matches:
            self.recorder.log({"step": step, "epoch": self._epoch(), **matches})
        name = RESULT_FOLDER if self.recipe.trains_adapter else "model"
        save_result(self.recipe, self.model, self.tokenizer, self.scratch / name, weights)
        self.uploads.do(lambda: self._publish_result(name), self.run_folder)
        self.recorder.set_result(name)

    def _publish_result(self, name: str) -> None:
        self.run_folder.delete(name)
        (self.run_folder / name).upload(self.scratch / name)


def _open_prepared(uri: str) -> Prepared:
    prepared = open_prepared(Folder(uri))
    if prepared is None:
        raise RunError(f"the prepared data set {uri} no longer exists; start the run again")
    return prepared


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
    if checkpoint_path is None:
        return TrainingProgress()
    return TrainingProgress(**json.loads((Path(checkpoint_path) / PROGRESS_FILE).read_bytes()))
