"""Where metrics go beside metrics.jsonl: the packages and keys that needs, without loading them."""

import netrc
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal
from urllib.parse import urlsplit

from ..common.errors import InputError

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
IN_FOLDER = "tensorboard"
"""The one that is a folder of the run, and no program of its own."""
_WANDB_HOST = "https://api.wandb.ai"
_WITHOUT_KEY = ("offline", "disabled", "dryrun")


def programs_of(names: Sequence[TrackerName]) -> list[TrackerName]:
    """The trackers that are programs of their own, each once."""
    return [name for name in dict.fromkeys(names) if name != IN_FOLDER]


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Check that every tracker can be used from here.

    Raises:
        InputError: its package or its key is absent.
    """
    for name in programs_of(names):
        if find_spec(name) is None:
            raise InputError(
                f"log.to: {name} needs the package {name}; install finray[{name}], or remove {name}"
            )
        if name == "wandb" and not _has_wandb_key():
            raise InputError(
                "log.to: wandb has no key; set WANDB_API_KEY, run wandb login, or set "
                "WANDB_MODE=offline, which writes into the run's folder"
            )


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_MODE", "").lower() in _WITHOUT_KEY:
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _WANDB_HOST).hostname
    try:
        keys = netrc.netrc(os.environ.get("NETRC"))
        return host is not None and keys.authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
