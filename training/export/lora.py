"""Merges a LoRA adapter into weights, with the formulas of PEFT's `merge_and_unload`.

LoRA (Hu et al., 2021), rsLoRA (Kalajdzievski, 2023) and DoRA (Liu et al., 2024), computed in
float32 for one weight at a time.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from ..common.errors import InputError
from ..config.adapter_folder import WEIGHTS_FILE

_PREFIX = "base_model.model."
_A = (".lora_A.weight", ".lora_embedding_A")
_BIAS = ".lora_B.bias"
_MAGNITUDE = ".lora_magnitude_vector"
_ROWS = ".token_adapter.trainable_tokens_delta"

# These initialisations subtract the initial adapter from the base; PEFT does not save that base.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class Update:
    """The change of one weight, in float32: W becomes W + scaling · B·A.

    With a magnitude m (DoRA) each row of the result is scaled to the norm m.
    """

    a: torch.Tensor
    """(rank, in), or (experts, rank, in)"""
    b: torch.Tensor
    """(out, rank), or (experts, out, rank)"""
    scaling: float
    magnitude: torch.Tensor | None = None
    """Magnitudes of DoRA: (out,); None without."""

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Change a weight in place, and return it.

        Args:
            weight: float32, (out, in) or (experts, out, in), with any strides.
        """
        if weight.dim() == 3:
            for matrix, a, b in zip(weight, self.a, self.b, strict=True):
                matrix.addmm_(b, a, alpha=self.scaling)
            return weight
        weight.addmm_(self.b, self.a, alpha=self.scaling)
        if self.magnitude is not None:
            weight *= (self.magnitude / torch.linalg.norm(weight, dim=1))[:, None]
        return weight

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight: (out, in) or (experts, out, in)."""
        return (*self.b.shape[:-1], self.a.shape[-1])


class Layout(Protocol):
    """The model that an adapter belongs to."""

    def shapes_of(self, module: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a module's own parameters in their order, by their names in it."""


