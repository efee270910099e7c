"""Places a model on the workers: a full copy on each (DDP), or a shard on each (FSDP2).

transformers treats a sharded model like one that it sharded while loading: the Trainer neither
moves nor wraps it, and generation keeps the ranks in step. The first rank loads the full base on
its CPU, in 4 bits if it is quantised, and hands it out a layer at a time (`first_worker`).

FSDP2 stores a weight as a DTensor, split along its first dimension. Files always hold full tensors:
a checkpoint depends neither on the number of workers nor on the strategy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..config.recipe import Recipe
from .composite import towers
from .dtypes import choose_dtype, torch_dtype
from .first_worker import hand_out
from .freezing import decoder_layers
from .loading import Model


def shard(model: Model, recipe: Recipe, device: torch.device) -> None:
    """Keep this rank's shard of every weight of rank 0's, on its device.

    All ranks call this together.

    A decoder layer's weights are gathered for its forward and its backward pass, and freed after
    each. Float32 weights that train under autocast are gathered in the compute type: autocast's own
    copies of them would stay until the backward pass.

    Args:
        model: the model to train, with its adapter.
        recipe: the run's recipe.
        device: the device that this rank trains on.
    """
    base = _base(model)
    # Gradients are added up and reduced in float32, whatever the type of the weights.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    compute = torch_dtype(choose_dtype(recipe.model))
    if base is model and compute != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Parts that text does not reach are units of their own, which are never gathered: torch looks
    # for their gradients where these are reduced in another type.
    outside = towers(base)
    for name, module in base.named_modules():
        if name in outside:
            hand_out(_whole(module), device)
            fully_shard(module, mesh=mesh)
    # The root comes last: it holds the weights outside the layers, and reshards them after forward.
    for module in (*decoder_layers(base)[1], base):
        hand_out(_whole(module), device)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    base._is_distributed_loading_by_transformers = True
    base._is_fsdp_managed_module = True


def _whole(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The weights of a module that are no shards yet."""
    return [weight for weight in module.parameters() if not isinstance(weight, DTensor)]


def is_sharded(model: torch.nn.Module) -> bool:
    """True if the model's parameters are FSDP2 shards (DTensors)."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


@contextmanager
def defer_gradient_reduction(model: Model) -> Iterator[None]:
    """Inside, an adapter's gradients stay on the rank; the last microbatch reduces them.

    Without an adapter they are reduced in every microbatch: full gradients of all weights would
    take the memory that sharding saves.
    """
    base = _base(model)
    assert isinstance(base, FSDPModule)
    base.set_requires_gradient_sync(base is model)
    try:
        yield
    finally:
        base.set_requires_gradient_sync(True)


def _base(model: Model) -> PreTrainedModel:
    """The transformers model: training and generation both call it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def full_tensors(value: Any) -> Any:
    """Replace every shard in nested dicts and lists by its full tensor.

    All ranks call this together. Tensors are gathered one after the other; rank 0 gets them on the
    CPU, the other ranks get empty tensors. Values that are no shards stay unchanged.
    """
    return _full_tensors(value, {})


def _full_tensors(value: Any, by_id: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, DTensor):
        if id(value) not in by_id:  # tied weights stay tied
            gathered: torch.Tensor = value.full_tensor().detach()
            by_id[id(value)] = gathered.cpu() if dist.get_rank() == 0 else gathered.new_empty(0)
        return by_id[id(value)]
    if isinstance(value, dict):
        return {key: _full_tensors(item, by_id) for key, item in value.items()}
    if isinstance(value, list):
        return [_full_tensors(item, by_id) for item in value]
    return value


def shard_of(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a full tensor, split like `parameter`; the tensor if it is not sharded.

    Every rank holds the full tensor, so nothing is sent; only the shard goes to the device.
    """
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    mesh = parameter.device_mesh
    # FSDP2 splits in the same way: the last shards may be smaller, or empty.
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
