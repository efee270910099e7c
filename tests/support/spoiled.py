"""Workers whose loss fails or dawdles: a sitecustomize.py, which new and forked processes run."""

from pathlib import Path
from string import Template
from textwrap import indent

from .forking import HANDING_OVER, before_all_else

_PROGRAM = Template('''
import importlib.util
import sys
import time

NAME = "finray.training.objectives.cross_entropy"


class Spoil:
    """Changes the objective when it is loaded."""

    def find_spec(self, name, path, target=None):
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            spoil(module.TokenObjective)

        spec.loader.exec_module = exec_module
        return spec


def spoil(objective):
    import torch
    from torch import distributed

    honest, calls = objective.loss, []

    def loss(self, model, batch, measured):
        calls.append(model.training)
        # A rehearsal is one process, without a group.
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        $before
        return honest(self, model, batch, measured)

    objective.loss = loss


if NAME in sys.modules:
    spoil(sys.modules[NAME].TokenObjective)
else:
    sys.meta_path.insert(0, Spoil())
''')


def spoil_loss(folder: Path, before: str) -> dict[str, str]:
    """Write the program; returns the environment of the processes that shall run it.

    Args:
        folder: where to.
        before: statements ahead of each loss. They see `rank`, `batch`, `model` and `calls`: for
            each loss so far, whether it was one of training.
    """
    hand_over = (HANDING_OVER / "sitecustomize.py").read_text(encoding="utf-8")
    program = _PROGRAM.substitute(before=indent(before, " " * 8).strip())
    (folder / "sitecustomize.py").write_text(hand_over + program, encoding="utf-8")
    return {"PYTHONPATH": before_all_else(folder)}
