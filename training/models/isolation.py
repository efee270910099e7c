"""Keeps packed documents apart, in the way that the model's forward takes.

documents   attention computes one document at a time (`attention`); one long row without padding
positions   transformers makes a block mask from positions that restart with every document
mask        the block mask is made here: the model does not make it from its positions
borders     kernels of convolutions, recurrences and flash attention get the documents' borders; one
            long row without padding

`rehearsal` decides which of them is right for an architecture.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

from ..config.sections import Isolation
from ..data.batching import Batch
from ..data.documents import Documents
from .attention import all_tokens, no_mask


def kept_outputs(
    model: torch.nn.Module,
    batch: Batch,
    accepted: frozenset[str],
    isolation: Isolation | None = "positions",
    config: Any = None,
) -> tuple[Tensor, Any]:
    """(logits of the kept columns, all outputs); documents do not see each other.

    The logits are (rows, columns, vocabulary).

    Args:
        model: the model, which may be wrapped for training.
        batch: flat for documents and borders.
        accepted: parameter names of the model's forward.
        isolation: how the model keeps documents apart; None for one document a row, whose
            positions the model counts itself: a few architectures do not start at 0.
        config: the model's configuration; needed for `mask`, and for the auxiliary loss of a
            mixture of experts.
    """
    outputs = outputs_of(model, batch, accepted, isolation, config)
    return kept_columns(outputs.logits, batch.inputs, accepted), outputs


def kept_columns(values: Tensor, inputs: Mapping[str, Tensor], accepted: frozenset[str]) -> Tensor:
    """Logits, or hidden states of the output head, of the kept columns: (rows, columns, width).

    Args:
        values: as the model computes them.
        inputs: those of the batch.
        accepted: as for `kept_outputs`.
    """
    values = values.reshape(len(inputs["input_ids"]), -1, values.shape[-1])
    return values if "logits_to_keep" in accepted else values[:, inputs["logits_to_keep"]]


def outputs_of(
    model: torch.nn.Module,
    batch: Batch,
    accepted: frozenset[str],
    isolation: Isolation | None = "positions",
    config: Any = None,
) -> Any:
    """The model's outputs; arguments are those of `kept_outputs`."""
    inputs = batch.inputs
    if isolation is None:
        accepted -= {"position_ids"}
    values: dict[str, Any] = {name: value for name, value in inputs.items() if name in accepted}
    takes_mask = isolation is None and "attention_mask" in accepted
    if takes_mask and batch.sizes is not None and _balances(config):
        values["attention_mask"] = _mask_of_padding(inputs["input_ids"], batch.sizes)
    if batch.documents is not None:
        if batch.documents.shared is None:
            values.update(_borders(batch.documents))
        if isolation == "documents":
            mask = _mask_without_borders(inputs["input_ids"], config)
            values.update(attention_mask=mask, documents=batch.documents)
    if isolation == "mask":
        dtype = next(w.dtype for w in model.parameters() if w.is_floating_point())
        values["attention_mask"] = _block_mask(config, inputs, dtype)
    return model(**values, use_cache=False)


def _mask_without_borders(ids: Tensor, config: Any) -> Tensor:
    """Of a flat row; the auxiliary loss of a mixture of experts reads it token by token."""
    return all_tokens(ids.shape[1], ids.device) if _balances(config) else no_mask(ids.device)


def _mask_of_padding(ids: Tensor, sizes: Tensor) -> Tensor:
    """Of padded rows, whose padding that loss leaves out."""
    return torch.arange(ids.shape[1], device=ids.device) < sizes[:, None]


def _balances(config: Any) -> bool:
    """True if a mixture of experts computes its auxiliary loss."""
    if config is None:
        return False
    return bool(getattr(config.get_text_config(), "output_router_logits", False))


def _block_mask(config: Any, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """The causal mask of each kind of the model's layers, within documents."""
    positions = inputs["position_ids"]
    # Only shape, type and device of the embeddings count.
    embeddings = torch.empty((*positions.shape, 0), dtype=dtype, device=positions.device)
    return create_masks_for_generate(config, embeddings, None, None, positions)


def _borders(documents: Documents) -> dict[str, Any]:
    """Arguments by which kernels keep documents apart."""
    return {
        "cu_seq_lens_q": documents.borders,
        "cu_seq_lens_k": documents.borders,
        "max_length_q": documents.longest,
        "max_length_k": documents.longest,
        "seq_idx": documents.numbers,
    }
