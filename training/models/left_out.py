"""Parameters without a gradient: a rehearsal finds them, and the run leaves them out.

They are named by patterns: the module or the experts' parameter that an adapter is on, or a
parameter of the base, with * for a number of a layer or of another list.
"""

import re
from collections.abc import Collection, Iterable

import torch
from peft.tuners.lora.layer import ParamWrapper

_PREFIX = "base_model.model."
_OF_ADAPTERS = re.compile(r"(\.base_layer)*\.(lora_|modules_to_save\.|original_module\.).*")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def plain_names(model: torch.nn.Module) -> dict[str, str]:
    """By the name of each trained parameter: what it is the adapter of, else the base's name."""
    of_experts = {
        name: module.parameter_name
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper)
    }
    names = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            names[name] = _OF_ADAPTERS.sub("", name.removeprefix(_PREFIX))
            if (holder := name.partition(".lora_")[0]) in of_experts:
                names[name] += f".{of_experts[holder]}"
    return names


def patterns_of(missing: Collection[str], every: Iterable[str]) -> tuple[list[str], bool]:
    """Patterns that match these names and no other ones.

    Args:
        missing: plain names without a gradient.
        every: the plain names of all that is trained.

    Returns:
        The patterns, and whether they hold for the same model with other numbers of layers: each
        pattern's parameters all lack a gradient, or it has no number.
    """
    rest = {_NUMBER.sub("*", name) for name in every if name not in missing}
    patterns = {name: _NUMBER.sub("*", name) for name in missing}
    chosen = {name if pattern in rest else pattern for name, pattern in patterns.items()}
    return sorted(chosen), all(pattern not in rest for pattern in patterns.values())


def expression(patterns: Iterable[str]) -> str | None:
    """A regular expression for whole names; None without patterns."""
    parts = [re.escape(pattern).replace(r"\*", r"\d+") for pattern in patterns]
    return "|".join(parts) or None


def kept(names: Iterable[str], patterns: Iterable[str]) -> frozenset[str]:
    """The targets of an adapter, modules or parameters, that no pattern matches."""
    if (matches := expression(patterns)) is None:
        return frozenset(names)
    return frozenset(
        name
        for name in names
        if not re.fullmatch(matches, name)
        and not re.fullmatch(matches, name.removesuffix(".weight"))
    )


def freeze_left_out(model: torch.nn.Module, patterns: Collection[str]) -> None:
    """Freeze the parameters that these patterns match."""
    if (matches := expression(patterns)) is None:
        return
    for name, plain in plain_names(model).items():
        if re.fullmatch(matches, plain):
            model.get_parameter(name).requires_grad_(False)
