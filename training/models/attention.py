"""Attention by documents: a flat row of documents without a mask over the whole row.

transformers knows it by the name `NAME`. A forward pass that hands over `documents` computes each
document by itself: on CUDA in a kernel that takes borders, on a CPU in a call for each, elsewhere
in groups of documents of like length. Documents that share what they begin with get a copy of it
here, and only here. A pass without them (generation, one document a row) computes
as sdpa does.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import dropout as drop
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..data.documents import Documents, Groups
from .attention_on_cpu import by_parts

NAME = "finray_documents"

_WITHOUT_EFFECT = frozenset(
    {
        *("position_ids", "cache_position", "use_cache", "position_embeddings", "layer_idx"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
        *("num_items_in_batch", "logits_to_keep"),
    }
)
"""Keyword arguments that attention functions receive and that change no result."""
_BLOCK = 256
"""Tokens whose scores are computed at a time where no fused kernel does."""
_WIDEST = 256
"""Largest width of a head that the kernel takes."""


@dataclass(frozen=True)
class _Layer:
    """What a layer's attention computes, other than of its inputs."""

    dropout: float
    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def is_plain(self) -> bool:
        """True if fused kernels compute it."""
        return self.softcap is None and self.sinks is None

    def window_of(self, size: int) -> int | None:
        """The window, if it is smaller than a document."""
        return self.window if self.window is not None and self.window < size else None


def attend_by_documents(model: torch.nn.Module) -> None:
    """Make a model use this attention.

    Raises:
        ValueError: its attention cannot be replaced.
    """
    base: PreTrainedModel = next(
        part for part in model.modules() if isinstance(part, PreTrainedModel)
    )
    replace_attention(base, NAME)


def replace_attention(base: PreTrainedModel, name: str) -> None:
    """Make a model use the attention that transformers has under a name.

    Raises:
        ValueError: its attention cannot be replaced.
    """
    base.set_attn_implementation(name)
    if base.config.get_text_config()._attn_implementation != name:
        raise ValueError(f"the attention of {type(base).__name__} cannot be replaced")


def no_mask(device: torch.device) -> Tensor:
    """An attention mask (1, 1, 0, 0), instead of which transformers makes none.

    Attention that reads a mask fails with it, so that documents cannot mix unnoticed.
    """
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)


def all_tokens(tokens: int, device: torch.device) -> Tensor:
    """A mask (1, tokens) of a row without padding, for a model that reads it outside attention.

    Attention gets `no_mask` in its place, which `mask_of` knows it by: its values are one.
    """
    return torch.ones((), dtype=torch.bool, device=device).expand(1, tokens)


