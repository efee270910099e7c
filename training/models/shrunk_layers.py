"""Which layers of an architecture stand for all: one of each kind, in the model's order.

A configuration says in four ways what a layer is: a list with one entry a layer (`layer_types`),
a list of the layers that have something (`mlp_only_layers`), a first or last number
(`first_k_dense_replace`), and a period (`attn_layer_period`).
"""

import re
from collections.abc import Callable, Collection, Hashable, Mapping
from itertools import pairwise
from typing import Any, TypeAlias

Values: TypeAlias = dict[str, Any]
"""A configuration as `PretrainedConfig.to_dict` writes it."""

_COUNT = re.compile(
    r"(num_|n_|conf_num_|decoder_|encoder_|num_decoder_|num_encoder_|num_hidden_)?(hidden_)?layers?"
    r"|depth|num_blocks|num_layers_per_stack|num_global_layers|resampler_depth"
)
_MEMBERS = re.compile(r".*(_layers|_layer_ids|_idxs|_indices|_indexes)")
_TAPS = ("intermediate_layers_indices", "spatial_target_layers")
"""Layers whose outputs are put together: all of them stay, because a width counts them."""

_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_LAST = ("num_kv_shared_layers",)
_ENDS = ("max_window_layers", "moe_layer_end_index")
"""Numbers of a layer after which there is another kind; they are at most the number of layers."""

_BLOCK = "n_layers_per_attn_res_block"

# A period, the field with its offset, and the lists that say the same where they are given.
_PERIODS = (
    ("attn_layer_period", "attn_layer_offset", ("layers_block_type", "layer_types")),
    ("global_attn_every_n_layers", "", ("layer_types",)),
    ("sliding_window_pattern", "", ("layer_types",)),
    ("_sliding_window_pattern", "", ("layer_types",)),
    ("full_attention_interval", "", ("layer_types",)),
    ("layer_group_size", "", ("layer_types",)),
    ("expert_layer_period", "expert_layer_offset", ()),
    ("decoder_sparse_step", "", ("mlp_layer_types",)),
    ("moe_layer_freq", "", ("mlp_layer_types",)),
    ("moe_layer_interval", "", ("mlp_layer_types",)),
    ("interleave_moe_layer_step", "", ("moe_layers",)),
    ("no_rope_layer_interval", "", ("no_rope_layers",)),
    ("cross_attention_frequency", "", ()),
    ("cross_layer_interval", "", ()),
)


def keep_kinds(values: Values) -> None:
    """Cut every stack of layers in `values`, in place, to the fewest that hold each kind.

    Two layers of a stack stay where all are alike, because a fault can lie between two.
    """
    counts = {key: n for key, n in values.items() if _COUNT.fullmatch(key) and _is_count(n)}
    if not counts:
        _infer_count(values, counts)
    stack = values.get("num_layers_per_stack")
    if stack and not values["num_hidden_layers"] % stack:  # a stack is gone through again and again
        rounds = values["num_hidden_layers"] // stack
        values["num_layers_per_stack"] = min(stack, 2)
        values["num_hidden_layers"] = rounds * min(stack, 2)
        return
    for total in sorted(set(counts.values()), reverse=True):
        chosen = _chosen(values, total)
        _subset(values, total, chosen)
        for key, number in counts.items():
            if number == total:
                values[key] = len(chosen)


def kinds_of_layers(values: Values, total: int) -> list[Hashable]:
    """Equal for layers of a stack of `total` of which the configuration says the same."""
    features = _features(values, total)
    return [tuple(feature(layer) for feature in features) for layer in range(total)]


def _infer_count(values: Values, counts: dict[str, int]) -> None:
    """Some configurations have a list of kinds alone."""
    for key in ("layers_block_type", "layer_types"):
        if isinstance(values.get(key), list):
            counts[f"len({key})"] = len(values[key])
            return


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def _chosen(values: Values, total: int) -> list[int]:
    """The layers that stay, by their numbers in the whole model."""
    first: dict[Hashable, int] = {}
    for layer, kind in enumerate(kinds_of_layers(values, total)):
        first.setdefault(kind, layer)
    chosen = set(first.values())
    for key in _TAPS:
        chosen |= {tap for tap in values.get(key) or () if 0 <= tap < total}
    chosen |= _shared(values, total)
    if _periods(values) or _BLOCK in values:  # they count from the first layer
        return list(range(max(min(total, 2), max(chosen) + 1)))
    rest = (layer for layer in range(total) if layer not in chosen)
    while len(chosen) < min(2, total):
        chosen.add(next(rest))
    return sorted(chosen)


