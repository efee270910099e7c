"""The command line itself: help, mistakes in one line, completion, quietness, log levels."""

import argparse
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import shtab
import yaml

from finray.cluster.cli.arguments import build_parser
from finray.cluster.cli.cluster_arguments import SHELLS
from finray.cluster.cli.commands import COMMANDS, command_function
from finray.cluster.cli.main import main
from finray.cluster.cli.parser import Parser
from finray.cluster.cli.remedies import Remedies
from finray.cluster.environment import worker_environment
from finray.cluster.nodes.probes import Line
from finray.cluster.preflight import Preflight
from finray.training.common.logs import chosen_level, limit
from finray.training.common.progress import Progress
from finray.training.config.recipe import Recipe


def parsers(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, Parser]]:
    """Every command and group of verbs, by its words."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, child in action.choices.items():
                yield f"{name} {word}".strip(), child
                yield from parsers(child, f"{name} {word}")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints: one line, with finray's name and exit code 2."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("finray: ") and err.count("\n") == 1
    return err.removeprefix("finray: ").rstrip()


# help


def test_every_command_has_its_function() -> None:
    groups = {"job", "cluster", "k8s", "data"}
    assert {name for name, _ in parsers(build_parser())} == COMMANDS.keys() | groups
    for name in COMMANDS:
        command, _, verb = name.partition(" ")
        words = {"command": command, **({"verb": verb} if verb else {})}
        assert callable(command_function(argparse.Namespace(**words)))


@pytest.mark.parametrize("name", [name for name, _ in parsers(build_parser())])
def test_help_says_what_and_how(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = dict(parsers(build_parser()))[name]
    assert parser.description and parser.description.count(".") == 1 + name.startswith("report")
    lines = (parser.epilog or "").splitlines()
    examples = [line.strip() for line in lines[1:]]
    assert lines[0] in ("example:", "examples:") and examples
    for example in examples:
        words = shlex.split(example.partition("|")[0].partition(">")[0])
        assert words[0] == "finray" and " ".join(words[1:]).startswith(name)
        options = build_parser().parse_args(words[1:])
        command = " ".join(filter(None, (options.command, vars(options).get("verb"))))
        assert command in COMMANDS and command.startswith(name)
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*name.split(), "--help"])
    out = capsys.readouterr().out
    assert parser.description in " ".join(out.split()) and examples[0] in out


def test_the_examples_of_the_whole_help_are_commands() -> None:
    text = build_parser().format_help()
    examples = [line.strip() for line in text.splitlines() if line.startswith("  finray ")]
    assert len(examples) > 5
    for example in examples:
        build_parser().parse_args(shlex.split(example.partition("|")[0])[1:])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"finray {version('finray')}\n"


def test_a_mistake_and_the_version_need_only_the_standard_library() -> None:
    script = (
        "import sys; before = set(sys.modules)\n"
        "from finray.cluster.cli.main import main\n"
        "assert main(['trian']) == 2 and main(['runs', '--storag=x']) == 2\n"
        "assert 'importlib.metadata' not in sys.modules\n"
        "try: main(['--version'])\n"
        "except SystemExit: pass\n"
        "extra = {m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "assert extra <= {'finray'}, extra"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian x.yaml", "unknown command 'trian'; did you mean 'train'?"),
        ("Train x.yaml", "unknown command 'Train'; did you mean 'train'?"),
        ("--quiet --log-level debug trian", "unknown command 'trian'; did you mean 'train'?"),
        ("job sumbit x.yaml", "unknown verb 'sumbit' of job; did you mean 'submit'?"),
        ("cluster dwon", "unknown verb 'dwon' of cluster; did you mean 'down'?"),
        ("k8s rendr x.yaml", "unknown verb 'rendr' of k8s; did you mean 'render'?"),
        ("tune shwo x.yaml", "unknown verb 'shwo' of tune; did you mean 'show'?"),
        ("submit x.yaml", "unknown command 'submit'; did you mean 'job submit'?"),
        ("doctor", "unknown command 'doctor'; did you mean 'cluster doctor'?"),
        ("frobnicate", "unknown command 'frobnicate'; finray --help lists them"),
        ("job zzz", "unknown verb 'zzz' of job; finray job --help lists them"),
        ("", "a command is missing; finray --help lists them"),
        ("job", "a verb is missing; finray job --help lists them"),
        ("train", "train needs RECIPE; see finray train --help"),
        ("export runs/run", "export needs --to or --push; see finray export --help"),
        ("runs --jsno", "unknown option --jsno; did you mean --json?"),
        ("train x.yaml --adress local", "unknown option --adress; did you mean --address?"),
        ("train x.yaml --adress=local", "unknown option --adress; did you mean --address?"),
        ("job logs run --fol", "unknown option --fol; did you mean --follow?"),
        ("job logs run --quite", "unknown option --quite; did you mean --quiet?"),
        ("--verison", "unknown option --verison; did you mean --version?"),
        ("runs --frobnicate", "unknown option --frobnicate; see finray runs --help"),
        ("runs here", "unexpected 'here'; see finray runs --help"),
        ("tune a.yaml b.yaml", "unexpected 'b.yaml'; see finray tune --help"),
        (
            "job --address http://h list",
            "--address belongs behind the command: finray job VERB --address",
        ),
        (
            "--set a=b train x.yaml",
            "--set belongs behind the command: finray COMMAND --set",
        ),
        (
            "cluster up --port many",
            "--port: expected a whole number, found 'many'; see finray cluster up --help",
        ),
        (
            "check x.yaml --wait-for-nodes long",
            "--wait-for-nodes: expected a number, found 'long'; see finray check --help",
        ),
        ("runs --json=yes", "--json takes no value; see finray runs --help"),
        ("train x.yaml --set", "--set needs a value; see finray train --help"),
        (
            "completion elvish",
            "SHELL: expected one of bash, zsh, tcsh, fish, found 'elvish'; "
            "see finray completion --help",
        ),
        (
            "--log-level loud runs",
            "--log-level: expected one of debug, info, warning, error, found 'loud'; "
            "see finray --help",
        ),
        (
            "train x.yaml --quiet --verbose",
            "--quiet and --verbose contradict each other; leave out one of them",
        ),
    ],
)
def test_a_mistake_names_its_remedy(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, *arguments.split()) == message


def test_every_option_can_be_suggested() -> None:
    for name, parser in parsers(build_parser()):
        if name in COMMANDS:
            names = {text for action in parser._actions for text in action.option_strings}
            suggested = Remedies(argparse.Namespace(parser=parser))._options
            assert set(suggested) | {"--help"} == {text for text in names if text[:2] == "--"}


RATE = "--set optim.learning_rate=1e-4"


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ("--optim.learning_rate=1e-4", RATE),
        ("--optim.learning-rate 1e-4", RATE),
        ("--optim-learning-rate 1e-4", RATE),
        ("--learning_rate 1e-4", RATE),
        ("--learning-rate 1e-4", RATE),
        ("--trainer.learning_rate=1e-4", RATE),
        ("--lr=1e-4", RATE),
        ("-lr 1e-4", RATE),
        ("optim.learning_rate=1e-4", RATE),
        ("lr=1e-4", RATE),
        (f"optim.learning_rate={'1' * 90}", f"--set optim.learning_rate={'1' * 90}"),
        ("model.base=base.yaml", "--set model.base=base.yaml"),
        ("--lr 1e-4 --epochs 3", f"{RATE} --set optim.epochs=3"),
        ("--seed -1", "--set seed=-1"),
        ("--data.train.1.weight=2", "--set data.train.1.weight=2"),
        ("data.curate=[deduplicate]", "--set 'data.curate=[deduplicate]'"),
        ("--data.curate=[deduplicate]", "--set 'data.curate=[deduplicate]'"),
        ("data.train=[a.jsonl,b.jsonl]", "--set 'data.train=[a.jsonl,b.jsonl]'"),
        ("adapter=lora", "--set adapter=lora"),
        ("method=dpo", "--set method=dpo"),
        ("data.eval=rows.jsonl", "--set data.eval=rows.jsonl"),
        ("data.train.1.map=rows.py:f", "--set data.train.1.map=rows.py:f"),
        ('"adapter={rank: 8}"', "--set 'adapter={rank: 8}'"),
        ("--num_train_epochs 3", "--set optim.epochs=3"),
        ("--model org/name", "--set model.base=org/name"),
        ("--model_name_or_path org/name", "--set model.base=org/name"),
        ("--dataset_name rows.jsonl", "--set data.train.0.path=rows.jsonl"),
        ("--load_in_4bit", "--set model.quantize=nf4"),
        ("--gradient_accumulation_steps=8", "--set optim.batch_size=8"),
        ("--dora", "--set adapter.dora=VALUE"),
        ("--schedule 'a b'", "--set 'optim.schedule=a b'"),
        ("--storage s3://bucket/runs", "--set storage=s3://bucket/runs"),
    ],
)
def test_settings_of_other_tools_become_set(
    given: str, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before and behind the recipe, which need not exist."""
    for words in (
        ["train", "r.yaml", *shlex.split(given)],
        ["train", *shlex.split(given), "r.yaml"],
    ):
        assert refusal(capsys, *words).endswith(f"; settings are given as {setting}"), words


