"""Uploads an exported model to the Hugging Face Hub, through its client."""

from pathlib import Path
from typing import Any

from ..common.errors import FinrayError, InputError, RunError
from ..common.formatting import one_line
from ..common.secrets import redact

_MESSAGE = "Upload a model trained with finray"
_PASSING = (408, 429)
"""Statuses of a hub that another time would take the upload."""


def reserve(name: str, private: bool) -> None:
    """Make the repository before anything is written, so that a refusal costs no time.

    Args:
        name: owner/name, or a name of the user's own.
        private: whether a new repository is private.

    Raises:
        InputError: the name is wrong, there is no token, the hub refuses, or a repository of this
            name is public and `private` is asked for.
        RunError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"--push {name}: {one_line(str(error))}; write OWNER/NAME, as in my-name/my-model"
        ) from None
    api = HfApi()
    try:
        is_public = not api.model_info(name).private
    except RepositoryNotFoundError:
        is_public = False
    except Exception as error:  # noqa: BLE001 - sorted by `_explained`
        raise _explained(name, error) from None
    if is_public and private:
        raise InputError(
            f"--push {name}: this repository exists and is public; add --public, or give another "
            "name"
        )
    try:
        api.create_repo(name, private=private, exist_ok=True)
    except Exception as error:  # noqa: BLE001 - sorted by `_explained`
        raise _explained(name, error) from None


def upload(folder: Path, name: str) -> str:
    """Upload all files of a folder as one commit; returns the address of the repository.

    Raises:
        InputError: the hub refuses.
        RunError: the hub cannot be reached, or the upload broke off.
    """
    from huggingface_hub import HfApi

    try:
        commit: Any = HfApi().upload_folder(
            repo_id=name, folder_path=folder, commit_message=_MESSAGE
        )
    except Exception as error:  # noqa: BLE001 - sorted by `_explained`
        raise _explained(name, error) from None
    return str(commit.repo_url)


def _explained(name: str, error: Exception) -> FinrayError:
    """An error of the client in one line, with its remedy."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    text = redact(one_line(str(error)))[:300]
    if isinstance(error, OfflineModeIsEnabled):
        return InputError(f"--push {name}: HF_HUB_OFFLINE is set; unset it to upload")
    if isinstance(error, LocalTokenNotFoundError):
        return InputError(f"--push {name}: there is no token; set HF_TOKEN, or run hf auth login")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HfHubHTTPError) and status in (401, 403, 404):
        return InputError(
            f"--push {name}: the hub refuses ({status}): {text}; set HF_TOKEN to a token that may "
            "write there"
        )
    if isinstance(error, HfHubHTTPError) and status in range(400, 500) and status not in _PASSING:
        return InputError(
            f"--push {name}: the hub refuses ({status}): {text}; give another repository, or "
            "upload the folder that --to writes"
        )
    return RunError(
        f"--push {name}: the hub cannot be reached: {text}; the run is as it was, try again later"
    )
