"""Merges an adapter into its base: reads, changes and writes one tensor at a time.

The merged model keeps the names and the order of the base's tensors, so it loads like the base.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..common.errors import InputError, RunError
from ..common.progress import Progress
from ..config.weight_checks import text_part
from ..models.dtypes import DtypeName, torch_dtype
from .lora import Adapter
from .quantised import Quantisation, dequantised, repacked
from .skeleton import Conversion, Skeleton
from .tensor_files import (
    SHARD_BYTES,
    Output,
    TensorFiles,
    TensorInfo,
    write_model_files,
)

CONFIG_FILE = "config.json"


def merge(
    base: Path,
    adapter: Path,
    target: Path,
    progress: Progress,
    *,
    quantize: Quantisation = "none",
    compute_dtype: DtypeName = "float32",
    dtype: DtypeName | None = None,
    pad_token_id: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the weights and the configuration of the merged model.

    Args:
        base: folder of the base model, with safetensors.
        adapter: folder of a LoRA adapter as PEFT writes it.
        target: an existing folder for the merged model.
        progress: receives the bytes written so far and in all.
        quantize: how the base was quantised while the adapter was trained. The adapter is then
            merged into the dequantised weights, not into the base's original ones.
        compute_dtype: the type in which the run loaded the base's weights; needed for `quantize`.
        dtype: type of the merged floating-point weights; None keeps the types of the base.
        pad_token_id: padding token for the configuration of a sequence classifier.
        shard_bytes: maximum size of a weights file in bytes.

    Raises:
        InputError: the base or the adapter cannot be merged, or they do not belong together.
        RunError: a merged weight is not finite in its type.
    """
    lora = Adapter(adapter)
    score = lora.replacements.get("score.weight")
    skeleton = Skeleton(base, lora.task, None if score is None else score.shape[0])
    lora.place(skeleton)
    files = TensorFiles(base)
    if lacking := skeleton.lacking(files.info):
        raise InputError(
            f"{base}: the base's weights lack {', '.join(lacking[:5])} ({len(lacking)} in all); "
            "give a complete model"
        )
    plan = _MergePlan(files, lora, skeleton, quantize, torch_dtype(compute_dtype))
    outputs = list(plan.outputs(None if dtype is None else torch_dtype(dtype)))
    config = json.loads((base / CONFIG_FILE).read_text(encoding="utf-8"))
    _write_config(_changed_config(config, plan, dtype, pad_token_id), target)
    write_model_files(target, outputs, progress, shard_bytes)


def recast(model: Path, target: Path, dtype: DtypeName, progress: Progress) -> None:
    """Write a full model's weights and configuration in another floating-point type.

    Raises:
        InputError: the weights cannot be read.
    """
    files, target_dtype = TensorFiles(model), torch_dtype(dtype)
    outputs = [_unchanged(files, key, info, target_dtype) for key, info in files.info.items()]
    config = json.loads((model / CONFIG_FILE).read_text(encoding="utf-8"))
    _write_config(_in_dtype(config, dtype), target)
    write_model_files(target, outputs, progress)


