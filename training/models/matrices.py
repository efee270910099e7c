"""The matrices of a model: linear layers, and experts, which are one parameter of three dimensions.

They are recognised by what they are, not by a table of architectures: a linear layer computes what
`torch.nn.Linear` does; experts are a parameter whose first dimension is the number of experts of
its module; a router is a layer beside experts with an output for each of them.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Kind = Literal["attention", "mlp", "shared_experts", "experts", "mixer", "other", "router", "head"]
"""Part of a model. mixer: state-space and convolution layers."""

KINDS: dict[Kind, str] = {
    "attention": "attention",
    "mlp": "dense MLP",
    "shared_experts": "shared experts",
    "experts": "experts",
    "mixer": "state-space layers",
    "other": "other layers",
    "router": "routers",
    "head": "head",
}
"""Titles of the kinds, in the order of reports."""

_READ = re.compile(r"self\.(\w+)\.weight\b")
_HANDED = re.compile(r"(?m)(?:^\s*(?:\w+=)?|= )self\.(\w+)\.weight(?:,$| @)")
"""A weight that is a whole argument of a call, or a factor."""
_WRITTEN = re.compile(r"self\.(\w+)\.weight\.(?:data\.)?\w+_\(")
_SCORE_HEADS = ("classifier", "score")
_ROUTERS = ("router", "gate")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|moe|expert|^fc\d$", re.IGNORECASE)
_MIXER = re.compile(r"mamba|mixer|ssm|conv|recurrent|short", re.IGNORECASE)


@dataclass(frozen=True)
class Matrix:
    """A weight that a token is multiplied with, or one for each expert."""

    module: str
    """Name of the module that holds the weight."""
    parameter: str
    """The weight's name in the module."""
    kind: Kind
    values: int
    """Number of values, however they are stored."""
    experts: int = 0
    """Number of experts in the weight; 0 for a linear layer."""
    is_plain: bool = True
    """False where no adapter can be added: a layer that returns a pair, or groups its weight."""

    @property
    def name(self) -> str:
        """The linear layer's name, or the name of the parameter that holds experts."""
        return f"{self.module}.{self.parameter}" if self.experts else self.module

    @property
    def weight(self) -> str:
        """Full name of the parameter."""
        return f"{self.module}.{self.parameter}"


def matrices(model: torch.nn.Module) -> list[Matrix]:
    """All matrices of a model but for embeddings, in its own order, with or without an adapter."""
    modules = dict(_own_modules(model))
    experts = {name: count for name, module in modules.items() if (count := _experts(module))}
    layers = {
        name: module
        for name, module in modules.items()
        if name and isinstance(module, torch.nn.Linear | Conv1D)
    }
    routers = set(_routers(modules, experts, layers))
    blocks = tuple({f"{name.rpartition('.')[0]}." for name in experts})
    heads = {*_SCORE_HEADS, _head(model)}
    is_plain: dict[type, bool] = {}
    every: list[Matrix] = []
    for name, module in modules.items():
        if name in experts:
            every += _of_experts(name, module, experts[name])
        elif name in layers:
            kind = _kind(name, is_beside_experts=bool(blocks) and name.startswith(blocks))
            kind = "head" if name in heads else "router" if name in routers else kind
            if type(module) not in is_plain:
                is_plain[type(module)] = computes_linear(module)
            plain = is_plain[type(module)]
            every.append(Matrix(name, "weight", kind, _values(module), is_plain=plain))
    return every


def expert_modules(model: torch.nn.Module) -> list[tuple[torch.nn.Module, int]]:
    """The modules that hold experts, each with their number."""
    own = (module for _, module in _own_modules(model))
    return [(module, count) for module in own if (count := _experts(module))]


def _own_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The base's modules under their own names, without what PEFT wraps around them."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, module in base.named_modules():
        is_added = ".lora_" in name or ".modules_to_save" in name
        if not is_added and not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield own_name(name), module


def own_name(name: str) -> str:
    """A module's name in the base, without the parts that PEFT adds."""
    for part in (".base_layer", ".original_module", ".token_adapter"):
        name = name.replace(part, "")
    return name


def _head(model: torch.nn.Module) -> str | None:
    """Name of the layer that computes logits."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    return next((name for name, module in base.named_modules() if module is head), None)


def _of_experts(name: str, module: torch.nn.Module, experts: int) -> Iterator[Matrix]:
    for parameter, weight in _own_parameters(module):
        if weight.dim() == 3 or _is_stack(weight, experts):
            # A stack's rows are read by another module, where no adapter reaches them.
            is_plain = weight.dim() == 3
            yield Matrix(name, parameter, "experts", weight.numel(), experts, is_plain)


def _own_parameters(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return module.named_parameters(recurse=False)


def _values(module: torch.nn.Module) -> int:
    """Number of values of a linear layer; bitsandbytes packs two into a byte."""
    if isinstance(module, Linear4bit | Linear8bitLt):
        return int(module.in_features * module.out_features)
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.numel()


def _experts(module: torch.nn.Module) -> int:
    """Number of experts that the module's own parameters hold; 0 without any."""
    counts = {
        value
        for name, value in vars(module).items()
        if isinstance(value, int) and not isinstance(value, bool) and "experts" in name
    }
    for _, weight in _own_parameters(module):
        if weight.dim() == 3 and weight.shape[0] in counts:
            return weight.shape[0]
        for count in counts - {0, 1}:
            if _is_stack(weight, count):
                return count
    return 0


