"""Attention by documents on a CPU: torch's fused kernel reads and writes parts of the whole row.

What the backward pass needs are the row's queries, keys, values and result, without copies of parts
whose sizes differ from row to row, between which a heap would keep gaps.
"""

from typing import Any

import torch
from torch import Tensor

from ..data.documents import Documents

_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def by_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """The attention of each document to itself, causal: (tokens, heads, width).

    Args:
        query: (tokens, heads, width).
        key, value: (tokens, heads of keys, width).
        documents: of the row.
        scaling: factor of the scores; None for 1/√width.
        window: number of tokens that a token sees, itself included; None for all before it.
    """
    computed: Tensor = _ByParts.apply(query, key, value, documents, scaling, window)  # type: ignore[no-untyped-call]
    return computed


class _ByParts(torch.autograd.Function):
    """A call of the kernel for each document."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Documents,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        computed = query.new_empty(query.shape)
        precise = torch.promote_types(query.dtype, torch.float32)
        norms = torch.empty(query.shape[:2], dtype=precise, device=query.device)
        rows = (query, key, value, computed, norms)
        for size, (q, k, v, result, norm) in _parts(documents, *rows):
            how = _settings(documents, size, q.dtype, scaling, window)
            own, logarithm = _KERNEL(*_heads(q, k, v), **how)
            result.copy_(own[0].transpose(0, 1))
            norm.copy_(logarithm[0].transpose(0, 1))
        ctx.save_for_backward(query, key, value, computed, norms)
        ctx.settings = documents, scaling, window
        return computed

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, computed, norms = ctx.saved_tensors
        documents, scaling, window = ctx.settings
        gradients = [torch.empty_like(tensor) for tensor in (query, key, value)]
        rows = (upstream[0], query, key, value, computed, norms, *gradients)
        for size, (above, q, k, v, result, norm, *into) in _parts(documents, *rows):
            own = _BACKWARD(
                *_heads(above, q, k, v, result),
                norm.transpose(0, 1)[None],
                dropout_p=0.0,
                **_settings(documents, size, q.dtype, scaling, window),
            )
            for part, gradient in zip(into, own, strict=True):
                part.copy_(gradient[0].transpose(0, 1))
        return *gradients, None, None, None


def _parts(documents: Documents, *rows: Tensor) -> Any:
    """(tokens, views of each tensor) of every document."""
    split = zip(*(torch.split(row, [*documents.lengths]) for row in rows), strict=True)
    return zip(documents.lengths, split, strict=True)


def _heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(1, heads, tokens, width), as the kernel takes them."""
    return tuple(tensor.transpose(0, 1)[None] for tensor in tensors)


def _settings(
    documents: Documents, size: int, dtype: torch.dtype, scaling: float | None, window: int | None
) -> dict[str, Any]:
    """The kernel's further arguments for a document of `size` tokens."""
    if window is None or window >= size:
        return {"is_causal": True, "scale": scaling}
    mask = documents.mask(size, window, dtype)[None, None]
    return {"is_causal": False, "scale": scaling, "attn_mask": mask}
