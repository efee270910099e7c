"""Merges a LoRA adapter into weights, with the formulas of PEFT's `merge_and_unload`.

LoRA (Hu et al., 2021), rsLoRA (Kalajdzievski, 2023) and DoRA (Liu et al., 2024), computed in
float32 for one weight at a time.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from ..common.errors import InputError
from ..config.adapter_folder import WEIGHTS_FILE

_PREFIX = "base_model.model."
_A = (".lora_A.weight", ".lora_embedding_A")
_B = (".lora_B.weight", ".lora_embedding_B")
_BIAS = ".lora_B.bias"
_MAGNITUDE = ".lora_magnitude_vector"

# These initialisations subtract the initial adapter from the base; PEFT does not save that base.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class Update:
    """The change of one module, in float32: W becomes W + scaling · B·A.

    With a magnitude m (DoRA) each row of the result is scaled to the norm m.
    """

    a: torch.Tensor
    """(rank, in)"""
    b: torch.Tensor
    """(out, rank)"""
    scaling: float
    bias: torch.Tensor | None = None
    """(out), added to the module's bias after scaling."""
    magnitude: torch.Tensor | None = None
    """(out)"""

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Change a weight in place, and return it: float32, (out, in), with any strides."""
        weight.addmm_(self.b, self.a, alpha=self.scaling)
        if self.magnitude is not None:
            weight *= (self.magnitude / torch.linalg.norm(weight, dim=1))[:, None]
        return weight


class Adapter:
    """A LoRA adapter, read from a folder that PEFT wrote.

    Raises:
        InputError: the adapter cannot be merged.
    """

    def __init__(self, folder: Path) -> None:
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            raise InputError(f"{folder}: a {config.peft_type} adapter cannot be merged")
        _check_mergeable(config)
        self.task = str(config.task_type)
        self.keeps_ties = bool(config.ensure_weight_tying)
        """True if tied weights were trained as one parameter, so that they stay equal."""
        self._config: Any = config
        self.updates: dict[str, Update] = {}
        """By the model's name of the module."""
        self.replacements: dict[str, torch.Tensor] = {}
        """New values of parameters, by name: a score head, biases, modules_to_save."""
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            names = list(file.keys())
            self._add_tensors({name.removeprefix(_PREFIX): file.get_tensor(name) for name in names})

    def _add_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(_A)]:
            module, _, kind = name.partition(".lora_")
            partner = f"{module}.lora_{kind.replace('A', 'B', 1)}"
            self.updates[module] = self._update(
                module,
                tensors.pop(name),
                tensors.pop(partner),
                tensors.pop(module + _BIAS, None),
                tensors.pop(module + _MAGNITUDE, None),
            )
        for name, tensor in tensors.items():
            # PEFT also saves the frozen weight of an adapted embedding.
            self.replacements[name.replace(".base_layer.", ".")] = tensor

    def _update(
        self,
        module: str,
        a: torch.Tensor,
        b: torch.Tensor,
        bias: torch.Tensor | None,
        magnitude: torch.Tensor | None,
    ) -> Update:
        patterns = self._config.alpha_pattern
        alpha = patterns.get(get_pattern_key(patterns.keys(), module), self._config.lora_alpha)
        rank = a.shape[0]
        return Update(
            a=a.float(),
            b=b.float(),
            scaling=alpha / (math.sqrt(rank) if self._config.use_rslora else rank),
            bias=None if bias is None else bias.float(),
            magnitude=None if magnitude is None else magnitude.float(),
        )

    def changes(self, name: str) -> bool:
        """True if the adapter changes the parameter of this name."""
        if name in self.replacements:
            return True
        module, _, kind = name.rpartition(".")
        update = self.updates.get(module)
        return update is not None and (kind == "weight" or update.bias is not None)

    def changed_names(self) -> set[str]:
        """Names of all parameters that the adapter changes."""
        weights = {f"{module}.weight" for module in self.updates}
        biases = {
            f"{module}.bias" for module, update in self.updates.items() if update.bias is not None
        }
        return weights | biases | self.replacements.keys()

    def merged(self, name: str, base: torch.Tensor, transposed: bool) -> torch.Tensor:
        """The merged value of a parameter, float32.

        Args:
            name: the parameter's name in the model.
            base: its value in the base, float32; it is overwritten.
            transposed: True if it is stored as (in, out), as in embeddings and GPT-2's Conv1D.
        """
        replacement = self.replacements.get(name)
        if replacement is not None:
            base = replacement.float()
        module, _, kind = name.rpartition(".")
        update = self.updates.get(module)
        if update is None:
            return base
        if kind == "bias":
            return base if update.bias is None else base + update.scaling * update.bias
        update.apply(base.T if transposed else base)
        return base

    def check_fits(self, name: str, base: tuple[int, ...], transposed: bool) -> None:
        """Check that the adapter's shapes match a parameter of the base.

        Args:
            name: the parameter's name in the model.
            base: its shape in the base.
            transposed: True if it is stored as (in, out).

        Raises:
            InputError: the shapes differ.
        """
        module, _, kind = name.rpartition(".")
        shapes = [tuple(self.replacements[name].shape)] if name in self.replacements else []
        update = self.updates.get(module)
        if update is not None and kind == "weight":
            shape: tuple[int, ...] = (update.b.shape[0], update.a.shape[1])
            shapes.append(shape[::-1] if transposed else shape)
        for shape in shapes:
            if shape != base:
                raise InputError(
                    f"the adapter belongs to another base model: it was trained on {name} of shape "
                    f"{shape}, but the base's has shape {base}"
                )


def _check_mergeable(config: LoraConfig) -> None:
    """Refuse LoRA variants that cannot be merged into single weights, by PEFT's field metadata."""
    refused = [
        field.name
        for field in fields(config)
        if field.metadata.get("is_lora_variant")
        and field.name != "use_dora"
        and getattr(config, field.name)
    ]
    names = ("target_parameters", "layer_replication", "trainable_token_indices")
    refused += [name for name in names if getattr(config, name)]
    init = str(config.init_lora_weights).lower()
    if init.startswith(_CHANGES_BASE):
        refused.append(f"init_lora_weights: {init} (it changes the base's weights)")
    if refused:
        raise InputError(f"an adapter with {', '.join(refused)} cannot be merged")
