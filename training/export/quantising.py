"""Stores an exported model with the weights of its layers quantised, as bitsandbytes reads them."""

from pathlib import Path
from typing import Literal

GENERATION_CONFIG = "generation_config.json"


def quantise(folder: Path, scheme: Literal["nf4", "int8"], model_class: str, trust: bool) -> None:
    """Replace the weights of a whole model; transformers then loads them quantised.

    Args:
        folder: the model's folder, which is changed.
        scheme: nf4 with quantised scales, or int8; embeddings and heads keep their type.
        model_class: transformers' auto class that loads it.
        trust: whether the model's own code may run.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=scheme == "nf4",
        load_in_8bit=scheme == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = getattr(transformers, model_class).from_pretrained(
        folder,
        quantization_config=config,
        dtype="auto",
        device_map={"": "cpu"},
        trust_remote_code=trust,
    )
    stops = folder / GENERATION_CONFIG
    kept = stops.read_bytes() if stops.is_file() else None
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
        file.unlink()
    model.save_pretrained(folder)
    if kept is not None:  # where answers end: save_pretrained may write other settings
        stops.write_bytes(kept)
