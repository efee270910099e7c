"""Loading libraries of thousands of modules."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python does not search for garbage.

    Modules leave next to none, and to search all that they define again and again takes a sixth of
    the time that torch, transformers and peft need to load.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
