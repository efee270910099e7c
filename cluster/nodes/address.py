"""Which cluster a command uses: the requested one, else the one that $FINRAY_ADDRESS names.

The variable holds a dashboard's URL for commands that use the Jobs API, or a Ray address for those
that run the driver here; each kind of command reads its own form.
"""

import os
import re
import socket

from ...training.common.errors import InputError, reason

VARIABLE = "FINRAY_ADDRESS"
DASHBOARD = "http://127.0.0.1:8265"
"""The dashboard of a head on this machine."""
_CONNECT_SECONDS = 10.0
_HOST_AND_PORT = re.compile(r"(?:ray://)?\[?([^\[\]]+?)\]?:(\d+)")


def dashboard_address(requested: str | None) -> str:
    """The URL of a dashboard: the requested one, else the variable's, else this machine's.

    Raises:
        InputError: the variable is used, and holds no URL.
    """
    named = _variable()
    if requested or not named:
        return requested or DASHBOARD
    if not _is_url(named):
        raise InputError(
            f"{VARIABLE}={named} names a Ray cluster, and this command needs its dashboard's URL, "
            f"such as {VARIABLE}=http://head:8265; set that, or give --address URL"
        )
    return named


def ray_address(requested: str | None) -> str | None:
    """HOST:PORT, `auto`, `ray://…` or `local`: the requested one, else the variable's.

    None if neither names one, also where the variable holds a dashboard's URL.

    Raises:
        InputError: a URL is requested.
    """
    if requested and _is_url(requested):
        raise InputError(
            f"--address {requested}: that is a dashboard's URL, which finray job takes; give "
            "HOST:PORT of a Ray cluster, auto or local"
        )
    named = _variable()
    return requested or (named if named and not _is_url(named) else None)


def require_answer(address: str) -> None:
    """Refuse a Ray address at which nothing listens: Ray itself would try for many minutes.

    Args:
        address: HOST:PORT, `ray://HOST:PORT`, or another form, which Ray resolves itself.

    Raises:
        InputError: no connection within ten seconds.
    """
    match = _HOST_AND_PORT.fullmatch(address)
    if match is None:
        return
    host, port = match[1], int(match[2])
    try:
        socket.create_connection((host, port), _CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(
            f"no Ray cluster answers at {address}: {reason(error)}; does the head run, and does "
            "its firewall let this machine in?"
        ) from None


def _variable() -> str:
    return os.environ.get(VARIABLE, "").strip()


def _is_url(address: str) -> bool:
    return address.lower().startswith(("http://", "https://"))
