"""The matrices that a new adapter targets, and how PEFT reaches them.

PEFT reaches a linear layer by its module (`target_modules`), and any weight by its parameter
(`target_parameters`): experts only so. For some mixtures of experts it reads names such as
`gate_proj` as those of experts in older files, and then passes over linear layers of these names;
they are therefore reached by their parameters, which every PEFT reads alike.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn, TypeVar

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from ..common.errors import InputError, RunError
from ..config.models import LoraAdapter
from .composite import is_in_towers, towers
from .matrices import KINDS, Kind, Matrix, matrices, own_name, past_its_layer

Value = TypeVar("Value")

_OTHERS = (torch.nn.Embedding, torch.nn.Conv1d)
"""Modules besides linear layers that PEFT adapts."""
_PREFIX = "base_model.model."
"""Before the names of a saved adapter's weights."""
_BY_DEFAULT: frozenset[Kind] = frozenset(KINDS) - {"router", "head"}


@dataclass(frozen=True)
class Targets:
    """What PEFT adapts."""

    modules: frozenset[str]
    """Names of modules that get an adapter around them."""
    parameters: frozenset[str] = frozenset()
    """Full names of parameters that an adapter is added to."""

    @property
    def names(self) -> frozenset[str]:
        """Names of all modules and parameters."""
        return self.modules | self.parameters


def choose_targets(model: PreTrainedModel, settings: LoraAdapter) -> Targets:
    """The modules and parameters that `adapter.targets` and `adapter.experts` name.

    Raises:
        InputError: a name matches nothing, a part of a matrix, or a layer that cannot be adapted.
    """
    reached = _reached(model)
    renamed = _renamed(model, reached)
    available = [
        replace(
            matrix,
            is_plain=matrix.is_plain
            and not _is_refused(model, matrix.module)
            and not _is_handed(model, matrix)
            and matrix.module not in renamed,
        )
        for matrix in reached
    ]
    if settings.targets == "all-linear":
        saved = tuple(settings.modules_to_save)
        chosen = [
            matrix
            for matrix in available
            if matrix.kind in _BY_DEFAULT and matrix.is_plain and not _is_saved(matrix, saved)
        ]
        others: set[str] = set()
    else:
        chosen, others = _named(model, available, settings.targets)
    if not settings.experts:
        chosen = [matrix for matrix in chosen if matrix.kind != "experts"]
    if not chosen and not others and renamed:
        raise InputError(
            f"adapter: the adapter of a {model.config.model_type} model is loaded under other "
            "names than it is saved, and would be lost; take the section adapter out to train all "
            "weights"
        )
    if not chosen and not others:
        raise InputError("adapter: no matrix is left to adapt; change targets or experts")
    indirect = _read_as_experts(model, chosen)
    parameters = {matrix.weight for matrix in chosen if matrix.experts or matrix in indirect}
    _check_settings(settings, chosen, indirect)
    modules = {matrix.module for matrix in chosen if matrix.weight not in parameters}
    return Targets(frozenset(modules | others), frozenset(parameters))


def _reached(model: PreTrainedModel) -> list[Matrix]:
    """The matrices that text reaches."""
    outside = towers(model)
    return [matrix for matrix in matrices(model) if not is_in_towers(matrix.module, outside)]


def _is_handed(model: PreTrainedModel, matrix: Matrix) -> bool:
    """True for a layer whose weight goes to a kernel, which passes an adapter over."""
    is_layer = not matrix.experts and matrix.kind != "head"
    return is_layer and past_its_layer(model, matrix) == "handed"


