"""The program of the child process that rehearses; `child.py` starts it.

    python -m finray.training.rehearsal.program

It reads recipes from stdin, and writes their outcomes to stdout: a line of JSON each.
"""

import json
import logging
import os
import signal
import sys
import warnings

from ..common.imports import uncollected
from .outcome import Outcome


def main() -> None:
    """Rehearse until stdin ends."""
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print
    warnings.simplefilter("ignore")
    with os.fdopen(answers, "w", encoding="utf-8") as stream:
        for line in sys.stdin.buffer:
            request = json.loads(line)
            signal.alarm(int(request["seconds"]))  # its parent may be gone
            outcome = rehearse(request["recipe"])
            signal.alarm(0)
            print(outcome.to_json(), file=stream, flush=True)
    sys.stdout.flush()
    os._exit(0)  # the libraries take a second to end


def rehearse(values: dict[str, object]) -> Outcome:
    """Rehearse a recipe in this process.

    Args:
        values: the recipe, as `Recipe.model_dump` wrote it.
    """
    # First of all: transformers looks for kernels when it loads a model's code.
    from .kernels import install

    install()
    with uncollected():
        import torch
        import transformers

        from ..common.scratch import scratch_folder
        from ..config.recipe import recipe_from_dict
        from ..models import import_peft  # noqa: F401 - before what loads peft
        from .rehearse import rehearse_recipe

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    with scratch_folder("rehearsal") as scratch:
        return rehearse_recipe(recipe_from_dict(values), scratch)


if __name__ == "__main__":
    main()
