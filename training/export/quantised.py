"""A weight as a quantised model computes with it."""

from typing import Literal

import torch

Quantisation = Literal["none", "nf4", "int8"]


def dequantised(weight: torch.Tensor, scheme: Quantisation, transposed: bool) -> torch.Tensor:
    """Quantise a weight as bitsandbytes does when transformers loads it, and back; float32.

    Args:
        weight: as it was given to bitsandbytes: in the type that the run computed in.
        scheme: nf4: 4 bits in blocks of 64, their scales quantised again (Dettmers et al., QLoRA,
            2023). int8: 8 bits for each row, by its largest value (LLM.int8, 2022).
        transposed: whether the weight is stored as (in, out).
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
