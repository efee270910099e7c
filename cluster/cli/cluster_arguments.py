"""The arguments of commands on clusters, and helpers; only the standard library is imported."""

from pathlib import Path
from typing import Any

from .parser import (
    Parser,
    add_again,
    add_command,
    add_group,
    add_json,
    add_overrides,
    add_recipe,
    add_training,
    add_waiting,
    complete_as,
    local,
    number,
    whole,
)

SHELLS = ("bash", "zsh", "tcsh", "fish")
"""Those for which shtab writes a completion script."""


def add_helpers(commands: Any) -> None:
    schema = add_command(
        commands,
        "schema",
        "print the JSON schema of recipes or sweeps, for editors",
        "schema > recipe.schema.json",
        "schema sweep > sweep.schema.json",
    )
    schema.add_argument(
        "of", nargs="?", choices=("recipe", "sweep"), default="recipe", help="default: recipe"
    )
    completion = add_command(
        commands,
        "completion",
        "print a script with which a shell completes finray's commands",
        "completion bash > ~/.local/share/bash-completion/completions/finray",
        "completion zsh > ~/.zfunc/_finray",
    )
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))


def add_k8s(commands: Any) -> None:
    example = "k8s render recipe.yaml --overlay gpu | kubectl create -f -"
    verbs = add_group(commands, "k8s", "run on Kubernetes", example)
    render = add_command(verbs, "render", "write a recipe as a RayJob of KubeRay, in YAML", example)
    add_recipe(render)
    render.add_argument(
        "--overlay", default="gpu", help="cpu, gpu (default), gpu-spot-elastic or kueue"
    )
    render.add_argument(
        "--gpu",
        metavar="CARD[:COUNT]",
        help="the cluster's GPUs, such as h100:8; sizes workers, settings and pods as plan does",
    )
    render.add_argument("--namespace", default="finray", help="default: finray")
    render.add_argument("--image", help="image of all pods (default: finray:cpu or finray:gpu)")
    render.add_argument(
        "--memory", help="memory of a worker's pod, such as 64Gi (default: the overlay's)"
    )
    render.add_argument(
        "--disk", help="local disk of a pod, such as 400Gi (default: the overlay's)"
    )
    to = render.add_argument(
        "--to", metavar="FILE", type=local, help="file to write (default: stdout)"
    )
    complete_as(to, "file")
    run = add_command(
        verbs, "run", "what a rendered RayJob runs on its head: train", "k8s run recipe.yaml"
    )
    add_training(run)
    run.set_defaults(address="auto", wait_for_nodes=3600.0)


def add_job(commands: Any) -> None:
    verbs = add_group(
        commands,
        "job",
        "run recipes and sweeps on a cluster as Ray jobs",
        "job submit recipe.yaml --address http://head:8265 --wait",
        "job logs my-run --follow",
    )
    submit = add_command(
        verbs,
        "submit",
        "upload a recipe or sweep with its files, and run it",
        "job submit recipe.yaml --address http://head:8265 --wait",
    )
    _add_submit(submit)
    listing = add_command(verbs, "list", "list the cluster's runs", "job list")
    status = add_command(
        verbs, "status", "show the state of a run's last attempt", "job status my-run"
    )
    logs = add_command(verbs, "logs", "show what a run has printed", "job logs my-run --follow")
    logs.add_argument("--follow", "-f", action="store_true", help="continue until it ends")
    stop = add_command(verbs, "stop", "let a run save a checkpoint and exit", "job stop my-run")
    fetch = add_command(
        verbs,
        "fetch",
        "download a run's metrics, report and result",
        "job fetch my-run --to results",
    )
    to = fetch.add_argument(
        "--to", metavar="DIR", type=local, help="folder to write (default: runs/NAME)"
    )
    complete_as(to, "directory")
    for verb in (status, logs, stop, fetch):
        verb.add_argument("name", metavar="NAME", help="the run's name")
    for verb in (submit, listing, status, logs, stop, fetch):
        _add_dashboard(verb)
    for verb in (submit, listing, status):
        add_json(verb)


def _add_submit(parser: Parser) -> None:
    recipe = parser.add_argument(
        "recipe", metavar="FILE", type=Path, help="a recipe or a sweep, in YAML"
    )
    complete_as(recipe, "file")
    add_overrides(parser, "a setting; recipe.KEY=VALUE changes a sweep's base recipe")
    parser.add_argument("--wait", action="store_true", help="print its log until it ends")
    folder = parser.add_argument(
        "--on-cluster",
        metavar="FOLDER",
        action="append",
        default=[],
        help="a folder of the cluster's nodes; its files are not uploaded (may be repeated)",
    )
    complete_as(folder, "directory")
    add_waiting(parser)
    add_again(parser)
    parser.add_argument(
        "--max-mib",
        metavar="MIB",
        type=number,
        default=100.0,
        help="largest size of the uploaded files (default: 100)",
    )
    parser.add_argument(
        "--python", help="the head's interpreter (default: the one that runs Ray's workers)"
    )


def add_cluster(commands: Any) -> None:
    verbs = add_group(
        commands,
        "cluster",
        "start, stop and check a cluster of your own machines",
        "cluster up",
        "cluster doctor",
    )
    up = add_command(
        verbs, "up", "start a head here, and show how other nodes join it", "cluster up --port 6380"
    )
    up.add_argument(
        "--port", metavar="PORT", type=whole, default=6379, help="port of the head (default: 6379)"
    )
    up.add_argument(
        "--dashboard-port",
        metavar="PORT",
        type=whole,
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
    add_command(verbs, "down", "stop the head that was started here, with its node", "cluster down")
    status = add_command(
        verbs, "status", "show whether the head that was started here runs", "cluster status"
    )
    doctor = add_command(
        verbs,
        "doctor",
        "check every node of a running cluster",
        "cluster doctor --storage s3://bucket/runs",
    )
    doctor.add_argument(
        "--storage",
        metavar="FOLDER",
        help="a folder or URI that every node must read and write",
    )
    _add_dashboard(doctor)
    add_json(status)


def _add_dashboard(parser: Parser) -> None:
    parser.add_argument(
        "--address",
        metavar="URL",
        help="the cluster's dashboard (default: $FINRAY_ADDRESS, else http://127.0.0.1:8265)",
    )
