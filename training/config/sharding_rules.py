"""Whether a recipe's weights can be cut up among workers (FSDP2); told without torch."""

from typing import TYPE_CHECKING

from .methods import DpoMethod, OnlineMethod

if TYPE_CHECKING:
    from .recipe import Recipe


def cannot_shard(recipe: "Recipe") -> str | None:
    """Why not, and what to do instead; None where they can."""
    method, adapter = recipe.method, recipe.adapter
    if recipe.model.quantize == "int8":
        return (
            "model.quantize int8 keeps scales of whole rows beside the weights, which are not cut "
            "up with them; take nf4"
        )
    if isinstance(method, OnlineMethod):
        return (
            f"method {method.kind} samples on every worker by itself, and would gather all weights "
            "for every token; take ddp, with model.quantize nf4 if the model is large"
        )
    if isinstance(method, DpoMethod) and method.precompute_reference:
        return (
            "method.precompute_reference computes on whole models; leave it out (beside an "
            "adapter, the reference takes no memory), or take ddp"
        )
    if adapter is not None and adapter.changes_base:
        return (
            f"adapter.init {adapter.init} writes its result from whole weights; take another init, "
            "or ddp"
        )
    return None