def test_every_setting_with_a_name_of_its_own_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    text = refusal(capsys, "check", "r.yaml", "--dtype", "float16")
    assert text.endswith("--set model.dtype=float16 or --set adapter.dtype=float16")
    text = refusal(capsys, "check", "r.yaml", "--lr", "1", "--epochs=2")
    assert text.startswith("unknown options --lr, --epochs; settings are given as --set ")
    text = refusal(capsys, "check", "r.yaml", "--learnin_rate", "1")
    assert text == "unknown option --learnin_rate; did you mean --set optim.learning_rate=1?"
    text = refusal(capsys, "check", "r.yaml", "optm.learnig_rate=1")
    assert text == "unexpected optm.learnig_rate=1; did you mean --set optim.learning_rate=1?"


def test_settings_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({"name": "s", "recipe": "r.yaml"}), encoding="utf-8")
    for command in ("tune", "job submit"):
        words = [*command.split(), str(sweep)]
        for given in ("--lr 1e-4", "lr=1e-4", "recipe.optim.learning_rate=1e-4"):
            text = refusal(capsys, *words, *given.split())
            assert text.endswith("--set recipe.optim.learning_rate=1e-4")
        for given in ("data.curate=[a]", "recipe.data.curate=[a]"):
            assert refusal(capsys, *words, given).endswith("--set 'recipe.data.curate=[a]'")
        assert refusal(capsys, *words, "--trials", "9").endswith(" --set trials=9")
        assert refusal(capsys, *words, "--seed=9").endswith(" --set seed=9")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: r\n", encoding="utf-8")
    text = refusal(capsys, "job", "submit", str(recipe), "--lr", "1e-4")
    assert text.endswith(f" {RATE}")


