"""`finray cluster`: a cluster of the user's own machines; one function a verb."""

import argparse
import json
import shlex
import sys
from dataclasses import asdict

from ...training.common.errors import InputError
from ..nodes.address import dashboard_address
from ..nodes.head import current_head, joining_lines, start_head, stop_head
from ..nodes.token import token_file


def up(options: argparse.Namespace) -> None:
    """Start a head here, and print how other nodes join it."""
    if not options.quiet:
        print("starting a head", file=sys.stderr)
    head = start_head(options.port, options.dashboard_port, tuple(options.start_option))
    print(f"head       {head.address}")
    print(f"dashboard  {head.dashboard} (this machine only; from elsewhere: ssh -L)")
    print(f"token      {token_file()} (anyone who has it can run code here; it does not encrypt)")
    print("on each other node, with the same packages installed (it runs until it is stopped):")
    print(f"  {joining_lines(head)}")
    print(f"then       finray cluster doctor --address {head.dashboard}")


def down(_: argparse.Namespace) -> None:
    """Stop the head that was started here."""
    head = stop_head()
    print("no head was started here" if head is None else f"stopped {head.address}")


def status(options: argparse.Namespace) -> None:
    """Print whether the head that was started here runs."""
    head = current_head()
    if options.json:
        print(json.dumps(None if head is None else asdict(head), indent=2))
    elif head is None:
        print("no head was started here")
    else:
        print(f"head {head.address} runs; dashboard {head.dashboard}")


def doctor(options: argparse.Namespace) -> None:
    """Check every node of a running cluster."""
    from ..jobs.client import Cluster

    what = "doctor" if options.storage is None else f"doctor {shlex.quote(options.storage)}"
    code, log = Cluster(dashboard_address(options.address)).run("finray~doctor", what)
    table = "\n".join(line for line in log.splitlines() if line.startswith("  "))
    if code:
        raise InputError(f"the cluster has problems:\n{table or log}")
    print(table)
