"""Trains a few steps with one of the contenders, in a process of its own; for other benchmarks.

    contenders.py NAME JOB

JOB is a file with a `Job` as JSON. The last line printed is the result: seconds and useful tokens
of the timed steps, the logged losses, and a hash of all token ids that the embedding saw.
"""

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from material import PAD_ID
from measure import print_result
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.modules.module import register_module_forward_pre_hook

from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe, recipe_from_dict
from finray.training.config.sections import Isolation
from finray.training.data.prepared import Prepared, open_prepared
from finray.training.data.stream import Sequence, Slice, stream

IGNORED = -100
_ISOLATION: Isolation = "documents"
"""As a rehearsal finds it for a Llama."""
Row = dict[str, list[int]]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Job:
    """What a contender trains, and which of its steps are timed."""

    recipe: dict[str, Any]
    prepared: str
    """URI of the prepared data; all contenders train on its rows in the same order."""
    rows: str
    """Source rows as a JSON array, for the contenders that do not pack; or empty."""
    steps: int
    warmup: int
    threads: int
    watch_ids: bool


@dataclass(frozen=True)
class Moment:
    """A point in time; its CPU time is that of this process alone."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> "Moment":
        """This process's clocks."""
        return cls(time.perf_counter(), time.process_time())


@dataclass
class Measured:
    """The measurements of a job."""

    starts: list["Moment"]
    """When each step began."""
    losses: list[float]
    """Mean loss between two logged steps."""
    tokens: int
    """Useful tokens of the timed steps."""

    def result(self, warmup: int, ids: str) -> dict[str, Any]:
        """The result as it is printed; without the last step, whose end is not recorded."""
        first, last = self.starts[warmup], self.starts[-1]
        return {
            "seconds": last.wall - first.wall,
            "cpu_seconds": last.cpu - first.cpu,
            "tokens": self.tokens,
            "losses": self.losses,
            "ids": ids,
        }


# finray


def run_finray(job: Job, logged: str = "loss") -> Measured:
    """finray's own worker, from the prepared data to the written adapter.

    Args:
        job: what is trained.
        logged: the measure that is kept of every logged step.
    """
    from finray.training.common.background import Stop
    from finray.training.engine.heartbeat import Heartbeat
    from finray.training.engine.task import WorkerTask
    from finray.training.engine.worker import run_worker
    from finray.training.launch.in_process import InProcessContext

    class TimedContext(InProcessContext):
        """Records the time at which each step begins."""

        def __init__(self) -> None:
            super().__init__(Stop(), Heartbeat())
            self.starts: list[Moment] = []

        def stop_requested(self) -> bool:
            self.starts.append(Moment.now())
            return super().stop_requested()

    with tempfile.TemporaryDirectory() as folder:
        context = TimedContext()
        recipe = recipe_of(job)
        task = WorkerTask(
            recipe=job.recipe,
            run=folder,
            prepared=job.prepared,
            isolation=_ISOLATION,
            shares_prefixes=not recipe.method.packs,
        )
        outcome = run_worker(task, context)
        if outcome["status"] != "finished":
            raise RuntimeError(outcome["error"])
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)[logged] for line in lines]
    return Measured(context.starts, losses, timed_tokens(job))


# the same batches, for the others


def recipe_of(job: Job) -> Recipe:
    """The job's recipe; all contenders use its settings."""
    return recipe_from_dict(job.recipe)


def sequences(job: Job, first: int, last: int) -> list[Sequence]:
    """The sequences of steps `first` to `last` - 1, in finray's order."""
    recipe, data = recipe_of(job), open_prepared(Folder(job.prepared))
    assert isinstance(data, Prepared)
    part = Slice(
        folder=data.files,
        split=data.manifest.train,
        seed=recipe.seed,
        batch_size=recipe.optim.batch_size,
        rank=0,
        world_size=1,
        start_step=first,
        stop_step=last,
    )
    return list(stream(part, on_ray=False))


def timed_tokens(job: Job) -> int:
    """Tokens of the steps that are timed, without padding."""
    return sum(len(item.input_ids) for item in sequences(job, job.warmup, job.steps - 1))


