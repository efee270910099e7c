"""The first recipe: from data, or from another project's configuration."""

import os
from collections.abc import Sequence
from pathlib import Path

from ...training.common.errors import InputError, reason
from ...training.common.formatting import shown
from ...training.config.paths import exists
from ..gpus import visible_gpus
from ..starting.first_recipe import FirstRecipe, first_recipe
from ..starting.importing import Imported, import_settings
from .recipes import prepare_process


def import_recipe(
    source: str | os.PathLike[str],
    *,
    gpus: int | None = None,
    to: str | Path | None = None,
    dataset_info: str | Path | None = None,
    method: str | None = None,
) -> Imported:
    """Make a recipe from a configuration of Axolotl, LLaMA-Factory or TRL.

        made = finray.import_recipe("axolotl.yml", gpus=8)
        finray.check(made.values)

    Args:
        source: a file, a script for a shell, or the command line of a training script.
        gpus: GPUs that it is meant for; by default those of the command line, else one.
        to: a new file for the recipe, whose folder its paths start from; None: it is only returned.
        dataset_info: LLaMA-Factory's dataset_info.json; by default that of `dataset_dir`, or the
            one beside the file.
        method: the method of a file of TRL or of LLaMA-Factory's version 1 that does not say it.

    Raises:
        InputError: it is no such configuration, or trains in a way that finray does not have; or
            `to` exists.
    """
    prepare_process()
    file = None if to is None else Path(to)
    if file is not None:
        check_new(file, "-o")
    target = Path.cwd() if file is None else file.parent
    info = None if dataset_info is None else Path(dataset_info)
    imported = import_settings(_text(source, "source"), gpus, target, info, method)
    if file is not None:
        write_new(file, imported.text, "-o")
    return imported


def init_recipe(
    data: str | os.PathLike[str],
    *,
    to: str | Path | None = None,
    model: str | os.PathLike[str] | None = None,
    method: str | None = None,
    rewards: Sequence[str] = (),
) -> FirstRecipe:
    """Look at data, machine and model, and make a recipe whose comments explain each choice.

        first = finray.init_recipe("conversations.jsonl", model="Qwen/Qwen3-0.6B")
        finray.train(first.values)

    Args:
        data: a file, a folder, a URI, or a data set of the hub.
        to: a new file for the recipe, whose folder its paths start from; None: it is only returned.
        model: a folder or a hub id; by default a small open model that fits the machine.
        method: a method's kind; by default the one that learns from the rows' shape.
        rewards: reward functions of an online method, as FILE:FUNCTION.

    Raises:
        InputError: the data cannot be read, no method learns from it, or `to` exists.
    """
    prepare_process()
    file = None if to is None else Path(to)
    if file is not None:
        check_new(file, "-o")
    # as a recipe's file is resolved, whose paths start there
    target = Path.cwd() if file is None else file.resolve().parent
    base = None if model is None else _text(model, "model")
    made = first_recipe(_text(data, "data"), base, method, rewards, visible_gpus(), target)
    if file is not None:
        write_new(file, made.text, "-o")
    return made


def _text(value: str | os.PathLike[str], name: str) -> str:
    """A path or a text as text.

    Raises:
        InputError: it is neither.
    """
    if not isinstance(value, str | os.PathLike):  # a program's
        raise InputError(f"{name}: expected a text or a path, found {shown(value)}")
    return os.fspath(value)


def check_new(file: Path, option: str) -> None:
    """Refuse a file that exists already.

    Raises:
        InputError: it does.
    """
    if exists(file):
        raise InputError(f"{option}: {file} exists already; name another file, or move it away")


def write_new(file: Path, text: str, option: str) -> None:
    """Write a file that does not exist yet; its folder is made.

    Raises:
        InputError: it exists, or cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        check_new(file, option)
        raise InputError(f"{option}: {file} exists already; name another file") from None
    except OSError as error:
        raise InputError(
            f"{option}: cannot write {file}: {reason(error)}; name another file"
        ) from None
