"""A frozen base in 4 or 8 bits, through bitsandbytes."""

import logging
import math

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from peft import PeftModel
from peft.tuners.lora import Linear4bit as LoraLinear4bit
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..config.models import ModelSettings
from .adapter import TRAINED
from .dtypes import choose_dtype, torch_dtype


def quantisation_config(settings: ModelSettings) -> BitsAndBytesConfig | None:
    """What transformers needs to quantise while it loads; None for an unquantised base."""
    if settings.quantize == "none":
        return None
    if settings.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch_dtype(choose_dtype(settings)),
    )


def prepare_for_training(model: torch.nn.Module) -> None:
    """Keep a quantised base as it is for as long as it is trained on."""
    # It tells of every product's cast to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 an evaluation would repack the weights for inference:
            # lossily, and into a layout that has no backward pass.
            module.support_avx512bf16_for_cpu = False


def is_exact_by_row(model: torch.nn.Module) -> bool:
    """Whether a token's values are computed apart from other tokens'.

    LLM.int8() looks for outliers over all tokens of a batch, and treats the columns where one has
    them differently for all.
    """
    return not any(isinstance(module, Linear8bitLt) for module in model.modules())


def numel(parameter: torch.nn.Parameter) -> int:
    """Number of a parameter's values; a 4-bit one packs two into a byte."""
    if isinstance(parameter, Params4bit) and parameter.quant_state is not None:
        return math.prod(parameter.quant_state.shape)
    return parameter.numel()


@torch.no_grad()
def initialise_loftq(model: PeftModel, full: PreTrainedModel) -> None:
    """LoftQ: set the adapter to the best approximation of W - dequantised(W) of its rank.

    Li et al., 2023, https://arxiv.org/abs/2310.08659, with one iteration: the base stays the plain
    NF4 one, so that the adapter loads onto it without finray. Unlike PEFT's function, this one
    respects the adapter's scaling.

    Args:
        model: a 4-bit base under a new adapter.
        full: the same base, not quantised.
    """
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLinear4bit):
            continue
        layer = full.get_submodule(name)
        packed = module.get_base_layer().weight
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        kept = dequantize_4bit(packed.data, packed.quant_state).float()
        lost = weight.to(kept) - kept
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
        rank = module.r[TRAINED]
        roots = (values[:rank] / module.scaling[TRAINED]).sqrt()
        module.lora_A[TRAINED].weight.copy_(roots[:, None] * right[:rank])
        module.lora_B[TRAINED].weight.copy_(left[:, :rank] * roots)
