"""What a run's folder already holds, compared with the recipe that is to run in it.

A resumed run computes what the undisturbed one would have. So its settings and its data must be the
same, but for those that change no result, and the number of steps may change where the schedule
allows it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ..common.errors import InputError
from ..common.formatting import one_line
from ..common.storage import Folder
from ..config.recipe import Recipe, recipe_from_dict
from .run_folder import CHECKPOINTS_FOLDER, RECIPE_FILE, Record, flat, read_recipe, read_run

FREE = (
    *("scale", "checkpoint", "eval", "log", "storage"),
    *("optim.micro_batch_size", "optim.micro_batch_tokens", "optim.max_skipped_steps"),
    "model.gradient_checkpointing",
)
"""Settings that a resumed run may change; others would change its result."""
_SHOWN = 200
"""Characters of a setting that are shown."""
_LENGTH = ("optim.epochs", "optim.max_steps")
_WAYS = "give this run another name, or start over with --fresh, which keeps the old folder"


@dataclass(frozen=True)
class RunState:
    """How far a run is."""

    folder: Folder
    record: Record | None
    """run.json; None for a new run."""
    has_new_length: bool = False
    """True if the recipe asks for another number of epochs or steps than before."""

    @property
    def is_finished(self) -> bool:
        """True if nothing is left to do."""
        return (
            self.record is not None
            and self.record.get("status") == "finished"
            and not self.has_new_length
        )

    @property
    def step(self) -> int:
        """Steps that are done."""
        return int((self.record or {}).get("step") or 0)

    def describe(self) -> str:
        """new, resumes at step 40, or finished on 2026-11-28."""
        if self.record is None:
            return "new"
        if self.is_finished:
            day = str(self.record.get("finished_at") or "")[:10]
            return f"finished already on {day}; nothing is trained"
        return f"resumes at step {self.step}" if self.step else "starts again; no step is done yet"


def state_of(recipe: Recipe, folder: Folder) -> RunState:
    """The state of a run's folder.

    Args:
        recipe: what is to run there.
        folder: the run's folder.

    Raises:
        InputError: the folder holds a run with other settings.
    """
    record = read_run(folder)
    if record is None:
        return RunState(folder, None)
    before = written_recipe(folder, _WAYS).model_dump(mode="json")
    now = recipe.model_dump(mode="json")
    changes = differences(before, now, (*FREE, *_LENGTH))
    if changes:
        raise InputError(
            f"{folder} holds a run with other settings:\n"
            + "\n".join(changes)
            + f"\nRestore them, {_WAYS}."
        )
    has_new_length = bool(differences(before, now, FREE)) and _total(record) is not None
    return RunState(folder, record, has_new_length)


def schedule_of(recipe: Recipe, state: RunState, total_steps: int, longer: bool) -> list[int]:
    """Last step of each learning-rate schedule of a run: one, and one more for each `--longer`.

    Args:
        recipe: what is to run.
        state: the run's state.
        total_steps: steps that the recipe asks for.
        longer: whether steps may be added under a schedule of their own.

    Raises:
        InputError: the number of steps changed, and the steps done would have had other rates.
    """
    before = _total(state.record)
    if before is None:
        return [total_steps]
    assert state.record is not None
    ends = [int(end) for end in state.record.get("schedule") or [before]]
    if total_steps == ends[-1]:
        return ends
    key = "optim.epochs" if recipe.optim.max_steps is None else "optim.max_steps"
    if total_steps < state.step:
        raise InputError(
            f"{key}: {total_steps} steps, but {state.folder} is at step {state.step} already; "
            f"raise it, {_WAYS}"
        )
    start = ends[-2] if len(ends) > 1 else 0
    if _same_rates(recipe, ends[-1] - start, total_steps - start):
        return [*ends[:-1], total_steps]
    if longer and total_steps > ends[-1]:
        return [*ends, total_steps]
    ways = _WAYS
    if total_steps > ends[-1]:
        ways = f"add --longer, which gives the added steps a schedule of their own, {_WAYS}"
    raise InputError(
        f"{key}: {total_steps} steps now, {ends[-1]} before: the steps done would have had other "
        f"learning rates (optim.schedule {recipe.optim.schedule}, optim.warmup_ratio "
        f"{recipe.optim.warmup_ratio:g}); {ways}"
    )


def warmup_steps(recipe: Recipe, steps: int) -> int:
    """Steps of the warm-up of a schedule of `steps` steps."""
    return math.floor(recipe.optim.warmup_ratio * steps)


def differences(before: Any, after: Any, free: tuple[str, ...] = ()) -> list[str]:
    """A line for each setting that differs, except keys that start with an item of `free`."""
    old, new = flat(before), flat(after)
    return [
        f"  {key}: {_short(old.get(key))} before, {_short(new.get(key))} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(free)
    ]


def move_aside(storage: Folder, name: str) -> Folder:
    """Rename a run's folder to the first free of <name>.1, <name>.2, ...; returns the new one."""
    taken = set(storage.names())
    free = next(f"{name}.{n}" for n in range(1, len(taken) + 2) if f"{name}.{n}" not in taken)
    (storage / name).move_to(storage / free)
    return storage / free


