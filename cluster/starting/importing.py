"""A recipe from the configuration, or the command line, of another project."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...training.common.errors import InputError
from ...training.common.formatting import one_line, printable, shown
from ...training.common.secrets import redact
from ...training.common.yaml_text import load_yaml
from ...training.config.foreign.llama_factory_v1 import LLAMA_FACTORY_V1
from ...training.config.foreign.lookup import dialect_of, marks_in
from ...training.config.methods import ONLINE
from ...training.config.paths import exists
from ...training.config.recipe import Recipe, build_recipe
from ...training.config.short_forms import write_out
from ...training.config.yaml_file import Document, read_foreign_file, read_text
from . import axolotl, llama_factory, llama_factory_v1, trl
from .command_line import CommandLine, is_command, read_command
from .draft import NO_MODEL, Draft, ForeignSettings
from .launch import devices_of, name_launcher_options, with_file
from .places import Places, starting_folders
from .recipe_text import recipe_text
from .refusals import refuse_other_training
from .trainer import Devices

_ACCELERATE = frozenset({"compute_environment", "distributed_type", "fsdp_config", "zero_stage"})
_PROJECTS = {"trl": "TRL", "llamafactory-cli": "LLaMA-Factory", "axolotl": "Axolotl"}
_SHELL = (".sh", ".bash", ".slurm", ".sbatch")
"""Ends of the names of scripts for a shell."""
_NAMES = "Axolotl, LLaMA-Factory and TRL"


@dataclass(frozen=True)
class Imported:
    """A recipe made from another project's settings."""

    dialect: str
    text: str
    """The recipe, with comments."""
    mapped: dict[str, str]
    """By their name: finray's key and value."""
    changed: dict[str, str]
    """By their name: what finray does in another way."""
    left: dict[str, str]
    """By their name: what it means, and why nothing comes of it."""
    off: tuple[str, ...]
    """Settings without a value, or switched off."""
    unknown: tuple[str, ...]
    """Settings that the project's table does not have."""
    notes: tuple[str, ...]
    faults: str | None
    """What is wrong with the recipe; None if it is valid."""
    values: dict[str, Any]
    """The recipe's settings, as `finray.check` and `finray.train` take them: paths start in the
    current folder."""


def import_settings(
    source: str, gpus: int | None, target: Path, dataset_info: Path | None, method: str | None
) -> Imported:
    """Make a recipe.

    Args:
        source: a YAML or JSON file, a script for a shell, or a command line.
        gpus: GPUs that the configuration is meant for; None: one, or those of the command line.
        target: the folder of the recipe, from which its paths start.
        dataset_info: LLaMA-Factory's dataset_info.json.
        method: the method of a file of TRL or of LLaMA-Factory's version 1 that does not say it.

    Raises:
        InputError: the file cannot be read, is of no project or of two, or trains in a way that
            finray does not have.
    """
    here = Path.cwd().resolve()
    made = _import(source, gpus, target.resolve(), dataset_info, method)
    if target.resolve() == here:
        return made
    return replace(made, values=_import(source, gpus, here, dataset_info, method).values)


def _import(
    source: str, gpus: int | None, target: Path, dataset_info: Path | None, method: str | None
) -> Imported:
    command = _command(source)
    values, where, folder = _read(source, command)
    name = _dialect(values, where, command)
    if method is not None and name in ("Axolotl", "LLaMA-Factory"):
        raise InputError(f"--method: {where} is {name}'s, which says its method; leave it out")
    renamed: dict[str, str] = {}
    if name == "TRL":
        values, renamed = trl.current_names(values)
    draft = Draft(ForeignSettings(values, where), dialect_of(name))
    devices = devices_of(gpus, with_file(command, draft) if name == "TRL" else command)
    refuse_other_training(draft)
    places = Places(starting_folders(folder), target)
    if name == "Axolotl":
        axolotl.convert(draft, devices, places)
    elif name == "LLaMA-Factory":
        llama_factory.convert(draft, devices, places, dataset_info)
    elif name == LLAMA_FACTORY_V1.name:
        verb = command.script if command is not None and command.script != "train" else None
        llama_factory_v1.convert(draft, devices, places, method or verb)
    else:
        kind, origin = _method(values, where, command, method)
        trl.convert(draft, devices, places, kind, origin)
    draft.mapped |= {old: draft.mapped[new] for old, new in renamed.items() if new in draft.mapped}
    if command is not None:
        name_launcher_options(draft, command, devices)
    _settle(draft)
    return _imported(draft, name, where, devices)


def _command(source: str) -> CommandLine | None:
    """The command line that the source is, or that its script for a shell has; None for a file of
    settings.

    Raises:
        InputError: it cannot be read, or is a program.
    """
    if not exists(source):
        return read_command(source) if is_command(source) else None
    kind = Path(source).suffix.lower()
    if kind in (".py", ".ipynb"):
        raise InputError(
            f"{printable(source)}: a program; finray import reads configurations and command "
            "lines: write its settings as one, such as 'trl sft --model_name_or_path … "
            "--learning_rate 1e-4'"
        )
    return read_command(read_text(Path(source), printable(source))) if kind in _SHELL else None


def _read(source: str, command: CommandLine | None) -> tuple[dict[str, Any], str, Path]:
    """The settings, their place in messages, and the folder that their paths start from."""
    if command is None:
        file = Path(source)
        return read_foreign_file(file), printable(source), file.resolve().parent
    values: dict[str, Any] = {}
    folder = Path.cwd()
    for name in command.files:
        values |= read_foreign_file(Path(name))
        folder = Path(name).resolve().parent
    return {**values, **command.values}, "the command line", folder


