"""AdamW for weights of any type, in the groups that a run asks for.

A bfloat16 weight has 8 bits of mantissa: an update of 1e-5 on 2e-2 would vanish. Weights of a
lower type than float32 are therefore updated on float32 copies, and rounded after every step.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch.optim import AdamW

from ..models.sharding import shard_of

Named = tuple[str, torch.nn.Parameter]


class SkippingAdamW(AdamW):
    """AdamW that leaves out a step where `skip` says so, without asking the device.

    A step left out changes nothing: weights, moments and the count of steps stay bit for bit. Only
    torch's fused kernel can do that; it asks `found_inf`, which fp16's GradScaler sets as well.
    """

    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None
    skip: torch.Tensor | None = None
    """A number on the weights' device: 1 where the next step is left out, 0 where it is taken."""

    def __init__(self, groups: Iterable[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update the weights, or leave them."""
        told = [flag for flag in (self.skip, self.found_inf) if flag is not None]
        self.found_inf = torch.stack(told).amax() if told else None
        loss = super().step(closure)
        self.skip = self.found_inf = None
        return loss


class MasterAdamW(SkippingAdamW):
    """AdamW on float32 masters of the weights that have a lower type.

    Its parameter groups hold the masters; other weights stand in them as they are. `state_dict`
    holds the masters too: a resumed run goes on from what rounding hid.
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
        """Update the masters by the weights' gradients, and round them into the weights."""
        for weight, master in zip(self._weights, self._masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
        loss = super().step(closure)
        for master in self._masters:
            master.grad = None
        self._round()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all weights."""
        super().zero_grad(set_to_none)
        for weight in self._weights:
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, and the masters in their order."""
        return {**super().state_dict(), "masters": [master.detach() for master in self._masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; the weights become those of its masters."""
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for master, saved in zip(self._masters, state_dict["masters"], strict=True):
            master.copy_(shard_of(saved, master))
        self._round()

    def _round(self) -> None:
        for weight, master in zip(self._weights, self._masters, strict=True):
            weight.copy_(master)


def make_optimizer(
    parameters: Iterable[Named],
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
        parameters: the model's, by name.
        decayed: names of those that weight decay applies to.
        lora_plus_ratio: an adapter's B matrices, and its vectors, learn at so many times the
            learning rate (LoRA+, Hayou et al., 2024, https://arxiv.org/abs/2402.12354).
    """
    trained = [(name, weight) for name, weight in parameters if weight.requires_grad]
    settings: dict[str, Any] = {"lr": learning_rate, "betas": betas, "eps": eps}
    if lora_plus_ratio is None:
        groups = _decay_groups(trained, decayed, weight_decay)
    else:
        fast = [named for named in trained if "lora_B" in named[0] or named[1].ndim == 1]
        names = {name for name, _ in fast}
        slow = [named for named in trained if named[0] not in names]
        # The first groups' rate is the one that is logged.
        groups = _decay_groups(slow, decayed, weight_decay)
        for group in _decay_groups(fast, decayed, weight_decay):
            groups.append({**group, "lr": learning_rate * lora_plus_ratio})
    is_plain = all(weight.dtype == torch.float32 for _, weight in trained)
    optimizer = (SkippingAdamW if is_plain else MasterAdamW)(groups, **settings)
    optimizer.register_load_state_dict_pre_hook(_cut_up)
    return optimizer


def _cut_up(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state of whole tensors as one of this rank's shards, where its weights are sharded."""
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
    named: Iterable[Named], decayed: Collection[str], weight_decay: float
) -> list[dict[str, Any]]:
    with_decay = [weight for name, weight in named if name in decayed]
    without = [weight for name, weight in named if name not in decayed]
    return [
        {"params": with_decay, "weight_decay": weight_decay},
        {"params": without, "weight_decay": 0.0},
    ]
