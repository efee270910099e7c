"""Seconds from the command to the first optimizer step: `finray train --local` against a script.

finray starts with nothing prepared (and once more with the data prepared); the script reads,
tokenises and trains the same rows with transformers' Trainer and peft. Steps are tiny, so that
only the time to the first one is measured. Each contender is killed after its first step.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from bare_finetune import FIRST_STEP, MAX_LENGTH
from material import Words, save_llama, save_tokenizer, texts_of, write_rows
from measure import (
    HERE,
    Figure,
    Target,
    child_environment,
    conclude,
    finray_command,
    parse_options,
    ratios,
    scratch,
    take_turns,
)

FULL = {"rows": 2_000, "vocabulary": 8_000, "hidden": 128, "layers": 4}
QUICK = {"rows": 500, "vocabulary": 2_000, "hidden": 64, "layers": 2}
POLL_SECONDS = 0.005
LONGEST_WAIT = 300.0


@dataclass(frozen=True)
class Seconds:
    """Seconds from the command to the first step."""

    wall: float
    cpu: float


def make_inputs(folder: Path, sizes: dict[str, int]) -> None:
    """Write model, rows and recipe."""
    rows = list(islice(Words().conversations(mean_words=40), sizes["rows"]))
    write_rows(folder / "rows.jsonl", rows)
    size = save_tokenizer(folder / "model", texts_of(rows), sizes["vocabulary"])
    save_llama(folder / "model", size, sizes["hidden"], sizes["layers"], MAX_LENGTH)
    recipe: dict[str, Any] = {
        "name": "start",
        "model": {"base": "model"},
        "adapter": {"kind": "lora"},
        # One document a row, as the script has it: the same work in the first step.
        "data": {"train": [{"path": "rows.jsonl"}], "max_length": MAX_LENGTH, "packing": False},
        "optim": {"batch_size": 8, "micro_batch_size": 4, "max_steps": 1000},
        "log": {"every_steps": 1},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")


def start(
    command: list[str], folder: Path, threads: int, stdin: int | IO[bytes] = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own."""
    return subprocess.Popen(
        command,
        cwd=folder,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**child_environment(), "OMP_NUM_THREADS": str(threads)},
    )


def end(child: subprocess.Popen[bytes]) -> float:
    """Kill a command with its child processes. Returns the seconds of CPU time it used."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.stdout is not None
    child.stdout.close()
    return usage.ru_utime + usage.ru_stime


def has_exited(child: subprocess.Popen[bytes]) -> bool:
    """True if the command has ended; its exit status stays available for `wait`."""
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def finray_seconds(folder: Path, storage: Path, name: str, threads: int) -> Seconds:
    """Run `finray train` until metrics.jsonl has its first line."""
    metrics = storage / name / "metrics.jsonl"
    settings = ["--set", f"storage={storage}", "--set", f"name={name}"]
    command = [*finray_command(), "train", "recipe.yaml", "--local", *settings]
    started = time.perf_counter()
    child = start(command, folder, threads)
    reached = False
    while not (reached := metrics.exists() and metrics.stat().st_size > 0):
        if has_exited(child) or time.perf_counter() - started > LONGEST_WAIT:
            break
        time.sleep(POLL_SECONDS)
    wall = time.perf_counter() - started
    cpu = end(child)
    if not reached:
        raise RuntimeError(f"finray made no step within {wall:.0f} s")
    return Seconds(wall, cpu)


def cold_seconds(folder: Path, threads: int) -> Seconds:
    """Run finray with an empty storage."""
    storage = folder / "runs"
    shutil.rmtree(storage, ignore_errors=True)
    return finray_seconds(folder, storage, "cold", threads)


def prepared_seconds(folder: Path, threads: int) -> Seconds:
    """Run finray with the data that the preceding cold start has prepared."""
    storage = folder / "runs"
    shutil.rmtree(storage / "warm", ignore_errors=True)
    return finray_seconds(folder, storage, "warm", threads)


def script_seconds(folder: Path, threads: int) -> Seconds:
    """Run the script until it reports its first step."""
    command = [sys.executable, str(HERE / "bare_finetune.py"), "model", "rows.jsonl", "output"]
    started = time.perf_counter()
    child = start(command, folder, threads)
    assert child.stdout is not None
    reached = any(FIRST_STEP.encode() in line for line in child.stdout)
    wall = time.perf_counter() - started
    cpu = end(child)
    if not reached:
        raise RuntimeError("the script made no step")
    return Seconds(wall, cpu)


def main() -> None:
    """Measure, and write the result."""
    options, _ = parse_options(__doc__)
    sizes = QUICK if options.quick else FULL
    with scratch() as folder:
        make_inputs(folder, sizes)
        contenders = {
            "finray": partial(cold_seconds, folder, options.threads),
            "finray, data prepared": partial(prepared_seconds, folder, options.threads),
            "script": partial(script_seconds, folder, options.threads),
        }
        if not options.quick:
            take_turns(contenders, 1)  # fills the page cache and compiles modules
        turns = take_turns(contenders, options.repetitions)
    seconds = {name: [run.wall for run in runs] for name, runs in turns.items()}
    cpu = {name: [run.cpu for run in runs] for name, runs in turns.items()}
    figures = [
        Figure(
            "time to the first step, finray --local / script",
            ratios(seconds["finray"], seconds["script"]),
            Target("at most", 1.5),
        ),
        Figure(
            "time to the first step, finray --local with data prepared / script",
            ratios(seconds["finray, data prepared"], seconds["script"]),
        ),
        # In addition to wall time, because other processes hardly affect it.
        Figure(
            "CPU time to the first step, finray --local / script",
            ratios(cpu["finray"], cpu["script"]),
        ),
    ]
    seconds |= {f"{name}, CPU time": values for name, values in cpu.items()}
    conclude("start", options, figures, seconds, dict(sizes))


if __name__ == "__main__":
    main()
