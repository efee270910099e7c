"""Ray's token: created where a cluster starts, required where one is joined.

Anyone who reaches a dashboard or GCS port that requires no token can run code there
(CVE-2023-48022).
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

Access = Literal["token", "open"]
"""What a dashboard requires of a request: a token, or nothing."""

MODE = "RAY_AUTH_MODE"
_TOKEN = "RAY_AUTH_TOKEN"
_TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_REFUSED = (401, 403)
_SECONDS = 10.0


def token_file() -> Path:
    """The file where Ray looks for the token when it is not in the environment."""
    return Path(os.environ.get(_TOKEN_PATH) or Path.home() / ".ray" / "auth_token")


def has_token() -> bool:
    """True if this user has a token, in the environment or in the file."""
    return bool(os.environ.get(_TOKEN)) or token_file().is_file()


def ensure_token() -> Path:
    """The token's file, readable by this user alone; created if it does not exist.

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
    except FileExistsError:  # another process created it meanwhile
        return file
    except OSError as error:
        raise InputError(
            f"cannot write Ray's token to {file}: {error.strerror}; name another file in "
            f"{_TOKEN_PATH}"
        ) from None
    return file


def start_with_token() -> None:
    """Make a cluster that is started here require a token, unless the environment says otherwise.

    Call it before Ray is imported.
    """
    if os.environ.setdefault(MODE, "token") == "token" and not os.environ.get(_TOKEN):
        ensure_token()


def join_with_token(address: str) -> None:
    """Make Ray present the token to the cluster that it joins.

    Call it before Ray is imported. Inside a Ray job, the cluster has set what is needed.

    Raises:
        InputError: there is no token to present.
    """
    if _JOB in os.environ:
        return
    if os.environ.setdefault(MODE, "token") == "token" and not has_token():
        raise InputError(no_token(address))


def authenticate(address: str) -> Access:
    """Make Ray present the token to a dashboard that requires one.

    Call it before Ray is imported.

    Raises:
        InputError: there is no answer; the dashboard requires a token and there is none; or it
            requires none and other machines can reach it.
    """
    access = probe(address)
    if access == "open":
        if not is_loopback(address):
            raise InputError(
                f"{address} answers without a token: anyone who reaches it can run code on the "
                f"cluster. Start Ray there with {MODE}=token (finray cluster up does)"
            )
        return access
    if not has_token():
        raise InputError(no_token(address))
    os.environ[MODE] = "token"
    return access


def probe(address: str) -> Access:
    """Request a dashboard's version without a token.

    Raises:
        InputError: the address is not an http(s) URL, or no dashboard answers there.
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
        raise InputError(
            f"{address} is not a Ray dashboard: it answered {error.code}; give the dashboard's "
            "URL, such as http://head:8265"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(
            f"no Ray dashboard answers at {address}: {reason}; is the head running, and is a "
            "tunnel open (ssh -L 8265:localhost:8265 HEAD)?"
        ) from None


def is_loopback(address: str) -> bool:
    """True if a URL's host is this machine's loopback."""
    host = urlsplit(address).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def no_token(address: str) -> str:
    """Message for a cluster that requires a token when this user has none."""
    return (
        f"the cluster at {address} requires a token, and there is none in {token_file()}; copy it "
        f"from the head (scp HEAD:.ray/auth_token {token_file()} && chmod 600 {token_file()}), "
        f"or name its file in {_TOKEN_PATH}"
    )


def wrong_token(address: str) -> str:
    """Message for a cluster that refuses this user's token."""
    where = f"in {_TOKEN}" if os.environ.get(_TOKEN) else f"in {token_file()}"
    return (
        f"the cluster at {address} refuses the token {where}: it is another cluster's, or an "
        "old one; copy the head's ~/.ray/auth_token again"
    )