class _Factors(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    magnitude: torch.Tensor | None


class Adapter:
    """A LoRA adapter, read from a folder that PEFT wrote.

    Raises:
        InputError: the adapter cannot be merged.
    """

    def __init__(self, folder: Path) -> None:
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            raise InputError(
                f"{folder}: a {config.peft_type} adapter cannot be merged; leave out --merge"
            )
        _check_mergeable(config)
        self.task = str(config.task_type)
        self.keeps_ties = bool(config.ensure_weight_tying)
        """True if tied weights were trained as one parameter, so that they stay equal."""
        self._config: Any = config
        self.updates: dict[str, Update] = {}
        """By the model's name of the weight; `place` fills it."""
        self.replacements: dict[str, torch.Tensor] = {}
        """New values of parameters, by name: a score head, biases, modules_to_save."""
        self._biases: dict[str, torch.Tensor] = {}
        """What is added to biases, by name."""
        self._factors: dict[str, list[_Factors]] = {}
        """By the name of the module; several where an adapter is nested in another."""
        self.rows: dict[str, tuple[list[int], torch.Tensor]] = {}
        """Trained rows of embeddings, by the parameter's name: their indices and values."""
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            names = list(file.keys())
            self._add_tensors({name.removeprefix(_PREFIX): file.get_tensor(name) for name in names})

    def _add_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        # A wrapper of a parameter holds the others of its module: the innermost comes last.
        adapters = [name for name in tensors if name.endswith(_A)]
        for name in sorted(adapters, key=lambda name: name.count(".base_layer")):
            module, _, kind = name.partition(".lora_")
            partner = f"{module}.lora_{kind.replace('A', 'B', 1)}"
            factors = _Factors(
                tensors.pop(name).float(),
                tensors.pop(partner).float(),
                tensors.pop(module + _BIAS, None),
                tensors.pop(module + _MAGNITUDE, None),
            )
            holder = module.partition(".base_layer")[0]
            self._factors.setdefault(holder, []).append(factors)
        for name in [name for name in tensors if name.endswith(_ROWS)]:
            module = name.removesuffix(_ROWS)
            self.rows[f"{module}.weight"] = self._indices(module), tensors.pop(name)
        for name, tensor in tensors.items():
            # PEFT also saves the frozen weight of an adapted embedding.
            self.replacements[name.replace(".base_layer.", ".")] = tensor

    def _indices(self, module: str) -> list[int]:
        indices = self._config.trainable_token_indices
        if not isinstance(indices, dict):
            return list(indices)
        return list(next(ids for name, ids in indices.items() if module.endswith(name)))

    def place(self, layout: "Layout") -> None:
        """Find the weight that each pair of factors belongs to.

        Raises:
            InputError: the model has no such weight.
        """
        for module, nested in self._factors.items():
            shapes = layout.shapes_of(module)
            adapted = [name for name in shapes if self._is_parameter(f"{module}.{name}")]
            if not adapted:
                self._place_layer(module, nested[0])
                continue
            if len(adapted) != len(nested):
                raise InputError(
                    f"the adapter belongs to another base model: it changes {len(nested)} "
                    f"parameters of {module}, but the base's are {', '.join(shapes) or 'missing'}; "
                    "restore the base that it was trained on"
                )
            # The first parameter is wrapped first, and is the innermost.
            for name, factors in zip(reversed(adapted), nested, strict=True):
                full = f"{module}.{name}"
                experts = shapes[name][0] if len(shapes[name]) == 3 else 0
                self.updates[full] = self._update(full, factors, experts)

    def _is_parameter(self, name: str) -> bool:
        targets = self._config.target_parameters or ()
        return any(name == target or name.endswith(f".{target}") for target in targets)

    def _place_layer(self, module: str, factors: "_Factors") -> None:
        update = self._update(module, factors, 0)
        self.updates[f"{module}.weight"] = update
        if factors.bias is not None:
            self._biases[f"{module}.bias"] = update.scaling * factors.bias.float()

    def _update(self, name: str, factors: "_Factors", experts: int) -> Update:
        a, b, magnitude = factors.a, factors.b, factors.magnitude
        rank = a.shape[0] // (experts or 1)
        if experts:
            a = a.reshape(experts, rank, -1)
            b = b.reshape(b.shape[0], rank, experts).permute(2, 0, 1)
        scaling = self._scaling(name, rank)
        return Update(a, b, scaling, None if magnitude is None else magnitude.float())

    def _scaling(self, name: str, rank: int) -> float:
        patterns = self._config.alpha_pattern
        alpha = patterns.get(get_pattern_key(patterns.keys(), name), self._config.lora_alpha)
        return float(alpha / (math.sqrt(rank) if self._config.use_rslora else rank))

    def changes(self, name: str) -> bool:
        """True if the adapter changes the parameter of this name."""
        return name in self.changed_names()

    def changed_names(self) -> set[str]:
        """Names of all parameters that the adapter changes."""
        return set(self.updates.keys() | self._biases.keys() | self.replacements.keys())

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
        if name in self._biases:
            return base + self._biases[name]
        update = self.updates.get(name)
        if update is not None:
            update.apply(base.transpose(-2, -1) if transposed else base)
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
        shapes = [tuple(self.replacements[name].shape)] if name in self.replacements else []
        update = self.updates.get(name)
        if update is not None:
            shape = update.shape
            shapes.append((*shape[:-2], shape[-1], shape[-2]) if transposed else shape)
        for shape in shapes:
            if shape != base:
                raise InputError(
                    f"the adapter belongs to another base model: it was trained on {name} of shape "
                    f"{shape}, but the base's has shape {base}; restore its own base"
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
    names = ("layer_replication",)
    refused += [name for name in names if getattr(config, name)]
    init = str(config.init_lora_weights).lower()
    if init.startswith(_CHANGES_BASE):
        refused.append(f"init_lora_weights: {init} (it changes the base's weights)")
    if refused:
        raise InputError(
            f"an adapter with {', '.join(refused)} cannot be merged; leave out --merge"
        )
