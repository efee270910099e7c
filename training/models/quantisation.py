"""A frozen base in 4 or 8 bits, through bitsandbytes."""

import logging
import math

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from transformers import BitsAndBytesConfig

from ..config.models import ModelSettings
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