def mask_of(*, attention_mask: Tensor | None = None, **settings: Any) -> Tensor | None:
    """The mask that transformers hands to this attention; arguments as for `sdpa_mask`."""
    if attention_mask is not None and attention_mask.stride() == (0, 0):
        return no_mask(attention_mask.device)
    mask: Tensor | None = sdpa_mask(attention_mask=attention_mask, **settings)
    return mask


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    documents: Documents | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers' models call.

    Args:
        module: the layer.
        query: (rows, heads, tokens, width).
        key, value: (rows, heads of keys, tokens, width).
        attention_mask: of a pass without `documents`.
        dropout: probability that a weight is 0.
        scaling: factor of the scores; None for 1/√width.
        is_causal: False if tokens see those after them; None for the layer's own.
        sliding_window: number of tokens that a token sees, itself included; None for all.
        softcap: scores stay within ±softcap.
        s_aux: (heads,): scores of a further key without a value.
        documents: of the only row.
        others: further arguments of the model's forward.

    Returns:
        (rows, tokens, heads, width of values), None.

    Raises:
        ValueError: `documents` with arguments whose effect is not known here.
    """
    layer = _Layer(dropout, scaling, sliding_window or None, softcap, s_aux)
    if documents is None:
        if layer.is_plain:
            arguments = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
            of_rows: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, **arguments, **others
            )
            return of_rows
        added = _added(attention_mask, query, key)
        if attention_mask is None and query.shape[2] == key.shape[2] and added is not None:
            window = layer.window_of(query.shape[2])
            return _weighed_in_blocks(query, key, value, added, layer, window), None
        return _weighed(query, key, value, added, layer), None
    strange = [name for name in others if others[name] is not None and name not in _WITHOUT_EFFECT]
    if strange or is_causal is False or query.shape[0] != 1 or query.shape[2] != documents.on_row:
        raise ValueError(f"attention by documents with {strange}, {is_causal=}, {query.shape=}")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    shared = documents.shared
    if shared is None:
        return _by_documents(query, key, value, documents, layer)[None], None
    query, key, value = (_repeated(tensor, shared.index) for tensor in (query, key, value))
    computed = _by_documents(query, key, value, documents, layer)
    row: Tensor = _Reordered.apply(computed, shared.back, shared.index, shared.copies)  # type: ignore[no-untyped-call]
    return row[None], None


def _by_documents(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, layer: _Layer
) -> Tensor:
    """All documents, one behind the other; tensors are (tokens, heads, width)."""
    if layer.is_plain and layer.dropout == 0:
        if _fits_kernel(query, key, value):
            return _by_kernel(query, key, value, documents, layer)
        if _fits_cpu(query, value):
            return _by_parts(query, key, value, documents, layer)
    return _by_groups(query, key, value, documents, layer)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask_of)


def _fits_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True if the kernel computes with this device, type and width of heads."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and key.dtype == query.dtype
        and value.shape[-1] <= width <= _WIDEST
        and width % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _fits_cpu(query: Tensor, value: Tensor) -> bool:
    """True if the processor's kernel computes with these."""
    return query.device.type == "cpu" and value.shape[-1] <= query.shape[-1]


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, layer: _Layer
) -> Tensor:
    """All documents in one call; tensors are (tokens, heads, width)."""
    width = value.shape[-1]
    window = layer.window_of(documents.longest)
    computed = varlen_attn(
        query,
        key,
        pad(value, (0, query.shape[-1] - width)),
        documents.borders,
        documents.borders,
        documents.longest,
        documents.longest,
        scale=layer.scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(computed, Tensor)
    return computed[..., :width]


def _by_parts(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, layer: _Layer
) -> Tensor:
    """A call for each document on the CPU; tensors are (tokens, heads, width)."""
    width = value.shape[-1]
    if width < query.shape[-1]:
        value = pad(value, (0, query.shape[-1] - width))
    return by_parts(query, key, value, documents, layer.scaling, layer.window)[..., :width]


def _by_groups(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, layer: _Layer
) -> Tensor:
    """A call for each group of documents; tensors are (tokens, heads, width)."""
    groups = documents.groups
    computed = []
    parts = (_split(query, groups), _split(key, groups), _split(value, groups))
    for (count, size), q, k, v in zip(groups.shapes, *parts, strict=True):
        window = layer.window_of(size)
        if layer.is_plain:
            mask = None if window is None else documents.mask(size, window, query.dtype)
            of_group = _fused(q, k, v, mask, layer)
        else:
            mask = documents.mask(size, window, query.dtype)
            of_group = _weighed_in_blocks(q, k, v, mask, layer, window)
        computed.append(of_group.reshape(count * size, *of_group.shape[2:]))
    together = torch.cat(computed)
    back: Tensor = _Reordered.apply(together, groups.inverse, groups.index, groups.padding)  # type: ignore[no-untyped-call]
    return back


def _repeated(tensor: Tensor, index: Tensor) -> Tensor:
    rows: Tensor = _Repeated.apply(tensor, index)  # type: ignore[no-untyped-call]
    return rows


def _split(tensor: Tensor, groups: Groups) -> list[Tensor]:
    """(documents, heads, tokens, width) of each group."""
    ordered = _Reordered.apply(tensor, groups.index, groups.inverse, None)  # type: ignore[no-untyped-call]
    parts = ordered.split([count * size for count, size in groups.shapes])
    return [
        part.unflatten(0, shape).transpose(1, 2)
        for part, shape in zip(parts, groups.shapes, strict=True)
    ]


class _Repeated(torch.autograd.Function):
    """Rows of a tensor by an index that names some of them several times."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(tensor)
        return tensor.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        given = upstream[0]
        # Sums of many gradients, which a lower type would round again and again.
        precise = torch.promote_types(given.dtype, torch.float32)
        total = given.new_zeros(ctx.rows, *given.shape[1:], dtype=precise)
        return total.index_add_(0, index, given.to(precise)).to(given.dtype), None


class _Reordered(torch.autograd.Function):
    """Rows of a tensor by their index; the gradient takes the way back, without adding up."""

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, index: Tensor, inverse: Tensor, padding: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(inverse, padding)
        return tensor.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, padding = ctx.saved_tensors
        gradient = upstream[0].index_select(0, inverse)
        if padding is not None:
            gradient.masked_fill_(padding[:, None, None], 0)
        return gradient, None, None, None


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, layer: _Layer) -> Tensor:
    """torch's attention; (documents, tokens, heads, width of values)."""
    width = value.shape[-1]
    if width < query.shape[-1]:  # fused kernels take equal widths
        value = pad(value, (0, query.shape[-1] - width))
    shares_keys = query.shape[1] != key.shape[1]
    if shares_keys and query.device.type != "cpu":  # fused kernels elsewhere take equal numbers
        key, value = (for_all_heads(tensor, query) for tensor in (key, value))
        shares_keys = False
    computed = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if mask is None else mask[None, None],
        dropout_p=layer.dropout,
        is_causal=mask is None,
        scale=layer.scaling,
        enable_gqa=shares_keys,
    )
    return computed[..., :width].transpose(1, 2)


