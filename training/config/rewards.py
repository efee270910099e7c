"""The settings of the rewards of online methods."""

import ast
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from ..common.errors import InputError
from ..common.secrets import redact
from .paths import resolve_model, resolve_path
from .section import Section


class _Reward(Section):
    weight: float = 1.0
    """Factor of the reward in the sum; below zero it is a penalty."""


class RunReward(_Reward):
    run: str
    """Folder of a finished finray run of method reward, relative to the recipe's folder, to where
    the command runs, or to the storage."""

    @property
    def name(self) -> str:
        """Its name in metrics."""
        return self.run.rstrip("/").rpartition("/")[2]


class ModelReward(_Reward):
    model: str
    """A sequence classifier: hub id, or a folder (relative to the recipe's folder). It reads the
    text through its own tokenizer, and a conversation through its own chat template."""
    label: str | None = None
    """The label whose logit is the reward; needed where the classifier has several."""

    @property
    def name(self) -> str:
        """Its name in metrics."""
        return self.model.rstrip("/").rpartition("/")[2]


class FunctionReward(_Reward):
    file: str
    """A Python file and a function in it, "rewards.py:json_valid", relative to the recipe's
    folder. The function takes `prompts, completions, completion_ids, **columns`, as TRL's do, and
    returns a float (or None: not applicable) for each completion."""
    source: str | None = None
    """The file's text, which travels with the recipe; leave it out, and the file is read."""

    @property
    def digest(self) -> str:
        """SHA-256 of the file's text, in hex."""
        assert self.source is not None
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def path(self) -> str:
        """The file."""
        return self.file.rpartition(":")[0]

    @property
    def name(self) -> str:
        """The function's name, which is also its name in metrics."""
        return self.file.rpartition(":")[2]


_KINDS = {"run": RunReward, "model": ModelReward, "file": FunctionReward}


def _kind(value: Any) -> str | None:
    """Which kind it is, by its one key."""
    for key, kind in _KINDS.items():
        if isinstance(value, kind) or (isinstance(value, dict) and key in value):
            return key
    return None


Reward = Annotated[
    Annotated[RunReward, Tag("run")]
    | Annotated[ModelReward, Tag("model")]
    | Annotated[FunctionReward, Tag("file")],
    Discriminator(
        _kind,
        custom_error_type="reward",
        custom_error_message="a reward is one of {run: FOLDER}, {model: NAME} and "
        '{file: "rewards.py:function"}, with an optional weight',
    ),
]


def resolve_reward(reward: Reward, places: Sequence[Path], where: str) -> Reward:
    """Make a reward independent of the current folder.

    Args:
        reward: as the recipe says it.
        places: folders in which a run is looked for; files and models belong to the first.
        where: the key in the recipe, for messages.

    Raises:
        InputError: where there is no such run or function.
    """
    if isinstance(reward, FunctionReward):
        file = f"{resolve_path(reward.path, places[0])}:{reward.name}"
        return _read_function(reward.model_copy(update={"file": file}), where)
    if isinstance(reward, ModelReward):
        return reward.model_copy(update={"model": resolve_model(reward.model, places[0])})
    candidates = [resolve_path(reward.run, place) for place in places]
    existing = [path for path in candidates if "://" in path or Path(path).is_dir()]
    if not existing:
        listed = ", ".join(dict.fromkeys(candidates))
        raise InputError(f"{where}.run: there is none of these folders: {listed}")
    return reward.model_copy(update={"run": existing[0]})


def _read_function(reward: FunctionReward, where: str) -> FunctionReward:
    """Read the file of a reward function and look for the function, without running anything."""
    if reward.source is None:
        try:
            source = Path(reward.path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{where}.file: cannot read {reward.path!r}: {error}") from None
        reward = reward.model_copy(update={"source": source})
    assert reward.source is not None
    if redact(reward.source) != reward.source:
        raise InputError(
            f"{where}.file: {reward.path} holds a secret, and its text is kept with the run; read "
            "it from the environment instead"
        )
    try:
        tree = ast.parse(reward.source, reward.path)
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise InputError(f"{where}.file: {reward.path}{line}: not valid Python: {error}") from None
    _check_function(tree, reward, where)
    return reward


def _check_function(tree: ast.Module, reward: FunctionReward, where: str) -> None:
    functions = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    named = [node for node in functions if node.name == reward.name]
    if not named:
        names = ", ".join(node.name for node in functions) or "none"
        raise InputError(
            f"{where}.file: {reward.path} has no function {reward.name!r} at its top level; "
            f"its functions: {names}"
        )
    if isinstance(named[-1], ast.AsyncFunctionDef):
        raise InputError(
            f"{where}.file: {reward.path}:{named[-1].lineno}: {reward.name} is an async function; "
            "a reward function is called like any other: def"
        )
    if named[-1].args.kwarg is None:
        raise InputError(
            f"{where}.file: {reward.path}:{named[-1].lineno}: {reward.name} must take **columns, "
            "as it is called with prompts, completions, completion_ids and the data's columns"
        )