def _dialect(values: Mapping[str, Any], where: str, command: CommandLine | None) -> str:
    marks = marks_in(values)
    if LLAMA_FACTORY_V1.name in marks:
        return LLAMA_FACTORY_V1.name
    if command is not None and command.project in _PROJECTS:
        named = _PROJECTS[command.project]
        marks = {named: [], **{name: keys for name, keys in marks.items() if name == named}}
    marks = {project: own for project, own in marks.items() if len(own) > 1 or _has_model(values)}
    if len(marks) > 1:
        keys = " and ".join(f"{name}'s {', '.join(own[:3])}" for name, own in marks.items())
        raise InputError(f"{where}: the file has {keys}; keep the settings of one of them")
    if marks:
        return next(iter(marks))
    if command is not None and (command.method is not None or "model_name_or_path" in values):
        return "TRL"
    if "model_name_or_path" in values:
        return "TRL"
    data = values.get("data")
    if isinstance(data, str) or (isinstance(data, dict) and "train" in data):
        raise InputError(f"{where}: this is a recipe of finray's already; finray check reads it")
    if _ACCELERATE & values.keys():
        raise InputError(
            f"{where}: accelerate's own settings, which say how processes start; name the file or "
            "command with the training's settings, and the GPUs with --gpus"
        )
    if "zero_optimization" in values:
        raise InputError(
            f"{where}: DeepSpeed's own settings; name the file or command with the training's, and "
            "the GPUs with --gpus"
        )
    keys = ", ".join(list(values)[:6]) or "none"
    raise InputError(f"{where}: no configuration of {_NAMES}; its keys: {keys}")


def _has_model(values: Mapping[str, Any]) -> bool:
    names = ("base_model", "base_model_config", "model_name_or_path", "model_name")
    return any(name in values for name in names)


def _method(
    values: dict[str, Any], where: str, command: CommandLine | None, method: str | None
) -> tuple[str, str]:
    if method is not None:
        return method, "--method"
    if command is not None and command.method is not None:
        kind = trl.PRETRAINING.get(command.method, command.method)
        return kind, f"the script {command.script}"
    return trl.method_by_keys(values, where)


def _settle(draft: Draft) -> None:
    """Leave out what contradicts in finray, and say so."""
    values = draft.values
    if values.get("model.base") == NO_MODEL:
        draft.notes.append(f"model.base: no model is named; write it in the place of {NO_MODEL}")
    if values.get("adapter.dora") and values.get("model.quantize") == "int8":
        values["model.quantize"] = "nf4"
        draft.notes.append("model.quantize: nf4 instead of int8, which gives DoRA no weights")
    if (
        values.get("adapter.init") in ("pissa", "olora", "orthogonal")
        and "model.quantize" in values
    ):
        draft.notes.append(
            f"adapter.init: default instead of {values.pop('adapter.init')}, which needs a base in "
            "16 bits"
        )
    if values.get("adapter.init") in ("pissa", "olora", "loftq") and values.get("adapter.dora"):
        draft.notes.append(f"adapter.init: default instead of {values.pop('adapter.init')} (DoRA)")
    online = values.get("method.kind") in ONLINE
    if online and int(values.get("data.max_length", 0)) <= int(values["method.max_completion"]):
        values["data.max_length"] = int(values["method.max_completion"]) + 512
        draft.notes.append("data.max_length: longer, as prompts need room beside completions")
    passes = int(values.get("method.passes", 1))
    every = int(values.get("checkpoint.every_steps", 100))
    if every % passes:
        values["checkpoint.every_steps"] = -(-every // passes) * passes


def _imported(draft: Draft, name: str, where: str, devices: Devices) -> Imported:
    unknown = draft.unknown()
    for said in (draft.changed, draft.left):
        said |= {name: one_line(text) for name, text in said.items()}
    draft.notes = list(map(one_line, draft.notes))
    off = tuple(key for key in draft.settings.values if draft.is_off(key))
    recipe = draft.nested()
    head = [f"Made by finray import from {where} ({name})."]
    is_alone = devices.count == 1 and "scale.workers" not in draft.values
    if is_alone and "--gpus" not in devices.origin[:6]:
        head.append("For one GPU: --gpus N multiplies the batch, which goes over all GPUs.")
    tail = _tail(draft, unknown)
    text = recipe_text(recipe, draft.sources, head, tail)
    return Imported(
        dialect=name,
        text=text,
        mapped=draft.mapped,
        changed=draft.changed,
        left=draft.left,
        off=off,
        unknown=tuple(unknown),
        notes=tuple(draft.notes),
        faults=_faults(recipe),
        values=dict(load_yaml(text)),
    )


def _tail(draft: Draft, unknown: list[str]) -> list[str]:
    lines: list[str] = []
    if draft.notes:
        lines += ["To look at:", *(f"  {note}" for note in draft.notes)]
    if draft.changed:
        lines += ["Done in another way:", *(f"  {k}: {text}" for k, text in draft.changed.items())]
    if draft.left:
        lines.append("Left out:")
        reasons = dict.fromkeys(draft.left.values())
        for reason in reasons:
            names = ", ".join(name for name, text in draft.left.items() if text == reason)
            lines.append(f"  {names}: {reason}")
    if unknown:
        lines.append("Not known to finray import:")
        lines += [redact(f"  {name}{_value_of(draft, name)}") for name in unknown]
    return lines


def _value_of(draft: Draft, name: str) -> str:
    values = draft.settings.values
    return f": {shown(values[name])}" if name in values else ""


def _faults(recipe: dict[str, Any]) -> str | None:
    document = Document(recipe, {(): "recipe"}, write_out)
    write_out(document.values)
    try:
        made: Recipe = build_recipe(document)
    except InputError as error:
        return str(error)
    del made
    return None
