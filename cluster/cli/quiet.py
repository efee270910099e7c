"""Keeping other libraries' chatter off the terminal."""

import logging
import warnings


def quiet_libraries() -> None:
    """Silence notes that a user of finray can do nothing about."""
    # It tells of optional kernels that no run here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # peft still calls names that transformers renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
