"""GRPO and RLOO against TRL's own trainers, one process each: completions per second.

Both train the same LoRA adapter on the same prompts in the same order, with the same reward
function, the same number of completions of nearly the same length, and a divergence to the same
reference; generation, the reference's pass and the step all count.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from contenders import Job, Measured, Watch, load_model, recipe_of, run_finray
from material import Words, save_llama, save_tokenizer, write_rows
from measure import (
    Figure,
    NotComparable,
    Options,
    Target,
    conclude,
    parse_options,
    print_result,
    ratios,
    run_child,
    scratch,
    take_turns,
)
from throughput import prepared_job

from finray.training.common.storage import Folder
from finray.training.data.prepared import Prepared, open_prepared

REWARD = """
def worth(prompts, completions, completion_ids, **columns):
    return [sum(token % 7 for token in ids) / len(ids) for ids in completion_ids]
"""
FULL = {"vocabulary": 16_000, "hidden": 256, "layers": 6, "words": 60, "completion": 64}
QUICK = {"vocabulary": 4_000, "hidden": 128, "layers": 3, "words": 30, "completion": 32}
GENERATIONS, BATCH, MICRO = 8, 32, 16
WARMUP, TIMED = 2, 6
STEPS = WARMUP + TIMED + 1
SIDES = ("finray", "trl")


def make_job(folder: Path, kind: str, sizes: dict[str, int], threads: int) -> Job:
    """A job with model, tokenizer, rewards and prepared prompts."""
    model, data, file = folder / "model", folder / "prompts.jsonl", folder / "rewards.py"
    talks = islice(Words().conversations(sizes["words"]), STEPS * BATCH // GENERATIONS * 2)
    rows = [{"prompt": talk["messages"][0]["content"]} for talk in talks]
    if not model.exists():
        size = save_tokenizer(model, (row["prompt"] for row in rows), sizes["vocabulary"])
        save_llama(model, size, sizes["hidden"], sizes["layers"], 1024)
        write_rows(data, rows)
        file.write_text(REWARD, encoding="utf-8")
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    values = {
        "name": "online",
        "model": {"base": str(model), "dtype": "float32"},
        "adapter": {"kind": "lora"},
        "method": {
            "kind": kind,
            "rewards": [{"file": f"{file}:worth", "source": REWARD}],
            "generations": GENERATIONS,
            "max_completion": sizes["completion"],
            "beta": 0.04,
        },
        "data": {"train": [{"path": str(data)}], "max_length": 1024},
        "optim": {
            "batch_size": BATCH,
            "micro_batch_size": MICRO,
            "max_steps": STEPS,
            "learning_rate": 1e-5,
        },
        "scale": {"workers": 0},
        "checkpoint": {"every_steps": 10_000},
        "log": {"every_steps": 1, "to": []},
        "storage": str(folder / "runs"),
    }
    return prepared_job(folder, values, STEPS, WARMUP, threads, rows=str(folder / "rows.json"))


def run_trl(job: Job) -> Measured:
    """Train with TRL's trainer and finray's settings."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl_methods import in_order

    recipe, data = recipe_of(job), open_prepared(Folder(job.prepared))
    assert isinstance(data, Prepared)
    method: Any = recipe.method
    is_grpo = method.kind == "grpo"
    space: dict[str, Any] = {}
    exec(REWARD, space)
    with tempfile.TemporaryDirectory() as folder:
        config = (trl.GRPOConfig if is_grpo else trl.RLOOConfig)(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            learning_rate=recipe.optim.learning_rate,
            max_steps=job.steps,
            logging_steps=1,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=BATCH // MICRO,
            num_generations=method.generations,
            max_completion_length=method.max_completion,
            beta=method.beta,
            shuffle_dataset=False,
            disable_tqdm=True,
        )
        watch = Watch()
        rows = json.loads(Path(job.rows).read_text(encoding="utf-8"))
        ordered = [rows[int(item.rows[0])] for item in in_order(recipe, data, job.steps)]
        trainer = (trl.GRPOTrainer if is_grpo else trl.RLOOTrainer)(
            model=load_model(recipe),
            reward_funcs=[space["worth"]],
            args=config,
            train_dataset=Dataset.from_list(ordered),
            processing_class=AutoTokenizer.from_pretrained(recipe.model.base),
            callbacks=[watch],
        )
        trainer.train()
        lengths = [
            logs["completions/mean_length"]
            for _, logs in watch.logs
            if "completions/mean_length" in logs
        ]
    return Measured(watch.starts, lengths, 0)


def contend(side: str, job: Job) -> None:
    """Run one contender in this process and print its result."""
    measured = run_finray(job, "completion_length") if side == "finray" else run_trl(job)
    print_result(measured.result(job.warmup, ""))


def run(side: str, job: Job, folder: Path) -> dict[str, Any]:
    """Run one contender in a child process. Returns its printed result."""
    path = folder / "job.json"
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    child = ("online.py", "--contender", side, str(path))
    result: dict[str, Any] = run_child(*child, threads=job.threads)
    return result


def compare(kind: str, folder: Path, sizes: dict[str, int], options: Options) -> "Compared":
    """The figures of one method, and both rates in every repetition.

    Raises:
        NotComparable: completions have another length than requested.
    """
    job = make_job(folder, kind, sizes, options.threads)
    turns = take_turns(
        {side: partial(run, side, job, folder) for side in SIDES}, options.repetitions
    )
    for result in (*turns["finray"], *turns["trl"]):
        # Completions that end early would be less work for one side.
        mean = fmean(result["losses"])
        if mean < 0.97 * sizes["completion"]:
            raise NotComparable(f"completions of {mean:.1f} tokens, not {sizes['completion']}")
    figures = []
    rates: dict[str, list[float]] = {}
    for name, target in (("seconds", Target("at least", 1.2)), ("cpu_seconds", None)):
        own = [[TIMED * BATCH / result[name] for result in turns[side]] for side in SIDES]
        per = f"completions per {name[:-1]}, {kind}"
        figures.append(Figure(f"{per}, finray / TRL", ratios(*own), target))
        rates |= {f"{per}, {side}": of_side for side, of_side in zip(SIDES, own, strict=True)}
    return figures, rates


Compared = tuple[list[Figure], dict[str, list[float]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark alone."""
    parser.add_argument("--contender", nargs=2, metavar=("SIDE", "JOB"), help="for its own use")


def main() -> None:
    """Measure, and write the result."""
    options, given = parse_options(__doc__, add=add_arguments)
    if given.contender:
        side, path = given.contender
        contend(side, Job(**json.loads(Path(path).read_text(encoding="utf-8"))))
        return
    sizes = QUICK if options.quick else FULL
    figures: list[Figure] = []
    rates: dict[str, list[float]] = {}
    with scratch() as folder:
        for kind in ("grpo", "rloo"):
            compared, measured = compare(kind, folder, sizes, options)
            figures += compared
            rates |= measured
    conclude("online", options, figures, rates, {**sizes, "steps_timed": TIMED, "batch": BATCH})


if __name__ == "__main__":
    main()
