"""One worker's part of a run, the same in this process, in one of several and in Ray Train's.

    choose a checkpoint → load the model → measure the base → train → measure the result → write it

Every rank walks through this together; rank 0 also keeps the books and writes the result.
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
from ..common.uploader import Uploads
from ..config.adapter_folder import RESULT_FOLDER
from ..config.recipe import recipe_from_dict
from ..data.batching import Rows, accumulation_steps, in_batches, microbatches
from ..data.origin import rows_of_step
from ..data.prepared import open_prepared
from ..data.stream import Slice, every_sequence, share, stream
from ..models import import_peft as quick_peft  # noqa: F401 - before what loads peft
from ..models.base_cache import measured_before
from ..models.dtypes import choose_dtype
from ..models.generation import answer, exact_match
from ..models.loading import check_isolation, count_parameters, load_model, load_tokenizer
from ..models.sharding import choose_strategy
from ..models.weights import gather_weights, save_result
from ..objectives.objective import Setup
from ..records import checkpoint
from ..records.recorder import Books, as_number
from ..records.run_folder import CHECKPOINTS_FOLDER
from .checkpointer import Saver, SaveState, state_record
from .context import Session
from .failures import ending_attempts
from .methods import objective_of
from .progress import Clock, Position
from .restart import AttemptOver
from .task import Job, Outcome
from .trainer import StepMeasures, StreamTrainer
from .trainer_arguments import accumulation, training_arguments
from .watchdog import Watchdog, write_stacks

POSITION_FILE = "position.json"


def run_worker(job: Job, session: Session) -> Outcome:
    """Train; an error that a restart would only repeat is returned, not raised."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory(prefix="finray-") as scratch, Uploads() as uploads:
            finished = _Worker(job, session, Path(scratch), uploads).run()
    except FinrayError as error:
        return Outcome(status="failed", error=str(error), exit_code=error.exit_code)
    except AttemptOver as over:
        found = over.restart["found"]
        return Outcome(status="restart", error=found, exit_code=1, restart=over.restart)
    if finished:
        return Outcome(status="finished", error=None, exit_code=0)
    return Outcome(status="stopped", error=None, exit_code=130)


