"""A model without weights: the names of its parameters, and how each is stored."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..common.errors import InputError

Task = Literal["CAUSAL_LM", "SEQ_CLS"]
"""PEFT's names for the tasks of models."""


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
        except ValueError as error:  # the model needs code from its folder
            raise InputError(f"{folder}: cannot merge into this base: {error}") from None
        if "quantization_config" in config.to_dict():
            raise InputError(f"{folder}: cannot merge into a base that is stored quantised")
        if task == "CAUSAL_LM":
            make: Any = AutoModelForCausalLM
        elif task == "SEQ_CLS":
            make = AutoModelForSequenceClassification
            config.num_labels = labels
        else:
            raise InputError(f"an adapter for the task {task} cannot be merged")
        with torch.device("meta"):
            model: PreTrainedModel = make.from_config(config)
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

    def names_of(self, stored: Iterable[str]) -> dict[str, str | None]:
        """The model's parameter name of each stored tensor; some files use other names.

        Returns:
            By the stored name. None means that several tensors form one parameter (fused experts).
            Tensors that the model does not load are left out.
        """
        transforms = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        prefix = self._model.base_model_prefix
        names: dict[str, str | None] = {}
        for key in sorted(stored, key=dot_natural_key):
            name, converter = rename_source_key(key, renamings, converters, prefix, self._state)
            if name not in self._state and key in self._state:
                name, converter = key, None
            if name in self._state:
                names[key] = name if converter is None else None
        return names

    def is_transposed(self, name: str) -> bool:
        """True if a weight is stored as (in, out), or as (tokens, width) in embeddings."""
        module = self._model.get_submodule(name.rpartition(".")[0])
        return isinstance(module, Conv1D | torch.nn.Embedding)

    def quantised(self) -> frozenset[str]:
        """Names of the weights that transformers quantises with bitsandbytes: those of all linear
        layers except the head and layers tied to it."""
        skipped = HfQuantizer.get_modules_to_not_convert(
            self._model, None, self._model._keep_in_fp32_modules
        )
        return frozenset(
            f"{name}.weight"
            for name, module in self._model.named_modules()
            if (type(module) is torch.nn.Linear or isinstance(module, Conv1D))
            and should_convert_module(name, skipped)
        )