def _is_refused(model: PreTrainedModel, module: str) -> bool:
    """True for a layer that PEFT refuses in a state-space model."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, module.rpartition(".")[2])
    except ValueError:
        return True
    return False


def _renamed(model: PreTrainedModel, reached: list[Matrix]) -> set[str]:
    """The linear layers whose adapters PEFT would put elsewhere when it loads them.

    It renames an adapter's weights as transformers renames those of a checkpoint, also where they
    have the model's own names already.
    """
    keys = {f"{_PREFIX}{matrix.module}.lora_A.weight": matrix.module for matrix in reached}
    own = {key: torch.empty(0) for key in keys}
    loaded = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), dict(own))
    return {keys[key] for key in own.keys() - loaded.keys()}


def _is_saved(matrix: Matrix, saved: tuple[str, ...]) -> bool:
    """True if the matrix is trained whole, as PEFT matches `modules_to_save`."""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", matrix.module) for name in saved)


def _named(
    model: PreTrainedModel, available: list[Matrix], targets: list[str] | str
) -> tuple[list[Matrix], set[str]]:
    """(matrices, names of other modules) that a list or a regular expression names."""
    by_name = {matrix.name: matrix for matrix in available}
    parts = _names_in_files(model, available)
    outside = towers(model)
    modules = {
        name: module
        for name, module in model.named_modules()
        if name and not is_in_towers(name, outside)
    }
    chosen: set[str] = set()
    others: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        is_expression = isinstance(targets, str)
        names = {name for name in modules if _matches(name, target, is_expression)}
        experts = {
            name
            for name, matrix in by_name.items()
            if matrix.experts and (matrix.module in names or _matches(name, target, is_expression))
        }
        in_files = {
            name
            for name, old in parts.items()
            if any(_matches(each, target, is_expression) for each in old)
        }
        if not names | experts | in_files:
            _refuse(target, is_expression, available)
        chosen |= experts | (names & by_name.keys()) | in_files
        rest = names - by_name.keys() - {by_name[name].module for name in experts}
        # An expression may match the modules around layers, too.
        adaptable = {
            n for n in rest if isinstance(modules[n], _OTHERS) and not _is_refused(model, n)
        }
        if rest - adaptable and not is_expression:
            _refuse(target, is_expression, available, {type(modules[n]) for n in rest - adaptable})
        others |= adaptable
    _check_parts(by_name, parts, targets)
    odd = {name for name in chosen if not by_name[name].is_plain}
    if odd and not isinstance(targets, str):
        raise InputError(
            f"adapter.targets: {shorten(odd)} cannot be adapted: such a layer returns more than a "
            "linear layer does, its weight is read past it, or its adapter is loaded under "
            "another name than it is saved; leave it out"
        )
    return [matrix for matrix in available if matrix.name in chosen - odd], others


def _refuse(
    target: str, is_expression: bool, available: list[Matrix], kinds: Collection[type] = ()
) -> NoReturn:
    """Refuse a target that matches nothing, or modules of kinds that take no adapter."""
    names = {matrix.name for matrix in available}
    if is_expression:
        raise InputError(
            f"adapter.targets: the regular expression {target!r} matches no module's whole name; "
            f"the linear layers are {shorten(names)}"
        )
    short = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
    if kinds:
        classes = " and ".join(sorted({kind.__name__ for kind in kinds}))
        raise InputError(
            f"adapter.targets: {target!r} is a {classes}, which takes no adapter; the linear "
            f"layers are {short}"
        )
    raise InputError(
        f"adapter.targets: {target!r} matches no module of the model; its linear layers are {short}"
    )


def _check_parts(
    by_name: dict[str, Matrix], parts: dict[str, list[str]], targets: list[str] | str
) -> None:
    """Refuse a part of a matrix, such as gate_proj without up_proj."""
    is_expression = isinstance(targets, str)
    for name, in_files in parts.items():
        every = [targets] if isinstance(targets, str) else targets
        named = {
            part for part in in_files for target in every if _matches(part, target, is_expression)
        }
        whole = by_name[name].parameter
        if named and named != set(in_files) and whole not in every:
            leaf = [part.rpartition(".")[2] for part in in_files]
            raise InputError(
                f"adapter.targets: {' and '.join(leaf)} of the experts are one matrix in this "
                f"model; name both, or {whole}"
            )


def _matches(name: str, target: str, is_expression: bool) -> bool:
    if is_expression:
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith(f".{target}")


def _names_in_files(model: PreTrainedModel, available: list[Matrix]) -> dict[str, list[str]]:
    """For experts, by name: the names of their parts in files with a matrix for each expert.

    Recipes use those names (`gate_proj`, `up_proj`), whichever way the model keeps its experts.
    """
    names: dict[str, list[str]] = {}
    converters = [
        entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)
    ]
    for matrix in available:
        for entry in converters if matrix.experts else ():
            target = _literal(entry.target_patterns[0])
            if len(entry.target_patterns) == 1 and f".{matrix.name}".endswith(f".{target}"):
                place = matrix.name.removesuffix(target)
                sources = (_literal(pattern) for pattern in entry.source_patterns)
                names[matrix.name] = [
                    place + source.replace("*", "0").removesuffix(".weight") for source in sources
                ]
    return names


def _literal(pattern: str) -> str:
    """A pattern of transformers' conversions without the marks of an expression."""
    return pattern.strip("^$").replace("\\", "")


def _read_as_experts(model: PreTrainedModel, chosen: Iterable[Matrix]) -> set[Matrix]:
    """The linear layers whose names PEFT reads as those of experts."""
    layers = [matrix for matrix in chosen if not matrix.experts]
    leaves = {matrix.module.rpartition(".")[2] for matrix in layers}
    converted = {leaf for leaf in leaves if _is_converted(model, leaf)}
    return {matrix for matrix in layers if matrix.module.rpartition(".")[2] in converted}


def _is_converted(model: PreTrainedModel, leaf: str) -> bool:
    config = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # it needs the names of all parts of the experts
        return True
    return leaf not in (config.target_modules or ())


def read_as_experts(model: PreTrainedModel) -> set[Matrix]:
    """All linear layers that an adapter reaches by their parameters."""
    return _read_as_experts(model, matrices(model))