class _Worker:
    def __init__(self, job: Job, session: Session, scratch: Path, uploads: Uploads) -> None:
        self.recipe = recipe_from_dict(job["recipe"])
        self.run_folder = Folder(job["run"])
        self.checkpoints = self.run_folder / CHECKPOINTS_FOLDER
        self.session = session
        self.scratch = scratch
        self.uploads = uploads
        prepared = open_prepared(Folder(job["prepared"]))
        if prepared is None:
            raise RunError(f"the prepared data set {job['prepared']} is gone")
        self.prepared = prepared
        self.cause = job.get("cause")
        self.total_steps = self.recipe.total_steps(prepared.manifest.train.sequences)
        self.until = job.get("until")
        self.position = Position()
        self.held_out: dict[str, float] = {}
        self.stopped = False
        self.watchdog = Watchdog(self.recipe.scale.hang_timeout, self._hung)

    def run(self) -> bool:
        """Returns whether the run got to its end (and was not asked to stop)."""
        choice = self._agree_on_checkpoint()
        transformers.set_seed(self.recipe.seed)
        self.tokenizer = load_tokenizer(self.recipe)
        self.model = load_model(self.recipe, self.recipe.method.head)
        if self.recipe.packs:
            check_isolation(self.model)
        checkpoint_path = self._fetch(choice)
        self.saver = self._make_saver(choice)
        self.trainer = self._make_trainer()
        self.books = self._open_books(choice)
        # The books are closed last: what ended the attempt is noted in them.
        ending = ending_attempts(
            self.recipe,
            self.prepared,
            self.position,
            lambda: self._note_skipped(self.trainer.skipped.take_steps()),
        )
        with self.watchdog, self.books or nullcontext(), ending:
            self._train(checkpoint_path)
        return not self.stopped

    def _train(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is None:
            self._measure_base()
        self.clock = Clock(self.position)
        if self.position.step < self.total_steps:
            self.trainer.train(resume_from_checkpoint=checkpoint_path)
        else:  # only the end was missing
            self.trainer.load_weights(str(checkpoint_path))
        if self.stopped:
            self.saver.finish()
        else:
            self._finish()

    # the start

    def _agree_on_checkpoint(self) -> checkpoint.Choice:
        """Rank 0 looks, all hear: they resume from the same checkpoint, or fail together."""
        found: list[checkpoint.Choice | FinrayError | None] = [None]
        if self.session.rank == 0:
            try:
                choice = checkpoint.choose(self.checkpoints)
                checkpoint.delete_after(self.checkpoints, choice.step)
                found = [choice]
            except FinrayError as error:
                found = [error]
        if self.session.world_size > 1:
            dist.broadcast_object_list(found, src=0)
        if isinstance(found[0], FinrayError):
            raise found[0]
        assert found[0] is not None
        return found[0]

    def _fetch(self, choice: checkpoint.Choice) -> str | None:
        """Bring the checkpoint to this node and take up its position."""
        if choice.name is None:
            return None
        folder = self.checkpoints / choice.name
        local = folder.local
        if local is None:
            local = self.scratch / choice.name
            folder.download(local)
        self.position = Position(**json.loads((local / POSITION_FILE).read_bytes()))
        return str(local)

    def _make_saver(self, choice: checkpoint.Choice) -> Saver:
        return Saver(
            self.checkpoints,
            self.scratch,
            rank=self.session.rank,
            world_size=self.session.world_size,
            settings=self.recipe.checkpoint,
            watched=self.recipe.method.watched,
            uploads=self.uploads,
            gather=self._gather,
            before=self._write_lines,
            tell=self._note_saves,
            last_step=None if choice.name is None else choice.step,
        )

    def _gather(self, value: str | None) -> list[str | None]:
        values = [value] * self.session.world_size
        if self.session.world_size > 1:
            dist.all_gather_object(values, value, group=self.trainer.cpu_group)
        return values

    def _make_trainer(self) -> StreamTrainer:
        session = self.session
        arguments = training_arguments(
            self.recipe, self.total_steps, session.world_size, self.scratch
        )
        device, world_size = arguments.device, session.world_size
        self.strategy = choose_strategy(self.recipe, self.model, world_size, device)
        setup = Setup(
            recipe=self.recipe,
            model=self.model,
            tokenizer=self.tokenizer,
            prepared=self.prepared,
            rank=session.rank,
            world_size=world_size,
            device=device,
            strategy=self.strategy,
        )
        self.objective = objective_of(setup)
        self.parameters = count_parameters(self.model)
        if self.strategy == "fsdp":  # the Trainer places a whole model
            setup.place(self.model)
        return StreamTrainer(
            self.model,
            arguments,
            objective=self.objective,
            passes=self.recipe.method.repeats,
            rows=self._training_rows,
            after_step=self._after_step,
            is_logged=self._is_logged,
            stop_requested=self._stop_requested,
            flags=lambda: (self.saver.is_over,),
            lora_plus_ratio=self.recipe.optim.lora_plus_ratio,
            max_skipped_steps=self.recipe.optim.max_skipped_steps,
        )

    def _open_books(self, choice: checkpoint.Choice) -> Books | None:
        if self.session.rank != 0:
            return None
        books = Books(self.run_folder, self.recipe, self.position.step)
        facts = {
            "total_steps": self.total_steps,
            "parameters": {
                **self.parameters,
                "adapter": self.recipe.adapter_kind,
                "quantize": self.recipe.model.quantize,
            },
            "nodes": sorted(set(self.session.nodes)),
            "device": self.trainer.args.device.type,
            "dtype": choose_dtype(self.recipe.model),
            "strategy": self.strategy,
        }
        books.open(choice, self.session.world_size, facts, self.cause)
        return books

    # the data

    def _training_rows(self) -> Iterator[Rows]:
        recipe, session = self.recipe, self.session
        per_step, passes = recipe.rows_per_step, recipe.method.repeats
        part = Slice(
            folder=self.prepared.files,
            split=self.prepared.manifest.train,
            seed=recipe.seed,
            batch_size=per_step,
            rank=session.rank,
            world_size=session.world_size,
            start_step=self.position.step // passes,
            stop_step=-(-self.total_steps // passes),
        )
        return microbatches(
            stream(part, on_ray=session.on_ray),
            share(per_step, session.rank, session.world_size),
            recipe.optim.micro_batch_size,
            accumulation(recipe, session.world_size),
        )

    def _held_out_rows(self) -> Iterator[Rows]:
        split = self.prepared.manifest.eval
        assert split is not None
        folder, session = self.prepared.files, self.session
        sequences = every_sequence(folder, split, session.rank, session.world_size)
        size = self.recipe.optim.micro_batch_size
        # Sharded, the ranks walk through the model together: as often as the busiest of them.
        passes = accumulation_steps(split.sequences, size, session.world_size)
        filled = passes if self.strategy == "fsdp" else 0
        return in_batches(sequences, size, at_least=filled)

    def _stop_requested(self) -> bool:
        """Asked before a step, whether to save and stop after it."""
        is_due = self.until is not None and self.position.step + 1 >= self.until
        return is_due or self.session.stop_requested()

    # after every step

    def _is_saved(self, step: int) -> bool:
        return step % self.recipe.checkpoint.every_steps == 0 or step == self.total_steps

    def _is_logged(self, step: int) -> bool:
        # A checkpoint is always logged: a resumed run then averages over the same steps.
        return step % self.recipe.log.every_steps == 0 or self._is_saved(step)

    def _is_evaluated(self, step: int) -> bool:
        every = self.recipe.eval.every_steps
        due = step == self.total_steps or (every is not None and step % every == 0)
        return due and self.prepared.manifest.eval is not None

    def _after_step(self, measures: StepMeasures) -> bool:
        """Log, evaluate and begin to save what is due; returns whether training ends here."""
        step, counts = measures.step, self.trainer.counts
        self.position.step = step
        self.position.tokens += counts.tokens
        if counts.flags[0] == self.session.world_size:
            self.saver.settle()
        if self._is_logged(step) or counts.stop:
            self._log(measures)
        self.watchdog.disarm()
        if self._is_evaluated(step):
            with self.clock.paused():
                self._evaluate()
        if self._is_saved(step) or counts.stop:
            with self.clock.paused():
                self._save()
        self.stopped = counts.stop and step < self.total_steps
        if not self.stopped and step < self.total_steps:
            self.watchdog.arm()
        return self.stopped

    def _hung(self, seconds: float) -> None:
        step = self.position.step + 1
        file = write_stacks(self.run_folder, self.session.rank, step)
        self.session.abandon(
            f"step {step} did not end within {seconds:.0f} s; {self.run_folder / file} shows where "
            f"rank {self.session.rank} hangs. Where steps take so long, raise scale.hang_timeout"
        )

    def _epoch(self) -> float:
        return self.recipe.epoch_at(self.position.step, self.prepared.manifest.train.sequences)

    def _log(self, measures: StepMeasures) -> None:
        loss, skipped = self.trainer.take_loss(measures.step - self.clock.step)
        accuracy = self.trainer.take_measures()
        speed = self.clock.lap(self.position)
        line = {
            "step": measures.step,
            "epoch": self._epoch(),
            "loss": loss,
            "learning_rate": measures.learning_rate,
            "grad_norm": as_number(measures.grad_norm),
            "tokens_per_second": round(speed, 1),
            "seconds": round(self.position.seconds, 3),
            **accuracy,
            **({"skipped": len(skipped)} if skipped else {}),
        }
        with self.clock.paused():
            self._note_skipped(skipped)
            self._tell(line)
        if self.books is not None:
            self.books.sampled(measures.step, self.objective.examples())
        self.trainer.skipped.check()

    def _note_skipped(self, steps: list[int]) -> None:
        if self.books is not None and steps:
            found = [(step, rows_of_step(self.recipe, self.prepared, step)) for step in steps]
            self.books.skipped(found)

    def _evaluate(self) -> None:
        measured = self.trainer.held_out(self._held_out_rows())
        self.held_out = {"step": self.position.step, **measured}
        self._tell({"epoch": self._epoch(), **self.held_out})

    def _tell(self, line: dict[str, float]) -> None:
        """Write a line of metrics, and tell it to whoever follows the run."""
        if self.books is not None:
            line = {**line, "tokens": self.position.tokens}
            self.books.logged(line)
            # Where all steps were skipped there is no loss to judge by.
            known = {name: v for name, v in line.items() if name != "loss" or math.isfinite(v)}
            self.session.report(known)

    def _save(self) -> None:
        step = self.position.step
        watched = self.recipe.method.watched
        fresh = self.held_out.get("step") == step and watched.name in self.held_out
        metrics = {watched.name: self.held_out[watched.name]} if fresh else {}
        self.saver.start(step, self._write_state, metrics)

    def _write_state(self, folder: Path) -> None:
        self.trainer.write_state(folder)
        if self.session.rank == 0:
            (folder / POSITION_FILE).write_text(json.dumps(asdict(self.position)))

    def _write_lines(self) -> None:
        """Called by the upload's thread: a checkpoint's lines are there before it is."""
        if self.books is not None:
            self.books.flush()

    def _note_saves(self, state: SaveState) -> None:
        if self.books is not None:
            step, tokens = self.position.step, self.position.tokens
            self.books.note_progress(step, tokens, **state_record(state))

    # before and after

    def _measure_base(self) -> None:
        """Held-out loss and answers of the model as it is before the first step."""
        if self.prepared.manifest.eval is None:
            return
        measured = measured_before(
            self.recipe,
            self.prepared.manifest.fingerprint,
            lambda: self.trainer.held_out(self._held_out_rows()),
        )
        measured.update(self._answer("before"))
        if self.books is not None:
            self.books.measured_base(measured)

    def _answer(self, when: str) -> dict[str, float]:
        """Answer the held-out samples greedily; their exact match, where there are any."""
        samples = self.prepared.samples(self.recipe.eval.samples)
        if not samples:
            return {}
        with self.trainer.compute_loss_context_manager():
            answers = answer(
                self.model,
                self.tokenizer,
                [sample.prompt_ids for sample in samples],
                self.recipe.eval.max_new_tokens,
                self.session.rank,
                self.session.world_size,
            )
        if self.books is not None:
            texts = [
                {"row": sample.row, "prompt": sample.prompt, "reference": sample.reference}
                for sample in samples
            ]
            self.books.answered(texts, answers, when)
        return {"exact_match": exact_match(answers, [sample.reference for sample in samples])}

    def _finish(self) -> None:
        """Measure the trained model and write it."""
        step = self.position.step
        if self._is_evaluated(step) and self.held_out.get("step") != step:
            self._evaluate()
        matches = self._answer("after")
        self.saver.finish()
        weights = gather_weights(self.model)
        if self.books is None:
            return
        if matches:
            self.books.logged({"step": step, "epoch": self._epoch(), **matches})
        name = RESULT_FOLDER if self.recipe.trains_adapter else "model"
        save_result(self.recipe, self.model, self.tokenizer, self.scratch / name, weights)
        self.uploads.do(lambda: self._publish_result(name), self.run_folder)
        self.books.finished(name)

    def _publish_result(self, name: str) -> None:
        self.run_folder.delete(name)
        (self.run_folder / name).upload(self.scratch / name)