def _same_rates(recipe: Recipe, before: int, now: int) -> bool:
    """True if schedules over `before` and over `now` steps agree in the steps that both have."""
    same_warmup = warmup_steps(recipe, before) == warmup_steps(recipe, now)
    return recipe.optim.schedule == "constant" and same_warmup


def _total(record: Record | None) -> int | None:
    total = (record or {}).get("total_steps")
    return None if total is None else int(total)


def has_checkpoints(folder: Folder) -> bool:
    """True if a run's folder holds a checkpoint, whole or not."""
    return any(name.startswith("step-") for name in (folder / CHECKPOINTS_FOLDER).names())


def written_recipe(folder: Folder, ways: str = "or use the finray that wrote it") -> Recipe:
    """The recipe that the run was started with.

    Args:
        folder: the run's folder.
        ways: what helps beside restoring the file.

    Raises:
        InputError: recipe.yaml is missing or damaged, or this finray does not accept its settings.
    """
    _, values = read_recipe(folder)
    if not values:
        raise InputError(f"{folder / RECIPE_FILE}: missing or empty; restore it, {ways}")
    try:
        return recipe_from_dict(values)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise InputError(
            f"{folder / RECIPE_FILE}: {key}: {one_line(fault['msg'])}: another finray wrote this "
            f"recipe, or it was changed; restore it, {ways}"
        ) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} … ({len(text)} characters)"


def check_same_data(
    folder: Folder, record: Record, fingerprint: str, contents: Callable[[], Mapping[str, str]]
) -> None:
    """Refuse to go on with other data.

    Args:
        folder: the run's folder.
        record: its run.json.
        fingerprint: name of the recipe's prepared data.
        contents: returns a hash of what identifies each source's files, by its path.

    Raises:
        InputError: the run has checkpoints or a result, and they belong to other data.
    """
    if record.get("prepared") in (None, fingerprint):
        return
    if has_checkpoints(folder) or record.get("status") == "finished":
        changed = ", ".join(_changed_sources(record, contents()))
        raise InputError(
            f"data: the data or the way it is prepared changed since {folder} was started (from "
            f"{record.get('prepared')} to {fingerprint}), and its checkpoints belong to the old "
            f"data. Restore {changed or 'the data'}, {_WAYS}"
        )


def _changed_sources(record: Record, contents: Mapping[str, str]) -> list[str]:
    """Paths of the sources whose content is not as the record says."""
    sources = (record.get("data") or {}).get("sources") or ()
    return [
        path
        for path, content in ((each.get("path"), each.get("content")) for each in sources)
        if content is not None and contents.get(path) not in (None, content)
    ]
