"""The arguments of commands on runs and results; only the standard library is imported."""

import argparse
from pathlib import Path
from typing import Any

from .parser import (
    Parser,
    add_command,
    add_json,
    add_model,
    add_storage,
    complete_as,
    local,
    number,
    whole,
)


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


def _add_runs(commands: Any) -> None:
    runs = add_command(
        commands,
        "runs",
        "list the runs of a storage; with a verb compare, note or delete runs",
        "runs --storage s3://bucket/runs",
        "runs --sort eval_loss --tag baseline",
        "runs compare my-run my-run.1",
    )
    add_storage(runs, is_verb=False)
    runs.add_argument(
        "--sort", metavar="KEY", help="the best first, by a metric or a column, such as eval_loss"
    )
    runs.add_argument("--tag", metavar="TAG", help="only runs with a tag (log.tags, runs note)")
    verbs = runs.add_subparsers(dest="verb", metavar="VERB", required=False)
    _add_compare(verbs)
    _add_note(verbs)
    _add_deleting(verbs, commands)


def _add_compare(verbs: Any) -> None:
    compare = add_command(
        verbs,
        "compare",
        "show how runs differ: settings, metrics, curves and answers",
        "runs compare first second",
        "runs compare first second third --page comparison.html",
    )
    _add_run_names(compare)
    compare.add_argument(
        "--rows", metavar="N", type=whole, default=3, help="answers to show (default: 3)"
    )
    page = compare.add_argument(
        "--page", metavar="FILE", type=local, help="write it as an HTML page instead"
    )
    complete_as(page, "file")
    add_storage(compare)


def _add_note(verbs: Any) -> None:
    note = add_command(
        verbs,
        "note",
        "write a note about a run, and tags",
        "runs note my-run 'warm-up too short' --tag baseline",
    )
    complete_as(note.add_argument("run", metavar="RUN", help="a run's name or folder"), "directory")
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
    add_storage(note)


def _add_deleting(verbs: Any, commands: Any) -> None:
    rm = add_command(
        verbs, "rm", "delete the named runs and sweeps; first shows their sizes", "runs rm old"
    )
    _add_run_names(rm)
    prune = add_command(
        verbs,
        "prune",
        "delete runs by a rule; first shows them with their sizes",
        "runs prune --keep-best 3 --older-than 30d",
        "runs prune --keep-best 3 --by exact_match --yes",
    )
    prune.add_argument(
        "--keep-best",
        metavar="N",
        type=whole,
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
            help="also delete unfinished runs and sweeps, which the same command would continue",
        )
        add_storage(parser)
    clean = add_command(
        commands,
        "clean",
        "delete prepared data, windows, rehearsals and unfinished writes that no run needs",
        "clean",
        "clean --older-than 7d --yes",
    )
    clean.add_argument(
        "--older-than",
        metavar="AGE",
        type=_age,
        default=86400.0,
        help="keep what was used within this time (default: 1d)",
    )
    add_storage(clean, is_verb=False)
    for parser in (rm, prune, clean):
        parser.add_argument(
            "--yes", action="store_true", help="delete it; without it nothing is deleted"
        )


def _add_run_names(parser: Parser) -> None:
    run = parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="a run's name in the storage, its folder or URI"
    )
    complete_as(run, "directory")


def add_results(commands: Any) -> None:
    _add_runs(commands)
    report = add_command(
        commands, "report", "write a run's report.html again", "report runs/my-run"
    )
    export = add_command(
        commands,
        "export",
        "write a finished run's result as a folder that loads without finray, or publish it",
        "export runs/my-run --to my-model --merge",
        "export runs/my-run --push my-name/my-model",
        "export runs/my-run --to my-model --merge --format gguf --llama-cpp ~/llama.cpp --ollama",
    )
    for parser in (report, export):
        complete_as(
            parser.add_argument(
                "run", metavar="RUN", help="a run's name in the storage, its folder or URI"
            ),
            "directory",
        )
    to = export.add_argument("--to", metavar="DIR", type=local, help="a new folder")
    complete_as(to, "directory")
    export.add_argument("--merge", action="store_true", help="merge the adapter into its base")
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="data type of a whole model's weights (default: the base model's)",
    )
    _add_publishing(export)
    add_json(export)


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
    complete_as(folder, "directory")
    export.add_argument(
        "--ollama", action="store_true", help="write a Modelfile, with template and stops"
    )
    export.add_argument(
        "--push", metavar="OWNER/NAME", help="upload it to a private repository of the hub"
    )
    export.add_argument("--public", action="store_true", help="let a new repository be public")


