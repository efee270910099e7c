"""The first recipe: from data, or from another project's configuration."""

from collections.abc import Sequence
from pathlib import Path

from ...training.common.errors import InputError, reason
from ...training.config.paths import exists
from ..gpus import visible_gpus
from ..starting.first_recipe import FirstRecipe, first_recipe
from ..starting.importing import Imported, import_settings
from .recipes import prepare_process


def import_recipe(
    source: str,
    *,
    gpus: int | None = None,
    to: Path | None = None,
    dataset_info: Path | None = None,
    method: str | None = None,
) -> Imported:
    """Make a recipe from a configuration of Axolotl, LLaMA-Factory or TRL.

    Args:
        source: a file, or the command line of a training script.
        gpus: GPUs that it is meant for; by default those of the command line, else one.
        to: a new file for the recipe, whose folder its paths start from; None: it is only returned.
        dataset_info: LLaMA-Factory's dataset_info.json; by default that of `dataset_dir`, or the
            one beside the file.
        method: the method of a TRL file that does not say it.

    Raises:
        InputError: it is no such configuration, or trains in a way that finray does not have; or
            `to` exists.
    """
    prepare_process()
    if to is not None:
        check_new(to, "-o")
    target = Path.cwd() if to is None else to.parent
    imported = import_settings(source, gpus, target, dataset_info, method)
    if to is not None:
        write_new(to, imported.text, "-o")
    return imported


def init_recipe(
    data: str,
    *,
    to: Path,
    model: str | None = None,
    method: str | None = None,
    rewards: Sequence[str] = (),
) -> FirstRecipe:
    """Look at data, machine and model, and write a recipe whose comments explain each choice.

    Args:
        data: a file, a folder, a URI, or a data set of the hub.
        to: a new file for the recipe.
        model: a folder or a hub id; by default a small open model that fits the machine.
        method: a method's kind; by default the one that learns from the rows' shape.
        rewards: reward functions of an online method, as FILE:FUNCTION.

    Raises:
        InputError: the data cannot be read, no method learns from it, or `to` exists.
    """
    prepare_process()
    check_new(to, "-o")
    target = to.resolve().parent  # as a recipe's file is resolved, whose paths start there
    made = first_recipe(data, model, method, rewards, visible_gpus(), target)
    write_new(to, made.text, "-o")
    return made


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
        raise InputError(f"{option}: cannot write {file}: {reason(error)}") from None
