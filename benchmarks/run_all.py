"""Run benchmarks one after the other, print one table, and replace the one in README.md.

With --only some of them run; the table has the others' figures as they are. With --quick nothing is
written into README.md, and no figure is kept. With --table nothing is run.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import FIGURE_COLUMNS, HERE, figure_row, result_path, table

NAMES = (
    "help",
    "start",
    "start_ray",
    "throughput",
    "methods",
    "online",
    "packing",
    "packed_rows",
    "pairs",
    "token_loss",
    "estimate",
    "prepare_memory",
    "prepare_speed",
    "answers",
    "curation",
    "checkpoint_stall",
    "kills",
    "kills_anywhere",
    "tune_quality",
    "tune_overhead",
)
README = HERE / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def run(name: str, arguments: list[str]) -> bool:
    """Run one benchmark. Returns True if it succeeded."""
    print(f"\n=== {name}", flush=True)
    command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
    return subprocess.run(command, check=False).returncode == 0


def collect(quick: bool) -> list[dict[str, Any]]:
    """The results on disk, in the order of `NAMES`."""
    paths = [result_path(name, quick) for name in NAMES]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    return [result for result in results if "figures" in result]


def overview(results: list[dict[str, Any]]) -> str:
    """A table of all figures, and the machines they were measured on."""
    rows = [figure_row(figure) for result in results for figure in result["figures"]]
    machines = sorted({machine(result["environment"]) for result in results})
    return "\n".join([table(FIGURE_COLUMNS, rows), "", *machines])


def machine(environment: dict[str, Any]) -> str:
    """One line about the machine and the versions."""
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "transformers", "trl"))
    return f"Measured on {environment['cores']} cores of {environment['cpu']}; {versions}."


def replace_table(readme: Path, block: str) -> None:
    """Write the table between the two marks of a file."""
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{readme.name} lacks the marks {BEGIN} and {END}")
    readme.write_text(f"{before}{BEGIN}\n\n{block}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Run, print and write; exit code 1 if a benchmark failed or a target is not met."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, one repetition")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="run these (default: all)")
    parser.add_argument("--table", action="store_true", help="print the table of existing results")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--data", help="folder with the real data, for those that read it")
    options = parser.parse_args()
    common = ["--threads", str(options.threads), *(["--quick"] if options.quick else [])]
    data = ["--data", options.data] if options.data else []
    special = {"packing": data, "packed_rows": data}
    names = () if options.table else options.only or NAMES
    failed = [name for name in names if not run(name, [*common, *special.get(name, [])])]
    results = collect(options.quick)
    if not results:
        raise SystemExit("there are no results yet; run without --table first")
    block = overview(results)
    print(f"\n{block}")
    if not options.quick:
        replace_table(README, block)
    missed = any(figure["met"] is False for result in results for figure in result["figures"])
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    sys.exit(1 if failed or missed else 0)


if __name__ == "__main__":
    main()
