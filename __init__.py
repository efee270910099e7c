"""finray: fine-tune language models on Ray, from one recipe file.

    import finray

    run = finray.train("support.yaml", {"optim.learning_rate": 1e-4})
    run.metrics     # a data frame
    run.report      # the page with curves and answers; a notebook shows it
    run.model()     # transformers' or PEFT's model

Each name is imported when it is first used: `import finray` loads neither torch nor Ray.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cluster.api.evaluation import EvaluationResult, evaluate
    from .cluster.api.generation import generate
    from .cluster.api.housekeeping import compare
    from .cluster.api.planning import plan
    from .cluster.api.recipes import load_recipe
    from .cluster.api.results import PreparedData, Report, RunResult, SweepResult
    from .cluster.api.runs import check, export, prepare, runs, train
    from .cluster.api.starting import import_recipe, init_recipe
    from .cluster.api.sweeps import tune
    from .training.common.errors import FinrayError, InputError, Interrupted, RunError
    from .training.config.recipe import Recipe
    from .training.records.comparison import Comparison

    __version__: str

__all__ = [
    "Comparison",
    "EvaluationResult",
    "FinrayError",
    "InputError",
    "Interrupted",
    "PreparedData",
    "Recipe",
    "Report",
    "RunError",
    "RunResult",
    "SweepResult",
    "__version__",
    "check",
    "compare",
    "evaluate",
    "export",
    "generate",
    "import_recipe",
    "init_recipe",
    "load_recipe",
    "plan",
    "prepare",
    "runs",
    "train",
    "tune",
]

_MODULES = {
    "cluster.api.evaluation": ("EvaluationResult", "evaluate"),
    "cluster.api.generation": ("generate",),
    "cluster.api.housekeeping": ("compare",),
    "cluster.api.planning": ("plan",),
    "cluster.api.recipes": ("load_recipe",),
    "cluster.api.results": ("PreparedData", "Report", "RunResult", "SweepResult"),
    "cluster.api.runs": ("check", "export", "prepare", "runs", "train"),
    "cluster.api.starting": ("import_recipe", "init_recipe"),
    "cluster.api.sweeps": ("tune",),
    "training.common.errors": ("FinrayError", "InputError", "Interrupted", "RunError"),
    "training.config.recipe": ("Recipe",),
    "training.records.comparison": ("Comparison",),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("finray")
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module 'finray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
