"""Tensors of which every worker holds a part: gathered to one, and cut up again.

FSDP2 keeps a trained or frozen weight as a DTensor, cut along its first dimension. What is written
is always whole, so that a checkpoint belongs to no number of workers and to no strategy.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def whole(value: Any) -> Any:
    """Dicts and lists of tensors, with every shard replaced by its whole tensor.

    All ranks call it together. Tensors are gathered one after the other, and only rank 0 keeps
    them, on the CPU; the others' are empty. What is not cut up stays as it is.
    """
    return _whole(value, {})


def _whole(value: Any, known: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, DTensor):
        if id(value) not in known:  # tied weights stay tied
            gathered: torch.Tensor = value.full_tensor().detach()
            known[id(value)] = gathered.cpu() if dist.get_rank() == 0 else gathered.new_empty(0)
        return known[id(value)]
    if isinstance(value, dict):
        return {key: _whole(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item, known) for item in value]
    return value


def shard_of(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor, cut up as a parameter is; the tensor where that is whole.

    Every rank has the whole tensor: nothing is sent, and only the part goes to the device.
    """
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    mesh = parameter.device_mesh
    # As FSDP2 cuts: the last parts may be smaller, or nothing.
    parts = tensor.chunk(mesh.size())
    part = parts[mesh.get_local_rank()] if mesh.get_local_rank() < len(parts) else tensor[:0]
    return DTensor.from_local(
        part.to(parameter.device, copy=True),
        mesh,
        parameter.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
