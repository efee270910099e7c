"""Quantises a frozen base to 4 or 8 bits with bitsandbytes."""

import logging
import math
from typing import Any

import torch
from bitsandbytes.autograd._functions import MatMul8bitFp, MatMul8bitLt
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from peft import PeftModel
from peft.tuners.lora import Linear4bit as LoraLinear4bit
from torch.nn.parallel import DistributedDataParallel
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..common.logs import limit
from ..config.models import ModelSettings
from .adapter import TRAINED
from .devices import decomposing_device
from .dtypes import choose_dtype, torch_dtype
from .packed import PackedWeight
from .quantiser import Int8Config, Nf4Config


def quantisation_config(settings: ModelSettings) -> BitsAndBytesConfig | None:
    """transformers' settings to quantise while it loads; None for an unquantised base."""
    if settings.quantize == "none":
        return None
    if settings.quantize == "int8":
        return Int8Config()
    return Nf4Config(torch_dtype(choose_dtype(settings)))


def prepare_for_training(model: torch.nn.Module) -> None:
    """Make sure that a quantised base does not change while an adapter is trained on it, and keeps
    nothing that the backward pass does not read."""
    # bitsandbytes warns of every cast to float16 in a matrix product.
    limit("bitsandbytes", logging.ERROR)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 an evaluation would repack the weights for inference, with
            # losses and in a layout without a backward pass.
            module.support_avx512bf16_for_cpu = False
        if isinstance(module, Linear8bitLt):
            module.register_forward_hook(forget_input)


def forget_input(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
    """Let go of what LLM.int8() keeps of a product's input for the gradient of its weight, which is
    frozen. It keeps that beside autograd, so that checkpointing would not free it."""
    node: Any = output.grad_fn
    if not output.numel():  # the backward pass of nothing reads it
        return
    if isinstance(node, MatMul8bitLt._backward_cls):
        node.tensors = (None, None, None)
    elif isinstance(node, MatMul8bitFp._backward_cls):
        node.A = None


def keep_from_broadcast(model: PeftModel) -> None:
    """Leave packed weights out when DDP sends rank 0's weights to all: each rank loads its own."""
    packed = [name for name, weight in model.named_parameters() if isinstance(weight, PackedWeight)]
    ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(model, packed)


def numel(parameter: torch.nn.Parameter) -> int:
    """Number of values of a parameter; a 4-bit parameter packs two into a byte."""
    if isinstance(parameter, Params4bit) and parameter.quant_state is not None:
        return math.prod(parameter.quant_state.shape)
    return parameter.numel()


@torch.no_grad()
def initialise_loftq(model: PeftModel, full: PreTrainedModel) -> None:
    """LoftQ: set the adapter to the best approximation of W - dequantised(W) at its rank.

    Li et al., 2023, https://arxiv.org/abs/2310.08659, with one iteration: the base keeps its plain
    NF4 weights, so the adapter works without finray. Unlike PEFT's function, this one respects the
    adapter's scaling.

    Args:
        model: a 4-bit base with a new adapter.
        full: the same base, not quantised.
    """
    device = decomposing_device()
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLinear4bit):
            continue
        layer = full.get_submodule(name)
        packed = module.get_base_layer().weight
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        dequantised = dequantize_4bit(packed.data, packed.quant_state).float().to(device)
        error = weight.to(dequantised) - dequantised
        left, values, right = torch.linalg.svd(error, full_matrices=False)
        rank = min(module.r[TRAINED], len(values))  # more ranks keep their first values
        roots = (values[:rank] / module.scaling[TRAINED]).sqrt()
        module.lora_A[TRAINED].weight[:rank].copy_(roots[:, None] * right[:rank])
        module.lora_B[TRAINED].weight[:, :rank].copy_(left[:, :rank] * roots)
