"""Rows of embedding and head for tokens that a run adds."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..common.errors import InputError
from ..common.storage import Folder
from ..config.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, trained_rows
from ..config.weight_files import read_header

_PREFIX = "base_model.model."


@torch.no_grad()
def make_room(model: PreTrainedModel, trained: Collection[int], fresh: Collection[int]) -> None:
    """Give each trained token a row of the embedding, and of the head.

    Args:
        model: a model that holds no adapter.
        trained: ids of the tokens to train.
        fresh: ids of those that the base's tokenizer lacks. Their rows, and those that the model
            lacks, start at the mean of all others. A bias of the head, which is not trained, keeps
            the values that it has.
    """
    if not trained:
        return
    before = rows_of(model)
    if max(trained) >= before:
        model.resize_token_embeddings(max(trained) + 1, mean_resizing=False)
    new = sorted({*fresh, *range(before, rows_of(model))})
    if not new or model.device.type == "meta":
        return
    for module in _embeddings(model):
        _set_to_mean(module.weight, new)
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            _set_to_mean(module.bias, [row for row in new if row >= before])


def _set_to_mean(values: torch.Tensor, rows: list[int]) -> None:
    """Set some rows to the mean of all others."""
    others = torch.ones(len(values), dtype=torch.bool, device=values.device)
    others[rows] = False
    mean = values[others].mean(dim=0, dtype=torch.float32)
    values[rows] = mean.to(values.dtype).expand_as(values[rows])


def room_for_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Give a base the rows that an adapter on it has.

    Args:
        model: the base.
        folder: the adapter's folder.
    """
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    whole = read_header(Folder(str(folder.absolute())), WEIGHTS_FILE).get(f"{_PREFIX}{name}.weight")
    rows = 0 if whole is None else whole.shape[0]
    make_room(model, [*trained_rows(config), rows - 1] if rows else trained_rows(config), ())


def rows_of(model: PreTrainedModel) -> int:
    """Number of rows of the model's embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def token_rows(model: PreTrainedModel, trained: Collection[int]) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices`: the rows to train, by the whole name of each matrix."""
    chosen = _embeddings(model)
    names = [name for name, module in model.named_modules() if any(module is c for c in chosen)]
    return {name: sorted(trained) for name in names}


def check_trained(model: PreTrainedModel, trained: Collection[int]) -> None:
    """Refuse added tokens of a model without an adapter whose embedding is frozen.

    Raises:
        InputError: with the embedding's name.
    """
    frozen = [module for module in _embeddings(model) if not module.weight.requires_grad]
    if trained and frozen:
        names = [n for n, module in model.named_modules() if any(module is f for f in frozen)]
        raise InputError(
            f"model.add_tokens: {' and '.join(names)} stay frozen, so the tokens would learn "
            "nothing; add them to freeze.train, or train an adapter"
        )


def _embeddings(model: PreTrainedModel) -> list[Any]:
    """The embedding, and the head where it is a matrix of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is embedding.weight:
        return [embedding]
    return [embedding, head]
