"""How a model is placed on the workers: whole on each (DDP), or a shard of it on each (FSDP2).

transformers takes a sharded model for one that it sharded while loading: the Trainer neither moves
nor wraps it, and generation keeps the ranks in step. Every rank loads the base whole on the CPU and
keeps its shard, so a node needs memory for as many copies as it has workers.

FSDP2 keeps a weight as a DTensor, cut along its first dimension. What is written is always whole:
a checkpoint depends neither on the number of workers nor on the strategy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..common.errors import InputError
from ..config.recipe import Recipe
from .dtypes import choose_dtype, torch_dtype
from .freezing import decoder_layers
from .loading import Model

Strategy = Literal["ddp", "fsdp"]

USABLE = 0.8
"""Share of a device's memory for what lies there all the time; the rest is for activations."""


def choose_strategy(
    recipe: Recipe, model: Model, world_size: int, device: torch.device
) -> Strategy:
    """What the recipe says; auto takes shards where a device cannot hold all of it.

    One worker has nobody to share with. All ranks call it together, and decide alike.

    Args:
        recipe: the run's.
        model: whole, wherever it is.
        world_size: how many workers there are.
        device: where this worker trains.

    Raises:
        InputError: for fsdp in float16, whose scaled gradients no test has seen.
    """
    asked, is_half = recipe.scale.strategy, choose_dtype(recipe.model) == "float16"
    if world_size == 1 or asked == "ddp":
        return "ddp"
    if asked == "fsdp":
        if is_half:
            raise InputError(
                "scale.strategy: fsdp computes in bfloat16 or float32, and this model in float16; "
                "set model.dtype, or take ddp"
            )
        return "fsdp"
    if is_half or recipe.why_not_shardable is not None or device.type == "cpu":
        return "ddp"
    memory: list[int] = [0] * world_size
    dist.all_gather_object(memory, torch.cuda.get_device_properties(device).total_memory)
    return "ddp" if static_bytes(model) <= USABLE * min(memory) else "fsdp"


def static_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights and, of what is trained, gradients, AdamW's moments and masters."""
    total = 0
    for weight in model.parameters():
        total += weight.nbytes
        if weight.requires_grad:
            of_optimizer = 8 if weight.dtype == torch.float32 else 12
            total += weight.nbytes + of_optimizer * weight.numel()
    return total


def shard(model: Model, recipe: Recipe, device: torch.device) -> None:
    """Leave on this rank's device its shard of every weight; all ranks call it together.

    A decoder layer's weights are gathered for its forward and its backward pass, and freed after
    each. Weights that are trained in float32 under autocast are gathered in the compute type:
    autocast's own copies of them would stay until the backward pass.

    Args:
        model: as it is trained, adapter and all.
        recipe: the run's.
        device: where this rank trains.
    """
    base = _base(model)
    policy, compute = MixedPrecisionPolicy(), torch_dtype(choose_dtype(recipe.model))
    if base is model and compute != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # The root last: it has what is in no layer. It too lies in shards whenever one looks at it.
    for module in (*decoder_layers(base)[1], base):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    base._is_distributed_loading_by_transformers = True
    base._is_fsdp_managed_module = True


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `shard` was there."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


@contextmanager
def without_needless_reduction(model: Model) -> Iterator[None]:
    """Inside, a sharded model's gradients stay with the rank, where that costs little.

    An adapter's wait for the last microbatch. Of all weights whole gradients would take the memory
    that shards save: those are reduced in every microbatch.
    """
    base = _base(model)
    assert isinstance(base, FSDPModule)
    base.set_requires_gradient_sync(base is model)
    try:
        yield
    finally:
        base.set_requires_gradient_sync(True)


def _base(model: Model) -> PreTrainedModel:
    """What is called in training as in generation."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def whole(value: Any) -> Any:
    """Dicts and lists of tensors, with every shard replaced by its whole tensor.

    All ranks call it together. Tensors are gathered one after the other, and only rank 0 keeps
    them, on the CPU; the others' are empty. What is not cut up stays as it is.
    """
    return _whole(value, {})


def _whole(value: Any, by_id: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, DTensor):
        if id(value) not in by_id:  # tied weights stay tied
            gathered: torch.Tensor = value.full_tensor().detach()
            by_id[id(value)] = gathered.cpu() if dist.get_rank() == 0 else gathered.new_empty(0)
        return by_id[id(value)]
    if isinstance(value, dict):
        return {key: _whole(item, by_id) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item, by_id) for item in value]
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
