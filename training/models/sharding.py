"""Places a model on the workers: a full copy on each (DDP), or a shard on each (FSDP2).

transformers treats a sharded model like one that it sharded while loading: the Trainer neither
moves nor wraps it, and generation keeps the ranks in step. Every rank loads the full base on the
CPU and keeps its shard, so a node needs memory for one copy per worker.

FSDP2 stores a weight as a DTensor, split along its first dimension. Files always hold full tensors:
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
from .composite import towers
from .devices import memory_of
from .dtypes import choose_dtype, torch_dtype
from .freezing import decoder_layers
from .loading import Model
from .packed import PackedWeight

Strategy = Literal["ddp", "fsdp"]

USABLE = 0.8
"""Share of a device's memory for model states; the rest is for activations."""


def choose_strategy(
    recipe: Recipe, model: Model, world_size: int, device: torch.device
) -> Strategy:
    """The recipe's strategy; `auto` chooses fsdp if the full model does not fit a device.

    A single worker always uses ddp. All ranks call this together and get the same result.

    Args:
        recipe: the run's recipe.
        model: the full model, on any device.
        world_size: number of workers.
        device: the device that this worker trains on.

    Raises:
        InputError: fsdp in float16, which finray does not support (its gradients are scaled).
    """
    requested, is_half = recipe.scale.strategy, choose_dtype(recipe.model) == "float16"
    if world_size == 1 or requested == "ddp":
        return "ddp"
    if requested == "fsdp":
        if is_half:
            raise InputError(
                "scale.strategy: fsdp does not support float16, which this model computes in; set "
                "model.dtype to bfloat16 or float32, or use ddp"
            )
        return "fsdp"
    is_packed = any(isinstance(weight, PackedWeight) for weight in model.parameters())
    if is_half or is_packed or recipe.why_not_shardable is not None or device.type == "cpu":
        return "ddp"
    memory: list[int] = [0] * world_size
    dist.all_gather_object(memory, memory_of(device))
    return "ddp" if model_state_bytes(model) <= USABLE * min(memory) else "fsdp"


def model_state_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights, and of the trained weights' gradients, which DDP holds twice, moments,
    and float32 masters with gradients."""
    total = 0
    for weight in model.parameters():
        total += weight.nbytes
        if weight.requires_grad:
            of_optimizer = 8 if weight.dtype == torch.float32 else 16
            total += 2 * weight.nbytes + of_optimizer * weight.numel()
    return total


def shard(model: Model, recipe: Recipe, device: torch.device) -> None:
    """Keep only this rank's shard of every weight, on its device; all ranks call this together.

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
            fully_shard(module, mesh=mesh)
    # The root comes last: it holds the weights outside the layers, and reshards them after forward.
    for module in (*decoder_layers(base)[1], base):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    base._is_distributed_loading_by_transformers = True
    base._is_fsdp_managed_module = True


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
