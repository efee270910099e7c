"""Tokens per second of preparing tool conversations: finray's two processes against `datasets.map`
with two, which calls TRL's own tokenisation.

finray reads JSON Lines, checks the rows, tokenises, packs and writes Parquet with hashes; TRL is
timed from a loaded data set to its tokenised rows, without packing. CPU time counts all processes,
and leaves out the start of Ray and of the libraries in the main process.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from material import END, START, Words, save_llama, save_tokenizer
from measure import (
    Figure,
    NotComparable,
    Target,
    conclude,
    parse_options,
    print_result,
    ratios,
    run_child,
    scratch,
    take_turns,
)

FULL, QUICK = 200, 12
"""Megabytes of rows."""
PROCESSES = 2
LENGTH = 32_768
FUNCTIONS = 40


def functions(words: Words) -> list[dict[str, Any]]:
    """The tools from which each conversation has some."""
    parameters = {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": words.text(12)},
            "limit": {"type": "integer", "description": words.text(8)},
        },
        "required": ["query"],
    }
    return [
        {
            "type": "function",
            "function": {
                "name": f"{words.text(1)}_{number}",
                "description": words.text(20),
                "parameters": parameters,
            },
        }
        for number in range(FUNCTIONS)
    ]


def conversations(seed: int = 0) -> Iterator[dict[str, Any]]:
    """Infinitely many conversations with tools as JSON text, calls, and results."""
    draw, words = np.random.default_rng(seed), Words(seed)
    tools = functions(words)
    while True:
        own = [tools[index] for index in draw.choice(FUNCTIONS, draw.integers(3, 8), replace=False)]
        messages: list[dict[str, Any]] = []
        for _ in range(draw.integers(1, 4)):
            messages.append({"role": "user", "content": words.text(int(draw.integers(5, 60)))})
            for _ in range(draw.integers(1, 3)):
                name = own[draw.integers(len(own))]["function"]["name"]
                arguments = {"query": words.text(4), "limit": int(draw.integers(1, 50))}
                call = {"type": "function", "function": {"name": name, "arguments": arguments}}
                result = {"rows": [words.text(9) for _ in range(draw.integers(1, 12))]}
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
                messages.append({"role": "tool", "content": json.dumps(result)})
            messages.append(
                {"role": "assistant", "content": words.text(int(draw.integers(8, 120)))}
            )
        yield {"messages": messages, "tools": json.dumps(own)}


def make_inputs(folder: Path, megabytes: float) -> None:
    """Write the rows, a tokenizer with Qwen2.5's template, and a tiny model."""
    rows = conversations()
    size = 0
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as stream:
        while size < megabytes * 1_000_000:
            size += stream.write(json.dumps(next(rows)) + "\n")
    texts = [json.dumps(row) for row in islice(conversations(1), 1000)]
    vocabulary = save_tokenizer(folder / "model", texts, 16_000)
    template = files("trl") / "chat_templates" / "qwen2_5.jinja"
    (folder / "model" / "chat_template.jinja").write_bytes(template.read_bytes())
    save_llama(folder / "model", vocabulary, hidden=64, layers=1, context=LENGTH)
    assert START in template.read_text("utf-8") and END in template.read_text("utf-8")


def cpu_seconds() -> float:
    """CPU time of this process and of all that it started, ended ones too."""
    import psutil

    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


@contextmanager
def measured(result: dict[str, Any]) -> Iterator[None]:
    """Add the seconds of a block to a result."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    yield
    result.update(wall=time.perf_counter() - wall, cpu=cpu_seconds() - cpu)


def finray(folder: Path) -> dict[str, Any]:
    """Prepare the rows in two processes of Ray."""
    from finray.cluster.environment import set_environment

    set_environment()
    import ray

    from finray.cluster.nodes.ray_session import ray_session
    from finray.training.config.recipe import load_recipe
    from finray.training.run import prepare_data, prepares_on_ray

    values = {
        "name": "speed",
        "model": {"base": str(folder / "model")},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": LENGTH, "packing": True},
        "scale": {"workers": 1},
        "storage": str(folder / f"runs-{os.getpid()}"),
    }
    recipe = load_recipe(values)
    result: dict[str, Any] = {}
    ray.init(num_cpus=PROCESSES, include_dashboard=False, log_to_driver=False)
    with ray_session(PROCESSES, None, {}, verbose=False), measured(result):
        if not prepares_on_ray(recipe):
            raise NotComparable("the rows are too few to be prepared by Ray")
        train = prepare_data(recipe).manifest.train
    ray.shutdown()
    return {**result, "tokens": train.tokens, "trained": train.trainable_tokens}


def trl(folder: Path) -> dict[str, Any]:
    """Tokenise the rows as SFTTrainer does when it is made."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as datasets.map asks for with processes
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    rows = load_dataset(
        "json",
        data_files=str(folder / "rows.jsonl"),
        split="train",
        cache_dir=str(folder / "cache"),
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        assistant_only_loss=True,
        max_length=LENGTH,
        dataset_num_proc=PROCESSES,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    result: dict[str, Any] = {}
    with measured(result):
        trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    columns = trainer.train_dataset.with_format("arrow")[:]
    tokens = len(columns["input_ids"].combine_chunks().flatten())
    labels = columns["labels"].combine_chunks().flatten().to_numpy()
    trainer.train_dataset.cleanup_cache_files()
    return {**result, "tokens": tokens, "trained": int(np.sum(labels != -100))}


CONTENDERS = {"finray": finray, "datasets.map": trl}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark alone."""
    parser.add_argument("--megabytes", type=float, help=f"size of the rows (default: {FULL})")


def main() -> None:
    """Measure, and write the result."""
    options, given = parse_options(__doc__, add=add_arguments)
    megabytes = given.megabytes or (QUICK if options.quick else FULL)
    with scratch() as folder:
        make_inputs(folder, megabytes)
        turns = take_turns(
            {
                name: partial(
                    run_child, "prepare_speed.py", "--child", name, str(folder), threads=1
                )
                for name in CONTENDERS
            },
            options.repetitions,
        )
    ours, theirs = (turns[name] for name in CONTENDERS)
    counted = {key: (ours[0][key], theirs[0][key]) for key in ("tokens", "trained")}
    for key, (own, other) in counted.items():
        if abs(own - other) > 0.01 * other:
            raise NotComparable(f"{key}: finray has {own}, TRL {other}")
    speeds = {
        f"{name}, tokens per {what} second": [run["tokens"] / run[what] for run in runs]
        for name, runs in turns.items()
        for what in ("cpu", "wall")
    }
    figures = [
        Figure(
            f"prepared tokens per {label}, {PROCESSES} processes, finray / datasets.map and TRL",
            ratios(*(speeds[f"{name}, tokens per {what} second"] for name in CONTENDERS)),
            target,
        )
        for what, label, target in (
            ("wall", "second", Target("at least", 1.3)),
            ("cpu", "CPU second", None),
        )
    ]
    conclude("prepare_speed", options, figures, speeds, {"megabytes": megabytes, **counted})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print_result(CONTENDERS[sys.argv[2]](Path(sys.argv[3])))
    else:
        main()