def _is_stack(weight: torch.Tensor, experts: int) -> bool:
    """True for a matrix that holds rows of all experts, unlike a router's, with one row of each."""
    return weight.dim() == 2 and weight.shape[0] > experts > 1 and weight.shape[0] % experts == 0


def _routers(
    modules: dict[str, torch.nn.Module],
    experts: dict[str, int],
    layers: dict[str, torch.nn.Module],
) -> Iterator[str]:
    """Layers that score experts, or that gate shared ones.

    Such a layer is alone in its branch beside the experts, or the last one of a small network.
    """
    for place, count in _expert_blocks(modules, experts):
        branches: dict[str, list[str]] = {}
        for name in layers:
            if name.startswith(f"{place}."):
                branch = name.removeprefix(f"{place}.").partition(".")[0]
                branches.setdefault(branch, []).append(name)
        for branch, names in branches.items():
            outputs = {int(layers[name].out_features) for name in names}  # type: ignore[arg-type]
            scores = branch in _ROUTERS or (count in outputs and not _ATTENTION.search(branch))
            if scores or (len(names) == 1 and outputs == {1}):
                yield from names


def _expert_blocks(
    modules: dict[str, torch.nn.Module], experts: dict[str, int]
) -> Iterator[tuple[str, int]]:
    """(module that holds experts, their number), also where each expert is a module of its own."""
    for name, count in experts.items():
        place = name.rpartition(".")[0]
        if any(weight.dim() == 2 for _, weight in _own_parameters(modules[name])):
            place = place.rpartition(".")[0]  # a stack is a level deeper
        yield place, count
    for name, module in modules.items():
        if isinstance(module, torch.nn.ModuleList) and name.endswith(".experts"):
            yield name.rpartition(".")[0], len(module)


def _kind(name: str, *, is_beside_experts: bool) -> Kind:
    parts = name.split(".")
    if any(map(_ATTENTION.search, parts)):
        return "attention"
    if re.search(r"\.experts\.\d+\.", name):
        return "experts"
    if any(map(_MLP.search, parts)):
        return "shared_experts" if is_beside_experts else "mlp"
    return "mixer" if any(map(_MIXER.search, parts)) else "other"


def past_its_layer(
    model: torch.nn.Module, matrix: Matrix
) -> Literal["handed", "read", "written"] | None:
    """Whether the code around a linear layer reads its weight, or writes it, past the layer.

    Kernels of state-space models are handed weights, in place of a call of the layer, which
    passes an adapter over; other code reads some, and Gemma 3n clamps some in every step.
    """
    place, _, leaf = matrix.module.rpartition(".")
    kind: type = type(model.get_submodule(place))
    source = _source(kind)
    if leaf in _WRITTEN.findall(source):
        return "written"
    if leaf in _HANDED.findall(source):
        return "handed"
    return "read" if leaf in _READ.findall(source) else None


@cache
def _source(kind: type) -> str:
    """The code of a class and of those that it derives from; empty where it is in no file."""
    own = [each for each in kind.__mro__ if issubclass(each, torch.nn.Module)]
    try:
        return "".join(inspect.getsource(each) for each in own if each is not torch.nn.Module)
    except (OSError, TypeError):
        return ""


@torch.no_grad()
def computes_linear(module: torch.nn.Module) -> bool:
    """True if a layer computes what `torch.nn.Linear` does, tried with a small weight.

    Subclasses may return a tuple, as some routers do, or apply their weight to groups of values.
    """
    if type(module) is torch.nn.Linear or isinstance(module, Conv1D | Linear4bit | Linear8bitLt):
        return True
    # The model may be built on the meta device.
    tokens = torch.ones(1, 4, 3, device="cpu")
    weight = torch.arange(15.0, device="cpu").reshape(5, 3)
    values = {"weight": weight}
    if module.bias is not None:
        values["bias"] = torch.arange(5.0, device="cpu")
    expected = torch.nn.functional.linear(tokens, weight, values.get("bias"))
    try:
        result = functional_call(module, values, (tokens,))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False  # it needs other inputs, or the shape of its own weight
    return isinstance(result, torch.Tensor) and torch.equal(result, expected)
