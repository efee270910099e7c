"""The command line of a training script as settings: `accelerate launch dpo.py --beta 0.1`."""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from ...training.common.errors import InputError
from ...training.common.yaml_faults import YamlFault
from ...training.common.yaml_text import parse_setting

_LAUNCHERS = {"accelerate", "torchrun", "deepspeed", "python", "python3", "uv", "poetry", "srun"}
_PROCESSES = ("num_processes", "nproc_per_node", "num_gpus")
_OPTION = re.compile(r"--?[A-Za-z]")
_ASSIGNMENT = re.compile(r"[A-Za-z_][\w.]*=")
_METHODS = ("sft", "dpo", "kto", "orpo", "cpo", "reward", "grpo", "rloo", "ppo", "online_dpo")


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

    @property
    def method(self) -> str | None:
        """The method by the script's name."""
        stem = PurePath(self.script).stem.lower()
        if "reward" in stem:
            return "reward"
        words = re.split(r"[_\-.]", stem)
        return next((name for name in _METHODS if name in words), None)


def is_command(text: str) -> bool:
    """True for a command line, False for a file's name."""
    return bool(re.search(r"\s", text.strip()))


def read_command(text: str) -> CommandLine:
    """Read a command line.

    Raises:
        InputError: a quote is not closed, or there is no script.
    """
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise InputError(f"the command line cannot be read: {error}; close the quote") from None
    command = CommandLine()
    rest = list(_without_environment(words))
    names = [PurePath(word).name for word in rest]
    start = _script_at(rest, names)
    if start is None:
        raise InputError(
            f"the command line names no training script: {' '.join(rest[:4])}; expected one such "
            "as trl sft --model_name_or_path …, or accelerate launch dpo.py …"
        )
    _read_launcher(rest[:start], command)
    command.script = rest[start]
    if names[start] in ("trl", "llamafactory-cli", "lmf", "axolotl"):
        command.project = names[start]
        start += 1
        command.script = rest[start] if start < len(rest) else ""
    elif rest[start].startswith("axolotl."):
        command.project = "axolotl"
    _read_options(rest[start + 1 :], command)
    return command


def _without_environment(words: Sequence[str]) -> Iterator[str]:
    """The words behind VARIABLE=value in front."""
    is_front = True
    for word in words:
        is_front = is_front and bool(re.match(r"[A-Z_][A-Z0-9_]*=", word))
        if not is_front:
            yield word


def _script_at(words: Sequence[str], names: Sequence[str]) -> int | None:
    for index, (word, name) in enumerate(zip(words, names, strict=True)):
        if name in ("trl", "llamafactory-cli", "lmf", "axolotl") or name.endswith(".py"):
            return index
        if index and words[index - 1] == "-m" and name not in _LAUNCHERS and "." in word:
            return None if word.startswith("torch.") else index
    return None


def _read_launcher(words: Sequence[str], command: CommandLine) -> None:
    """Processes of accelerate, torchrun or deepspeed."""
    for name, value in _options(words):
        if name in _PROCESSES and str(value).isdecimal():
            command.processes = int(value)


def _read_options(words: Sequence[str], command: CommandLine) -> None:
    for name, value in _options(words):
        if name == "config":
            command.files.append(str(value))
        elif name in _PROCESSES and str(value).isdecimal():
            command.processes = int(value)
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
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if _OPTION.match(word):
            name, separator, value = word.lstrip("-").partition("=")
            found.append((name.replace("-", "_"), [value] if separator else []))
        elif found:
            found[-1][1].append(word)
        else:
            loose.append(word)
    if loose:
        yield "", loose
    for name, texts in found:
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
