"""AdamW for weights of any type, in the parameter groups of the recipe.

A bfloat16 weight has 8 bits of mantissa: an update of 1e-5 on 2e-2 would vanish. For weights of a
lower type than float32 the optimizer therefore updates float32 copies (masters), and rounds them
into the weights after every step.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch.optim import AdamW

from ..models.sharding import shard_of

NamedParameter = tuple[str, torch.nn.Parameter]


class SkippingAdamW(AdamW):
    """AdamW that skips a step if `skip` is 1, without waiting for the device.

    A skipped step changes no bit of the weights, the moments and the step count. Only torch's fused
    kernel can do that: it reads `found_inf`, which fp16's GradScaler sets too.
    """

    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None
    skip: torch.Tensor | None = None
    """A scalar on the weights' device: 1 to skip the next step, 0 to take it."""

    def __init__(self, groups: Iterable[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update the weights, unless the step is skipped."""
        flags = [flag for flag in (self.skip, self.found_inf) if flag is not None]
        self.found_inf = torch.stack(flags).amax() if flags else None
        loss = None if self._skips_on_host() else super().step(closure)
        self.skip = self.found_inf = None
        return loss

    def _skips_on_host(self) -> bool:
        """True if a step is skipped on a device whose fused kernel does not read the flag."""
        flag = self.found_inf
        if flag is None or flag.device.type in ("cpu", "cuda"):
            return False
        self.found_inf = None
        return bool(flag)


class MasterAdamW(SkippingAdamW):
    """AdamW with float32 masters of the weights that have a lower type.

    The parameter groups hold the masters, and the float32 weights themselves. `state_dict` holds
    the masters too, so a resumed run continues from the unrounded values.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **settings: Any) -> None:
        self._weights: list[torch.nn.Parameter] = []
        self._masters: list[torch.Tensor] = []
        super().__init__(
            [
                {**group, "params": [self._master(weight) for weight in group["params"]]}
                for group in groups
            ],
            **settings,
        )

    def _master(self, weight: torch.nn.Parameter) -> torch.Tensor:
        if weight.dtype == torch.float32:
            return weight
        master = weight.detach().float().requires_grad_()
        self._weights.append(weight)
        self._masters.append(master)
        return master

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update the masters with the weights' gradients, and round them into the weights."""
        for weight, master in zip(self._weights, self._masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
        loss = super().step(closure)
        for master in self._masters:
            master.grad = None
        self._round()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all weights."""
        super().zero_grad(set_to_none)
        for weight in self._weights:
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, and `masters` in the order of the weights."""
        return {**super().state_dict(), "masters": [master.detach() for master in self._masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the weights become its rounded masters."""
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for master, saved in zip(self._masters, state_dict["masters"], strict=True):
            master.copy_(shard_of(saved, master))
        self._round()

    def _round(self) -> None:
        for weight, master in zip(self._weights, self._masters, strict=True):
            weight.copy_(master)


def make_optimizer(
    parameters: Iterable[NamedParameter],
    decayed: Collection[str],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    lora_plus_ratio: float | None,
) -> SkippingAdamW:
    """AdamW over the parameters that require gradients.

    Args:
        parameters: the model's parameters, with their names.
        decayed: names of the parameters with weight decay.
        lora_plus_ratio: factor on the learning rate of an adapter's B matrices and vectors (LoRA+,
            Hayou et al., 2024, https://arxiv.org/abs/2402.12354); None for one rate.
    """
    trained = [(name, weight) for name, weight in parameters if weight.requires_grad]
    settings: dict[str, Any] = {"lr": learning_rate, "betas": betas, "eps": eps}
    if lora_plus_ratio is None:
        groups = _decay_groups(trained, decayed, weight_decay)
    else:
        fast = [item for item in trained if "lora_B" in item[0] or item[1].ndim == 1]
        names = {name for name, _ in fast}
        slow = [item for item in trained if item[0] not in names]
        # The rate of the first group is logged.
        groups = _decay_groups(slow, decayed, weight_decay)
        for group in _decay_groups(fast, decayed, weight_decay):
            groups.append({**group, "lr": learning_rate * lora_plus_ratio})
    is_plain = all(weight.dtype == torch.float32 for _, weight in trained)
    optimizer = (SkippingAdamW if is_plain else MasterAdamW)(groups, **settings)
    optimizer.register_load_state_dict_pre_hook(_shard_state)
    return optimizer


def _shard_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Replace full tensors of a loaded state by this rank's shards, if its weights are sharded."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    state = {
        index: {
            name: shard_of(value, weights[index]) if value.shape == weights[index].shape else value
            for name, value in of_weight.items()
        }
        for index, of_weight in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _decay_groups(
    parameters: Iterable[NamedParameter], decayed: Collection[str], weight_decay: float
) -> list[dict[str, Any]]:
    parameters = list(parameters)
    with_decay = [weight for name, weight in parameters if name in decayed]
    without = [weight for name, weight in parameters if name not in decayed]
    return [
        {"params": with_decay, "weight_decay": weight_decay},
        {"params": without, "weight_decay": 0.0},
    ]
