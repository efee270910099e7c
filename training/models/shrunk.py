"""A shrunk random copy of a model: the same architecture and kinds of layers, small in every size.

What a run would do with the whole model is tried on the copy, in seconds, on the CPU.
"""

from typing import TYPE_CHECKING

from transformers import PretrainedConfig

from .shrunk_layers import Values, feature_layers
from .shrunk_sizes import cut_sizes, number, parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOISE = 0.1
"""Added to vectors and numbers, such as norms and biases, which start at equal values."""
_SECTIONS = "mrope_section"
_SECTIONED = ("paddleocr_vl", "paddleocr_vl_text")
"""Kinds whose code has sections of rotary positions that the configuration class does not name."""


def shrink(
    config: PretrainedConfig, *, vocabulary: int, all_layers: bool = False
) -> PretrainedConfig:
    """A configuration of the same architecture with every size cut; needs no torch.

    Args:
        config: the whole model's; parts for images and sound are cut as well. A quantisation that
            it names is left out.
        vocabulary: rows of the embedding; special tokens beyond it get numbers inside.
        all_layers: keep the number of layers, so that modules have the whole model's names.

    Raises:
        Exception: what the configuration's own checks raise, where no small one suits them.
    """
    values = config.to_dict()
    for part in parts(values):
        for key in ("dtype", "torch_dtype", "quantization_config", "_name_or_path"):
            part.pop(key, None)
    _name_sections(config, values)
    cut_sizes(values, vocabulary, all_layers)
    _keep_feature_layers(values)
    small = type(config).from_dict(values)
    small._name_or_path = config._name_or_path  # where a model's own code lies
    return small


def random_copy(
    config: PretrainedConfig, seed: int, *, trust_remote_code: bool = False
) -> "PreTrainedModel":
    """A model of this configuration with random weights, in float32 on the CPU.

    Matrices are drawn so that every layer adds about as much as it gets: a wrong mask shows in the
    loss, which the usual small values would hide at small widths.

    Raises:
        InputError: as `model_from_config`.
    """
    import torch

    from .composite import model_from_config

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = model_from_config(
            config,
            "causal",
            "model.base",
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
        )
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif parameter.is_floating_point():
                parameter.add_(_NOISE * torch.randn_like(parameter))
    return model


def _name_sections(config: PretrainedConfig, values: Values) -> None:
    """Write the sections of rotary positions where the model's code has a default for them."""
    is_named = _SECTIONS in getattr(config, "ignore_keys_at_rope_validation", ())
    rope = values.get("rope_parameters") or {}
    if "rope_theta" in rope and (is_named or config.model_type in _SECTIONED):
        rope.setdefault(_SECTIONS, [2, 2, 3])
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            _name_sections(part, values[name])


def _keep_feature_layers(values: Values) -> None:
    """Name layers of the vision tower that the shrunk tower has."""
    key = "vision_feature_layer"
    tower = values.get("vision_config")
    depth = number(tower.get("num_hidden_layers")) if isinstance(tower, dict) else 0
    for part in parts(values):
        if depth and part is not tower and key in part:
            part[key] = feature_layers(part[key], depth)
