"""The storage of a recipe or sweep that names none: $FINRAY_STORAGE, else `runs`."""

import os

from ..common.errors import InputError
from .yaml_file import Change, Document, apply_changes

VARIABLE = "FINRAY_STORAGE"
_SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "hf")
"""What `common.storage` can open."""


def default_storage() -> str:
    """A folder, relative to where the command runs, or a URI."""
    return os.environ.get(VARIABLE) or "runs"


def settle_storage(document: Document) -> None:
    """Take the storage from the variable where neither the file nor an override names one.

    Only what a user wrote goes through here; a recipe that finray wrote names its storage.
    """
    if os.environ.get(VARIABLE) and "storage" not in document.values:
        apply_changes(document, [Change("storage", default_storage(), f"${VARIABLE}")])


def check_storage_kind(document: Document) -> None:
    """Refuse a storage that finray cannot open.

    Raises:
        InputError: it is a URI of an unknown kind.
    """
    scheme, separator, _ = str(document.values.get("storage")).partition("://")
    if separator and scheme not in _SCHEMES:
        raise InputError(
            f"{document.place(('storage',))}: storage: {scheme}:// is not a kind of storage that "
            "finray opens; give a folder, s3://… or gs://…"
        )
