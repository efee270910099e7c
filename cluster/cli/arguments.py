"""The arguments of every command; only the standard library is imported."""

import argparse
from pathlib import Path
from typing import Any

from .cluster_arguments import add_cluster, add_helpers, add_job, add_k8s
from .parser import (
    Parser,
    add_command,
    add_general,
    add_group,
    add_json,
    add_overrides,
    add_preparing,
    add_ray,
    add_recipe,
    add_to,
    add_training,
    add_waiting,
    complete_as,
    local,
    number,
    whole,
)
from .result_arguments import add_chat, add_eval, add_evaluation, add_results

_EPILOG = """\
examples:
  finray init --data conversations.jsonl
  finray import axolotl.yml -o recipe.yaml
  finray check recipe.yaml
  finray train recipe.yaml --set optim.learning_rate=1e-4
  finray data show recipe.yaml
  finray plan recipe.yaml --gpu h100:8
  finray train recipe.yaml --local
  finray job submit recipe.yaml --address http://head:8265 --wait
  finray tune sweep.yaml
  finray tune show sweep.yaml
  finray runs
  finray runs compare my-run my-run.1
  finray chat runs/my-run
  finray eval runs/my-run --base
  finray generate runs/my-run --prompts prompts.jsonl --to answers.jsonl
  finray k8s render recipe.yaml --overlay gpu | kubectl create -f -
  finray export runs/my-run --to my-model --merge

environment:
  FINRAY_STORAGE  the storage of recipes and sweeps that name none
  FINRAY_ADDRESS  the default of --address: a dashboard's URL for job and doctor,
                  HOST:PORT, auto or local for train, check, prepare and tune;
                  inside a job the job's own cluster is used
"""


