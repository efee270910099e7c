"""Whether a recipe can leave this machine: no path that exists only here, and no secret."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...training.common.errors import InputError
from ...training.config.recipe import Recipe

# Environment variables whose value is one; RAY_AUTH_TOKEN_PATH and the like name a file.
_SECRET_NAME = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY)(_(?!PATH$|FILE$)|$)", re.IGNORECASE
)
_SHORTEST_SECRET = 8
_SECRETS = {
    "a user name with a password in a URI": re.compile(r"://[^@\s]*:[^@\s]*@"),
    "credentials in the query of a URI": re.compile(
        r"[?&][^=&\s]*(secret|token|password|signature|credential|access_key|api_?key|sig)"
        r"[^=&\s]*=",
        re.IGNORECASE,
    ),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    "an AWS access key": re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),
}


def check_no_secret(recipe: Recipe, remedy: str, environment: Mapping[str, str]) -> None:
    """Refuse a recipe that holds a secret; the message names the key and not the value.

    Args:
        recipe: as `load_recipe` gives it.
        remedy: where the secret belongs instead.
        environment: the values of variables such as HF_TOKEN are secrets.

    Raises:
        InputError: with every key that holds one.
    """
    values = {
        f"the value of ${name}": value
        for name, value in environment.items()
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET
    }
    faults = []
    for key, text in strings(recipe.model_dump(mode="json")):
        kinds = [kind for kind, pattern in _SECRETS.items() if pattern.search(text)]
        kinds += [kind for kind, value in values.items() if value in text]
        if kinds:
            faults.append(f"{key}: holds {kinds[0]}; {remedy}")
    if faults:
        raise InputError("\n".join(faults))


def check_reachable(recipe: Recipe, mount: str) -> bool:
    """Refuse paths of this machine; whether the recipe names paths under `mount`.

    Args:
        recipe: as `load_recipe` gives it: paths are absolute.
        mount: the folder that all pods share.

    Raises:
        InputError: with every key that names a folder or file of this machine.
    """
    faults = []
    shared = False
    for key, text in strings(recipe.model_dump(mode="json")):
        path = text.removeprefix("file://")
        if not _is_path(path):
            continue
        if f"{path}/".startswith(f"{mount}/") and ".." not in path.split("/"):
            shared = True
        else:
            hub = " or name its hub id" if key.startswith("model.") else ""
            faults.append(
                f"{key}: {path} is on this machine, and no pod can read it; put it at s3://…, "
                f"gs://… or {mount}/…{hub}"
            )
    if faults:
        raise InputError("\n".join(faults))
    return shared


def _is_path(text: str) -> bool:
    """Whether a setting is a path: an absolute one, as the recipe's loader makes them."""
    return text.startswith("/") and "\n" not in text and "{" not in text


def strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in a recipe."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, child in value.items():
            yield from strings(child, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from strings(child, f"{key}.{index}")
