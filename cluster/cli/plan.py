"""`finray plan`: how a recipe would run on a kind of GPU, without one."""

import argparse
import json

from ..api.planning import plan as make_plan
from ..screens.plan import render


def plan(options: argparse.Namespace) -> None:
    """Print each placement with its memory, speed and hours, and the settings of the best."""
    planned = make_plan(
        options.recipe, options.overrides, gpu=options.gpu, utilisation=options.utilisation
    )
    print(json.dumps(planned, indent=2) if options.json else render(planned, options.overrides))
