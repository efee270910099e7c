"""Rehearses a recipe in a child process, and keeps the outcome beside the prepared data.

<storage>/prepared/rehearsals/<key>.json; `key` computes the key.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Self

from ..common.errors import InputError, RunError
from ..common.formatting import one_line
from ..common.progress import SILENT, Progress
from ..common.storage import Folder
from ..config.model_folder import model_folder
from ..config.recipe import Recipe
from ..models.devices import VARIABLE
from ..models.dtypes import SAFE_ISA
from ..records.run_folder import PREPARED_FOLDER
from .key import key_of
from .outcome import Outcome

REHEARSALS = "rehearsals"
_SECONDS = 600
"""On an idle machine it takes fifteen, most of them to load the libraries."""
_PROGRAM = "finray.training.rehearsal.program"


class Rehearsal:
    """A rehearsal that runs beside other work. Leaving the context ends it.

    Args:
        recipe: the recipe, its paths absolute.
        only_cached: do not ask the hub for the model's configuration.

    Raises:
        InputError: there is no such model.
    """

    def __init__(self, recipe: Recipe, *, only_cached: bool = False) -> None:
        self._outcome: Outcome | None = None
        self._child: _Child | None = None
        folder = model_folder(recipe.model, only_cached=only_cached)
        if folder is None:
            self._outcome = Outcome(
                "not rehearsed", message="the model's configuration is not on this machine yet"
            )
            return
        self._file = _File(recipe, key_of(recipe, folder))
        self._outcome = self._file.read()
        if self._outcome is None:
            self._child = _Child()
            self._child.start(recipe)
            self._child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.end()

    @property
    def is_done(self) -> bool:
        """True if the outcome is there already."""
        return self._outcome is not None

    def outcome(self, progress: Progress = SILENT) -> Outcome:
        """The outcome; waits for it."""
        if self._outcome is None:
            assert self._child is not None
            progress.status("rehearsing on a small copy of the model")
            self._outcome = self._child.outcome()
            self._child.end()
            self._file.write(self._outcome)
        return self._outcome


def rehearse(recipe: Recipe, progress: Progress = SILENT) -> Outcome:
    """Rehearse a recipe, or take the kept outcome."""
    with Rehearsal(recipe) as rehearsal:
        return rehearsal.outcome(progress)


def rehearse_all(recipes: Mapping[str, Recipe], progress: Progress = SILENT) -> dict[str, Outcome]:
    """Rehearse recipes, one after the other in the same process, or take the kept outcomes.

    Args:
        recipes: by their `key_of`.
        progress: receives what is waited for.

    Returns:
        The outcomes, by the same keys.
    """
    files = {key: _File(recipe, key) for key, recipe in recipes.items()}
    kept = {key: outcome for key, file in files.items() if (outcome := file.read()) is not None}
    left = [key for key in recipes if key not in kept]
    child: _Child | None = None
    try:
        for number, key in enumerate(left):
            progress.status(f"rehearsing on a small copy of the model, {number + 1} of {len(left)}")
            child = child or _Child()
            child.start(recipes[key])
            kept[key] = child.outcome()
            files[key].write(kept[key])
            if kept[key].status == "not rehearsed":  # its process may have ended
                child.end()
                child = None
    finally:
        if child is not None:
            child.end()
    return kept


class _File:
    """The file that keeps an outcome.

    Args:
        recipe: the recipe that was rehearsed.
        key: its `key_of`.
    """

    def __init__(self, recipe: Recipe, key: str) -> None:
        self._home = Folder(recipe.storage) / PREPARED_FOLDER / REHEARSALS
        self._name = f"{key}.json"

    def read(self) -> Outcome | None:
        """The outcome; None if there is none, or a damaged one."""
        try:
            if self._home.exists(self._name):
                return Outcome.from_json(self._home.read(self._name))
        except (OSError, ValueError, InputError):
            pass
        return None

    def write(self, outcome: Outcome) -> None:
        """Keep an outcome, unless it says nothing of the recipe."""
        if outcome.status != "not rehearsed":
            with suppress(OSError, RunError):  # the next start rehearses again
                self._home.create()
                self._home.write(self._name, outcome.to_json().encode())


class _Child:
    """A process that rehearses recipes one after the other."""

    def __init__(self) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        self._process = start_child(self._errors)
        self._timer: threading.Timer | None = None
        self._is_late = False

    def start(self, recipe: Recipe) -> None:
        """Begin with a recipe; `outcome` waits for it."""
        request = {"recipe": recipe.model_dump(mode="json"), "seconds": _SECONDS}
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(_SECONDS, self._stop_late)
        self._timer.daemon = True
        self._timer.start()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which `outcome` reports
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """Say that no other recipe follows."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def outcome(self) -> Outcome:
        """Wait for the outcome; a process that fails or takes too long has rehearsed nothing."""
        assert self._timer is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        with suppress(ValueError):
            return Outcome.from_json(line)
        self.close()
        code = self._process.wait()
        if self._is_late:
            return Outcome("not rehearsed", message=f"it took longer than {_SECONDS} s")
        ending = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Outcome("not rehearsed", message=f"it ended with {ending}{self._last_error()}")

    def end(self) -> None:
        """Kill the process if it runs."""
        if self._timer is not None:
            self._timer.cancel()
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()

    def _stop_late(self) -> None:
        self._is_late = True
        self._process.kill()

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {one_line(lines[-1])[:300]}" if lines else ""


def start_child(errors: IO[bytes]) -> "subprocess.Popen[bytes]":
    """Start the process that rehearses; it reads its request from stdin.

    Args:
        errors: the file that gets its stderr.
    """
    # Matrices are small: more threads would only take cores from the work beside it.
    on_cpu = {**SAFE_ISA, VARIABLE: "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env, pipe = {**os.environ, **on_cpu}, subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-P", "-m", _PROGRAM], stdin=pipe, stdout=pipe, stderr=errors, env=env
    )
