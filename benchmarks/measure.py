"""Shared by all benchmarks: interleaved repetitions, medians, and writing and printing results.

Contenders take turns, so that a slowdown of the machine affects all of them. Each turn begins with
another one (ABC BCA CAB ...), so that none is always first. A ratio is taken within each turn, and
the median of the ratios is the figure.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PACKAGES = ("finray", "torch", "transformers", "peft", "trl", "ray")

T = TypeVar("T")


class NotComparable(Exception):
    """Raised if the contenders did not do the same work, so that a comparison is meaningless."""


@dataclass(frozen=True)
class Target:
    """A bound that a figure should meet."""

    direction: Literal["at least", "at most"]
    value: float
    unit: str = ""

    def is_met(self, measured: float) -> bool:
        """True if a measured value meets the bound."""
        if self.direction == "at least":
            return measured >= self.value
        return measured <= self.value

    def __str__(self) -> str:
        return f"{self.direction} {self.value:g}{self.unit}"


@dataclass(frozen=True)
class Figure:
    """One result of a benchmark: a name, its value in every repetition, and a target."""

    name: str
    values: tuple[float, ...]
    target: Target | None = None
    unit: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The figure as it is written into the results."""
        median = statistics.median(self.values)
        return {
            "figure": self.name,
            "asked": None if self.target is None else str(self.target),
            "measured": round(median, 4),
            "lowest": round(min(self.values), 4),
            "highest": round(max(self.values), 4),
            "unit": self.unit,
            "met": None if self.target is None else self.target.is_met(median),
        }


@dataclass(frozen=True)
class Options:
    """The command line's options that all benchmarks share."""

    quick: bool
    repetitions: int
    threads: int


def parse_options(
    document: str,
    repetitions: int = 6,
    add: Callable[[argparse.ArgumentParser], None] | None = None,
) -> tuple[Options, argparse.Namespace]:
    """Parse the arguments that all benchmarks share, and those that `add` adds."""
    parser = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, one repetition")
    parser.add_argument("--repetitions", type=int, help=f"default: {repetitions}, with --quick 1")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    if add is not None:
        add(parser)
    given = parser.parse_args()
    count = given.repetitions or (1 if given.quick else repetitions)
    return Options(given.quick, count, given.threads), given


def take_turns(contenders: Mapping[str, Callable[[], T]], repetitions: int) -> dict[str, list[T]]:
    """Call all contenders in turn, `repetitions` times, each time beginning with the next one.

    Returns the results by contender, in the order of the turns.
    """
    measured: dict[str, list[T]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(repetitions):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            started = time.perf_counter()
            measured[name].append(contenders[name]())
            seconds = time.perf_counter() - started
            print(f"  {turn + 1}/{repetitions} {name}: {seconds:.1f} s", file=sys.stderr)
    return measured


def ratios(over: list[float], under: list[float]) -> tuple[float, ...]:
    """The ratio of both values in each repetition."""
    return tuple(a / b for a, b in zip(over, under, strict=True))


def run_child(script: str, *arguments: str, threads: int | None = None) -> Any:
    """Run a script of this folder in a child process. Returns the JSON of its last line.

    Raises:
        RuntimeError: the script failed; the message holds its error output.
    """
    env = child_environment()
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    return last_line([sys.executable, script, *arguments], env, HERE)


def last_line(command: list[str], env: dict[str, str], folder: Path) -> Any:
    """Run a command in a folder. Returns the JSON of its last line.

    Raises:
        RuntimeError: it failed; the message holds its error output.
    """
    child = subprocess.run(
        command, check=False, capture_output=True, text=True, env=env, cwd=folder
    )
    if child.returncode != 0:
        message = f"{' '.join(command[1:])[:200]} ended with {child.returncode}"
        raise RuntimeError(f"{message}:\n{child.stderr[-4000:]}")
    return json.loads(child.stdout.strip().splitlines()[-1])


def child_environment() -> dict[str, str]:
    """This process's environment, with model hubs and experiment trackers disabled."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}


def finray_command() -> list[str]:
    """The finray command of this Python installation."""
    script = Path(sys.executable).parent / "finray"
    return [str(script)] if script.exists() else [sys.executable, "-m", "finray.cluster.cli.main"]


def resident_mb(name: Literal["VmRSS", "VmHWM"]) -> float:
    """This process's resident memory, or the largest since `reset_peak`, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def reset_peak() -> None:
    """Let `resident_mb("VmHWM")` begin anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def print_result(result: Any) -> None:
    """Print a child's result as JSON on its last line, which `run_child` reads."""
    print(json.dumps(result), flush=True)


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder, which is deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="finray-benchmark-") as folder:
        yield Path(folder)


