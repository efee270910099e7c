"""Peak memory of the process that prepares data, for 10 MB and 500 MB of rows.

The driver's peak (VmHWM), without Ray and with the work done by tasks of Ray Data. Each size runs
in a process of its own. One repetition by default: a peak hardly varies, and the large file takes
minutes.
"""

import json
import shutil
import statistics
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from material import Words, save_llama, save_tokenizer, texts_of, write_rows
from measure import (
    Figure,
    Target,
    conclude,
    parse_options,
    print_result,
    resident_mb,
    run_child,
    scratch,
    take_turns,
)

FULL = {"small": 10, "large": 500}
# Less than 10 MB would not fill the buffers of the second pass once.
QUICK = {"small": 10, "large": 50}
PLACES = {"in process": 0, "ray": 1}
DISTINCT_ROWS = 20_000
LENGTH = 1024


def make_inputs(folder: Path, sizes: dict[str, int]) -> None:
    """Write the tokenizer, and a file of rows for each size in MB."""
    rows = list(islice(Words().conversations(mean_words=80), DISTINCT_ROWS))
    size = save_tokenizer(folder / "model", texts_of(rows[:2000]), 8_000)
    save_llama(folder / "model", size, hidden=64, layers=1, context=LENGTH)
    write_rows(folder / "rows.jsonl", rows)
    block = (folder / "rows.jsonl").read_bytes()
    for name, megabytes in sizes.items():
        write_size(folder / f"{name}.jsonl", block, megabytes * 1_000_000)


def write_size(path: Path, block: bytes, size: int) -> None:
    """Repeat the rows of `block` until the file has `size` bytes; rows stay whole."""
    with path.open("wb") as stream:
        for _ in range(size // len(block)):
            stream.write(block)
        rest = block[: size % len(block)]
        stream.write(rest[: rest.rfind(b"\n") + 1])


def child(folder: Path, name: str, workers: int) -> dict[str, Any]:
    """Prepare a file. Returns this process's peak memory and the time."""
    from finray.cluster.environment import set_environment

    set_environment()
    from finray.cluster.nodes.ray_session import ray_session
    from finray.training.config.recipe import load_recipe
    from finray.training.run import prepare_data

    values = {
        "name": name,
        "model": {"base": str(folder / "model")},
        "adapter": {"kind": "lora"},
        "data": {"train": [{"path": str(folder / f"{name}.jsonl")}], "max_length": LENGTH},
        "scale": {"workers": workers},
        "storage": str(folder / f"runs-{name}-{workers}"),
    }
    path = folder / f"{name}-{workers}.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    recipe = load_recipe(path)
    started = time.perf_counter()
    if workers:
        with ray_session(recipe.scale, None, {}, verbose=False):
            prepared = prepare_data(recipe)
    else:
        prepared = prepare_data(recipe)
    return {
        "peak_mb": resident_mb("VmHWM"),
        "seconds": time.perf_counter() - started,
        "rows": prepared.manifest.rows_read,
    }


def measure_one(folder: Path, name: str, workers: int) -> dict[str, Any]:
    """Measure in a child process, and delete the prepared data so the next one prepares again."""
    arguments = ("--child", str(folder), name, str(workers))
    result: dict[str, Any] = run_child("prepare_memory.py", *arguments)
    for storage in folder.glob("runs-*"):
        shutil.rmtree(storage)
    return result


def main() -> None:
    """Measure, and write the result."""
    options, _ = parse_options(__doc__)
    sizes = QUICK if options.quick else FULL
    with scratch() as folder:
        make_inputs(folder, sizes)
        contenders = {
            f"{place}, {megabytes} MB": partial(measure_one, folder, name, workers)
            for place, workers in PLACES.items()
            for name, megabytes in sizes.items()
        }
        turns = take_turns(contenders, options.repetitions)
    peaks = {name: [result["peak_mb"] for result in results] for name, results in turns.items()}
    figures = []
    for place in PLACES:
        small, large = (peaks[f"{place}, {megabytes} MB"] for megabytes in sizes.values())
        growth = tuple(b - a for a, b in zip(small, large, strict=True))
        name = f"growth of peak memory, {place}, {sizes['small']} to {sizes['large']} MB"
        figures.append(Figure(name, growth, Target("at most", 50, " MB"), " MB"))
    seconds = {
        name: round(statistics.median(result["seconds"] for result in results), 1)
        for name, results in turns.items()
    }
    rows = {name: results[0]["rows"] for name, results in turns.items()}
    settings = {**sizes, "seconds": seconds, "rows": rows}
    conclude("prepare_memory", options, figures, peaks, settings)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print_result(child(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
    else:
        main()
