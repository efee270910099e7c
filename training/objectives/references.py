"""The frozen model that a policy is compared with."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from ..common.errors import InputError
from ..config.adapter_folder import CONFIG_FILE, check_safetensors
from ..config.recipe import Recipe
from ..data.batching import Batch
from ..models.adapter_reference import add_reference, as_reference
from ..models.dtypes import choose_dtype, torch_dtype
from ..models.loading import Model, evaluating
from .objective import Setup

Compute = Callable[[torch.nn.Module, Batch], torch.Tensor]
"""Computes a tensor, such as log-probabilities, with a model on a batch."""


class Reference:
    """The model as the run starts, or the one that the recipe names.

    Beside an adapter no second copy of the base is held. Without one, the model is copied.

    Args:
        setup: its model is as it is before the first step.
        named: `method.reference_model`.
    """

    def __init__(self, setup: Setup, named: str | None) -> None:
        self._device = setup.device
        self._adapted: PeftModel | None = None
        if named is not None:
            self._model = _frozen(load_reference(named, setup.recipe), setup)
        elif isinstance(setup.model, PeftModel):
            add_reference(setup.model, setup.recipe)
            self._adapted = setup.model
        else:
            self._model = _frozen(copy.deepcopy(setup.model), setup)

    def __call__(self, compute: Compute, batch: Batch) -> torch.Tensor:
        """What `compute` gives for the reference and a batch; without a graph, on its device."""
        with torch.no_grad(), self._model_as_reference() as model:
            return compute(model, batch.to(self._device))

    @contextmanager
    def _model_as_reference(self) -> Iterator[Model]:
        if self._adapted is None:
            yield self._model
            return
        with evaluating(self._adapted), as_reference(self._adapted):
            yield self._adapted


def load_reference(name: str, recipe: Recipe) -> Model:
    """A causal language model by hub id or folder, or an adapter's folder with its base.

    Raises:
        InputError: where it cannot be loaded.
    """
    is_adapter = (Path(name) / CONFIG_FILE).is_file()
    if is_adapter:
        check_safetensors(Path(name), "method.reference_model")
    source = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
    try:
        model: Model = source.from_pretrained(
            name,
            dtype=torch_dtype(choose_dtype(recipe.model)),
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"method.reference_model: cannot load {name}: {error}") from error
    return model


def _frozen(model: Model, setup: Setup) -> Model:
    model.config.use_cache = False
    dtype = torch_dtype(choose_dtype(setup.recipe.model))
    return setup.place(model.requires_grad_(False).eval().to(dtype))
