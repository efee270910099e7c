"""Ray's token: made where a cluster starts, demanded where one is joined.

Who reaches a dashboard or a GCS port without a token runs code there (CVE-2023-48022).
"""

import ipaddress
import os
import secrets
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from ...training.common.errors import InputError

Door = Literal["token", "open"]
"""How a dashboard receives a request without a token: refuses it, or answers."""

MODE = "RAY_AUTH_MODE"
_TOKEN = "RAY_AUTH_TOKEN"
_TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_REFUSED = (401, 403)
_SECONDS = 10.0


def token_file() -> Path:
    """Where Ray looks for the token when it is not in the environment."""
    return Path(os.environ.get(_TOKEN_PATH) or Path.home() / ".ray" / "auth_token")


def has_token() -> bool:
    """Whether this user has a token, in the environment or in the file."""
    return bool(os.environ.get(_TOKEN)) or token_file().is_file()


def ensure_token() -> Path:
    """The token's file, made here with mode 0600 where there is none, and closed to others.

    Raises:
        InputError: the file cannot be written.
    """
    file = token_file()
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not file.exists():
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as stream:
                stream.write(secrets.token_hex(32))
        elif file.stat().st_mode & 0o077:
            file.chmod(0o600)
    except FileExistsError:  # another process made it in this moment
        return file
    except OSError as error:
        raise InputError(
            f"cannot write Ray's token to {file}: {error.strerror}; name another file in "
            f"{_TOKEN_PATH}"
        ) from None
    return file


def enter_own_cluster() -> None:
    """Before Ray is imported to start a cluster here: with a token, unless told otherwise."""
    if os.environ.setdefault(MODE, "token") == "token" and not os.environ.get(_TOKEN):
        ensure_token()


def enter_cluster(address: str) -> None:
    """Before Ray is imported to join a cluster: a token is presented.

    Inside a Ray job, the cluster has set what it wants already.

    Raises:
        InputError: there is no token to present.
    """
    if _JOB in os.environ:
        return
    if os.environ.setdefault(MODE, "token") == "token" and not has_token():
        raise InputError(no_token(address))


def enter_dashboard(address: str) -> Door:
    """Before Ray is imported to speak to a dashboard: is a token wanted, and is there one.

    Raises:
        InputError: nobody answers; a token is wanted and there is none; or none is wanted on an
            address that others reach.
    """
    door = knock(address)
    if door == "open":
        if not is_loopback(address):
            raise InputError(
                f"{address} answers without a token: whoever reaches it runs code on the "
                f"cluster. Start Ray there with {MODE}=token (finray cluster up does)"
            )
        return door
    if not has_token():
        raise InputError(no_token(address))
    os.environ[MODE] = "token"
    return door


def knock(address: str) -> Door:
    """Ask a dashboard for its version without a token.

    Raises:
        InputError: the address is no http(s) URL, or nobody answers there.
    """
    if urlsplit(address).scheme not in ("http", "https"):
        raise InputError(
            f"--address {address}: expected the dashboard's URL, such as http://head:8265"
        )
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=_SECONDS):
            return "open"
    except urllib.error.HTTPError as error:
        if error.code in _REFUSED:
            return "token"
        raise InputError(f"{address} is no Ray dashboard: it answered {error.code}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(
            f"no Ray dashboard answers at {address}: {reason}; is the head running, and is a "
            "tunnel open (ssh -L 8265:localhost:8265 HEAD)?"
        ) from None


def is_loopback(address: str) -> bool:
    """Whether a URL's host is this machine's loopback."""
    host = urlsplit(address).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def no_token(address: str) -> str:
    """What to do where a cluster wants a token and this user has none."""
    return (
        f"the cluster at {address} wants a token, and there is none in {token_file()}; copy it "
        f"from the head (scp HEAD:.ray/auth_token {token_file()} && chmod 600 {token_file()}), "
        f"or name its file in {_TOKEN_PATH}"
    )


def wrong_token(address: str) -> str:
    """What to do where a cluster refuses this user's token."""
    where = f"in {_TOKEN}" if os.environ.get(_TOKEN) else f"in {token_file()}"
    return (
        f"the cluster at {address} refuses the token {where}: it is another cluster's, or an "
        "old one; copy the head's ~/.ray/auth_token again"
    )
