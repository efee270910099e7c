"""`finray completion`: what a shell sources to complete finray's commands."""

import argparse

import shtab

from .arguments import build_parser


def completion(options: argparse.Namespace) -> None:
    """Print a shell's completion script."""
    print(shtab.complete(build_parser(), options.shell))
