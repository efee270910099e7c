"""Quantises a base while transformers loads it: linear layers by bitsandbytes, and experts too.

Each weight is packed as soon as it is read, so the full weights are never in memory together. A GPU
packs it, a hundred times as fast as a CPU, wherever it stays.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationMethod

from ..common.errors import InputError
from .devices import own_device
from .matrices import matrices, past_its_layer
from .packed import PackedWeight, Scheme
from .targets import read_as_experts, shorten

_LEFT = 0.1
"""Largest share of a model's matrices that quantisation may leave in their type."""


@dataclass(frozen=True)
class Plan:
    """How each weight of a model is quantised."""

    layers: frozenset[str]
    """Names of the linear layers that bitsandbytes replaces."""
    packed: frozenset[str]
    """Full names of the parameters that become packed weights."""

    @property
    def weights(self) -> frozenset[str]:
        """Full names of all quantised weights."""
        return self.packed | {f"{name}.weight" for name in self.layers}


def plan_quantisation(model: PreTrainedModel) -> Plan:
    """The plan for a model that is not quantised; it may be on the meta device.

    The head, layers tied to it, routers, and weights that the model's code changes stay as they
    are. What bitsandbytes has no layer for is packed: experts, layers that PEFT reaches by their
    parameters, and weights that are read past their layer.
    """
    tied = model.all_tied_weights_keys
    skipped = [name.removesuffix(".weight") for name in {*tied, *tied.values()}]
    skipped += model._keep_in_fp32_modules or []
    indirect = read_as_experts(model)
    layers, packed = set(), set()
    for matrix in matrices(model):
        is_kept = matrix.kind in ("head", "router") or not should_convert_module(
            matrix.module, skipped
        )
        if is_kept:
            continue
        use = None if matrix.experts else past_its_layer(model, matrix)
        if use == "written":
            continue
        if matrix.experts or matrix in indirect or not matrix.is_plain or use is not None:
            packed.add(matrix.weight)
        else:
            layers.add(matrix.module)
    return Plan(frozenset(layers), frozenset(packed))


def check_quantisable(model: PreTrainedModel, quantize: str, *, sharded: bool) -> None:
    """Refuse to quantise a model much of which would stay as it is, and to shard packed weights.

    Args:
        model: the base, on any device.
        quantize: the recipe's setting.
        sharded: True if the recipe asks for shards of the weights.

    Raises:
        InputError: matrices of an unknown kind hold more than a tenth of the model, or packed
            weights are to be sharded.
    """
    plan = plan_quantisation(model)
    if sharded and plan.packed:
        raise InputError(
            f"scale.strategy fsdp: quantised {shorten(plan.packed)} cannot be sharded over "
            "workers; use ddp, which holds them on each, or set model.quantize: none"
        )
    adaptable = {matrix.weight for matrix in matrices(model)} | _embeddings(model)
    total, left = 0, {}
    for name, weight in model.named_parameters():
        total += weight.numel()
        if weight.dim() > 1 and name not in adaptable and name not in plan.weights:
            left[name] = weight.numel()
    if sum(left.values()) > _LEFT * total:
        raise InputError(
            f"model.quantize {quantize}: {2e-9 * sum(left.values()):.3g} GB of the model's "
            f"{2e-9 * total:.3g} GB would stay in 16 bits, because {shorten(left)} are neither "
            "linear layers nor experts; set model.quantize: none"
        )


def check_saved(model: PreTrainedModel, saved: Iterable[str]) -> None:
    """Refuse to train modules whole that are quantised.

    Args:
        model: the base, on any device, not quantised.
        saved: names or ends of names, as PEFT's `modules_to_save` has them.

    Raises:
        InputError: a module has quantised weights.
    """
    weights = plan_quantisation(model).weights
    for name in saved:
        quantised = [w for w in weights if re.search(rf"(^|\.){re.escape(name)}\.", w)]
        if quantised:
            raise InputError(
                f"adapter.modules_to_save: {name} holds {shorten(quantised)}, which model.quantize "
                "packs, so they cannot be trained whole; name them in adapter.targets instead, or "
                "set model.quantize: none"
            )


def _embeddings(model: PreTrainedModel) -> set[str]:
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
    }


@register_quantization_config("finray_nf4")
class Nf4Config(BitsAndBytesConfig):
    """NF4 with double quantisation."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        self.quant_method: Any = "finray_nf4"


@register_quantization_config("finray_int8")
class Int8Config(BitsAndBytesConfig):
    """LLM.int8()."""

    def __init__(self) -> None:
        super().__init__(load_in_8bit=True)
        self.quant_method: Any = "finray_int8"


class _Packing(HfQuantizer):
    """Adds packed weights to a quantiser of transformers."""

    scheme: Scheme

    def __init__(self, quantization_config: Any, **arguments: Any) -> None:
        # From here on, transformers and PEFT handle the model as one of bitsandbytes.
        quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES
        super().__init__(quantization_config, **arguments)
        self.plan = Plan(frozenset(), frozenset())

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, *arguments: Any, **more: Any
    ) -> None:
        self.plan = plan_quantisation(model)
        for name in self.plan.layers:
            module = model.get_submodule(name)
            if not isinstance(module, Conv1D) and type(module) is not torch.nn.Linear:
                model.set_submodule(name, _as_linear(module))
        super()._process_model_before_weight_loading(model, *arguments, **more)

    def get_modules_to_not_convert(self, model: PreTrainedModel, *_: Any) -> list[str]:
        """Names of the layers that bitsandbytes does not replace."""
        return [
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and name not in self.plan.layers
        ]

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **arguments: Any
    ) -> bool:
        """True for the weights of the plan."""
        if param_name in self.plan.packed:
            return True
        return bool(super().param_needs_quantization(model, param_name, **arguments))

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that transformers applies to each weight."""
        return _Quantise(self, super().get_quantize_ops())


def _as_linear(module: torch.nn.Module) -> torch.nn.Linear:
    """A plain layer in place of one of a subclass that computes the same."""
    out_features, in_features = module.weight.shape  # type: ignore[misc]
    return torch.nn.Linear(in_features, out_features, module.bias is not None, device="meta")


class _Quantise(ConversionOps):
    def __init__(self, quantiser: _Packing, of_layers: ConversionOps) -> None:
        self.quantiser, self.of_layers = quantiser, of_layers

    def convert(self, input_dict: Mapping[str, Any], **arguments: Any) -> dict[str, Any]:
        """Quantise weights, by their full names; each stays on the device where it is."""
        weights = {
            name: value[0] if isinstance(value, list) else value
            for name, value in input_dict.items()
        }
        device = own_device()
        packed, rest = {}, {}
        for name, weight in weights.items():
            if name in self.quantiser.plan.packed:
                made = PackedWeight.of(weight.to(device), self.quantiser.scheme).to(weight.device)
                packed[name] = torch.nn.Parameter(made, requires_grad=False)
            else:
                rest[name] = weight.to(device)
        layers = self.of_layers.convert(rest, **arguments) if rest else {}
        for name, weight in layers.items():
            if weight.device.type != weights[name].device.type:
                layers[name] = weight.to(weights[name].device)
        return packed | layers


@register_quantizer("finray_nf4")
class Nf4Quantiser(_Packing, Bnb4BitHfQuantizer):
    """Quantises to NF4."""

    scheme = "nf4"


@register_quantizer("finray_int8")
class Int8Quantiser(_Packing, Bnb8BitHfQuantizer):
    """Quantises to 8 bits."""

    scheme = "int8"
