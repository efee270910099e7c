"""The settings of the rewards of online methods."""

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from ..common.errors import InputError
from .paths import resolve_model, resolve_path
from .section import Section
from .user_code import UserFunction


class _Reward(Section):
    weight: float = 1.0
    """Factor of the reward in the sum; below zero it is a penalty."""


class RunReward(_Reward):
    run: str
    """Folder of a finished finray run of method reward, relative to the recipe's folder, to where
    the command runs, or to the storage."""

    @property
    def name(self) -> str:
        """The reward's name in metrics."""
        return self.run.rstrip("/").rpartition("/")[2]


class ModelReward(_Reward):
    model: str
    """A sequence classifier: hub id, or a folder (relative to the recipe's folder). It reads the
    text through its own tokenizer, and a conversation through its own chat template."""
    label: str | None = None
    """The label whose logit is the reward; needed where the classifier has several."""

    @property
    def name(self) -> str:
        """The reward's name in metrics."""
        return self.model.rstrip("/").rpartition("/")[2]


class FunctionReward(_Reward, UserFunction):
    file: str
    """A Python file and a function in it, "rewards.py:json_valid", relative to the recipe's
    folder. The function takes `prompts, completions, completion_ids, **columns`, as TRL's do, and
    returns a float (or None: not applicable) for each completion."""
    source: str | None = None
    """The file's text, which travels with the recipe; leave it out, and the file is read."""

    def check_parameters(self, function: ast.FunctionDef, place: str) -> None:
        """The data's columns come as keyword arguments."""
        if function.args.kwarg is None:
            raise InputError(
                f"{place} must take **columns, as it is called with prompts, completions, "
                "completion_ids and the data's columns"
            )


_KINDS = {"run": RunReward, "model": ModelReward, "file": FunctionReward}


def _kind(value: Any) -> str | None:
    """The kind of a reward, by its only required key."""
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
        reward: the reward's settings.
        places: folders in which a run is searched; files and models are searched in the first only.
        where: the key in the recipe, for messages.

    Raises:
        InputError: where there is no such run or function.
    """
    if isinstance(reward, FunctionReward):
        return reward.resolve(places[0], where)
    if isinstance(reward, ModelReward):
        return reward.model_copy(update={"model": resolve_model(reward.model, places[0])})
    candidates = [resolve_path(reward.run, place) for place in places]
    existing = [path for path in candidates if "://" in path or Path(path).is_dir()]
    if not existing:
        listed = ", ".join(dict.fromkeys(candidates))
        raise InputError(f"{where}.run: none of these folders exists: {listed}")
    return reward.model_copy(update={"run": existing[0]})
