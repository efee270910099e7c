"""How much the libraries log: by default little; `--log-level` sets one level for all of them.

The level is in the environment, through which it reaches every worker.
"""

import logging
import os

_VARIABLE = "FINRAY_LOG_LEVEL"
_OF_LIBRARIES = (
    *("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"),
    "ACCELERATE_LOG_LEVEL",
)
"""Variables that libraries read when they are imported."""


def choose_level(level: str) -> None:
    """Set the level of all libraries, for this process and those that it starts.

    Call it before any library is imported.
    """
    os.environ.update(dict.fromkeys((_VARIABLE, *_OF_LIBRARIES), level))


def chosen_level() -> int | None:
    """The chosen level as `logging` numbers it; None if there is none."""
    return logging.getLevelNamesMapping().get(os.environ.get(_VARIABLE, "").upper())


def log_environment() -> dict[str, str]:
    """The variables that workers need, so that they log as this process does."""
    if chosen_level() is None:
        return {}
    names = (_VARIABLE, *_OF_LIBRARIES)
    return {name: os.environ[name] for name in names if name in os.environ}


def start_logging() -> None:
    """Print what the libraries log, if a level was chosen; once in every process."""
    if (level := chosen_level()) is not None:
        logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")


def limit(name: str, level: int) -> None:
    """Hide a library's lines below a level, unless the user chose one."""
    logging.getLogger(name).setLevel(chosen_level() or level)
