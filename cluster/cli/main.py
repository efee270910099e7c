"""The finray command: arguments in, exit codes out.

Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 130 interrupted.
Only the standard library is imported here; each command imports what it needs.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

EPILOG = """\
examples:
  finray check recipe.yaml
  finray train recipe.yaml --set optim.learning_rate=1e-4
  finray train recipe.yaml --local
  finray job submit recipe.yaml --address http://head:8265 --wait
  finray tune sweep.yaml
  finray tune show sweep.yaml
  finray runs
  finray k8s render recipe.yaml --overlay gpu | kubectl create -f -
  finray export runs/my-run --to my-model --merge
"""

COMMANDS = {
    "check": ("check", "check"),
    "prepare": ("prepare", "prepare"),
    "train": ("train", "train"),
    "tune": ("tune", "tune"),
    "job submit": ("job", "submit"),
    "job list": ("job", "list_jobs"),
    "job status": ("job", "status"),
    "job logs": ("job", "logs"),
    "job stop": ("job", "stop"),
    "job fetch": ("job", "fetch"),
    "cluster up": ("cluster", "up"),
    "cluster down": ("cluster", "down"),
    "cluster status": ("cluster", "status"),
    "cluster doctor": ("cluster", "doctor"),
    "runs": ("runs", "runs"),
    "report": ("runs", "report"),
    "export": ("runs", "export"),
    "schema": ("runs", "schema"),
    "k8s render": ("k8s", "render"),
}
"""Command, with its verb if it has one: the module beside this one, and the function there."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    options = _parser().parse_args(arguments)
    from ...training.common.errors import FinrayError
    from ...training.common.secrets import redact
    from ..environment import quiet_libraries, set_environment

    set_environment()
    quiet_libraries()
    try:
        command_function(options)(options)
    except FinrayError as error:
        print(f"finray: {redact(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("finray: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output, such as `head`, has closed it: no error of ours.
        sys.stderr.close()
        return 0
    return 0


def command_function(options: argparse.Namespace) -> Callable[[argparse.Namespace], None]:
    """The function of a parsed command; only its own module is imported."""
    import importlib

    words = [options.command, options.verb] if "verb" in options else [options.command]
    module, name = COMMANDS[" ".join(words)]
    function: Callable[[argparse.Namespace], None] = getattr(
        importlib.import_module(f".{module}", __package__), name
    )
    return function


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finray",
        description="Fine-tune language models on Ray: one recipe file, from a laptop to a "
        "cluster.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add = commands.add_parser
    _add_train(add("check", help="validate a recipe and its data, and show what a run would do"))
    _add_prepare(add("prepare", help="prepare a recipe's data, without training"))
    _add_train(add("train", help="train, or continue an unfinished run"))
    _add_job(add("job", help="run recipes and sweeps on a cluster as Ray jobs"))
    _add_cluster(add("cluster", help="start, stop and check a cluster of your own machines"))
    _add_tune(
        add("tune", help="search for good settings, continue an unfinished sweep, or show one")
    )
    _add_runs(add("runs", help="list the runs of a storage"))
    _add_report(add("report", help="write a run's report.html again"))
    _add_k8s(add("k8s", help="run on Kubernetes"))
    _add_export(
        add("export", help="write a finished run's result as a folder that loads without finray")
    )
    _add_schema(add("schema", help="print the recipe's JSON schema, for editors"))
    return parser


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    _add_local(parser)
    _add_ray(parser)
    _add_json(parser)


def _add_train(parser: argparse.ArgumentParser) -> None:
    """Arguments of `train` and of `check`."""
    _add_prepare(parser)
    _add_waiting(parser)


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sweep",
        metavar="[show] SWEEP",
        nargs="+",
        help="the sweep, a YAML file; after show also a sweep's folder or URI",
    )
    _add_overrides(parser, "a setting of the sweep; recipe.KEY=VALUE changes its base recipe")
    parser.add_argument(
        "--stop-when",
        dest="bounds",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="stop the sweep at this value, trials_without_gain or tokens (may be repeated)",
    )
    parser.add_argument("--local", action="store_true", help="one worker a trial, on this machine")
    _add_ray(parser)
    _add_waiting(parser)
    _add_json(parser)


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--storage", default="runs", help="folder or URI (default: runs)")
    _add_json(parser)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder or URI")


