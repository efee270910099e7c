"""`finray chat` and `finray eval` against scripts of transformers and peft on the same adapter.

Of `chat`, the seconds from the command to the first words of the answer; of `eval`, those of loss,
answers and exact match of all rows. Both evaluations must find the same.
"""

import json
import math
import resource
import subprocess
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from bare_finetune import MAX_LENGTH
from material import Words, save_llama, save_tokenizer, texts_of, write_rows
from measure import (
    HERE,
    Figure,
    NotComparable,
    Target,
    child_environment,
    conclude,
    finray_command,
    parse_options,
    ratios,
    scratch,
    take_turns,
)
from start import Seconds, end, start

FULL = {"rows": 10_000, "vocabulary": 8_000, "hidden": 256, "layers": 6}
QUICK = {"rows": 300, "vocabulary": 2_000, "hidden": 64, "layers": 2}
MAX_TOKENS, BATCH = 16, 32
MESSAGE = "hello"


def make_inputs(folder: Path, sizes: dict[str, int]) -> None:
    """Write the model, the rows, and a run of one step."""
    rows = list(islice(Words().conversations(mean_words=20), sizes["rows"]))
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "train.jsonl", rows[:64])
    size = save_tokenizer(folder / "model", texts_of(rows[:2000]), sizes["vocabulary"])
    save_llama(folder / "model", size, sizes["hidden"], sizes["layers"], MAX_LENGTH)
    recipe: dict[str, Any] = {
        "name": "answers",
        "model": {"base": "model"},
        "adapter": {"kind": "lora"},
        "data": {"train": [{"path": "train.jsonl"}], "max_length": MAX_LENGTH},
        "optim": {"batch_size": 8, "max_steps": 1},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    run(folder, 2, [*finray_command(), "train", "recipe.yaml", "--local"])


def run(folder: Path, threads: int, command: list[str]) -> str:
    """Run a command to its end. Returns what it prints.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        command,
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**child_environment(), "OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-4000:]}")
    return done.stdout


def first_word(folder: Path, threads: int, command: list[str], text: str | None) -> Seconds:
    """Run a command until it prints something."""
    (folder / "input.txt").write_text("" if text is None else f"{text}\n", encoding="utf-8")
    started = time.perf_counter()
    with (folder / "input.txt").open("rb") as stdin:
        child = start(command, folder, threads, stdin)
    assert child.stdout is not None
    reached = child.stdout.read(1)
    wall = time.perf_counter() - started
    cpu = end(child)
    if not reached:
        raise RuntimeError(f"{' '.join(command)} printed nothing")
    return Seconds(wall, cpu)


def script(*arguments: str) -> list[str]:
    """The plain script."""
    return [sys.executable, str(HERE / "plain_answers.py"), *arguments]


def evaluation(folder: Path, threads: int, command: list[str]) -> dict[str, float]:
    """Evaluate, and measure the seconds by the clock and of CPU."""
    started, before = time.perf_counter(), cpu_of_children()
    printed = json.loads(run(folder, threads, command))
    measured = {"seconds": time.perf_counter() - started, "cpu": cpu_of_children() - before}
    values = {one["name"]: one["values"]["answer"] for one in printed.get("measures", [])}
    return {**measured, **(values or printed)}


def cpu_of_children() -> float:
    """CPU seconds of all processes that have ended, of this one's children and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure, and write the result."""
    options, _ = parse_options(__doc__, repetitions=6)
    sizes = QUICK if options.quick else FULL
    with scratch() as folder:
        make_inputs(folder, sizes)
        adapter = str(folder / "runs" / "answers" / "adapter")
        chat = [*finray_command(), "chat", "runs/answers", "--max-tokens", "32"]
        chats = {
            "chat": partial(first_word, folder, options.threads, chat, MESSAGE),
            "script, chat": partial(
                first_word, folder, options.threads, script("chat", adapter, MESSAGE), None
            ),
        }
        if not options.quick:
            take_turns(chats, 1)  # fills the page cache and compiles modules
        turns = take_turns(chats, options.repetitions)
        numbers = [str(MAX_TOKENS), str(BATCH)]
        words = ["--max-tokens", numbers[0], "--batch", numbers[1], "--metric", "exact_match"]
        own = [*finray_command(), "eval", "runs/answers", "--data", "rows.jsonl", *words, "--json"]
        plain = script("eval", adapter, "rows.jsonl", *numbers)
        evaluations = {
            "eval": partial(evaluation, folder, options.threads, own),
            "script, eval": partial(evaluation, folder, options.threads, plain),
        }
        evaluated = take_turns(evaluations, options.repetitions)
    for ours, theirs in zip(*evaluated.values(), strict=True):
        same = math.isclose(ours["loss"], theirs["loss"], rel_tol=1e-4)
        if not same or ours["exact_match"] != theirs["exact_match"]:
            raise NotComparable(f"finray measured {ours}, the script {theirs}")
    seconds = {name: [one.wall for one in runs] for name, runs in turns.items()}
    cpu = {name: [one.cpu for one in runs] for name, runs in turns.items()}
    eval_cpu = {name: [one["cpu"] for one in runs] for name, runs in evaluated.items()}
    evals = {name: [one["seconds"] for one in runs] for name, runs in evaluated.items()}
    figures = [
        Figure(
            "time to the first words of an answer, finray chat / script",
            ratios(seconds["chat"], seconds["script, chat"]),
            Target("at most", 1.1),
        ),
        Figure("CPU time to them, finray chat / script", ratios(cpu["chat"], cpu["script, chat"])),
        Figure(
            f"{sizes['rows']:,} rows, finray eval / script",
            ratios(evals["eval"], evals["script, eval"]),
            Target("at most", 1.1),
        ),
        Figure(
            f"CPU time of {sizes['rows']:,} rows, finray eval / script",
            ratios(eval_cpu["eval"], eval_cpu["script, eval"]),
        ),
    ]
    seconds |= {f"{name}, CPU time": values for name, values in cpu.items()}
    conclude("answers", options, figures, {**seconds, **evals}, dict(sizes))


if __name__ == "__main__":
    main()