def environment(threads: int | None) -> dict[str, Any]:
    """The machine and the versions that a result was measured with."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": threads,
        "load_average": round(os.getloadavg()[0], 2),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def commit() -> str:
    """The commit that is checked out, with a + if files differ from it."""

    def answer(*command: str) -> str:
        return subprocess.check_output(["git", *command], cwd=HERE, text=True).strip()

    differs = answer("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results")
    return answer("rev-parse", "HEAD") + ("+" if differs else "")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def conclude(
    name: str,
    options: Options,
    figures: list[Figure],
    repetitions: Mapping[str, list[float]],
    settings: dict[str, Any],
) -> None:
    """Write a benchmark's result and print its tables.

    Args:
        name: the benchmark's name.
        options: the command line's options.
        figures: the benchmark's results.
        repetitions: each contender's values, in order.
        settings: sizes that the values depend on.
    """
    part = _part(options, figures, repetitions, settings)
    _write(name, options.quick, {"benchmark": name, "quick": options.quick, **part})
    _print(name, options, part, repetitions)


def conclude_stage(
    name: str,
    stage: str,
    options: Options,
    figures: list[Figure],
    repetitions: Mapping[str, list[float]],
    settings: dict[str, Any],
) -> None:
    """Write the result of one stage of a benchmark beside those of the others, and print it.

    Args: see `conclude`; each stage has an environment of its own.
    """
    path = result_path(name, options.quick)
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    part = _part(options, figures, repetitions, settings)
    stages = {**before.get("stages", {}), stage: part}
    result = {
        "benchmark": name,
        "quick": options.quick,
        "environment": part["environment"],
        "figures": [figure for each in stages.values() for figure in each["figures"]],
        "stages": stages,
    }
    _write(name, options.quick, result)
    _print(f"{name}, {stage}", options, part, repetitions)


def _part(
    options: Options,
    figures: list[Figure],
    repetitions: Mapping[str, list[float]],
    settings: dict[str, Any],
) -> dict[str, Any]:
    return {
        "environment": environment(options.threads),
        "settings": settings,
        "medians": {key: round(statistics.median(v), 4) for key, v in repetitions.items()},
        "repetitions": {key: [round(x, 4) for x in v] for key, v in repetitions.items()},
        "figures": [figure.to_dict() for figure in figures],
    }


def _write(name: str, quick: bool, result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = result_path(name, quick)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {path.relative_to(HERE.parent)}")


def _print(
    title: str, options: Options, part: dict[str, Any], repetitions: Mapping[str, list[float]]
) -> None:
    rows = [[key, f"{statistics.median(v):,.4g}"] for key, v in repetitions.items()]
    print(f"\n{title}: medians of {options.repetitions}")
    print(table(["contender", "median"], rows))
    print(table(FIGURE_COLUMNS, [figure_row(figure) for figure in part["figures"]]))


def result_path(name: str, quick: bool) -> Path:
    """Path of a result; quick results have another name and are not committed."""
    return RESULTS / f"{name}{'.quick' if quick else ''}.json"


FIGURE_COLUMNS = ["figure", "target", "measured", "spread", "met"]


_NEAR = 0.005


def figure_row(figure: dict[str, Any]) -> list[str]:
    """The cells of one figure, for a table with `FIGURE_COLUMNS`."""
    unit = figure["unit"]
    return [
        figure["figure"],
        figure["asked"] or "-",
        f"{_shown(figure['measured'])}{unit}",
        f"{_shown(figure['lowest'])}-{_shown(figure['highest'])}",
        {None: "-", True: "yes", False: "NO"}[figure["met"]],
    ]


def _shown(value: float) -> str:
    """A ratio near 1 with the digits that tell it from 1, others with three."""
    return f"{value:.4f}" if 0 < abs(value - 1) < _NEAR else f"{value:.3g}"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(columns), rule, *map(line, rows)])