def _add_schema(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "of", nargs="?", choices=("recipe", "sweep"), default="recipe", help="default: recipe"
    )


def _add_k8s(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    render = verbs.add_parser("render", help="write a recipe as a RayJob of KubeRay, in YAML")
    _add_recipe(render)
    render.add_argument(
        "--overlay", default="gpu", help="cpu, gpu (default), gpu-spot-elastic or kueue"
    )
    render.add_argument("--namespace", default="finray", help="default: finray")
    render.add_argument("--image", help="image of all pods (default: finray:cpu or finray:gpu)")
    render.add_argument(
        "--memory", help="memory of a worker's pod, such as 64Gi (default: the overlay's)"
    )
    render.add_argument("--to", metavar="FILE", type=Path, help="file to write (default: stdout)")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder or URI")
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="a new folder")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into its base")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="data type of a whole model's weights (default: the base model's)",
    )
    _add_json(parser)


def _add_job(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    submit = verbs.add_parser("submit", help="upload a recipe or sweep with its files, and run it")
    submit.add_argument("recipe", metavar="FILE", type=Path, help="a recipe or a sweep, in YAML")
    _add_overrides(submit, "a setting; recipe.KEY=VALUE changes a sweep's base recipe")
    submit.add_argument("--wait", action="store_true", help="print its log until it ends")
    submit.add_argument(
        "--on-cluster",
        metavar="FOLDER",
        action="append",
        default=[],
        help="a folder of the cluster's nodes; its files are not uploaded (may be repeated)",
    )
    _add_waiting(submit)
    submit.add_argument(
        "--max-mib",
        type=float,
        default=100.0,
        help="largest size of the uploaded files (default: 100)",
    )
    submit.add_argument(
        "--python", help="the head's interpreter (default: the one that runs Ray's workers)"
    )
    listing = verbs.add_parser("list", help="list the cluster's runs")
    status = verbs.add_parser("status", help="show the state of a run's last attempt")
    logs = verbs.add_parser("logs", help="show what a run has printed")
    logs.add_argument("-f", "--follow", action="store_true", help="continue until it ends")
    stop = verbs.add_parser("stop", help="let a run save a checkpoint and exit")
    fetch = verbs.add_parser("fetch", help="download a run's metrics, report and result")
    fetch.add_argument("--to", type=Path, help="folder (default: runs/NAME)")
    for verb in (status, logs, stop, fetch):
        verb.add_argument("name", metavar="NAME", help="the run's name")
    for verb in (submit, listing, status, logs, stop, fetch):
        _add_dashboard(verb)
    for verb in (submit, listing, status):
        _add_json(verb)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    up = verbs.add_parser("up", help="start a head here, and show how other nodes join it")
    up.add_argument("--port", type=int, default=6379, help="port of the head (default: 6379)")
    up.add_argument(
        "--dashboard-port",
        type=int,
        default=8265,
        help="port of the dashboard, on localhost (default: 8265)",
    )
    up.add_argument(
        "--start-option",
        metavar="OPTION",
        action="append",
        default=[],
        help="option for ray start, such as --num-cpus=0 (may be repeated)",
    )
    verbs.add_parser("down", help="stop the head that was started here, with its node")
    status = verbs.add_parser("status", help="show whether the head that was started here runs")
    doctor = verbs.add_parser("doctor", help="check every node of a running cluster")
    doctor.add_argument("--storage", help="a folder or URI that every node must read and write")
    _add_dashboard(doctor)
    _add_json(status)


def _add_dashboard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        metavar="URL",
        default="http://127.0.0.1:8265",
        help="the cluster's dashboard (default: http://127.0.0.1:8265)",
    )


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="the recipe, a YAML file")
    _add_overrides(parser, "a setting, such as optim.learning_rate=1e-4")


def _add_local(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--local", action="store_true", help="run in this process (scale.workers=0)"
    )


def _add_overrides(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help=f"override {what} (may be repeated)",
    )


def _add_ray(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        help="a running Ray cluster (default: $RAY_ADDRESS), or local: start Ray on this machine, "
        "the default of a sweep",
    )
    parser.add_argument("--verbose", action="store_true", help="show what the workers print")


def _add_waiting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--wait-for-nodes",
        metavar="SECONDS",
        type=float,
        default=0.0,
        help="seconds to wait for an autoscaler to add the missing nodes (default: 0)",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


if __name__ == "__main__":
    sys.exit(main())
