"""LoftQ: an adapter that starts as what quantisation took from the base.

Li et al., 2023, https://arxiv.org/abs/2310.08659, with one iteration: the base stays the plain
NF4 one, so that the adapter loads onto it without finray.
"""

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from peft.tuners.lora import Linear4bit
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .adapter import TRAINED


@torch.no_grad()
def initialise(model: PeftModel, full: PreTrainedModel) -> None:
    """Set the adapter to the best approximation of W - dequantised(W) of its rank.

    Unlike PEFT's function, this one takes the adapter's scaling into account.

    Args:
        model: a 4-bit base under a new adapter.
        full: the same base, not quantised.
    """
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, Linear4bit):
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