class _MergePlan:
    """Decides which tensors the merged model has, and how each is computed."""

    def __init__(
        self,
        files: TensorFiles,
        adapter: Adapter,
        skeleton: Skeleton,
        quantize: Quantisation,
        compute_dtype: torch.dtype,
    ) -> None:
        self.files = files
        self.adapter = adapter
        self.skeleton = skeleton
        self.quantize = quantize
        self.compute_dtype = compute_dtype
        self.names = skeleton.names_of(files.info)
        self.quantised = skeleton.quantised() if quantize != "none" else frozenset()
        self.packed = skeleton.packed() if quantize != "none" else frozenset()
        self.changed = adapter.changed_names()
        self.joined = {
            key: _Joined(self, conversion)
            for conversion in skeleton.conversions(files.info)
            if conversion.name in self.changed | self.quantised
            for key in conversion.keys
        }
        pairs = skeleton.tied.items()
        is_changed = any(adapter.changes(name) for pair in pairs for name in pair)
        self.unties = is_changed and not adapter.keeps_ties
        """True if weights that are tied in the base differ in the merged model."""
        self.rows = self._most_rows()
        """Rows that embedding and head have at least."""
        self.vocabulary: int | None = None
        """Rows of the merged embedding, if it has more than the base's."""

    def outputs(self, dtype: torch.dtype | None) -> Iterator[Output]:
        """Every tensor of the merged model, in the base's order.

        Raises:
            InputError: the adapter changes a parameter that the base does not have.
        """
        stored = {name: key for key, name in self.names.items() if name is not None}
        for key, info in self.files.info.items():
            name = self.names.get(key)
            if key in self.joined:
                written = TensorInfo(info.shape, _cast_to(info.dtype, dtype))
                yield Output(key, written, partial(self.joined[key].take, key, written.dtype))
                continue
            # Tensors that this model does not load, such as a vision tower, are copied; only a
            # classifier leaves out the language-model head of its base.
            if name is None and (key in self.names or self.skeleton.task == "CAUSAL_LM"):
                yield _unchanged(self.files, key, info, dtype)
            elif name is not None and not (self.unties and name in self.skeleton.tied):
                yield self._output(key, name, key, info, dtype)
        for name in sorted(self._added(stored)):
            source = stored.get(self.skeleton.tied.get(name, name))
            info = self._added_info(name) if source is None else self.files.info[source]
            yield self._output(name, name, source, info, dtype)

    def _added(self, stored: dict[str, str]) -> set[str]:
        """Names of new parameters that the base's files lack: a score head, an untied head."""
        tied = self.skeleton.tied
        added = set(tied) if self.unties else set()
        joined = {part.conversion.name for part in self.joined.values()}
        needed = {tied[name] for name in added} | (self.changed - tied.keys())
        for name in sorted(needed - stored.keys() - joined):
            if name not in self.adapter.replacements or not self.skeleton.has(name):
                raise InputError(
                    f"the adapter changes {name}, which is not a tensor of its own in the base's "
                    "files: the adapter belongs to another base model; restore its own base"
                )
            added.add(name)
        return added

    def _added_info(self, name: str) -> TensorInfo:
        """Shape of a new parameter, in the type that most of the base's weights have."""
        sizes: Counter[torch.dtype] = Counter()
        for info in self.files.info.values():
            sizes[info.dtype] += info.bytes
        shape = tuple(self.adapter.replacements[name].shape)
        return TensorInfo(shape, sizes.most_common(1)[0][0])

    def _output(
        self, key: str, name: str, source: str | None, info: TensorInfo, dtype: torch.dtype | None
    ) -> Output:
        shape = self._grown(name, info.shape)
        is_changed = self.adapter.changes(name) or self._rows(name) is not None
        is_changed = is_changed or shape != info.shape
        if source is not None and name not in self.quantised and not is_changed:
            return replace(_unchanged(self.files, source, info, dtype), name=key)
        if source is not None:
            self.adapter.check_fits(name, shape, self.skeleton.is_transposed(name))
        info = TensorInfo(shape, _cast_to(info.dtype, dtype))
        return Output(key, info, partial(self._make, name, source, info.dtype))

    def _make(self, name: str, source: str | None, dtype: torch.dtype) -> torch.Tensor:
        """A parameter of the merged model, computed in float32."""
        if source is None:
            weight = self.adapter.replacements[name].float()
        else:
            transposed = self.skeleton.is_transposed(name)
            weight = self._base_weight(name, source, transposed)
            weight = self.adapter.merged(name, weight, transposed)
        if (rows := self._rows(name)) is not None:
            weight = _with_rows(weight, *rows)
        if len(weight) < self._grown(name, tuple(weight.shape))[0]:  # such as the bias of a head
            new = weight.mean(dim=0, keepdim=True).expand(
                self.rows - len(weight), *weight.shape[1:]
            )
            weight = torch.cat([weight, new])
        return _finite(name, weight.to(dtype))

    def _rows(self, name: str) -> tuple[list[int], torch.Tensor] | None:
        """Trained rows of a parameter, or of the one that it is tied to."""
        rows = self.adapter.rows
        return rows.get(name) or rows.get(self.skeleton.tied.get(name, name))

    def _most_rows(self) -> int:
        adapter, skeleton = self.adapter, self.skeleton
        sizes = [max(indices) + 1 for indices, _ in adapter.rows.values()]
        for name, whole in adapter.replacements.items():
            if skeleton.has(name) and skeleton.is_embedding(name):
                sizes.append(whole.shape[0])
        return max(sizes, default=0)

    def _grown(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a merged parameter; added tokens give embedding and head more rows."""
        if not self.rows or not shape or shape[0] >= self.rows:
            return shape
        if not self.skeleton.has(name) or not self.skeleton.is_embedding(name):
            return shape
        self.vocabulary = self.rows
        return (self.rows, *shape[1:])

    def _base_weight(self, name: str, source: str, transposed: bool) -> torch.Tensor:
        return self.trained_on(name, self.files.read(source), transposed)

    def trained_on(self, name: str, stored: torch.Tensor, transposed: bool) -> torch.Tensor:
        """The weight that the adapter was trained on, as a new float32 tensor.

        Args:
            name: the parameter's name in the model.
            stored: its value in the base.
            transposed: True if it is stored as (in, out).
        """
        if name not in self.quantised or self.quantize == "none":
            return stored.to(torch.float32, copy=True)
        if name in self.packed:
            return repacked(stored.to(self.compute_dtype), self.quantize)
        return dequantised(stored.to(self.compute_dtype), self.quantize, transposed)


class _Joined:
    """Stored tensors that are one parameter of the model, merged together."""

    def __init__(self, plan: _MergePlan, conversion: Conversion) -> None:
        self.plan, self.conversion = plan, conversion
        self._merged: dict[str, torch.Tensor] = {}

    def take(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        """A stored tensor of the merged model, in a type; it is not kept after this."""
        if key not in self._merged:
            self._merged = self._merge()
        return _finite(key, self._merged.pop(key).to(dtype).contiguous())

    def _merge(self) -> dict[str, torch.Tensor]:
        plan = self.plan
        stored = {key: plan.files.read(key) for key in self.conversion.keys}
        merged = {}
        for name, weight in self.conversion.join(stored).items():
            transposed = plan.skeleton.is_transposed(name)
            plan.adapter.check_fits(name, tuple(weight.shape), transposed)
            base = plan.trained_on(name, weight, transposed)
            merged[name] = plan.adapter.merged(name, base, transposed)
        return self.conversion.split(merged)


def _finite(name: str, weight: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(weight).all():
        raise RunError(
            f"{name}: the merged weight is not finite in {str(weight.dtype).removeprefix('torch.')}"
            "; try another --dtype; if that fails too, the training diverged"
        )
    return weight


def _with_rows(weight: torch.Tensor, indices: list[int], rows: torch.Tensor) -> torch.Tensor:
    """A matrix with some rows replaced; the last ones may be new."""
    missing = max(indices) + 1 - len(weight)
    if missing > 0:
        weight = torch.cat([weight, weight.new_zeros(missing, weight.shape[1])])
    return weight.index_copy(0, torch.tensor(indices), rows.to(weight))


def _unchanged(files: TensorFiles, key: str, info: TensorInfo, dtype: torch.dtype | None) -> Output:
    """A stored tensor with its values, in its own or another floating-point type."""
    info = TensorInfo(info.shape, _cast_to(info.dtype, dtype))
    return Output(key, info, lambda: files.read(key).to(info.dtype))


def _cast_to(stored: torch.dtype, requested: torch.dtype | None) -> torch.dtype:
    return requested if requested is not None and stored.is_floating_point else stored


def _changed_config(
    config: dict[str, Any], plan: _MergePlan, dtype: DtypeName | None, pad_token_id: int | None
) -> dict[str, Any]:
    """The base's configuration, adapted to the merged model."""
    if dtype is not None:
        config = _in_dtype(config, dtype)
    if plan.vocabulary is not None:
        text_part(config)["vocab_size"] = plan.vocabulary
    if plan.unties:
        for section in _sections(config):
            if "tie_word_embeddings" in section:
                section["tie_word_embeddings"] = False
        config["tie_word_embeddings"] = False
    if plan.skeleton.task == "SEQ_CLS":
        labels = [f"LABEL_{number}" for number in range(plan.skeleton.labels)]
        config["architectures"] = [plan.skeleton.architecture]
        config["id2label"] = {str(number): label for number, label in enumerate(labels)}
        config["label2id"] = {label: number for number, label in enumerate(labels)}
        if config.get("pad_token_id") is None:
            config["pad_token_id"] = pad_token_id
    return config


def _in_dtype(config: dict[str, Any], dtype: DtypeName) -> dict[str, Any]:
    for section in _sections(config):
        if section.pop("torch_dtype", None) is not None or "dtype" in section:
            section["dtype"] = dtype
    return {**config, "dtype": dtype}


def _sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    """A configuration and its nested configurations, such as text_config."""
    return [config, *(part for part in config.values() if isinstance(part, dict))]


def _write_config(config: dict[str, Any], target: Path) -> None:
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
