"""What a run starts from, beside its recipe and data: the files of its models and rewards.

run.json notes the digest of every file that counts, and the commit of every model and data set from
the hub. A run goes on only from the same files, and from the same commits.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.storage import Folder
from ..config.adapter_folder import CONFIG_FILE as ADAPTER_CONFIG
from ..config.adapter_folder import WEIGHTS_FILE as ADAPTER_WEIGHTS
from ..config.base_digest import file_digests
from ..config.model_folder import is_tokenizer_file, model_folder, named_model
from ..config.models import ModelSettings
from ..config.places import about
from ..config.recipe import Recipe
from ..config.remote_code import is_commit
from ..config.source import Source
from ..config.weight_files import INDEX_FILE, SINGLE_FILE, weight_files
from ..data.hub import can_move, commit_of, pinned
from .run_folder import finished_run

Identity = dict[str, dict[str, Any]]
"""By the key in the recipe and the model's name: `files` with their digests and `config`, the
content of config.json; for a model from the hub `commit`."""

Commits = dict[str, str]
"""The commit of each model and data set from the hub, by the name that the recipe gives: owner/name
or owner/name@revision, that of a data set after datasets/."""

_CONFIG = "config.json"
_OTHER_FILES = ("generation_config.json", ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_SHOWN = 60


def identity_of(recipe: Recipe) -> Identity:
    """The files that the run starts from; folders that do not exist are left out.

    Raises:
        InputError: a file cannot be read.
    """
    identity = identity_of_base(recipe)
    model = recipe.model
    if model.adapter is not None:
        _add(identity, "model.adapter", ModelSettings(base=model.adapter))
    for key, name in recipe.method.models.items():
        _add_with_base(identity, key, named_model(name))
    for key, uri in recipe.method.runs.items():
        run = finished_run(Folder(uri))
        identity[f"{key} {uri}"] = _described(run.result)
        if run.kind == "adapter":
            base, revision = run.recipe["model"]["base"], run.recipe["model"].get("revision")
            _add(identity, key, ModelSettings(base=base, revision=revision))
    return identity


def identity_of_base(recipe: Recipe) -> Identity:
    """The part of the identity that concerns `model.base`.

    Raises:
        InputError: a file cannot be read.
    """
    identity: Identity = {}
    model, has_weights = recipe.model, not recipe.method.starts_at_random
    _add(identity, "model.base", model, code=model.trust_remote_code, weights=has_weights)
    return identity


def _add_with_base(identity: Identity, key: str, model: ModelSettings) -> None:
    """Add a model that may be an adapter, which names its base."""
    _add(identity, key, model)
    config = _json(Folder(model.base), ADAPTER_CONFIG) if Path(model.base).is_absolute() else {}
    if isinstance(base := config.get("base_model_name_or_path"), str):
        _add(identity, key, ModelSettings(base=base, revision=config.get("revision")))


def _add(
    identity: Identity, key: str, model: ModelSettings, code: bool = False, weights: bool = True
) -> None:
    place = f"{key} {model.base}"
    if not Path(model.base).is_absolute():
        identity[place] = {"commit": model.revision}
    elif Path(model.base).is_dir():
        identity[place] = _described(Folder(model.base), code, weights)


def _described(folder: Folder, code: bool = False, weights: bool = True) -> dict[str, Any]:
    names = folder.names()
    counted = [name for name in names if is_tokenizer_file(name) or name in _OTHER_FILES]
    counted += [name for name in names if code and name.endswith(".py")]
    if weights and not {SINGLE_FILE, INDEX_FILE}.isdisjoint(names):
        counted += weight_files(folder)
    return {"config": _json(folder, _CONFIG), "files": file_digests(folder, counted)}


def _json(folder: Folder, name: str) -> dict[str, Any]:
    """A JSON object; empty where there is none, which other checks report."""
    try:
        content = json.loads(folder.read(name))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_identity(noted: Any, present: Identity, folder: Folder) -> None:
    """Refuse to go on from other files than those that an earlier attempt noted.

    Args:
        noted: `identity` of run.json or sweep.json; None if an older finray wrote it.
        present: the identity now.
        folder: of the run or sweep.

    Raises:
        InputError: with a line for each file and each setting of a configuration that differs.
    """
    changes = changed_files(noted, present)
    if changes:
        raise InputError(
            f"{folder} was started from other files:\n" + "\n".join(changes) + "\n"
            "Restore them, give this run another name, or delete that folder."
        )


def changed_files(noted: Any, present: Identity) -> list[str]:
    """A line for each difference between what was noted and what is there now."""
    before = noted if isinstance(noted, dict) else {}
    return [
        f"  {place}{change}"
        for place in sorted(before.keys() & present.keys())
        if isinstance(before[place], dict)
        for change in _changes(before[place], present[place])
    ]


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if before.get("commit") != now.get("commit"):
        yield f": commit {before.get('commit')} before, {now.get('commit')} now"
    for key, old, new in _differing(before.get("config"), now.get("config")):
        yield f"/{_CONFIG}: {key}: {_short(old)} before, {_short(new)} now"
    for name, old, new in _differing(before.get("files"), now.get("files")):
        state = "is new" if old is None else "is gone" if new is None else "has another content"
        yield f"/{name} {state}"


def _differing(before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    old, new = (values if isinstance(values, dict) else {} for values in (before, now))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"


def hub_commits(recipe: Recipe, noted: Any = None) -> Commits:
    """The commits of the recipe's models and data sets from the hub; of what is noted already, the
    same ones.

    Args:
        recipe: the recipe, as the user wrote it.
        noted: `commits` of run.json or sweep.json; None without an earlier attempt.

    Raises:
        InputError: the hub does not give a model or data set.
    """
    commits: Commits = dict(noted) if isinstance(noted, dict) else {}
    for key, model in _hub_models(recipe):
        name = _hub_name(model)
        if name not in commits and not is_commit(model.revision):
            folder = model_folder(model, where=key)
            assert folder is not None
            commits[name] = folder.name  # <cache>/snapshots/<commit>
    for key, source in _hub_sources(recipe):
        if (name := _data_name(source)) not in commits:
            with about(key):
                commits[name] = commit_of(source)
    return commits


def at_commits(recipe: Recipe, commits: Any) -> Recipe:
    """The recipe with its models and data sets from the hub at these commits."""
    noted: Mapping[str, Any] = commits if isinstance(commits, dict) else {}
    model = recipe.model
    if not Path(model.base).is_absolute():
        revision = noted.get(_hub_name(model), model.revision)
        model = model.model_copy(update={"revision": revision})
    names = {
        key: f"{named_model(name).base}@{noted[name]}"
        for key, name in recipe.method.models.items()
        if name in noted
    }
    method = recipe.method.with_models(names) if names else recipe.method
    data = recipe.data.with_sources(lambda _, source: _at_commit(source, noted))
    return recipe.model_copy(update={"model": model, "method": method, "data": data})


def _at_commit(source: Source, noted: Mapping[str, Any]) -> Source:
    commit = noted.get(_data_name(source)) if can_move(source) else None
    return source if commit is None else pinned(source, commit)


def _data_name(source: Source) -> str:
    """A source of the hub in `Commits`; caches may hold the subsets at different commits."""
    parts = [source.place.removeprefix("hf://").removeprefix("datasets/"), source.subset]
    name = "/".join(["datasets", *filter(None, parts)])
    return name if source.revision is None else f"{name}@{source.revision}"


def _hub_models(recipe: Recipe) -> Iterator[tuple[str, ModelSettings]]:
    named = [(key, named_model(name)) for key, name in recipe.method.models.items()]
    for key, model in [("model.base", recipe.model), *named]:
        if not Path(model.base).is_absolute():
            yield key, model


def _hub_sources(recipe: Recipe) -> Iterator[tuple[str, Source]]:
    return ((key, source) for key, source in recipe.data.sources if can_move(source))


def _hub_name(model: ModelSettings) -> str:
    return model.base if model.revision is None else f"{model.base}@{model.revision}"