def test_a_secret_in_a_mistake_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    secret = "hf_" + "a" * 30
    assert secret not in refusal(capsys, "train", "r.yaml", f"--revision={secret}")


# completion


def complete(script: str, *words: str, folder: Path) -> list[str]:
    """What bash offers for the last of the words."""
    program = f"""
source /dev/stdin <<'SCRIPT'
{script}
SCRIPT
compopt() {{ :; }}
COMP_WORDS=({" ".join(map(shlex.quote, words))})
COMP_CWORD=$(({len(words)} - 1))
_shtab_finray
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "--norc", "-c", program], cwd=folder, capture_output=True, text=True, check=True
    )
    assert not done.stderr
    return sorted(done.stdout.split())


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "results").mkdir()

    def offered(*words: str) -> list[str]:
        return complete(script, "finray", *words, folder=tmp_path)

    assert offered("tr") == ["train"]
    assert offered("job", "s") == ["status", "stop", "submit"]
    assert offered("train", "rec") == ["recipe.yaml"]
    assert offered("train", "recipe.yaml", "--lo") == ["--local", "--log-level", "--longer"]
    assert offered("train", "recipe.yaml", "--log-level", "w") == ["warning"]
    assert offered("export", "run", "--to", "re") == ["results"]
    assert offered("job", "fetch", "run", "--to", "re") == ["results"]
    assert offered("tune", "rec") == ["recipe.yaml"]
    assert offered("completion", "") == sorted(SHELLS)


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(SHELLS) <= set(shtab.SUPPORTED_SHELLS)
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert "finray" in out and "submit" in out and "recipe" in out


# how much is printed


class Recorder(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_warnings_of_a_check_are_progress(capsys: pytest.CaptureFixture[str]) -> None:
    """So --quiet hides them; an error is raised."""
    progress = Recorder()
    lines = (Line("memory", True, "tight", warns=True), Line("fits", True, "yes"))
    Preflight(lines, {}).require_success(progress)
    assert progress.notes == ["memory: tight"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("words", ["--quiet runs", "runs --quiet", "runs"])
def test_general_options_stand_before_and_behind(words: str) -> None:
    options = build_parser().parse_args(words.split())
    assert options.quiet == ("--quiet" in words) and options.log_level is None
    words = f"{words.replace('--quiet', '')} --log-level info"
    assert build_parser().parse_args(words.split()).log_level == "info"
    options = build_parser().parse_args(["--log-level", "info", "job", "--quiet", "list"])
    assert (options.log_level, options.quiet) == ("info", True)


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command sets ends with the test."""
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.mark.usefixtures("own_environment")
def test_a_log_level_reaches_libraries_and_workers(capsys: pytest.CaptureFixture[str]) -> None:
    values: dict[str, Any] = {
        "name": "r",
        "model": {"base": "b"},
        "data": {"train": [{"path": "/a"}]},
    }
    recipe = Recipe.model_validate(values)
    assert main(["schema"]) == 0
    assert chosen_level() is None and "TRANSFORMERS_VERBOSITY" not in worker_environment(recipe)
    limit("bitsandbytes", logging.ERROR)
    assert logging.getLogger("bitsandbytes").level == logging.ERROR
    assert main(["schema", "--log-level", "info"]) == 0
    names = ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY")
    assert [worker_environment(recipe)[name] for name in names] == ["info"] * 3
    limit("bitsandbytes", logging.ERROR)
    assert chosen_level() == logging.getLogger("bitsandbytes").level == logging.INFO
    capsys.readouterr()
