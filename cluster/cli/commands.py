"""The commands, and the function that runs each."""

import argparse
from collections.abc import Callable

COMMANDS = {
    "init": ("start", "init"),
    "import": ("start", "import_"),
    "check": ("check", "check"),
    "plan": ("plan", "plan"),
    "prepare": ("prepare", "prepare"),
    "train": ("train", "train"),
    "tune": ("tune", "tune"),
    "job submit": ("job", "submit"),
    "job list": ("job", "list_jobs"),
    "job status": ("job", "status"),
    "job logs": ("job", "logs"),
    "job stop": ("job", "stop"),
    "job fetch": ("job", "fetch"),
    "cluster up": ("cluster", "up"),
    "cluster down": ("cluster", "down"),
    "cluster status": ("cluster", "status"),
    "cluster doctor": ("cluster", "doctor"),
    "data show": ("data", "show"),
    "data report": ("data", "report"),
    "runs": ("storage", "runs"),
    "runs compare": ("storage", "compare"),
    "runs note": ("storage", "note"),
    "runs rm": ("storage", "rm"),
    "runs prune": ("storage", "prune"),
    "clean": ("storage", "clean"),
    "report": ("runs", "report"),
    "export": ("runs", "export"),
    "generate": ("evaluation", "generate"),
    "chat": ("evaluation", "chat"),
    "eval": ("evaluation", "evaluate"),
    "schema": ("runs", "schema"),
    "k8s render": ("k8s", "render"),
    "k8s run": ("k8s", "run"),
    "completion": ("completion", "completion"),
}
"""Command, with its verb if it has one: the module beside this one, and the function there."""


def command_function(options: argparse.Namespace) -> Callable[[argparse.Namespace], None]:
    """The function of a parsed command; only its own module is imported."""
    import importlib

    words = [options.command, getattr(options, "verb", None)]
    module, name = COMMANDS[" ".join(filter(None, words))]
    function: Callable[[argparse.Namespace], None] = getattr(
        importlib.import_module(f".{module}", __package__), name
    )
    return function