class _ShowVersion(argparse.Action):
    """Prints finray's version, which is read only now."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from importlib.metadata import version

        print(f"finray {version('finray')}")
        parser.exit()


def build_parser() -> Parser:
    """The parser of the whole command line.

    Its result names the command, its verb if it has one, and the command's own parser.
    """
    parser = Parser(
        prog="finray",
        description="Fine-tune language models on Ray: one recipe file, from a laptop to a "
        "cluster.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--version",
        action=_ShowVersion,
        nargs=0,
        default=argparse.SUPPRESS,
        help="show finray's version",
    )
    add_general(parser, is_shown=False)
    parser.set_defaults(quiet=False, log_level=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_init(commands)
    _add_import(commands)
    _add_runs_of_recipes(commands)
    _add_data(commands)
    add_job(commands)
    add_cluster(commands)
    add_results(commands)
    add_chat(commands)
    add_evaluation(commands)
    add_eval(commands)
    add_k8s(commands)
    add_helpers(commands)
    return parser


def _add_init(commands: Any) -> None:
    init = add_command(
        commands,
        "init",
        "write a first recipe from your data, explain each choice, and check it",
        "init --data conversations.jsonl",
        "init --data pairs.jsonl --model Qwen/Qwen3-4B --method dpo -o pairs.yaml",
    )
    data = init.add_argument(
        "--data",
        metavar="FILE",
        required=True,
        help="the rows: a file, a folder, a URI, or a data set of the hub",
    )
    complete_as(data, "file")
    model = init.add_argument(
        "--model",
        metavar="MODEL",
        help="a folder or a hub id (default: a small open model that fits this machine)",
    )
    complete_as(model, "directory")
    init.add_argument(
        "--method", metavar="KIND", help="such as sft or dpo (default: by the rows' shape)"
    )
    init.add_argument(
        "--reward",
        metavar="FILE:FUNCTION",
        action="append",
        default=[],
        help="a reward function, for grpo and rloo (may be repeated)",
    )
    add_to(init, "the recipe (default: recipe.yaml)", Path("recipe.yaml"))


def _add_import(commands: Any) -> None:
    parser = add_command(
        commands,
        "import",
        "make a recipe from a configuration of Axolotl, LLaMA-Factory or TRL",
        "import axolotl.yml -o recipe.yaml",
        "import llama3_lora_sft.yaml --gpus 8 --dataset-info data/dataset_info.json",
        "import 'trl dpo --model_name_or_path org/model --dataset_name org/pairs' -o dpo.yaml",
    )
    source = parser.add_argument(
        "source",
        metavar="FILE",
        help="a YAML or JSON file, a script for a shell, or a command line in quotes",
    )
    complete_as(source, "file")
    parser.add_argument(
        "--gpus",
        metavar="N",
        type=whole,
        help="GPUs that it is meant for; a step's batch goes over all of them (default: those of "
        "the command line, else 1)",
    )
    info = parser.add_argument(
        "--dataset-info",
        metavar="FILE",
        type=Path,
        help="LLaMA-Factory's dataset_info.json (default: in dataset_dir, or beside the file)",
    )
    complete_as(info, "file")
    parser.add_argument(
        "--method",
        metavar="KIND",
        help="the method of a file (TRL, LLaMA-Factory v1) that does not say it, such as dpo",
    )
    add_to(parser, "a new file for the recipe (default: it is printed)")
    add_json(parser)


def _add_planning(commands: Any) -> None:
    example = "plan recipe.yaml --gpu h100:8"
    what = "show how a recipe would run on a kind of GPU, without one"
    parser = add_command(commands, "plan", what, example)
    add_recipe(parser)
    parser.add_argument(
        "--gpu", metavar="CARD[:COUNT]", required=True, help="the GPUs, such as l40s or h100:8"
    )
    parser.add_argument(
        "--utilisation",
        metavar="SHARE",
        type=number,
        default=0.4,
        help="share of a GPU's 16-bit operations that training reaches (default: 0.4)",
    )
    add_json(parser)


def _add_runs_of_recipes(commands: Any) -> None:
    check = add_command(
        commands,
        "check",
        "validate a recipe and its data, and show what a run would do",
        "check recipe.yaml",
    )
    prepare = add_command(
        commands,
        "prepare",
        "prepare a recipe's data, without training",
        "prepare recipe.yaml",
    )
    train = add_command(
        commands,
        "train",
        "train, or continue an unfinished run",
        "train recipe.yaml",
        "train recipe.yaml --set optim.learning_rate=1e-4 --set name=my-run",
    )
    _add_planning(commands)
    add_preparing(prepare)
    for parser in (check, train):
        add_training(parser)
    tune = add_command(
        commands,
        "tune",
        "search for good settings, continue an unfinished sweep, or show one",
        "tune sweep.yaml --stop-when trials_without_gain=10",
        "tune show sweep.yaml",
    )
    _add_tune(tune)


def _add_data(commands: Any) -> None:
    verbs = add_group(commands, "data", "look at the data of a recipe", "data show recipe.yaml")
    show = add_command(
        verbs,
        "show",
        "show the first rows as the model sees them: template, special and trained tokens",
        "data show recipe.yaml --rows 5",
        "data show recipe.yaml --page rows.html",
    )
    add_recipe(show)
    show.add_argument(
        "--rows", metavar="N", type=whole, default=3, help="rows of each source (default: 3)"
    )
    page = show.add_argument(
        "--page", metavar="FILE", type=local, help="write them as an HTML page instead"
    )
    complete_as(page, "file")
    report = add_command(
        verbs,
        "report",
        "curate the training rows, and show what each stage drops and why",
        "data report recipe.yaml",
    )
    add_preparing(report)


def _add_tune(parser: Parser) -> None:
    sweep = parser.add_argument(
        "sweep",
        metavar="[show] SWEEP",
        nargs="+",
        help="the sweep, a YAML file; after show also a sweep's folder or URI",
    )
    complete_as(sweep, "file")
    add_overrides(parser, "a setting of the sweep; recipe.KEY=VALUE changes its base recipe")
    parser.add_argument(
        "--stop-when",
        dest="bounds",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="stop the sweep at this value, trials_without_gain or tokens (may be repeated)",
    )
    parser.add_argument("--local", action="store_true", help="one worker a trial, on this machine")
    add_ray(parser)
    add_waiting(parser)
    add_json(parser)
