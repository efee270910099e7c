"""Passes over decoder layers that repeat earlier ones: what they keep is known.

A large model has dozens of equal layers, and each takes as long to follow as the first.
"""

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from transformers import PretrainedConfig

from .shrunk_layers import kinds_of_layers

_PLAIN = (bool, int, float, str, type(None))
_NUMBERS = {"layer_idx", "layer_id", "layer_index", "layer_number"}
"""Names under which a module knows the number of its layer."""


def kinds_of(layers: Iterable[torch.nn.Module], config: PretrainedConfig) -> list[Hashable]:
    """Equal for layers that differ in their numbers and values alone, in the layers' order.

    What the configuration says of a layer counts, and its modules with their settings and the
    shapes of their weights. A layer that shares weights with an earlier one is like no other.
    """
    layers = list(layers)
    by_config = kinds_of_layers(config.to_dict(), len(layers))
    seen: set[int] = set()
    kinds: list[Hashable] = []
    for layer, kind in zip(layers, by_config, strict=True):
        own = {id(parameter) for parameter in layer.parameters()}
        kinds.append(object() if own & seen else (kind, _structure(layer)))
        seen |= own
    return kinds


def form_of(value: Any) -> Hashable:
    """Equal for arguments of which a layer keeps as much; what it may change is like no other."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.requires_grad
    if isinstance(value, tuple):
        return tuple(map(form_of, value))
    return value if isinstance(value, _PLAIN) else object()


def _structure(layer: torch.nn.Module) -> Hashable:
    return tuple(
        (name, type(module), _settings(module), _tensors(module))
        for name, module in layer.named_modules()
    )


def _settings(module: torch.nn.Module) -> Hashable:
    return tuple(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN) and name not in _NUMBERS
    )


def _tensors(module: torch.nn.Module) -> Hashable:
    held = {**module._parameters, **module._buffers}
    return tuple((name, form_of(tensor)) for name, tensor in held.items())