def _shared(values: Values, total: int) -> set[int]:
    """Layers that use what another layer made.

    Zamba's blocks lend their weights: one layer more than there are blocks. Inkling adds up the
    outputs of a block of layers from its second block on.
    """
    kinds = values.get("layers_block_type") or ()
    hybrids = [layer for layer, kind in enumerate(kinds) if kind == "hybrid"]
    chosen = set(hybrids[: (values.get("num_mem_blocks") or 1) + 1])
    second = values.get(_BLOCK)
    return chosen | {second} if second and second < total else chosen


def _features(values: Values, total: int) -> list[Callable[[int], Hashable]]:
    """What distinguishes one layer from another, as functions of its number."""
    features: list[Callable[[int], Hashable]] = []
    for key, value in values.items():
        if _is_member_list(key, value, total):
            features.append(_within(value))
        elif isinstance(value, list | tuple) and len(value) == total > 1:
            features.append(_entry(value))
        elif key == "per_layer_config" and isinstance(value, Mapping):
            by_layer = {int(layer): repr(changes) for layer, changes in value.items()}
            features.append(by_layer.get)
    for key in _FIRST:
        if _is_count(values.get(key)):
            features.append(_within(range(values[key])))
    for key in _LAST:
        if _is_count(values.get(key)):
            features.append(_within(range(total - values[key], total)))
    if cycle := values.get("block_types"):
        features.append(lambda layer: str(cycle[layer % len(cycle)]))
    return features + [_in_period(*period) for period in _periods(values)]


def _within(layers: Collection[int]) -> Callable[[int], Hashable]:
    return lambda layer: layer in layers


def _in_period(period: int, offset: int) -> Callable[[int], Hashable]:
    return lambda layer: layer % period == offset


def _entry(value: list[Any] | tuple[Any, ...]) -> Callable[[int], Hashable]:
    """An entry of a list; of many different numbers only whether they are 0."""
    entries = [repr(entry) for entry in value]
    if len(set(entries)) > 4 and all(isinstance(entry, int | float) for entry in value):
        entries = [str(bool(entry)) for entry in value]
    return lambda layer: entries[layer]


def _periods(values: Values) -> list[tuple[int, int]]:
    """Periods that decide, each with the place of the layer that is of the other kind."""
    cycle = values.get("block_types") or ()
    periods = [(len(cycle), len(cycle) - 1)] if len(cycle) > 1 else []
    for key, offset, lists in _PERIODS:
        period = values.get(key)
        if isinstance(period, int) and period > 1 and not any(values.get(name) for name in lists):
            periods.append((period, values.get(offset, period - 1)))
    return periods


def _is_member_list(key: str, value: Any, total: int) -> bool:
    """True for a rising list of layer numbers."""
    if not isinstance(value, list | tuple) or not value or not _MEMBERS.fullmatch(key):
        return False
    if not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value):
        return False
    rising = all(low < high for low, high in pairwise(value))
    return rising and value[0] >= 0 and value[-1] < total


def _subset(values: Values, total: int, chosen: list[int]) -> None:
    """Express everything that is said about layers for the chosen ones."""
    place = {layer: new for new, layer in enumerate(chosen)}
    for key, value in list(values.items()):
        if _is_member_list(key, value, total):
            values[key] = [place[layer] for layer in value if layer in place]
        elif key == "kv_source_layers" and isinstance(value, list) and len(value) == total:
            values[key] = [_source(value[layer], place) for layer in chosen]
        elif isinstance(value, list | tuple) and len(value) == total > 1:
            values[key] = [value[layer] for layer in chosen]
        elif key == "per_layer_config" and isinstance(value, Mapping):
            kept = {place[int(layer)]: v for layer, v in value.items() if int(layer) in place}
            values[key] = kept
        elif key in _FIRST and _is_count(value):
            values[key] = sum(layer < value for layer in chosen)
        elif key in _LAST and _is_count(value):
            values[key] = sum(layer >= total - value for layer in chosen)
        elif key in _ENDS and _is_count(value):
            values[key] = min(value, len(chosen) - (key == "moe_layer_end_index"))
        elif key == "vision_feature_layer":
            values[key] = feature_layers(value, len(chosen))


def _source(layer: int, place: dict[int, int]) -> int:
    """The layer that lends its keys and values: the nearest kept one up to it."""
    return max((new for old, new in place.items() if old <= layer), default=0)


def feature_layers(value: Any, total: int) -> Any:
    """Numbers of a tower's layers, from its start or end, that a tower of `total` layers has."""
    if isinstance(value, list | tuple):
        return [feature_layers(layer, total) for layer in value]
    return max(-total, min(value, total - 1)) if isinstance(value, int) else value
