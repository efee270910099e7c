"""Counts the values of the models that score completions beside the training, without loading them.

A reward model that finray trained is counted by its run, a classifier by its configuration.
"""

import torch
from transformers import AutoConfig

from ..common.storage import Folder
from ..config.model_folder import model_folder, named_model
from ..config.recipe import Recipe
from ..records.run_folder import read_run
from .composite import model_from_config
from .pretrained import not_loaded


def values_of_rewards(recipe: Recipe) -> int:
    """Values of all reward models; without those of which this machine holds no files.

    Raises:
        InputError: a run's record cannot be read, or a model's configuration cannot be loaded.
    """
    runs = sum(map(_of_run, recipe.method.runs.values()))
    return runs + sum(_of_classifier(*named) for named in recipe.method.models.items())


def _of_run(run: str) -> int:
    record = read_run(Folder(run)) or {}
    return int((record.get("parameters") or {}).get("total") or 0)


def _of_classifier(key: str, name: str) -> int:
    folder = model_folder(named_model(name), only_cached=True, where=key)
    if folder is None or not (folder / "config.json").is_file():
        return 0
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise not_loaded(key, name, error) from error
    with torch.device("meta"):
        model = model_from_config(config, "score", key)
    return int(model.num_parameters())
