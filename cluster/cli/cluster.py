"""`finray cluster`: a cluster of the user's own machines; one function a verb."""

import argparse
import json
import shlex
import sys
from dataclasses import asdict

from ...training.common.errors import InputError
from ..jobs.client import Cluster
from ..nodes.head import current_head, end_head, joining_lines, start_head
from ..nodes.token import token_file


def up(options: argparse.Namespace) -> None:
    """Start a head here, and tell how further nodes join it."""
    print("starting a head", file=sys.stderr)
    head = start_head(options.port, options.dashboard_port, tuple(options.start_option))
    print(f"head       {head.address}")
    print(f"dashboard  {head.dashboard} (this machine only; from elsewhere: ssh -L)")
    print(f"token      {token_file()} (whoever has it runs code here; it does not encrypt)")
    print("on each further node, with the same packages installed:")
    print(f"  {joining_lines(head)}")
    print(f"then       finray cluster doctor --address {head.dashboard}")


def down(_: argparse.Namespace) -> None:
    """End the head that was started here."""
    head = end_head()
    print("no head was started here" if head is None else f"ended {head.address}")


def status(options: argparse.Namespace) -> None:
    """Whether the head started here runs."""
    head = current_head()
    if options.json:
        print(json.dumps(None if head is None else asdict(head), indent=2))
    elif head is None:
        print("no head was started here")
    else:
        print(f"head {head.address} runs; dashboard {head.dashboard}")


def doctor(options: argparse.Namespace) -> None:
    """Examine every node of a running cluster."""
    what = "doctor" if options.storage is None else f"doctor {shlex.quote(options.storage)}"
    code, log = Cluster(options.address).run("finray~doctor", what)
    found = "\n".join(line for line in log.splitlines() if line.startswith("  "))
    if code:
        raise InputError(f"the cluster needs care:\n{found or log}")
    print(found)
