"""The frozen reference model that preference and online methods compare the policy with."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel

from ..data.batching import Batch, apart
from ..models.adapter_reference import add_reference, reference_weights
from ..models.attention import attend_by_documents
from ..models.dtypes import choose_dtype, torch_dtype
from ..models.first_worker import made_once
from ..models.loading import Model, evaluation_mode
from ..models.open_result import open_model
from .objective import Setup

Compute = Callable[[torch.nn.Module, Batch], torch.Tensor]
"""Computes a tensor, such as log-probabilities, with a model on a batch."""


class Reference:
    """The model at the start of the run, or the model that the recipe names.

    With an adapter, the base is not copied; without one, the model is copied. A model of another
    architecture than the policy's takes one text a row.

    Args:
        setup: the run's setup; its model is in the state before the first step.
        named: `method.reference_model`; None for the model at the start of the run.
    """

    def __init__(self, setup: Setup, named: str | None) -> None:
        self._device = setup.device
        self._adapted: PeftModel | None = None
        self._takes_flat = True
        if isinstance(setup.model, PeftModel) and named is None:
            add_reference(setup.model, setup.recipe)
            self._adapted = setup.model
            return
        model = made_once(setup.recipe, setup.strategy, lambda: _frozen(setup, named))
        if named is not None:
            self._takes_flat = _kind_of(model) == _kind_of(setup.model)
            if setup.isolation == "documents" and self._takes_flat:
                attend_by_documents(model)
        self._model = setup.place(model)

    def __call__(self, compute: Compute, batch: Batch) -> torch.Tensor:
        """The result of `compute` for the reference and a batch, without a graph, on its device."""
        if batch.documents is not None and not self._takes_flat:
            batch = apart(batch)
        with torch.no_grad(), self._model_as_reference() as model:
            return compute(model, batch.to(self._device))

    @contextmanager
    def _model_as_reference(self) -> Iterator[Model]:
        if self._adapted is None:
            yield self._model
            return
        with evaluation_mode(self._adapted), reference_weights(self._adapted):
            yield self._adapted


def _kind_of(model: Model) -> str:
    """The architecture, which decides whether texts can share a row."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    kind: str = base.config.model_type
    return kind


def _frozen(setup: Setup, named: str | None) -> Model:
    """The named model, or a copy of the run's in the type that it computes in, on the CPU."""
    dtype = torch_dtype(choose_dtype(setup.recipe.model))
    model = setup.model
    if named is not None:
        model = open_model(named, "causal", dtype, "method.reference_model")
    # Buffers keep their type: rounded frequencies of positions make another model.
    weights = {
        id(weight): torch.nn.Parameter(weight.detach().to(dtype, copy=named is None))
        for weight in model.parameters()
        if weight.is_floating_point()  # not those of a quantised one
    }
    model = copy.deepcopy(model, weights)
    model.config.use_cache = False
    return model.requires_grad_(False).eval()
