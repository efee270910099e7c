"""The command line of a training script as settings: `accelerate launch dpo.py --beta 0.1`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from ...training.common.errors import InputError
from ...training.common.formatting import one_line
from ...training.common.yaml_faults import YamlFault
from ...training.common.yaml_text import parse_setting
from .shell_words import open_piece, read_shell, without_marks

_LAUNCHERS = re.compile(r"(accelerate|torch|deepspeed|ray)(\.\w+)*")
"""Modules that start a script."""
_PROJECTS = {
    "trl": "trl",
    "axolotl": "axolotl",
    "llamafactory": "llamafactory-cli",
    "llamafactory-cli": "llamafactory-cli",
    "lmf": "llamafactory-cli",
}
"""The projects' commands, by these and by their packages' names."""
_COMMANDS = {*_PROJECTS, "cli", "main", "__main__"}
"""Words, or last parts of modules, that a verb follows."""
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_PROCESSES = ("num_processes", "nproc_per_node", "num_gpus")
_MACHINES = ("nnodes", "num_nodes")
_CHOSEN = ("gpu_ids", "include")
"""The launchers' options that list GPUs: 0,1 or host:0,1@host:0,1."""
_READ = (*_PROCESSES, *_MACHINES, *_CHOSEN, "num_machines", "config_file", "module")
_OPTION = re.compile(r"--?[A-Za-z]")
_ASSIGNMENT = re.compile(r"[A-Za-z_][\w.]*=")
_METHODS = re.compile(
    r"(?<![a-z])(online_dpo|nash_md|sft|cpt|dpo|kto|orpo|cpo|simpo|grpo|rloo|ppo|gkd|xpo|bco|prm|gold"
    r"|minillm|sdft|sdpo|tpo|a2po|gmpo|\w*distillation)(?![a-z])"
)
"""TRL's methods in the name of a script; those that finray lacks are refused."""
_LAUNCH_FILES = ("config_file", "accelerate_config")
_IDLE = {
    "llamafactory-cli": frozenset("api chat env eval export help version webchat webui".split()),
    "axolotl": frozenset(
        "evaluate fetch inference lm-eval merge-lora merge-sharded-fsdp-weights quantize "
        "vllm-serve".split()
    ),
    "trl": frozenset({"chat", "env", "vllm-serve", "skills"}),
}
"""The projects' commands that train nothing."""


@dataclass
class CommandLine:
    """What a command line says."""

    script: str = ""
    """The script or verb: dpo.py, sft."""
    project: str = ""
    """trl, llamafactory-cli or axolotl, if one of them is named."""
    values: dict[str, Any] = field(default_factory=dict)
    """Options of the script."""
    processes: int | None = None
    """Processes that the launcher starts."""
    files: list[str] = field(default_factory=list)
    """YAML files with settings."""
    launch_file: str | None = None
    """accelerate's file, or the name of one that TRL brings along."""

    launcher: dict[str, Any] = field(default_factory=dict)
    """Options of the launcher beside those."""

    @property
    def method(self) -> str | None:
        """The method by the name of the script or module."""
        name = PurePath(self.script).name.lower().removesuffix(".py").replace("-", "_")
        for part in reversed(name.split(".")):
            if (match := _METHODS.search(part)) is not None:
                return match[0]
            if "reward" in part:
                return "reward"
        return None


def is_command(text: str) -> bool:
    """True for a command line, False for a file's name."""
    return bool(re.search(r"\s", text.strip()))


def read_command(text: str) -> CommandLine:
    """Read a command line, or the first one of a script for a shell that trains.

    Raises:
        InputError: a quote is not closed, there is no training script, or an option's value is a
            variable without one.
    """
    commands, variables = read_shell(text)
    rest = [list(_plain_words(words)) for words in commands]
    scripts = [(words, at) for words in rest if (at := _script_at(words)) is not None]
    if not scripts:
        begin = one_line(without_marks(" ".join(rest[0][:4]))) if rest else "it is empty"
        raise InputError(
            f"the command line names no training script: {begin}; expected one such as trl sft "
            "--model_name_or_path …, or accelerate launch dpo.py …"
        )
    words, start = next((each for each in scripts if _trains(*each)), scripts[0])
    words = [*map(without_marks, words[: start + 1]), *words[start + 1 :]]
    command = CommandLine()
    _read_launcher(words[:start], command)
    command.script = words[start]
    command.project = _project(words[start])
    if command.project and PurePath(words[start]).name.rpartition(".")[2] in _COMMANDS:
        start += 1
        command.script = without_marks(words[start]) if start < len(words) else ""
    if command.script in _IDLE.get(command.project, ()):
        raise InputError(
            f"the command line: {command.project} {command.script} trains nothing; name the file "
            "or command that trains (finray chat, eval and export are there, too)"
        )
    _read_options(words[start + 1 :], command)
    if command.processes is None:
        command.processes = visible_gpus(variables, command.launch_file)
    return command


