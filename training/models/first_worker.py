"""Lets the first worker alone load a model that is sharded, and hands out its weights.

The others get its modules with placeholders: tensors of the weights' shapes that hold one value.
`hand_out` fills them on the device, as many at a time as are whole there at once. So a machine's
memory holds the weights once, however many workers it has.
"""

import copyreg
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from bitsandbytes.nn import Params4bit
from torch import Tensor

from ..common.errors import FinrayError
from ..config.recipe import Recipe
from ..config.sections import Strategy
from .cpu_group import cpu_group
from .out_of_memory import first_line

_Made = TypeVar("_Made", bound=torch.nn.Module)
_Shape = tuple[torch.Size, torch.dtype]


def made_once(recipe: Recipe, strategy: Strategy, make: Callable[[], _Made]) -> _Made:
    """What `make` returns; if it is sharded next, on the first worker, and elsewhere the same
    modules with placeholders.

    All ranks call this together. Buffers, and the scales of 4-bit weights, have their values
    everywhere. Code of the model's own, or a part that cannot be sent, lets each rank call `make`.

    Args:
        recipe: the run's recipe.
        strategy: of the run.
        make: makes a model on the CPU.

    Raises:
        FinrayError: that of the first worker, on all.
        RuntimeError: another error of the first worker, on the others.
    """
    if strategy != "fsdp" or recipe.model.trust_remote_code:
        return make()
    # Between CPUs: a GPU's collectives end while a slow storage is still read.
    group = cpu_group()
    try:
        return _received(make, group) if dist.get_rank() > 0 else _sent(make, group)
    finally:
        dist.destroy_process_group(group)


def _sent(make: Callable[[], _Made], group: Any) -> _Made:
    """What `make` returns, after it or its error has been sent."""
    try:
        model = make()
    except Exception as error:
        of_others = error if isinstance(error, FinrayError) else RuntimeError(first_line(error))
        dist.broadcast_object_list([of_others], src=0, group=group)
        raise
    dist.broadcast_object_list([_packed(model)], src=0, group=group)
    return model


def _received(make: Callable[[], _Made], group: Any) -> _Made:
    received: list[Any] = [None]
    dist.broadcast_object_list(received, src=0, group=group)
    (sent,) = received
    if isinstance(sent, Exception):
        raise sent
    if sent is None:
        return make()
    try:
        made: _Made = _Unpacker(io.BytesIO(sent)).load()
    except ImportError:  # a module that transformers fetched for the first worker
        return make()
    return made


@torch.no_grad()
def hand_out(weights: Iterable[Tensor], device: torch.device) -> None:
    """Give weights the values of the first worker, on this rank's device.

    All ranks call this together, with the same weights in the same order.
    """
    is_first = dist.get_rank() == 0
    for weight in weights:
        if is_first:
            values = weight.data.to(device).contiguous()
        else:
            values = torch.empty(weight.shape, dtype=weight.dtype, device=device)
        dist.broadcast(values, src=0)
        weight.data = values
        if isinstance(weight, Params4bit):
            weight.quant_state.to(device)


def _packed(model: torch.nn.Module) -> bytes | None:
    """The modules without their weights' values; None if a part of them cannot be sent."""
    file = io.BytesIO()
    try:
        _Packer(file, {weight.data_ptr() for weight in model.parameters()}).dump(model)
    except Exception:  # noqa: BLE001 - whatever a module holds, each rank can load it
        return None
    return file.getvalue()


class _Packer(pickle.Pickler):
    """Writes shapes and types in place of weights."""

    def __init__(self, file: io.BytesIO, weights: set[int]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._weights = weights

    def persistent_id(self, value: Any) -> _Shape | None:
        is_weight = type(value) is Tensor and value.data_ptr() in self._weights
        return (value.shape, value.dtype) if is_weight and value.numel() else None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Params4bit):  # torch writes a plain parameter
            return copyreg.__newobj__, (type(value),), value.__getstate__()  # type: ignore[attr-defined]
        if type(value) is Tensor and value.untyped_storage().nbytes() > value.nbytes:
            own: Any = value.clone()  # not all of a file
            return own.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


class _Unpacker(pickle.Unpickler):
    """Reads placeholders for weights."""

    def persistent_load(self, described: _Shape) -> Tensor:
        shape, dtype = described
        return torch.empty(1, dtype=dtype).expand(shape)
