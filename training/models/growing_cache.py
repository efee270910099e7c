"""A cache of keys and values that tokens are appended to in place.

transformers' own joins all that it holds with each new token, which copies the whole cache: for a
completion of n tokens n²/2 times what a token holds.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 128
"""Tokens that new memory has room for beyond those that are held."""


def append_in_place(cache: DynamicCache, longest: int) -> None:
    """Let a cache's layers append in place, but for those with a window or another state.

    Args:
        cache: the cache of a batch's prompts.
        longest: tokens that a sequence has at most at the end.
    """
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[number] = _GrowingLayer(layer, longest)


class _GrowingLayer(DynamicLayer):
    """Holds views of memory that has room for more tokens.

    Args:
        layer: with what it holds so far.
        longest: as for `append_in_place`.
    """

    def __init__(self, layer: DynamicLayer, longest: int) -> None:
        super().__init__()
        self._longest = longest
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.keys, self.values = layer.keys, layer.values
        self._memories: list[Tensor] = [self.keys, self.values]

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the tokens' keys and values, (sequences, heads, tokens, width); returns all."""
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def _append(self, number: int, held: Tensor, new: Tensor) -> Tensor:
        size, end = held.shape[-2], held.shape[-2] + new.shape[-2]
        memory = self._memories[number]
        # What selects sequences replaces the tensors that this layer holds.
        is_own = memory.data_ptr() == held.data_ptr() and len(memory) == len(held)
        if not is_own or memory.shape[-2] < end:
            room = max(end, min(end + _ROOM, self._longest))
            memory = held.new_empty(*held.shape[:2], room, held.shape[-1])
            memory[:, :, :size] = held
            self._memories[number] = memory
        memory[:, :, size:end] = new
        return memory[:, :, :end]