def add_evaluation(commands: Any) -> None:
    generate = add_command(
        commands,
        "generate",
        "answer the prompts of a file with a trained model",
        "generate runs/my-run --prompts prompts.jsonl --to answers.jsonl",
        "generate Qwen/Qwen3-0.6B --prompts prompts.jsonl --to answers.jsonl --temperature 0.7",
    )
    add_model(generate)
    prompts = generate.add_argument(
        "--prompts",
        metavar="FILE",
        required=True,
        help="rows with conversations, prompts or instructions: a file, folder or URI",
    )
    to = generate.add_argument(
        "--to",
        metavar="FILE",
        type=local,
        required=True,
        help="the JSON Lines to write; a started file is continued",
    )
    for action in (prompts, to):
        complete_as(action, "file")
    _add_answering(generate)
    _add_sampling(generate)
    generate.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        help="what answers (default: vLLM on GPUs, if it is installed and can load the model)",
    )
    generate.add_argument(
        "--base", action="store_true", help="answer with the model under the adapter, too"
    )
    add_json(generate)


def add_chat(commands: Any) -> None:
    chat = add_command(
        commands,
        "chat",
        "talk to a trained model in the terminal",
        "chat runs/my-run",
        "chat runs/my-run --base --system 'Answer in one sentence.'",
    )
    add_model(chat)
    chat.add_argument("--base", action="store_true", help="show the base's answers, too")
    chat.add_argument("--system", metavar="TEXT", default="", help="the system prompt")
    tools = chat.add_argument(
        "--tools", metavar="FILE", type=Path, help="a JSON list of the tools that it may call"
    )
    complete_as(tools, "file")
    _add_length(chat)
    _add_sampling(chat)


def add_eval(commands: Any) -> None:
    evaluate = add_command(
        commands,
        "eval",
        "measure a trained model on rows with answers",
        "eval runs/my-run --base",
        "eval runs/my-run --data test.jsonl --metric rougeL --metric score.py:polite",
        "eval runs/my-run --data test.jsonl --against runs/other "
        "--judge http://127.0.0.1:8000/v1 --judge-model Qwen/Qwen3-32B",
    )
    add_model(evaluate)
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
    evaluate.add_argument(
        "--tasks",
        metavar="NAME,NAME",
        type=lambda text: [name for each in text.split(",") if (name := each.strip())],
        default=[],
        help="tasks of lm-evaluation-harness, or YAML files of such",
    )
    schema = evaluate.add_argument(
        "--schema", metavar="FILE", type=Path, help="a JSON schema for json_valid"
    )
    for action in (data, schema):
        complete_as(action, "file")
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
    evaluate.add_argument("--rows", metavar="N", type=whole, help="read the first rows only")
    to = evaluate.add_argument(
        "--to",
        metavar="DIR",
        help="folder or URI of eval.json, eval.jsonl and eval.html (default: the run's)",
    )
    for action in (against, to):
        complete_as(action, "directory")
    _add_answering(evaluate)
    add_json(evaluate)


def _add_length(parser: Parser) -> None:
    parser.add_argument(
        "--max-tokens",
        metavar="N",
        type=whole,
        default=512,
        help="longest answer, in tokens (default: 512)",
    )


def _add_sampling(parser: Parser) -> None:
    parser.add_argument(
        "--temperature", metavar="T", type=number, default=0.0, help="0 (default) is greedy"
    )
    parser.add_argument(
        "--top-p", metavar="P", type=number, default=1.0, help="sample among the likeliest tokens"
    )
    parser.add_argument(
        "--seed", metavar="N", type=whole, default=0, help="seed of sampled answers (default: 0)"
    )


def _add_answering(parser: Parser) -> None:
    _add_length(parser)
    parser.add_argument(
        "--batch", metavar="N", type=whole, default=32, help="answers in a batch (default: 32)"
    )
    parser.add_argument(
        "--address",
        help="a running Ray cluster that answers, as HOST:PORT or auto, or local (default: "
        "$FINRAY_ADDRESS unless that is a URL, then $RAY_ADDRESS, else this machine)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=whole,
        help="processes that answer, each with a GPU where there are some (default: this one; on "
        "a cluster all of its GPUs, or 2 processes)",
    )
