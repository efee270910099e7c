"""Data sets of the hub: their files at a commit, or what the caches of this machine hold.

Files of the hub are read where they are (hf://), part by part, by the tasks that need them.
"""

import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from ..common.errors import InputError
from ..common.formatting import one_line
from ..common.storage import Folder
from ..config.remote_code import is_commit
from ..config.source import Source
from .sources import SourceFile, find_files
from .splits import Splits, splits_of

_TOKEN = "$HF_TOKEN, or the file that `hf auth login` writes"
_SECONDS = 10.0
"""How long the hub may take to answer; beyond, it counts as unreachable."""
_ADDRESS = re.compile(
    r"hf://datasets/(?P<name>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/convert/\w+|refs/pr/\d+|[^/]+))?(?P<below>/.*)?"
)


def can_move(source: Source) -> bool:
    """True for a data set of the hub, or an hf:// address inside one, at no fixed commit."""
    match = _ADDRESS.fullmatch(source.place)
    if source.dataset is None and match is None:
        return False
    return not is_commit(source.revision if match is None else match["revision"])


def commit_of(source: Source) -> str:
    """The commit that a source of the hub has now.

    Raises:
        InputError: see `hub_splits` and `pinned_address`.
    """
    if source.dataset is not None:
        return hub_splits(source.dataset, source.subset, source.revision)[0]
    return str(pinned_address(source.place)[1])


def pinned(source: Source, commit: str) -> Source:
    """A source of the hub at a commit."""
    if source.dataset is not None:
        return source.model_copy(update={"revision": commit})
    return source.model_copy(update={"path": _at(source.place, commit)})


def pinned_address(path: str) -> tuple[str, str | None]:
    """An address of the hub with the commit in place of its revision, and the commit.

    Any other path is returned as it is, with None.

    Raises:
        InputError: the data set does not exist, needs a permission, or the hub cannot be reached.
    """
    match = _ADDRESS.fullmatch(path)
    if match is None:
        return path, None
    name, revision = match["name"], match["revision"]
    commit = _commit(name, None if revision is None else unquote(revision), "path")
    if commit is None:
        raise InputError(
            f"path: the hub cannot be reached, where {path} is read; try again, name what a cache "
            f"holds as dataset: {name}, or name a folder"
        )
    return _at(path, commit), commit


def _at(path: str, commit: str) -> str:
    match = _ADDRESS.fullmatch(path)
    assert match is not None
    return f"hf://datasets/{match['name']}@{commit}{match['below'] or ''}"


def hub_splits(name: str, subset: str | None, revision: str | None) -> tuple[str, Splits]:
    """The commit of a data set, and the files of its splits.

    Without a network (or with HF_HUB_OFFLINE) those that `load_dataset` or `hf download` left in
    a cache.

    Args:
        name: owner/name.
        subset: its configuration; None: the default one.
        revision: commit, tag or branch; None: the default branch.

    Raises:
        InputError: it does not exist, needs a permission, has no data files, or is in no cache.
    """
    commit = _commit(name, revision)
    if commit is None:
        return _cached(name, subset, revision)
    folder = Folder(f"hf://datasets/{name}@{commit}")
    try:
        return commit, _checked_splits(folder, name, subset)
    except OSError as error:
        raise InputError(
            f"dataset: cannot list {name} on the hub: {one_line(str(error))}; try again"
        ) from None


def _checked_splits(folder: Folder, name: str, subset: str | None) -> Splits:
    splits = splits_of(folder, subset)
    if not any(splits.values()):
        script = f"{name.rpartition('/')[2]}.py"
        what = (
            f"is a loading script ({script}), whose code is not run"
            if script in folder.names()
            else "has no data files of a known kind"
        )
        raise InputError(
            f"dataset: {name} {what}; take a copy of it in Parquet (revision refs/convert/parquet "
            "has one for many), or another data set"
        )
    return splits


@lru_cache(maxsize=64)
def _commit(name: str, revision: str | None, key: str = "dataset") -> str | None:
    """The commit of a revision; None if the hub cannot be reached. `key` is for messages."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if constants.is_offline_mode():
        return None
    api = HfApi()
    try:
        info = api.dataset_info(name, revision=revision, timeout=_SECONDS)
        if info.gated:
            api.auth_check(name, repo_type="dataset")
    except HFValidationError:
        raise InputError(
            f"{key}: {name!r} is neither a folder nor a data set of the hub (owner/name); "
            "correct it"
        ) from None
    except GatedRepoError:
        raise InputError(
            f"{key}: {name} is gated; ask for access at {constants.ENDPOINT}/datasets/{name}, "
            f"and give your token ({_TOKEN})"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{key}: {name} does not exist on the hub, or is private; correct the name, or give "
            f"a token that may read it ({_TOKEN})"
        ) from None
    except RevisionNotFoundError:
        raise InputError(
            f"{'revision' if key == 'dataset' else key}: {name} has no revision {revision}; name a "
            "commit, tag or branch of it"
        ) from None
    except HfHubHTTPError as error:
        raise InputError(
            f"{key}: the hub refuses {name}: {one_line(str(error))}; try again, or give a token "
            f"({_TOKEN})"
        ) from None
    except (OSError, HTTPError):
        return None
    return str(info.sha)


def _cached(name: str, subset: str | None, revision: str | None) -> tuple[str, Splits]:
    """The data set in a cache of this machine."""
    cached = _arrow_cache(name, subset, revision) or _snapshot(name, subset, revision)
    if cached is None:
        at = f" at revision {revision}" if revision else ""
        raise InputError(
            f"dataset: the hub cannot be reached, and no cache holds {name}{at}; fetch it where "
            f"there is a network: hf download --repo-type dataset {name}, or name a folder"
        )
    return cached


def _arrow_cache(name: str, subset: str | None, revision: str | None) -> tuple[str, Splits] | None:
    """What `load_dataset` left in $HF_DATASETS_CACHE.

    Its builder for the cache is called itself: `load_dataset_builder` asks the hub first, six times
    if that does not answer.
    """
    from datasets.packaged_modules.cache.cache import Cache

    place = {"dataset_name": name.rpartition("/")[2], "repo_id": name}
    try:
        builder = Cache(**place, config_name=subset, version="auto", hash="auto")
    except ValueError as error:
        if "multiple" in str(error) or "Available configs" in str(error):
            raise InputError(
                f"subset: {one_line(str(error))}; name one of them as subset"
            ) from None
        return None
    if revision not in (None, builder.hash):
        config, version = builder.config.name, str(builder.config.version)
        builder = Cache(**place, config_name=config, version=version, hash=revision)
        if not Path(builder.cache_dir).is_dir():
            return None
    data = builder.as_dataset()
    files = {
        str(name): [_file(item["filename"]) for item in data[name].cache_files] for name in data
    }
    return str(builder.hash), files


def _file(path: str) -> SourceFile:
    (file,) = find_files(path)
    return file


def _snapshot(name: str, subset: str | None, revision: str | None) -> tuple[str, Splits] | None:
    """What `hf download` left in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        path = snapshot_download(
            name, repo_type="dataset", revision=revision, local_files_only=True
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    folder = Folder(path)
    splits = splits_of(folder, subset)
    return (folder.name, splits) if any(splits.values()) else None
