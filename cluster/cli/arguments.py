"""The arguments of every command; only the standard library is imported."""

import argparse
from pathlib import Path
from typing import Any, Literal, NoReturn

LEVELS = ("debug", "info", "warning", "error")
"""Levels of `logging`, which takes time to import."""
SHELLS = ("bash", "zsh", "tcsh", "fish")
"""Those for which shtab writes a completion script."""
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


class UsageError(Exception):
    """A command line that argparse refuses.

    Args:
        message: argparse's reason.
        parser: of the command, as far as it could be read.
    """

    def __init__(self, message: str, parser: "Parser") -> None:
        super().__init__(message)
        self.message = message
        self.parser = parser


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` where argparse prints the usage and exits."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings
        )

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise UsageError(message, self)


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
    _add_general(parser, is_shown=False)
    parser.set_defaults(quiet=False, log_level=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_starting(commands)
    _add_runs_of_recipes(commands)
    _add_data(commands)
    _add_job(commands)
    _add_cluster(commands)
    _add_results(commands)
    _add_chat(commands)
    _add_evaluation(commands)
    _add_eval(commands)
    _add_k8s(commands)
    _add_helpers(commands)
    return parser


def _command(commands: Any, name: str, what: str, *examples: str) -> Parser:
    """A new command with its help: what it does, and examples."""
    parser = _described(commands, name, what, examples)
    parser.set_defaults(parser=parser)
    _add_general(parser, is_shown=True)
    return parser


def _group(commands: Any, name: str, what: str, *examples: str) -> Any:
    """A new command that consists of verbs; returns what they are added to."""
    parser = _described(commands, name, what, examples)
    _add_general(parser, is_shown=False)
    return parser.add_subparsers(dest="verb", metavar="VERB", required=True)


def _described(commands: Any, name: str, what: str, examples: tuple[str, ...]) -> Parser:
    title = "example:" if len(examples) == 1 else "examples:"
    parser: Parser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog="\n".join([title, *(f"  finray {example}" for example in examples)]),
    )
    return parser


def _add_general(parser: Parser, is_shown: bool) -> None:
    """Options that may stand before and behind a command; the help of commands shows them."""
    quiet = "print only the result and errors"
    level = f"let the libraries log: {', '.join(LEVELS)}"
    if not is_shown:
        quiet = level = argparse.SUPPRESS
    # What stands before the command is kept, as a command has no default of its own.
    default = argparse.SUPPRESS
    group = parser.add_argument_group("general options")
    group.add_argument("--quiet", action="store_true", default=default, help=quiet)
    group.add_argument("--log-level", metavar="LEVEL", choices=LEVELS, default=default, help=level)


def _completed(action: argparse.Action, kind: Literal["file", "directory"]) -> None:
    """Let a shell complete an argument as a path; `finray completion` reads this."""
    action.complete = kind  # type: ignore[attr-defined]


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None


def _age(text: str) -> float:
    """12h, 30d or 2w in seconds."""
    units = {"h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
    try:
        seconds = float(text[:-1]) * units[text[-1:]]
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(
            f"expected an age such as 12h, 30d or 2w, found {text!r}"
        ) from None
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"expected an age of 0 or more, found {text!r}")
    return seconds


def _tag(text: str) -> str:
    if not text or len(text) > 40 or not all(c.isalnum() or c in "._:/+-" for c in text):
        raise argparse.ArgumentTypeError(
            f"expected a tag of at most 40 letters, digits and ._:/+-, found {text!r}"
        )
    return text


def _add_starting(commands: Any) -> None:
    init = _command(
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
    _completed(data, "file")
    model = init.add_argument(
        "--model",
        metavar="MODEL",
        help="a folder or a hub id (default: a small open model that fits this machine)",
    )
    _completed(model, "directory")
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
    _add_to(init, "the recipe (default: recipe.yaml)", Path("recipe.yaml"))
    parser = _command(
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
        help="a YAML or JSON file, or the command line of a training script in quotes",
    )
    _completed(source, "file")
    parser.add_argument(
        "--gpus",
        metavar="N",
        type=_whole,
        help="GPUs that it is meant for; a step's batch goes over all of them (default: those of "
        "the command line, else 1)",
    )
    info = parser.add_argument(
        "--dataset-info",
        metavar="FILE",
        type=Path,
        help="LLaMA-Factory's dataset_info.json (default: in dataset_dir, or beside the file)",
    )
    _completed(info, "file")
    parser.add_argument(
        "--method",
        metavar="KIND",
        help="the method of a TRL file that does not say it, such as dpo",
    )
    _add_to(parser, "a new file for the recipe (default: it is printed)")
    _add_json(parser)


def _add_to(parser: Parser, what: str, default: Path | None = None) -> None:
    to = parser.add_argument("--to", "-o", metavar="FILE", type=Path, default=default, help=what)
    _completed(to, "file")


def _add_planning(commands: Any) -> None:
    example = "plan recipe.yaml --gpu h100:8"
    what = "show how a recipe would run on a kind of GPU, without one"
    parser = _command(commands, "plan", what, example)
    _add_recipe(parser)
    parser.add_argument(
        "--gpu", metavar="CARD[:COUNT]", required=True, help="the GPUs, such as l40s or h100:8"
    )
    parser.add_argument(
        "--utilisation",
        metavar="SHARE",
        type=_number,
        default=0.4,
        help="share of a GPU's 16-bit operations that training reaches (default: 0.4)",
    )
    _add_json(parser)


def _add_runs_of_recipes(commands: Any) -> None:
    check = _command(
        commands,
        "check",
        "validate a recipe and its data, and show what a run would do",
        "check recipe.yaml",
    )
    prepare = _command(
        commands,
        "prepare",
        "prepare a recipe's data, without training",
        "prepare recipe.yaml",
    )
    train = _command(
        commands,
        "train",
        "train, or continue an unfinished run",
        "train recipe.yaml",
        "train recipe.yaml --set optim.learning_rate=1e-4 --set name=my-run",
    )
    _add_planning(commands)
    _add_preparing(prepare)
    for parser in (check, train):
        _add_training(parser)
    tune = _command(
        commands,
        "tune",
        "search for good settings, continue an unfinished sweep, or show one",
        "tune sweep.yaml --stop-when trials_without_gain=10",
        "tune show sweep.yaml",
    )
    _add_tune(tune)


def _add_data(commands: Any) -> None:
    verbs = _group(commands, "data", "look at the data of a recipe", "data show recipe.yaml")
    show = _command(
        verbs,
        "show",
        "show the first rows as the model sees them: template, special and trained tokens",
        "data show recipe.yaml --rows 5",
        "data show recipe.yaml --page rows.html",
    )
    _add_recipe(show)
    show.add_argument(
        "--rows", metavar="N", type=_whole, default=3, help="rows of each source (default: 3)"
    )
    page = show.add_argument(
        "--page", metavar="FILE", type=Path, help="write them as an HTML page instead"
    )
    _completed(page, "file")
    report = _command(
        verbs,
        "report",
        "curate the training rows, and show what each stage takes and why",
        "data report recipe.yaml",
    )
    _add_preparing(report)


def _add_preparing(parser: Parser) -> None:
    _add_recipe(parser)
    parser.add_argument(
        "--local", action="store_true", help="run in this process (scale.workers=0)"
    )
    _add_ray(parser)
    _add_json(parser)


def _add_training(parser: Parser) -> None:
    _add_preparing(parser)
    _add_waiting(parser)
    _add_again(parser)


def _add_tune(parser: Parser) -> None:
    sweep = parser.add_argument(
        "sweep",
        metavar="[show] SWEEP",
        nargs="+",
        help="the sweep, a YAML file; after show also a sweep's folder or URI",
    )
    _completed(sweep, "file")
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


def _add_storage(parser: Parser, is_verb: bool = True) -> None:
    """The storage, and JSON; what stands before a verb is kept, so a verb has no default."""
    default = argparse.SUPPRESS if is_verb else None
    storage = parser.add_argument(
        "--storage",
        metavar="FOLDER",
        default=default,
        help="folder or URI (default: $FINRAY_STORAGE, else runs)",
    )
    _completed(storage, "directory")
    as_json = argparse.SUPPRESS if is_verb else False
    parser.add_argument(
        "--json", action="store_true", default=as_json, help="print the result as JSON"
    )


def _add_runs(commands: Any) -> None:
    runs = _command(
        commands,
        "runs",
        "list the runs of a storage; with a verb compare, note or delete runs",
        "runs --storage s3://bucket/runs",
        "runs --sort eval_loss --tag baseline",
        "runs compare my-run my-run.1",
    )
    _add_storage(runs, is_verb=False)
    runs.add_argument(
        "--sort", metavar="KEY", help="the best first, by a metric or a column, such as eval_loss"
    )
    runs.add_argument("--tag", metavar="TAG", help="only runs with a tag (log.tags, runs note)")
    verbs = runs.add_subparsers(dest="verb", metavar="VERB", required=False)
    _add_compare(verbs)
    _add_note(verbs)
    _add_deleting(verbs, commands)


def _add_compare(verbs: Any) -> None:
    compare = _command(
        verbs,
        "compare",
        "show how runs differ: settings, metrics, curves and answers",
        "runs compare first second",
        "runs compare first second third --page comparison.html",
    )
    _add_run_names(compare)
    compare.add_argument(
        "--rows", metavar="N", type=_whole, default=3, help="answers to show (default: 3)"
    )
    page = compare.add_argument(
        "--page", metavar="FILE", type=Path, help="write it as an HTML page instead"
    )
    _completed(page, "file")
    _add_storage(compare)


def _add_note(verbs: Any) -> None:
    note = _command(
        verbs,
        "note",
        "write a note about a run, and tags",
        "runs note my-run 'warm-up too short' --tag baseline",
    )
    _completed(note.add_argument("run", metavar="RUN", help="a run's name or folder"), "directory")
    note.add_argument("text", metavar="TEXT", nargs="?", help="the note; '' removes it")
    for option, what, dest in (("--tag", "add", "tags"), ("--untag", "remove", "without")):
        note.add_argument(
            option,
            dest=dest,
            metavar="TAG",
            action="append",
            type=_tag,
            default=[],
            help=f"{what} a tag (may be repeated)",
        )
    _add_storage(note)


def _add_deleting(verbs: Any, commands: Any) -> None:
    rm = _command(
        verbs, "rm", "delete runs and sweeps that are named; first shows their sizes", "runs rm old"
    )
    _add_run_names(rm)
    prune = _command(
        verbs,
        "prune",
        "delete runs by a rule; first shows them with their sizes",
        "runs prune --keep-best 3 --older-than 30d",
        "runs prune --keep-best 3 --by exact_match --yes",
    )
    prune.add_argument(
        "--keep-best",
        metavar="N",
        type=_whole,
        help="keep the best runs of each method, and delete the others",
    )
    prune.add_argument(
        "--by",
        metavar="METRIC",
        default="eval_loss",
        help="the metric of --keep-best (default: eval_loss)",
    )
    prune.add_argument(
        "--older-than", metavar="AGE", type=_age, help="delete only older ones: 12h, 30d, 2w"
    )
    for parser in (rm, prune):
        parser.add_argument(
            "--unfinished",
            action="store_true",
            help="delete also what the same command would continue",
        )
        _add_storage(parser)
    clean = _command(
        commands,
        "clean",
        "delete prepared data, rehearsals and remains that no run refers to; first shows sizes",
        "clean",
        "clean --older-than 7d --yes",
    )
    clean.add_argument(
        "--older-than",
        metavar="AGE",
        type=_age,
        default=86400.0,
        help="keep what was used later (default: 1d)",
    )
    _add_storage(clean, is_verb=False)
    for parser in (rm, prune, clean):
        parser.add_argument(
            "--yes", action="store_true", help="delete it; without it nothing is deleted"
        )


def _add_run_names(parser: Parser) -> None:
    run = parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="a run's name in the storage, its folder or URI"
    )
    _completed(run, "directory")


def _add_results(commands: Any) -> None:
    _add_runs(commands)
    report = _command(commands, "report", "write a run's report.html again", "report runs/my-run")
    export = _command(
        commands,
        "export",
        "write a finished run's result as a folder that loads without finray, or publish it",
        "export runs/my-run --to my-model --merge",
        "export runs/my-run --push my-name/my-model",
        "export runs/my-run --to my-model --merge --format gguf --llama-cpp ~/llama.cpp --ollama",
    )
    for parser in (report, export):
        _completed(
            parser.add_argument("run", metavar="RUN", help="a run's folder or URI"), "directory"
        )
    to = export.add_argument("--to", metavar="DIR", type=Path, help="a new folder")
    _completed(to, "directory")
    export.add_argument("--merge", action="store_true", help="merge the adapter into its base")
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="data type of a whole model's weights (default: the base model's)",
    )
    _add_publishing(export)
    _add_json(export)


def _add_publishing(export: Parser) -> None:
    export.add_argument(
        "--quantize", choices=("nf4", "int8"), help="store a whole model's weights quantised"
    )
    export.add_argument(
        "--format",
        choices=("safetensors", "gguf"),
        default="safetensors",
        help="gguf: also a file for llama.cpp and Ollama (default: safetensors)",
    )
    folder = export.add_argument(
        "--llama-cpp",
        metavar="FOLDER",
        type=Path,
        help="a checkout of llama.cpp, whose converter writes the GGUF file",
    )
    _completed(folder, "directory")
    export.add_argument(
        "--ollama", action="store_true", help="write a Modelfile, with template and stops"
    )
    export.add_argument(
        "--push", metavar="OWNER/NAME", help="upload it to a private repository of the hub"
    )
    export.add_argument("--public", action="store_true", help="let a new repository be public")


def _add_evaluation(commands: Any) -> None:
    generate = _command(
        commands,
        "generate",
        "answer the prompts of a file with a trained model",
        "generate runs/my-run --prompts prompts.jsonl --to answers.jsonl",
        "generate Qwen/Qwen3-0.6B --prompts prompts.jsonl --to answers.jsonl --temperature 0.7",
    )
    _add_model(generate)
    prompts = generate.add_argument(
        "--prompts",
        metavar="FILE",
        required=True,
        help="rows with conversations, prompts or instructions: a file, folder or URI",
    )
    to = generate.add_argument(
        "--to",
        metavar="FILE",
        type=Path,
        required=True,
        help="the JSON Lines to write; a started file is continued",
    )
    for action in (prompts, to):
        _completed(action, "file")
    _add_answering(generate)
    _add_sampling(generate)
    generate.add_argument(
        "--address",
        help="a running Ray cluster that answers, as HOST:PORT or auto, or local (default: "
        "$FINRAY_ADDRESS unless that is a URL, then $RAY_ADDRESS, else this process)",
    )
    generate.add_argument(
        "--workers",
        metavar="N",
        type=_whole,
        default=2,
        help="processes that answer on a cluster without GPUs (default: 2)",
    )
    generate.add_argument(
        "--base", action="store_true", help="answer with the model under the adapter, too"
    )
    _add_json(generate)


def _add_chat(commands: Any) -> None:
    chat = _command(
        commands,
        "chat",
        "talk to a trained model in the terminal",
        "chat runs/my-run",
        "chat runs/my-run --base --system 'Answer in one sentence.'",
    )
    _add_model(chat)
    chat.add_argument("--base", action="store_true", help="show the base's answers, too")
    chat.add_argument("--system", metavar="TEXT", default="", help="the system prompt")
    tools = chat.add_argument(
        "--tools", metavar="FILE", type=Path, help="a JSON list of the tools that it may call"
    )
    _completed(tools, "file")
    _add_length(chat)
    _add_sampling(chat)


def _add_eval(commands: Any) -> None:
    evaluate = _command(
        commands,
        "eval",
        "measure a trained model on rows with answers",
        "eval runs/my-run --base",
        "eval runs/my-run --data test.jsonl --metric rougeL --metric score.py:polite",
        "eval runs/my-run --data test.jsonl --against runs/other "
        "--judge http://127.0.0.1:8000/v1 --judge-model Qwen/Qwen3-32B",
    )
    _add_model(evaluate)
    data = evaluate.add_argument(
        "--data", metavar="FILE", help="rows: a file, folder or URI (default: the run's data.eval)"
    )
    evaluate.add_argument(
        "--metric",
        dest="metrics",
        metavar="NAME",
        action="append",
        default=[],
        help="exact_match, token_f1 (both are the default), rouge1, rouge2, rougeL, bleu, chrf, "
        "json_valid, tool_calls, or score.py:function (may be repeated)",
    )
    schema = evaluate.add_argument(
        "--schema", metavar="FILE", type=Path, help="a JSON schema for json_valid"
    )
    for action in (data, schema):
        _completed(action, "file")
    evaluate.add_argument("--no-loss", action="store_true", help="measure no loss and perplexity")
    evaluate.add_argument(
        "--base", action="store_true", help="measure the model under the adapter, too"
    )
    against = evaluate.add_argument(
        "--against", metavar="RUN|MODEL", help="compare with another model, row by row"
    )
    evaluate.add_argument(
        "--judge",
        metavar="URL",
        help="an OpenAI-compatible API that scores answers; its token is in $FINRAY_JUDGE_TOKEN",
    )
    evaluate.add_argument(
        "--judge-model", metavar="NAME", default="", help="the judge's model, as its API calls it"
    )
    evaluate.add_argument("--rows", metavar="N", type=_whole, help="read the first rows only")
    to = evaluate.add_argument(
        "--to",
        metavar="DIR",
        type=Path,
        help="folder of eval.json, eval.jsonl and eval.html (default: the run's)",
    )
    for action in (against, to):
        _completed(action, "directory")
    _add_answering(evaluate)
    _add_json(evaluate)


def _add_model(parser: Parser) -> None:
    model = parser.add_argument(
        "model",
        metavar="RUN|MODEL",
        help="a run's folder, name or URI, a checkpoint of it, a model's folder, or a hub id",
    )
    _completed(model, "directory")


def _add_length(parser: Parser) -> None:
    parser.add_argument(
        "--max-tokens",
        metavar="N",
        type=_whole,
        default=512,
        help="longest answer, in tokens (default: 512)",
    )


def _add_sampling(parser: Parser) -> None:
    parser.add_argument(
        "--temperature", metavar="T", type=_number, default=0.0, help="0 (default) is greedy"
    )
    parser.add_argument(
        "--top-p", metavar="P", type=_number, default=1.0, help="sample among the likeliest tokens"
    )
    parser.add_argument(
        "--seed", metavar="N", type=_whole, default=0, help="seed of sampled answers (default: 0)"
    )


def _add_answering(parser: Parser) -> None:
    _add_length(parser)
    parser.add_argument(
        "--batch", metavar="N", type=_whole, default=32, help="answers in a batch (default: 32)"
    )


def _add_helpers(commands: Any) -> None:
    schema = _command(
        commands,
        "schema",
        "print the JSON schema of recipes or sweeps, for editors",
        "schema > recipe.schema.json",
        "schema sweep > sweep.schema.json",
    )
    schema.add_argument(
        "of", nargs="?", choices=("recipe", "sweep"), default="recipe", help="default: recipe"
    )
    completion = _command(
        commands,
        "completion",
        "print a script with which a shell completes finray's commands",
        "completion bash > ~/.local/share/bash-completion/completions/finray",
        "completion zsh > ~/.zfunc/_finray",
    )
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))


def _add_k8s(commands: Any) -> None:
    example = "k8s render recipe.yaml --overlay gpu | kubectl create -f -"
    verbs = _group(commands, "k8s", "run on Kubernetes", example)
    render = _command(verbs, "render", "write a recipe as a RayJob of KubeRay, in YAML", example)
    _add_recipe(render)
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
        "--to", metavar="FILE", type=Path, help="file to write (default: stdout)"
    )
    _completed(to, "file")
    run = _command(
        verbs, "run", "what a rendered RayJob runs on its head: train", "k8s run recipe.yaml"
    )
    _add_training(run)
    run.set_defaults(address="auto", wait_for_nodes=3600.0)


def _add_job(commands: Any) -> None:
    verbs = _group(
        commands,
        "job",
        "run recipes and sweeps on a cluster as Ray jobs",
        "job submit recipe.yaml --address http://head:8265 --wait",
        "job logs my-run --follow",
    )
    submit = _command(
        verbs,
        "submit",
        "upload a recipe or sweep with its files, and run it",
        "job submit recipe.yaml --address http://head:8265 --wait",
    )
    _add_submit(submit)
    listing = _command(verbs, "list", "list the cluster's runs", "job list")
    status = _command(
        verbs, "status", "show the state of a run's last attempt", "job status my-run"
    )
    logs = _command(verbs, "logs", "show what a run has printed", "job logs my-run --follow")
    logs.add_argument("--follow", "-f", action="store_true", help="continue until it ends")
    stop = _command(verbs, "stop", "let a run save a checkpoint and exit", "job stop my-run")
    fetch = _command(
        verbs,
        "fetch",
        "download a run's metrics, report and result",
        "job fetch my-run --to results",
    )
    to = fetch.add_argument(
        "--to", metavar="DIR", type=Path, help="folder to write (default: runs/NAME)"
    )
    _completed(to, "directory")
    for verb in (status, logs, stop, fetch):
        verb.add_argument("name", metavar="NAME", help="the run's name")
    for verb in (submit, listing, status, logs, stop, fetch):
        _add_dashboard(verb)
    for verb in (submit, listing, status):
        _add_json(verb)


def _add_submit(parser: Parser) -> None:
    recipe = parser.add_argument(
        "recipe", metavar="FILE", type=Path, help="a recipe or a sweep, in YAML"
    )
    _completed(recipe, "file")
    _add_overrides(parser, "a setting; recipe.KEY=VALUE changes a sweep's base recipe")
    parser.add_argument("--wait", action="store_true", help="print its log until it ends")
    folder = parser.add_argument(
        "--on-cluster",
        metavar="FOLDER",
        action="append",
        default=[],
        help="a folder of the cluster's nodes; its files are not uploaded (may be repeated)",
    )
    _completed(folder, "directory")
    _add_waiting(parser)
    _add_again(parser)
    parser.add_argument(
        "--max-mib",
        metavar="MIB",
        type=_number,
        default=100.0,
        help="largest size of the uploaded files (default: 100)",
    )
    parser.add_argument(
        "--python", help="the head's interpreter (default: the one that runs Ray's workers)"
    )


def _add_cluster(commands: Any) -> None:
    verbs = _group(
        commands,
        "cluster",
        "start, stop and check a cluster of your own machines",
        "cluster up",
        "cluster doctor",
    )
    up = _command(
        verbs, "up", "start a head here, and show how other nodes join it", "cluster up --port 6380"
    )
    up.add_argument(
        "--port", metavar="PORT", type=_whole, default=6379, help="port of the head (default: 6379)"
    )
    up.add_argument(
        "--dashboard-port",
        metavar="PORT",
        type=_whole,
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
    _command(verbs, "down", "stop the head that was started here, with its node", "cluster down")
    status = _command(
        verbs, "status", "show whether the head that was started here runs", "cluster status"
    )
    doctor = _command(
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
    _add_json(status)


def _add_dashboard(parser: Parser) -> None:
    parser.add_argument(
        "--address",
        metavar="URL",
        help="the cluster's dashboard (default: $FINRAY_ADDRESS, else http://127.0.0.1:8265)",
    )


def _add_recipe(parser: Parser) -> None:
    recipe = parser.add_argument(
        "recipe", metavar="RECIPE", type=Path, help="the recipe, a YAML file"
    )
    _completed(recipe, "file")
    _add_overrides(parser, "a setting, such as optim.learning_rate=1e-4")


def _add_overrides(parser: Parser, what: str) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help=f"override {what} (may be repeated)",
    )


def _add_ray(parser: Parser) -> None:
    parser.add_argument(
        "--address",
        help="a running Ray cluster, as HOST:PORT or auto (default: $FINRAY_ADDRESS unless that is "
        "a URL, then $RAY_ADDRESS), or local: start Ray on this machine, the default of a sweep",
    )
    parser.add_argument("--verbose", action="store_true", help="show what the workers print")


def _add_waiting(parser: Parser) -> None:
    parser.add_argument(
        "--wait-for-nodes",
        metavar="SECONDS",
        type=_number,
        default=0.0,
        help="seconds to wait for an autoscaler to add the missing nodes (default: 0)",
    )


def _add_again(parser: Parser) -> None:
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="begin anew; an earlier run's folder is renamed to NAME.1",
    )
    parser.add_argument(
        "--longer",
        action="store_true",
        help="steps that were added get a learning-rate schedule of their own",
    )


def _add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