def rows_in_order(job: Job) -> list[Row]:
    """The sequences as rows of plain lists, for a data set."""
    return [
        {
            "input_ids": item.input_ids.tolist(),
            "labels": [
                token if trainable else IGNORED
                for token, trainable in zip(item.input_ids.tolist(), item.trainable, strict=True)
            ],
            "seq_lengths": item.lengths.tolist(),
        }
        for item in sequences(job, 0, job.steps)
    ]


def collate(rows: list[Row]) -> Tensors:
    """Pad rows at the end; positions restart with each document, which isolates documents."""
    longest = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED)
    positions = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        size = len(row["input_ids"])
        input_ids[index, :size] = torch.tensor(row["input_ids"])
        labels[index, :size] = torch.tensor(row["labels"])
        lengths = row["seq_lengths"]
        lengths = [*lengths[:-1], lengths[-1] + longest - size]
        positions[index] = torch.cat([torch.arange(length) for length in lengths])
    return {"input_ids": input_ids, "labels": labels, "position_ids": positions}


def load_model(recipe: Recipe) -> PeftModel:
    """Base and adapter as a user loads them; the seed gives equal first weights to all."""
    transformers.set_seed(recipe.seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        recipe.model.base, dtype=torch.float32
    )
    model.config.use_cache = False
    adapter = recipe.adapter
    assert adapter is not None
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules="all-linear",
    )
    return get_peft_model(model, config)


# the bare loop


def run_bare(job: Job) -> Measured:
    """A training loop in PyTorch, as a competent engineer writes it."""
    recipe = recipe_of(job)
    optim, log_every = recipe.optim, recipe.log.every_steps
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(recipe).to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), weight_decay=0.0
    )
    schedule = transformers.get_cosine_schedule_with_warmup(
        optimizer, int(optim.warmup_ratio * job.steps), job.steps
    )
    rows = rows_in_order(job)
    measured = Measured([], [], timed_tokens(job))
    running = torch.zeros((), device=device)
    for step in range(1, job.steps + 1):
        measured.starts.append(Moment.now())
        batch = rows[(step - 1) * optim.batch_size : step * optim.batch_size]
        size = optim.microbatch
        parts = [collate(batch[i : i + size]) for i in range(0, len(batch), size)]
        bearing = sum(int((part["labels"][:, 1:] != IGNORED).sum()) for part in parts)
        for part in parts:
            inputs = {name: tensor.to(device) for name, tensor in part.items()}
            loss = model(**inputs, num_items_in_batch=bearing).loss
            loss.backward()
            running += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, optim.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % log_every == 0 or step == job.steps:
            measured.losses.append(running.item() / (step - log_every * len(measured.losses)))
            running.zero_()
    return measured


# TRL


