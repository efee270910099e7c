"""Checks that a recipe can leave this machine: it names no local path."""

from ...training.common.errors import InputError
from ...training.common.secrets import texts
from ...training.config.recipe import Recipe
from ...training.config.user_code import functions_in


def check_reachable(recipe: Recipe, mount: str) -> bool:
    """Refuse paths of this machine. Files of the user's code travel inside the recipe.

    Args:
        recipe: as `load_recipe` gives it: paths are absolute.
        mount: the folder that all pods share.

    Returns:
        True if the recipe names paths under `mount`.

    Raises:
        InputError: with every key that names a folder or file of this machine.
    """
    faults = []
    shared = False
    travelling = {f"{key}.file" for key, _ in functions_in(recipe)}
    for key, text in texts(recipe.model_dump(mode="json")):
        path = text.removeprefix("file://")
        is_prompt = key[-1] == "system"  # such as "/no_think"
        if not _is_path(path) or is_prompt or ".".join(map(str, key)) in travelling:
            continue
        if f"{path}/".startswith(f"{mount}/") and ".." not in path.split("/"):
            shared = True
        else:
            hub = " or name its hub id" if key[0] == "model" else ""
            faults.append(
                f"{'.'.join(map(str, key))}: {path} is on this machine, and no pod can read it; "
                f"put it at s3://…, gs://… or {mount}/…{hub}"
            )
    if faults:
        raise InputError("\n".join(faults))
    return shared


def _is_path(text: str) -> bool:
    """True for an absolute path, which the recipe's loader makes of every path."""
    return text.startswith("/") and "\n" not in text and "{" not in text
