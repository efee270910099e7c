"""An adapter merged into its base: read, changed and written one tensor at a time.

What is written keeps the base's own names and order, so that it loads as the base does.
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
from ..models.dtypes import DtypeName, torch_dtype
from .lora import Adapter
from .quantised import Quantisation, dequantised
from .skeleton import Skeleton
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
        target: where to; the folder exists.
        progress: receives the bytes written so far and in all.
        quantize: how the base was quantised while the adapter was trained: the merged weights
            start from what the quantised ones stand for, not from the base's own.
        compute_dtype: the type in which the run held the base's weights; it matters to `quantize`.
        dtype: type of the merged floating-point weights; by default each keeps the base's.
        pad_token_id: a sequence classifier needs it in its configuration.
        shard_bytes: largest size of a weights file.

    Raises:
        InputError: for a base or an adapter that cannot be merged, or do not belong together.
        RunError: where a merged weight is not finite in its type.
    """
    learnt = Adapter(adapter)
    score = learnt.replacements.get("score.weight")
    skeleton = Skeleton(base, learnt.task, None if score is None else score.shape[0])
    plan = _Plan(TensorFiles(base), learnt, skeleton, quantize, torch_dtype(compute_dtype))
    wanted = None if dtype is None else torch_dtype(dtype)
    outputs = list(plan.outputs(wanted))
    config = json.loads((base / CONFIG_FILE).read_text(encoding="utf-8"))
    _write_config(_changed_config(config, plan, dtype, pad_token_id), target)
    write_model_files(target, outputs, progress, shard_bytes)


def recast(model: Path, target: Path, dtype: DtypeName, progress: Progress) -> None:
    """Write a whole model's weights and configuration anew, in another floating-point type.

    Raises:
        InputError: for weights that cannot be read.
    """
    files, wanted = TensorFiles(model), torch_dtype(dtype)
    outputs = [_kept(files, key, info, wanted) for key, info in files.info.items()]
    config = json.loads((model / CONFIG_FILE).read_text(encoding="utf-8"))
    _write_config(_in_dtype(config, dtype), target)
    write_model_files(target, outputs, progress)


class _Plan:
    """Which tensors the merged model has, and how each comes about."""

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
        pairs = skeleton.tied.items()
        touched = any(adapter.touches(name) for pair in pairs for name in pair)
        self.unties = touched and not adapter.keeps_ties
        """Whether weights that the base shares are no longer equal."""

    def outputs(self, dtype: torch.dtype | None) -> Iterator[Output]:
        """Every tensor of the merged model, in the base's order.

        Raises:
            InputError: where the adapter changes what the base does not have.
        """
        stored = {name: key for key, name in self.names.items() if name is not None}
        for key, info in self.files.info.items():
            name = self.names.get(key)
            # What this model does not load stays (a vision tower), but for a classifier's old head.
            if name is None and (key in self.names or self.skeleton.task == "CAUSAL_LM"):
                yield _kept(self.files, key, info, dtype)
            elif name is not None and not (self.unties and name in self.skeleton.tied):
                yield self._output(key, name, key, info, dtype)
        for name in sorted(self._added(stored)):
            source = stored.get(self.skeleton.tied.get(name, name))
            info = self._added_info(name) if source is None else self.files.info[source]
            yield self._output(name, name, source, info, dtype)

    def _added(self, stored: dict[str, str]) -> set[str]:
        """Parameters that are not stored in the base's files: a score head, an untied head."""
        tied = self.skeleton.tied
        added = set(tied) if self.unties else set()
        needed = {tied[name] for name in added} | (self.adapter.changed() - tied.keys())
        for name in sorted(needed - stored.keys()):
            if name not in self.adapter.replacements or not self.skeleton.has(name):
                raise InputError(
                    f"the adapter changes {name}, which the base's files do not hold as a tensor "
                    "of its own: it is of another base model, or a part of fused experts, which "
                    "cannot be merged"
                )
            added.add(name)
        return added

    def _added_info(self, name: str) -> TensorInfo:
        """A replacement's shape, in the type that most of the base's weights have."""
        sizes: Counter[torch.dtype] = Counter()
        for info in self.files.info.values():
            sizes[info.dtype] += info.bytes
        shape = tuple(self.adapter.replacements[name].shape)
        return TensorInfo(shape, sizes.most_common(1)[0][0])

    def _output(
        self, key: str, name: str, source: str | None, info: TensorInfo, dtype: torch.dtype | None
    ) -> Output:
        if source is not None and name not in self.quantised and not self.adapter.touches(name):
            return replace(_kept(self.files, source, info, dtype), name=key)
        if source is not None:
            self.adapter.check_fits(name, info.shape, self.skeleton.is_transposed(name))
        info = TensorInfo(info.shape, _cast_to(info.dtype, dtype))
        return Output(key, info, partial(self._make, name, source, info.dtype))

    def _make(self, name: str, source: str | None, dtype: torch.dtype) -> torch.Tensor:
        """A parameter of the merged model, computed in float32."""
        if source is None:
            weight = self.adapter.replacements[name].float()
        else:
            transposed = self.skeleton.is_transposed(name)
            weight = self._base_weight(name, source, transposed)
            weight = self.adapter.merged(name, weight, transposed)
        merged = weight.to(dtype)
        if not torch.isfinite(merged).all():
            raise RunError(
                f"{name}: the merged weight is not finite as {str(dtype).removeprefix('torch.')}; "
                "another --dtype may hold it, or the training went astray"
            )
        return merged

    def _base_weight(self, name: str, source: str, transposed: bool) -> torch.Tensor:
        """What the adapter was trained over, float32 and free to be overwritten."""
        stored = self.files.read(source)
        if name not in self.quantised or self.quantize == "none":
            return stored.to(torch.float32, copy=True)
        return dequantised(stored.to(self.compute_dtype), self.quantize, transposed)


def _kept(files: TensorFiles, key: str, info: TensorInfo, dtype: torch.dtype | None) -> Output:
    """A stored tensor as it is, or in another floating-point type."""
    info = TensorInfo(info.shape, _cast_to(info.dtype, dtype))
    return Output(key, info, lambda: files.read(key).to(info.dtype))


def _cast_to(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and stored.is_floating_point else stored


def _changed_config(
    config: dict[str, Any], plan: _Plan, dtype: DtypeName | None, pad_token_id: int | None
) -> dict[str, Any]:
    """The base's configuration, for what the model has become."""
    if dtype is not None:
        config = _in_dtype(config, dtype)
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
    """A configuration and those of its parts, such as text_config."""
    return [config, *(part for part in config.values() if isinstance(part, dict))]


def _write_config(config: dict[str, Any], target: Path) -> None:
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