def _weighed_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, layer: _Layer, window: int | None
) -> Tensor:
    """As `_weighed` with a causal mask, without the scores of keys that a block of tokens does not
    see: of a long document almost half."""
    size = query.shape[2]
    if size <= _BLOCK:
        return _weighed(query, key, value, mask, layer)
    key, value = (for_all_heads(tensor, query) for tensor in (key, value))
    blocks = []
    for first in range(0, size, _BLOCK):
        last = min(first + _BLOCK, size)
        start = 0 if window is None else max(0, first - window + 1)
        of_block = query[:, :, first:last], key[:, :, start:last], value[:, :, start:last]
        blocks.append(_weighed(*of_block, mask[first:last, start:last], layer))
    return torch.cat(blocks, dim=1)


def _weighed(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, layer: _Layer
) -> Tensor:
    """Attention with capped scores and sinks; (documents, tokens, heads, width of values)."""
    if key.shape[1] != query.shape[1]:
        key, value = (for_all_heads(tensor, query) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if layer.scaling is None else layer.scaling
    scores = query @ key.transpose(-2, -1) * scale
    if layer.softcap is not None:
        scores = (scores / layer.softcap).tanh() * layer.softcap
    if mask is not None:
        scores = scores + mask
    if layer.sinks is not None:
        column = layer.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    precise = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=precise).to(query.dtype)
    weights = drop(weights[..., : key.shape[2]], layer.dropout)
    return (weights @ value).transpose(1, 2)


def for_all_heads(tensor: Tensor, query: Tensor) -> Tensor:
    """Keys or values, repeated for each head of the queries that reads them."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)


def _added(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """What is added to the scores of rows; without a mask, tokens see those before them."""
    size = query.shape[2]
    if mask is None:
        if size == 1:
            return None
        mask = torch.ones(size, key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask.dtype != torch.bool:
        return mask
    added = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    return added.masked_fill_(~mask, torch.finfo(query.dtype).min)
