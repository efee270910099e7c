"""The settings of the rewards of online methods."""

import ast
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Tag, model_validator

from ..common.errors import InputError
from .paths import is_folder, resolve_model, resolve_path
from .places import about
from .section import Section
from .user_code import UserFunction


class _Reward(Section):
    weight: float = 1.0
    """Factor of the reward in the sum; below zero it is a penalty."""


class RunReward(_Reward):
    """A reward model that finray trained."""

    run: str
    """Folder of a finished finray run of method reward, relative to the recipe's folder, to where
    the command runs, or to the storage."""

    @property
    def name(self) -> str:
        """The reward's name in metrics."""
        return self.run.rstrip("/").rpartition("/")[2]


class ModelReward(_Reward):
    """A sequence classifier as a reward model."""

    model: str
    """A sequence classifier: hub id (owner/name, or owner/name@revision), or a folder (relative to
    the recipe's folder). It reads the text through its own tokenizer, and a conversation through
    its own chat template."""
    label: str | None = None
    """The label whose logit is the reward; needed where the classifier has several."""

    @property
    def name(self) -> str:
        """The reward's name in metrics; a revision is no part of it."""
        name = self.model.rstrip("/").rpartition("/")[2]
        return name if Path(self.model).is_absolute() else name.partition("@")[0]


class FunctionReward(_Reward, UserFunction):
    """A Python function as a reward."""

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
                "completion_ids and the data's columns; add it to its parameters"
            )


_TrlName = Literal[
    "accuracy_reward",
    "reasoning_accuracy_reward",
    "think_format_reward",
    "get_cosine_scaled_reward",
    "get_repetition_penalty_reward",
    "get_soft_overlong_punishment",
]
_OPTIONS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "get_cosine_scaled_reward": (
        frozenset({"max_len"}),
        frozenset({"min_value_wrong", "max_value_wrong", "min_value_correct", "max_value_correct"}),
    ),
    "get_repetition_penalty_reward": (frozenset(), frozenset({"ngram_size", "max_penalty"})),
    "get_soft_overlong_punishment": (
        frozenset({"max_completion_len", "soft_punish_cache"}),
        frozenset(),
    ),
}
"""(needed, possible) options of the functions that make a reward."""


class TrlReward(_Reward):
    """A reward function that TRL ships."""

    trl: _TrlName
    """Its name in trl.rewards. The accuracy rewards compare the answer with the column `solution`,
    else with `reference`, and need the package math-verify."""
    options: dict[str, float] = {}
    """Arguments of a get_… function, such as {max_completion_len: 512, soft_punish_cache: 128}."""

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        needed, possible = _OPTIONS.get(self.trl, (frozenset(), frozenset()))
        if missing := sorted(needed - self.options.keys()):
            raise ValueError(f"trl {self.trl} needs options: {', '.join(missing)}")
        if unknown := sorted(self.options.keys() - needed - possible):
            names = ", ".join(sorted(needed | possible)) or "none"
            raise ValueError(f"options: {self.trl} has no {unknown[0]}; its options: {names}")
        return self

    @property
    def name(self) -> str:
        """The reward's name in metrics."""
        return self.trl.removeprefix("get_")

    @property
    def path(self) -> str:
        """Where the function is, for messages."""
        return "trl.rewards"

    @property
    def needs_math_verify(self) -> bool:
        """True if it compares formulas."""
        return "accuracy" in self.trl or "cosine" in self.trl

    def load(self) -> Callable[..., Any]:
        """The function, as a reward function of a file is called."""
        from trl import rewards

        function: Callable[..., Any] = getattr(rewards, self.trl)
        if self.trl in _OPTIONS:
            whole = {key: int(v) if v == int(v) else v for key, v in self.options.items()}
            function = function(**whole)

        def score(completions: list[Any], **columns: Any) -> Any:
            # They read conversations; an answer to a plain text becomes one.
            messages = [
                [{"role": "assistant", "content": text}] if isinstance(text, str) else text
                for text in completions
            ]
            solution = columns.pop("solution", columns.get("reference"))
            return function(completions=messages, solution=solution, **columns)

        return score


_KINDS = {"run": RunReward, "model": ModelReward, "file": FunctionReward, "trl": TrlReward}


def _kind(value: Any) -> str | None:
    """The kind of a reward, by its only required key."""
    for key, kind in _KINDS.items():
        if isinstance(value, kind) or (isinstance(value, dict) and key in value):
            return key
    return None


Reward = Annotated[
    Annotated[RunReward, Tag("run")]
    | Annotated[ModelReward, Tag("model")]
    | Annotated[FunctionReward, Tag("file")]
    | Annotated[TrlReward, Tag("trl")],
    Discriminator(
        _kind,
        custom_error_type="reward",
        custom_error_message="a reward is one of {run: FOLDER}, {model: NAME}, {trl: NAME} and "
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
    if isinstance(reward, TrlReward):
        return reward
    if isinstance(reward, FunctionReward):
        return reward.resolve(places[0], where)
    if isinstance(reward, ModelReward):
        with about(f"{where}.model"):
            return reward.model_copy(update={"model": resolve_model(reward.model, places[0])})
    return reward.model_copy(update={"run": resolve_run(reward.run, places, f"{where}.run")})


def resolve_run(run: str, places: Sequence[Path], where: str) -> str:
    """The folder of a run, absolute.

    Args:
        run: as the recipe names it.
        places: folders in which it is searched.
        where: the key in the recipe, for messages.

    Raises:
        InputError: there is no such folder.
    """
    with about(where):
        candidates = [resolve_path(run, place) for place in places]
    existing = [path for path in candidates if "://" in path or is_folder(path)]
    if not existing:
        listed = ", ".join(dict.fromkeys(candidates))
        raise InputError(f"{where}: none of these folders exists: {listed}; correct the path")
    return existing[0]
