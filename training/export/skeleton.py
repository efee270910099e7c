"""A model without weights: the names of its parameters, and how each is stored."""

import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D

from ..common.errors import InputError
from ..config.models import Head
from ..models.composite import is_in_towers, model_from_config, towers
from ..models.quantiser import plan_quantisation

_HEADS: dict[str, Head] = {"CAUSAL_LM": "causal", "SEQ_CLS": "score"}


class Skeleton:
    """The model that a folder's configuration describes, on the meta device.

    Args:
        folder: the base model's folder.
        task: the task that the adapter was trained for.
        labels: number of outputs of a sequence classifier.

    Raises:
        InputError: the base is stored quantised or needs its own code, or another task is given.
    """

    def __init__(self, folder: Path, task: str, labels: int | None) -> None:
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except ValueError:
            raise InputError(
                f"{folder}: cannot merge into a base that needs Python code of its own; load the "
                "adapter with PEFT, and merge it there (merge_and_unload)"
            ) from None
        if "quantization_config" in config.to_dict():
            raise InputError(
                f"{folder}: cannot merge into a base that is stored quantised; leave out --merge"
            )
        if task not in _HEADS:
            raise InputError(f"an adapter for the task {task} cannot be merged; leave out --merge")
        if task == "SEQ_CLS":
            config.num_labels = labels
        with torch.device("meta"):
            model = model_from_config(config, _HEADS[task], str(folder))
        self.task = task
        self.labels = int(config.num_labels)
        """Number of outputs of a sequence classifier."""
        self._model = model
        self._state = model.state_dict()
        self.architecture = type(model).__name__
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys)
        """Names of tied parameters: each to the parameter whose weights it shares."""

    def has(self, name: str) -> bool:
        """True if the model has a parameter of this name."""
        return name in self._state

    def shapes_of(self, module: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a module's own parameters in their order, by their names in it."""
        holder = dict(self._model.named_modules()).get(module)
        own = holder.named_parameters(recurse=False) if holder is not None else ()
        return {name: tuple(weight.shape) for name, weight in own}

    def names_of(self, stored: Iterable[str]) -> dict[str, str | None]:
        """The model's parameter name of each stored tensor; some files use other names.

        Returns:
            By the stored name. None for the parts of a `Conversion`. Tensors that the model does
            not load are left out.
        """
        return {
            key: None if pattern else name for key, name, pattern in self._parameters_of(stored)
        }

    def conversions(self, stored: Iterable[str]) -> "list[Conversion]":
        """The groups of stored tensors that transformers forms the model's parameters of."""
        parts: dict[str, list[tuple[str, str]]] = {}
        for key, name, pattern in self._parameters_of(stored):
            if pattern is not None:
                parts.setdefault(name, []).append((key, pattern))
        by_pattern = {
            pattern: entry
            for entry in get_model_conversion_mapping(self._model)
            if isinstance(entry, WeightConverter)
            for pattern in entry.source_patterns
        }
        return [
            Conversion(self._model, name, tuple(group), by_pattern[group[0][1]])
            for name, group in parts.items()
        ]

    def lacking(self, stored: Iterable[str]) -> list[str]:
        """Names of the parameters that none of the stored tensors gives a value, but for a head."""
        given = {name for _, name, _ in self._parameters_of(stored)}
        given |= {name for pair in self.tied.items() for name in pair if not given.isdisjoint(pair)}
        prefix = self._model.base_model_prefix
        is_needed = prefix if self.task == "SEQ_CLS" else ""
        ignored = "|".join(self._model._keys_to_ignore_on_load_missing or ()) or "(?!)"
        return [
            name
            for name in self._state
            if name not in given and name.startswith(is_needed) and not re.search(ignored, name)
        ]

    def _parameters_of(self, stored: Iterable[str]) -> Iterator[tuple[str, str, str | None]]:
        """(stored name, the model's name, the pattern of the conversion that it is a part of)."""
        transforms = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        prefix = self._model.base_model_prefix
        for key in sorted(stored, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, self._state)
            if name not in self._state and key in self._state:
                name, pattern = key, None
            if name in self._state:
                yield key, name, pattern

    def is_transposed(self, name: str) -> bool:
        """True if a weight is stored as (in, out), or as (tokens, width) in embeddings."""
        module = self._model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, Conv1D | torch.nn.Embedding):
            return True
        # transformers marks such experts so.
        return self._state[name].dim() == 3 and bool(vars(module).get("is_transposed", False))

    def is_embedding(self, name: str) -> bool:
        """True for the matrix of the embedding or of the head."""
        module = self._model.get_submodule(name.rpartition(".")[0])
        model = self._model
        return module is model.get_input_embeddings() or module is model.get_output_embeddings()

    def quantised(self) -> frozenset[str]:
        """Names of the weights that a run quantises, without those that text does not reach: a
        merged model takes them from its base as they are."""
        outside = towers(self._model)
        weights = plan_quantisation(self._model).weights
        return frozenset(name for name in weights if not is_in_towers(name, outside))

    def packed(self) -> frozenset[str]:
        """Names of the quantised weights that no layer of bitsandbytes holds, such as experts."""
        return plan_quantisation(self._model).packed & self.quantised()


@dataclass(frozen=True)
class Conversion:
    """Stored tensors that form parameters of the model, such as the matrices of all experts."""

    model: PreTrainedModel
    name: str
    """Name of the first parameter."""
    parts: tuple[tuple[str, str], ...]
    """(stored name, pattern in the converter) of each tensor."""
    converter: WeightConverter

    @property
    def keys(self) -> tuple[str, ...]:
        """The stored names."""
        return tuple(key for key, _ in self.parts)

    def join(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters, by name, of the stored tensors."""
        converter = deepcopy(self.converter)
        for key, pattern in self.parts:
            converter.add_tensor(self.name, key, pattern, tensors[key])
        joined = converter.convert(self.name, model=self.model, config=self.model.config)
        return {name: _only(value) for name, value in joined.items()}

    def split(self, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The stored tensors of the parameters.

        Raises:
            InputError: transformers writes them in another layout than the base's files.
        """
        written = revert_weight_conversion(self.model, parameters)
        if written.keys() != set(self.keys):
            raise InputError(
                f"{self.name}: the base's files hold it as {self.keys[0]} and so on, which "
                "transformers no longer writes; load the base with transformers, and save it again"
            )
        return {key: _only(value) for key, value in written.items()}


def _only(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value[0] if isinstance(value, list) else value
    return tensor