def _check_settings(settings: LoraAdapter, chosen: list[Matrix], indirect: set[Matrix]) -> None:
    """Refuse what PEFT cannot do to a parameter."""
    reached = [matrix for matrix in chosen if matrix.experts] or sorted(
        indirect, key=lambda matrix: matrix.name
    )
    if not reached:
        return
    names = shorten(matrix.name for matrix in reached)
    experts = any(matrix.experts for matrix in reached)
    remedy = "set adapter.experts: false" if experts else "name other adapter.targets"
    faults = {
        "adapter.dropout": ("0", settings.dropout > 0),
        "adapter.dora": ("false", settings.dora),
        "adapter.init": ("default", settings.init not in ("default", "gaussian")),
    }
    for key, (value, is_set) in faults.items():
        if is_set:
            raise InputError(
                f"{key}: the adapter is added to the weights of {names}, where this is not "
                f"possible; set {key}: {value}, or {remedy}"
            )


def patterns_for(targets: Targets, patterns: Mapping[str, Value]) -> dict[str, Value]:
    """Patterns of names with their values, also for linear layers reached by their parameter."""
    return {
        name: value
        for pattern, value in patterns.items()
        for name in (pattern, *([rf"(?:{pattern})\.weight"] if targets.parameters else ()))
    }


def shortest(names: Iterable[str], all_names: Iterable[str]) -> list[str]:
    """The shortest endings, of two parts at least, that select the names among all names."""
    names = set(names)
    others = {ending for name in set(all_names) - names for ending in _endings(name)}
    chosen = {next((e for e in _endings(name) if e not in others), name) for name in names}
    return sorted(chosen)


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[-count:]) for count in range(2, len(parts) + 1)]


def adapted_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """The layers that hold the adapter, by the names of their modules or parameters."""
    return {
        f"{own_name(name)}.{module.parameter_name}"
        if isinstance(module, ParamWrapper)
        else own_name(name): module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }


def check_adapted(model: PeftModel, targets: Targets) -> None:
    """Compare what PEFT adapted with what the recipe asks for.

    Raises:
        RunError: they differ.
    """
    adapted = adapted_layers(model).keys()
    lacking, more = targets.names - adapted, adapted - targets.names
    if lacking or more:
        raise RunError(
            "adapter.targets: PEFT adapted other layers than those that were asked for: it left "
            f"out {shorten(lacking) or 'none'}, and added {shorten(more) or 'none'}; name the "
            "layers in adapter.targets"
        )


def shorten(names: Iterable[str]) -> str:
    """Sorted names of modules or parameters for a message; layer numbers become `*`."""
    return ", ".join(sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}))


def coverage(model: PeftModel) -> dict[str, dict[str, float]]:
    """What is adapted, by the titles of `KINDS`; kinds that the model lacks are left out.

    Returns:
        For each kind: modules (number of adapted layers or parameters), of (number of all),
        parameters (number of trained values), share (of the kind's values, 0 to 1). The entry
        "all" has the sums, its share without routers and heads.
    """
    layers = adapted_layers(model)
    outside = towers(model.get_base_model())
    own = [matrix for matrix in matrices(model) if not is_in_towers(matrix.module, outside)]
    rows: dict[str, dict[str, float]] = {}
    for kind, title in KINDS.items():
        of_kind = [matrix for matrix in own if matrix.kind == kind]
        if of_kind:
            rows[title] = _row(of_kind, layers)
    rows["all"] = _row(own, layers)
    counted = [matrix for matrix in own if matrix.kind in _BY_DEFAULT]
    rows["all"]["share"] = _row(counted, layers)["share"]
    return rows


def coverage_of(model: torch.nn.Module) -> dict[str, dict[str, float]] | None:
    """`coverage`, and None for a model without an adapter."""
    return coverage(model) if isinstance(model, PeftModel) else None


def _row(of_kind: list[Matrix], layers: dict[str, LoraLayer]) -> dict[str, float]:
    adapted = [
        (matrix, layer)
        for matrix in of_kind
        if (layer := layers.get(matrix.name) or layers.get(matrix.weight)) is not None
    ]
    values = sum(matrix.values for matrix in of_kind)
    return {
        "modules": len(adapted),
        "of": len(of_kind),
        "parameters": sum(_adapter_values(layer) for _, layer in adapted),
        "share": round(sum(matrix.values for matrix, _ in adapted) / max(values, 1), 4),
    }


def _adapter_values(layer: LoraLayer) -> int:
    """Number of an adapter's values in a layer, without frozen copies of it."""
    parts: list[torch.nn.Module] = [
        getattr(layer, name) for name in ("lora_A", "lora_B", "lora_magnitude_vector")
    ]
    return sum(
        weight.numel()
        for part in parts
        for name, weight in part.named_parameters()
        if name.split(".")[0] == "default"
    )
