"""What a LoRA adapter does to a weight: the formulas of PEFT's `merge_and_unload`.

LoRA (Hu et al., 2021), rsLoRA (Kalajdzievski, 2023) and DoRA (Liu et al., 2024). Everything is
computed in float32, one weight at a time.
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

# These set the base's weights to what the first adapter leaves over; they are not written.
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class Update:
    """The change of one module, all float32: W becomes W + scaling · B·A.

    With a magnitude m (DoRA) each row of that is scaled to the length that m says.
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
        """The new weight, in the place of the old one: float32, (out, in), of any strides."""
        weight.addmm_(self.b, self.a, alpha=self.scaling)
        if self.magnitude is not None:
            weight *= (self.magnitude / torch.linalg.norm(weight, dim=1))[:, None]
        return weight


class Adapter:
    """An adapter's folder as PEFT writes it.

    Raises:
        InputError: for adapters that cannot be merged, and for tensors of an unknown meaning.
    """

    def __init__(self, folder: Path) -> None:
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            raise InputError(f"{folder}: a {config.peft_type} adapter cannot be merged")
        _check_mergeable(config)
        self.task = str(config.task_type)
        self.keeps_ties = bool(config.ensure_weight_tying)
        """Weights that the base shares were trained as one; both names hold the same."""
        self._config: Any = config
        self.updates: dict[str, Update] = {}
        """By module, as the model names it."""
        self.replacements: dict[str, torch.Tensor] = {}
        """Parameters trained as a whole, by name: a score head, biases, modules_to_save."""
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            names = list(file.keys())
            self._take({name.removeprefix(_PREFIX): file.get_tensor(name) for name in names})

    def _take(self, tensors: dict[str, torch.Tensor]) -> None:
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
            # The frozen weight under an adapted embedding is written along with it.
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

    def touches(self, name: str) -> bool:
        """Whether the adapter changes this parameter of the model."""
        if name in self.replacements:
            return True
        module, _, kind = name.rpartition(".")
        update = self.updates.get(module)
        return update is not None and (kind == "weight" or update.bias is not None)

    def changed(self) -> set[str]:
        """Names of all parameters that the adapter changes."""
        weights = {f"{module}.weight" for module in self.updates}
        biases = {
            f"{module}.bias" for module, update in self.updates.items() if update.bias is not None
        }
        return weights | biases | self.replacements.keys()

    def merged(self, name: str, base: torch.Tensor, transposed: bool) -> torch.Tensor:
        """A parameter with what was learnt.

        Args:
            name: its name in the model.
            base: its value in the base, float32; it is overwritten.
            transposed: whether it is stored as (in, out): embeddings and GPT-2's Conv1D.
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
        """Compare shapes.

        Raises:
            InputError: where they differ from the base's.
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
                    f"the adapter is of another base model: it was trained over a {name} of shape "
                    f"{shape}, and the base has {base}"
                )


def _check_mergeable(config: LoraConfig) -> None:
    """Refuse what has no single weight to merge into, by PEFT's own marks."""
    refused = [
        field.name
        for field in fields(config)
        if field.metadata.get("is_lora_variant")
        and field.name != "use_dora"
        and getattr(config, field.name)
    ]
    names = ("target_parameters", "layer_replication", "trainable_token_indices")
    refused += [name for name in names if getattr(config, name)]
    start = str(config.init_lora_weights).lower()
    if start.startswith(_CHANGE_THE_BASE):
        refused.append(f"init_lora_weights: {start} (it changes the base's weights)")
    if refused:
        raise InputError(f"an adapter with {', '.join(refused)} cannot be merged")
