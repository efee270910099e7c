"""Computes the weights that a quantised model effectively uses."""

from typing import Literal

import torch

from ..models.packed import PackedWeight

Quantisation = Literal["none", "nf4", "int8"]


def repacked(weight: torch.Tensor, scheme: Quantisation) -> torch.Tensor:
    """The values that a run reads from a packed weight; float32.

    Args:
        weight: the weight in the compute type of the run.
        scheme: nf4 or int8.
    """
    assert scheme != "none"
    return PackedWeight.of(weight, scheme).values().float()


def dequantised(weight: torch.Tensor, scheme: Quantisation, transposed: bool) -> torch.Tensor:
    """Quantise a weight as transformers does with bitsandbytes, and dequantise it; float32.

    Args:
        weight: the weight in the compute type of the run.
        scheme: nf4: 4 bits in blocks of 64 with quantised scales (Dettmers et al., QLoRA, 2023).
            int8: 8 bits, scaled by the largest value of each row (LLM.int8, 2022).
        transposed: True if the weight is stored as (in, out).
    """
    from bitsandbytes import functional

    rows = (weight.T if transposed else weight).contiguous()
    if scheme == "nf4":
        packed, state = functional.quantize_4bit(rows, compress_statistics=True, quant_type="nf4")
        back = functional.dequantize_4bit(packed, state)
    else:
        packed, scales, _ = functional.int8_vectorwise_quant(rows.half())
        back = functional.int8_vectorwise_dequant(packed, scales)
    weight = back.float()
    return weight.T.contiguous() if transposed else weight