def visible_gpus(variables: Mapping[str, str], launch_file: str | None) -> int | None:
    """The GPUs that variables of the environment name; None if none does, or if accelerate's file
    is here and counts the processes."""
    if launch_file is not None and Path(launch_file).is_file():
        return None
    each, machines = (variables.get(name, "") for name in ("NPROC_PER_NODE", "NNODES"))
    devices = [text for text in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if text]
    if not (each.isdecimal() or machines.isdecimal() or devices):
        return None
    here = int(each) if each.isdecimal() else len(devices)
    return max(1, here) * (max(1, int(machines)) if machines.isdecimal() else 1)


def _plain_words(words: Sequence[str]) -> Iterator[str]:
    """The words, -mMODULE as two."""
    before = ""
    for word in words:
        is_joined = word.startswith("-m") and PurePath(before).name.startswith("python")
        yield from ("-m", word[2:]) if is_joined and len(word) > 2 else (word,)
        before = word


def _script_at(words: Sequence[str]) -> int | None:
    """The index of the script, of the module in its place, or of a project's command."""
    for index, word in enumerate(words):
        is_module = index > 0 and words[index - 1] in ("-m", "--module")
        if is_module and _LAUNCHERS.fullmatch(word):
            continue
        if _project(word) or word.endswith(".py") or (is_module and _MODULE.fullmatch(word)):
            return index
    return None


def _project(word: str) -> str:
    """The project whose command or module a word is; empty for another's."""
    name = PurePath(word).name
    if name in _PROJECTS:
        return _PROJECTS[name]
    is_module = _MODULE.fullmatch(word) and not word.endswith((".py", ".yaml", ".yml", ".json"))
    return _PROJECTS.get(word.partition(".")[0], "") if is_module else ""


def _trains(words: Sequence[str], at: int) -> bool:
    """True if a script is named after a method, or a project's command trains; another may do."""
    project, verb = _project(words[at]), next(iter(words[at + 1 :]), "")
    if project:
        return verb not in _IDLE.get(project, ())
    return CommandLine(script=words[at]).method is not None


def _read_launcher(words: Sequence[str], command: CommandLine) -> None:
    """Processes of accelerate, torchrun or deepspeed: of all machines, or of each."""
    counts = {name: int(value) for name, value in _options(words) if str(value).isdecimal()}
    of_all = counts.get("num_processes")
    of_each = next((counts[name] for name in _PROCESSES[1:] if name in counts), None)
    machines = next((counts[name] for name in _MACHINES if name in counts), 1)
    chosen = [_count(value) for name, value in _options(words) if name in _CHOSEN]
    of_each = of_each or next(filter(None, chosen), None)
    is_all = "include" in dict(_options(words))
    command.processes = of_all or (of_each and of_each * (1 if is_all else max(1, machines)))
    others = {name: value for name, value in _options(words) if name not in _READ}
    command.launcher = {name: value for name, value in others.items() if len(name) > 1}
    files = [str(value) for name, value in _options(words) if name in _LAUNCH_FILES]
    command.launch_file = files[-1] if files else None


def _count(value: Any) -> int | None:
    """GPUs of a launcher's list of them; None where it lists none by number."""
    parts = [part.rpartition(":")[2].split(",") for part in str(value).split("@")]
    numbers = [number for part in parts for number in part if number]
    return len(numbers) if all(number.isdecimal() for number in numbers) else None


def _read_options(words: Sequence[str], command: CommandLine) -> None:
    for word in words:
        if (piece := open_piece(word)) is None:
            continue
        if piece.startswith(("$(", "`")):
            raise InputError(
                f"the command line: {one_line(piece)} is computed by a shell, and finray import "
                "runs nothing; write its value"
            )
        raise InputError(
            f"the command line: {piece} is a variable of the shell without a value here; "
            "write its value, or set it in front: NAME=value trl …"
        )
    for name, value in _options(words):
        if name == "config":
            command.files.append(str(value))
        elif name in _LAUNCH_FILES and not isinstance(value, bool):
            command.launch_file = str(value)
        elif name in _PROCESSES and str(value).isdecimal():
            command.processes = int(value)
        elif name == "launcher":
            command.launcher[name] = value
        elif name:
            command.values[name] = value
        else:
            command.files += [str(word) for word in value if _is_file(str(word))]
            assignments = [str(word) for word in value if _ASSIGNMENT.match(str(word))]
            for word in assignments:
                own, _, text = word.partition("=")
                command.values[own] = _value(text)


def _is_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml", ".json"))


def _options(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(name, value) of each option; the words without one come first, under an empty name."""
    loose: list[str] = []
    options: list[tuple[str, list[str]]] = []
    for word in words:
        if _OPTION.match(word):
            name, separator, value = word.lstrip("-").partition("=")
            options.append((name.replace("-", "_"), [value] if separator else []))
        elif options:
            options[-1][1].append(word)
        else:
            loose.append(word)
    if loose:
        yield "", loose
    for name, texts in options:
        if not texts:
            yield (name[3:], False) if name.startswith("no_") else (name, True)
        else:
            values = [_value(text) for text in texts]
            yield name, values[0] if len(values) == 1 else values


def _value(text: str) -> Any:
    try:
        return parse_setting(text)
    except YamlFault:
        return text
