"""The finray command: arguments in, exit codes out.

Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 130 interrupted.
Only the standard library is imported here; each command imports what it needs.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EPILOG = """\
examples:
  finray check recipe.yaml
  finray train recipe.yaml --set optim.learning_rate=1e-4
  finray train recipe.yaml --local
  finray runs
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    options = _parser().parse_args(arguments)
    from ..training.errors import FinrayError
    from . import commands
    from .environment import set_environment
    from .quiet import quiet_libraries

    set_environment()
    quiet_libraries()
    try:
        run = getattr(commands, options.command)
        run(options)
    except FinrayError as error:
        print(f"finray: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("finray: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output (`| head`) has gone; that is no fault.
        sys.stderr.close()
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finray",
        description="Fine-tune language models on Ray: one recipe file, from a laptop to a "
        "cluster.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    check = commands.add_parser(
        "check", help="validate a recipe and its data, and tell what a run would do"
    )
    _add_recipe(check)
    _add_json(check)

    prepare = commands.add_parser("prepare", help="prepare a recipe's data, without training")
    _add_recipe(prepare)
    _add_ray(prepare)
    _add_json(prepare)

    train = commands.add_parser("train", help="train, or go on with an unfinished run")
    _add_recipe(train)
    _add_ray(train)
    _add_json(train)

    runs = commands.add_parser("runs", help="list the runs of a storage")
    runs.add_argument("--storage", default="runs", help="folder or URI (default: runs)")
    _add_json(runs)

    report = commands.add_parser("report", help="write a run's report.html anew")
    report.add_argument("run", metavar="RUN", help="a run's folder or URI")

    commands.add_parser("schema", help="print the recipe's JSON schema, for editors")
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="the recipe, a YAML file")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a setting, such as optim.learning_rate=1e-4 (may be repeated)",
    )
    parser.add_argument(
        "--local", action="store_true", help="in this process, without Ray (scale.workers=0)"
    )


def _add_ray(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", help="a running Ray cluster (default: one of this machine's own)"
    )
    parser.add_argument("--verbose", action="store_true", help="pass on what Ray's workers print")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


if __name__ == "__main__":
    sys.exit(main())