class Watch(transformers.TrainerCallback):
    """Records when steps begin and what is logged."""

    def __init__(self) -> None:
        self.starts: list[Moment] = []
        self.logs: list[tuple[Moment, dict[str, float]]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Called when a step's batches are loaded."""
        self.starts.append(Moment.now())

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Record losses and TRL's count of tokens."""
        self.logs.append((Moment.now(), dict(logs)))

    def losses(self) -> list[float]:
        """The logged losses."""
        return [logs["loss"] for _, logs in self.logs if "loss" in logs]


def sft_config(job: Job, folder: str, **changes: Any) -> Any:
    """TRL's defaults, except what all contenders share: optimizer, schedule, float32, seed."""
    from trl import SFTConfig

    recipe = recipe_of(job)
    optim = recipe.optim
    return SFTConfig(
        output_dir=folder,
        seed=recipe.seed,
        max_steps=job.steps,
        learning_rate=optim.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(optim.warmup_ratio * job.steps),
        max_grad_norm=optim.max_grad_norm,
        bf16=False,
        logging_steps=recipe.log.every_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **changes,
    )


def run_trl(job: Job, **changes: Any) -> Measured:
    """SFTTrainer on the same tensors as the bare loop."""
    from datasets import Dataset
    from trl import SFTTrainer

    recipe, watch = recipe_of(job), Watch()
    optim = recipe.optim
    with tempfile.TemporaryDirectory() as folder:
        arguments = sft_config(
            job,
            folder,
            per_device_train_batch_size=optim.microbatch,
            gradient_accumulation_steps=optim.batch_size // optim.microbatch,
            train_sampling_strategy="sequential",
            dataset_kwargs={"skip_prepare_dataset": True},
            **changes,
        )
        SFTTrainer(
            load_model(recipe),
            arguments,
            data_collator=collate,
            train_dataset=Dataset.from_list(rows_in_order(job)),
            processing_class=transformers.AutoTokenizer.from_pretrained(recipe.model.base),
            callbacks=[watch],
        ).train()
    return Measured(watch.starts, watch.losses(), timed_tokens(job))


def run_trl_unpacked(job: Job, **changes: Any) -> Measured:
    """SFTTrainer from the source rows, with its default tokenising, order and collation."""
    from datasets import Dataset
    from trl import SFTTrainer

    recipe, watch = recipe_of(job), Watch()
    rows = json.loads(Path(job.rows).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        SFTTrainer(
            load_model(recipe),
            sft_config(job, folder, max_length=recipe.data.max_length, **changes),
            train_dataset=Dataset.from_list([prompt_and_completion(row) for row in rows]),
            processing_class=transformers.AutoTokenizer.from_pretrained(recipe.model.base),
            callbacks=[watch],
        ).train()
    # Between two logs, because only they hold the number of tokens without padding.
    timed = [(at, logs["num_tokens"]) for at, logs in watch.logs if "loss" in logs]
    first, last = timed[job.warmup // recipe.log.every_steps - 1], timed[-1]
    starts = [first[0]] * (job.warmup + 1) + [last[0]]
    return Measured(starts, watch.losses(), int(last[1] - first[1]))


def run_trl_method(job: Job) -> Measured:
    """TRL's trainer for the recipe's method, on the source rows in finray's order."""
    from trl_methods import first_model, in_order, make_trainer

    recipe, watch = recipe_of(job), Watch()
    rows = json.loads(Path(job.rows).read_text(encoding="utf-8"))
    data = open_prepared(Folder(job.prepared))
    assert isinstance(data, Prepared)
    ordered = [rows[int(item.rows[0])] for item in in_order(recipe, data, job.steps)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(recipe.model.base)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(recipe, first_model(recipe), tokenizer, ordered, Path(folder))
        trainer.add_callback(watch)
        trainer.train()
    return Measured(watch.starts, trainer.losses, timed_tokens(job))


def prompt_and_completion(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """An Alpaca row in TRL's format, with the same text that finray makes of it."""
    question = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


CONTENDERS: dict[str, Callable[[Job], Measured]] = {
    "finray": run_finray,
    "bare": run_bare,
    "trl": run_trl,
    "trl_no_checkpointing": lambda job: run_trl(job, gradient_checkpointing=False),
    "trl_method": run_trl_method,
    "trl_unpacked": run_trl_unpacked,
    "trl_unpacked_no_checkpointing": lambda job: run_trl_unpacked(
        job, gradient_checkpointing=False
    ),
}


@contextmanager
def hashed_ids(is_enabled: bool) -> Iterator[Callable[[], str]]:
    """Hash the token ids that an embedding receives in training, but padding: rows may be padded,
    or follow each other on a flat one.

    Yields:
        A function that returns the hash so far; an empty text if not enabled.
    """
    digest = hashlib.sha256()

    def note(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Embedding) and module.training:
            ids = inputs[0].flatten()
            digest.update(ids[ids != PAD_ID].cpu().numpy().tobytes())

    hook = register_module_forward_pre_hook(note) if is_enabled else None
    yield lambda: digest.hexdigest() if is_enabled else ""
    if hook is not None:
        hook.remove()


def main() -> None:
    """Run the contender that the command line names."""
    name, path = sys.argv[1:]
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    torch.set_num_threads(job.threads)
    transformers.utils.logging.set_verbosity_error()
    with hashed_ids(job.watch_ids) as ids:
        measured = CONTENDERS[name](job)
    print_result(measured.result(job.warmup, ids()))


if __name__ == "__main__":
    main()
