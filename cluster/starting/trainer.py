"""What all three projects inherit from transformers' Trainer: batch, duration, rate, saving."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, get_args

from ...training.common.errors import InputError
from ...training.config.methods import ONLINE
from ...training.config.sections import RESERVED_NAMES
from ...training.config.trackers import TrackerName, check_trackers
from .draft import Draft, finite

_SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "polynomial": "linear",
    "cosine": "cosine",
}
_SAME = ("constant", "constant_with_warmup", "linear", "cosine")
_TRACKERS: dict[str, TrackerName] = {name: name for name in get_args(TrackerName)}
_OFF = ("none", "false")
_HALF = "model.dtype: auto, bfloat16 where the GPU has it, float16 elsewhere"
_PREPARED_AHEAD = (
    "rows are prepared ahead; data.prepare: streaming reads them while the run trains, and needs "
    "optim.max_steps"
)
"""How finray differs where another project streams, and the number of steps is open."""
_ALL_ROWS = "rows are prepared ahead: data.curate and method.precompute_reference need all of them"
_HOW_SHARDED = (
    "how weights are shared and where they lie; finray's FSDP2 shares each layer's, on the GPUs"
)
_RECOMPUTES = ("activation_checkpointing", "fsdp_activation_checkpointing")
"""FSDP's own gradient checkpointing."""
_WARMUP = 0.03
"""Axolotl's own share of the steps, and finray's."""
_PARENTS = {
    *("", ".", "..", "/", "outputs", "output", "saves", "data", "results", "runs", "tmp", "out"),
    *("checkpoints", "work_dirs", "models", "content", "workspace", "home"),
}


@dataclass(frozen=True)
class Devices:
    """The GPUs that the training is meant for."""

    count: int
    origin: str
    """Where their number comes from, for the comment."""
    shards: str = ""
    """The file that shares the weights among them, beside the configuration; empty for none."""


@dataclass(frozen=True)
class Defaults:
    """What a project takes where nothing is set."""

    project: str
    learning_rate: float
    epochs: float
    microbatch: int
    schedule: str
    warmup: float = 0.0


def leave_present(draft: Draft, names: Sequence[str], why: str) -> None:
    """Leave out those of these settings that have a value."""
    for name in names:
        if draft.settings.value(name) is not None:
            draft.leave(name, why)


def streaming(draft: Draft, asked: Sequence[str]) -> None:
    """Rows that are read while the run trains.

    Args:
        draft: the draft, with its duration.
        asked: the settings that say so, by dotted name; empty if none does.
    """
    needs_all_rows = "data.curate" in draft.values or draft.settings.flag(
        "precompute_ref_log_probs"
    )
    if asked and "optim.max_steps" in draft.values and not needs_all_rows:
        draft.put("data.prepare", "streaming", note=", ".join(asked))
        draft.mapped |= {
            name: ", ".join(filter(None, [draft.mapped.get(name), "data.prepare: streaming"]))
            for name in asked
        }
        return
    for name in asked:
        draft.change(name, _ALL_ROWS if needs_all_rows else _PREPARED_AHEAD)


def rate(draft: Draft, defaults: Defaults) -> None:
    """The learning rate."""
    own = draft.settings.number("learning_rate")
    note = "" if own is not None else f"{defaults.project}'s default"
    value = defaults.learning_rate if own is None else own
    draft.put("optim.learning_rate", value, "learning_rate", note=note)


def batch(
    draft: Draft, devices: Devices, defaults: Defaults, name: str, generations: int = 1
) -> None:
    """Sequences of a step: microbatch x accumulation x GPUs.

    Args:
        draft: the draft.
        devices: the GPUs.
        defaults: the project's.
        name: the setting of the microbatch.
        generations: completions of a prompt, of online methods.
    """
    settings = draft.settings
    micro = settings.whole(name, 1)
    accumulation = settings.whole("gradient_accumulation_steps", 1)
    whole = settings.whole("batch_size", 1) if name == "micro_batch_size" else None
    if micro is None and whole is not None and accumulation:
        micro = max(1, whole // accumulation)
    rows = defaults.microbatch if micro is None else max(1, micro)
    if accumulation is None and whole is not None:
        accumulation = max(1, whole // rows)
    steps = max(1, accumulation or 1)
    total = rows * steps * devices.count
    note = f"{rows} x {steps} x {devices.count}: microbatch x accumulation x GPUs"
    note += f" ({devices.origin})"
    least = generations * devices.count if generations > 1 else devices.count
    rounded = max(least, -(-total // generations) * generations)
    if rounded != total:
        unit = f"whole groups of {generations} completions" if generations > 1 else "one sequence"
        draft.notes.append(f"optim.batch_size: {total} became {rounded}, {unit} for each GPU")
    if draft.values.get("method.kind") == "kto" and rounded < 2:
        rounded = 2
        draft.notes.append("optim.batch_size: 2 instead of 1, as kto compares answers of a batch")
    names = ["gradient_accumulation_steps", "gradient_accumulation"]
    names += ["batch_size"] if whole is not None else []
    draft.put("optim.batch_size", rounded, *names, note=note)
    micro_note = "" if micro is not None else f"{defaults.project}'s default"
    draft.put("optim.micro_batch_size", min(rows, rounded), name, note=micro_note)
    if devices.count > 1:
        draft.put("scale.workers", devices.count, note=devices.origin)


def without_split_sequences(draft: Draft, devices: Devices, share: int) -> Devices:
    """The GPUs, each with sequences of its own.

    Args:
        draft: the draft.
        devices: the GPUs.
        share: of them compute one sequence together in the other project, so that the batch counts
            them once.
    """
    if share < 2 or devices.count < 2:
        return devices
    count = max(1, devices.count // share)
    draft.notes.append(
        f"scale.workers: {count}, not {devices.count}, which keeps the batch; finray splits no "
        "sequence over GPUs, but scale.strategy: fsdp shares the model among more"
    )
    return Devices(count, f"{devices.count} GPUs, {share} for a sequence", devices.shards)


def duration(draft: Draft, defaults: Defaults, name: str) -> None:
    """Passes over the data, or steps."""
    settings = draft.settings
    steps, epochs = settings.whole("max_steps"), settings.number(name)
    if steps is not None and steps > 0:
        draft.put("optim.max_steps", steps, "max_steps")
        if epochs is not None:
            draft.leave(name, "passes over the data; max_steps comes before it")
        return
    draft.fulfilled("no limit, as by default", "max_steps")
    note = "" if epochs is not None else f"{defaults.project}'s default"
    value = defaults.epochs if not epochs or epochs < 0 else epochs
    draft.put("optim.epochs", value, name, note=note)


def schedule(draft: Draft, defaults: Defaults, name: str) -> None:
    """The learning rate's course."""
    own = draft.settings.text(name)
    kind = defaults.schedule if own is None else own.lower()
    value = _SCHEDULES.get(kind, "cosine")
    draft.put("optim.schedule", value, name, note="" if own else f"{defaults.project}'s default")
    if own is not None and kind not in _SAME:
        draft.change(name, f"finray has no {own}; {value} is the nearest")
    _warmup(draft, defaults, kind == "constant")


def _warmup(draft: Draft, defaults: Defaults, without: bool) -> None:
    settings = draft.settings
    share, steps = settings.number("warmup_ratio"), settings.number("warmup_steps")
    names = ["warmup_ratio"]
    if steps is not None and 0 < steps < 1:
        share, steps, names = steps, None, ["warmup_steps"]
    elif steps == 0:
        names.append("warmup_steps")
    if without:
        draft.put("optim.warmup_ratio", 0.0, "warmup_ratio", "warmup_steps")
    elif steps:
        if share is not None:
            draft.leave("warmup_ratio", "a share of the steps; warmup_steps comes before it")
        total = draft.values.get("optim.max_steps")
        if total:
            note = f"{steps:g} of {total} steps"
            draft.put(
                "optim.warmup_ratio", round(min(1.0, steps / total), 4), "warmup_steps", note=note
            )
        else:
            draft.put("optim.warmup_ratio", _WARMUP)
            draft.change(
                "warmup_steps",
                f"{steps:g} steps; finray takes a share of the steps, whose number the data "
                f"decides: {_WARMUP:g} is written",
            )
    elif share is not None:
        draft.put("optim.warmup_ratio", min(1.0, share), *names)
    else:
        value = defaults.warmup if steps is None else 0.0
        note = "" if steps is not None else f"{defaults.project}'s default"
        draft.put("optim.warmup_ratio", value, "warmup_steps", note=note)


def optimizer(draft: Draft, name: str) -> None:
    """AdamW, instead of any other optimizer."""
    own = draft.settings.text(name)
    if own is None:
        return
    kind = own.lower().removeprefix("optimizernames.")
    if not kind.startswith(("adamw", "paged_adamw")) or "schedule_free" in kind:
        draft.change(name, f"{own}: AdamW instead, which may need another learning rate")
    elif "8bit" in kind or "4bit" in kind or "paged" in kind:
        draft.change(name, f"{own}: AdamW with states of 32 bits, 8 bytes a trained weight")
    else:
        draft.fulfilled("AdamW, the only optimizer", name)


def precision(draft: Draft, *names: str) -> None:
    """The compute type.

    Args:
        draft: the draft.
        names: settings that hold a type's name.
    """
    settings = draft.settings
    for name in ("bf16", "pure_bf16", "bfloat16"):
        if str(settings.value(name)).lower() in ("auto", "true", "full", "1"):
            draft.fulfilled("model.dtype: auto, bfloat16 where the GPU has it", name)
    for name in ("fp16", "float16"):
        if settings.value(name) is not None and settings.flag(name):
            draft.change(name, _HALF)
    if settings.value("float32") is not None and settings.flag("float32"):
        draft.put("model.dtype", "float32", "float32")
    others = ("fp16", "float16", "float32", *names)
    is_off = str(settings.value("bf16")).lower() == "false"
    if is_off and all(str(settings.value(name)).lower() in _OFF for name in others):
        draft.change(
            "bf16",
            "false: float32 there; model.dtype: auto takes bfloat16 where the GPU has it, and "
            "model.dtype: float32 is the same",
        )
    for name in names:
        kind = (settings.text(name) or "").lower().removeprefix("torch.")
        if kind in ("float16", "half", "fp16"):
            draft.change(name, _HALF)
            continue
        if kind:
            draft.fulfilled("model.dtype: auto, bfloat16 where the GPU has it", name)


def checkpointing(draft: Draft) -> None:
    """Gradient checkpointing."""
    value = draft.settings.value("gradient_checkpointing")
    if value is None:
        return
    text = str(value).lower()
    draft.put("model.gradient_checkpointing", text not in ("false", "0"), "gradient_checkpointing")
    if text not in ("true", "false"):
        draft.change("gradient_checkpointing", f"{value}: activations are recomputed, not moved")


def remote_code(draft: Draft) -> None:
    """A model's own code, which needs a pinned commit."""
    if draft.settings.flag("trust_remote_code"):
        draft.change(
            "trust_remote_code",
            "false: architectures that transformers has need no code; for others set it with "
            "model.revision, the full hash of a commit",
        )


def sharding(draft: Draft, devices: Devices) -> None:
    """DeepSpeed's and FSDP's sharding as FSDP2."""
    given = {name: draft.settings.value(name) for name in ("deepspeed", "fsdp", "fsdp_config")}
    names = [name for name, value in given.items() if value is not None]
    if not names:
        _shard_as_launched(draft, devices)
        return
    for name, value in given.items():
        inner = value if isinstance(value, dict) else {}
        of_it = draft.settings.inside(name, inner)
        for key in filter(of_it.flag, _RECOMPUTES):
            if not draft.values.get("model.gradient_checkpointing"):
                draft.put("model.gradient_checkpointing", True, note=f"{name}.{key}")
        taken = ("zero_optimization", *_RECOMPUTES)
        leave = [key for key in inner if key not in taken and of_it.value(key)]
        for key in leave:
            draft.leave(f"{name}.{key}", _HOW_SHARDED)
    shards = any(name != "deepspeed" or is_stage_3(given[name]) for name in names)
    for name in names:
        if devices.count < 2:
            draft.change(name, "one GPU has no other to share the weights with; see --gpus")
        elif _cannot_shard(draft):
            draft.change(name, "scale.strategy: auto; what is trained here cannot be sharded")
        elif shards:
            draft.put("scale.strategy", "fsdp", name)
        else:
            draft.change(
                name, "scale.strategy: auto shards weights, gradients and states where one GPU "
                "does not hold them"
            )  # fmt: skip


def is_stage_3(deepspeed: Any) -> bool:
    """True if DeepSpeed shares the weights too: ZeRO-3, by its settings or its file's name."""
    if isinstance(deepspeed, dict):
        zero = deepspeed.get("zero_optimization")
        return isinstance(zero, dict) and zero.get("stage") == 3
    return bool(re.search(r"z(ero)?[_-]?(stage)?[_-]?3", str(deepspeed).lower()))


def _shard_as_launched(draft: Draft, devices: Devices) -> None:
    if devices.shards and devices.count > 1 and not _cannot_shard(draft):
        draft.put("scale.strategy", "fsdp", note=devices.shards)


def _cannot_shard(draft: Draft) -> bool:
    values = draft.values
    is_online = values.get("method.kind") in ONLINE
    init = values.get("adapter.init")
    return values.get("model.quantize") == "int8" or is_online or init in ("pissa", "olora")


def evaluation(draft: Draft, holds_out: bool) -> None:
    """Steps between two measurements of held-out data."""
    settings = draft.settings
    strategies = ("eval_strategy", "evaluation_strategy")
    strategy = next((text for name in strategies if (text := settings.text(name))), None)
    every = _steps(draft, "eval_steps")
    if not holds_out:
        for name in (*strategies, "eval_steps", "evals_per_epoch"):
            if settings.value(name) is not None:
                draft.leave(name, "steps between measurements; there is no held-out data")
        return
    is_off = str(strategy).lower() in ("no", "false")
    if every is not None and not is_off and strategy != "epoch":
        draft.put("eval.every_steps", every, "eval_steps")
    elif is_off:
        draft.fulfilled("held-out data is measured at the end alone", "eval_steps")
    for name in strategies:
        own = settings.text(name)
        if own == "epoch":
            draft.change(name, "held-out data is measured at the end; eval.every_steps adds more")
        elif own is not None:
            draft.fulfilled("eval.every_steps", name)
    if settings.value("evals_per_epoch") is not None:
        draft.change(
            "evals_per_epoch",
            "held-out data is measured at the end; eval.every_steps, optimizer steps, adds more",
        )


def saving(draft: Draft, passes: int = 1) -> None:
    """Steps between two checkpoints, and how many are kept.

    Args:
        draft: the draft.
        passes: optimizer steps on the same completions, which checkpoints do not hold.
    """
    settings = draft.settings
    if (every := _steps(draft, "save_steps")) is not None:
        draft.put("checkpoint.every_steps", -(-every // passes) * passes, "save_steps")
    if settings.value("saves_per_epoch") is not None:
        draft.change(
            "saves_per_epoch",
            "checkpoint.every_steps counts optimizer steps, 100 by default; a run saves at its end",
        )
    keep = settings.whole("save_total_limit")
    if keep is not None and keep > 0:
        draft.put("checkpoint.keep", keep, "save_total_limit")
    if (every := _steps(draft, "logging_steps")) is not None:
        draft.put("log.every_steps", every, "logging_steps")


def _steps(draft: Draft, name: str) -> int | None:
    """A number of steps; a share of them where their number is set."""
    number = draft.settings.number(name)
    if number is None or number <= 0:
        return None
    if number >= 1:
        return int(number)
    total = draft.values.get("optim.max_steps")
    if total:
        return max(1, round(number * float(total)))
    draft.change(name, f"{number:g} of all steps; finray counts steps, whose number the data sets")
    return None


def trackers(draft: Draft, name: str = "report_to") -> None:
    """What is written beside metrics.jsonl, by a list of names."""
    value = draft.settings.value(name)
    if value is None:
        return
    asked = [text.lower() for text in draft.settings.texts(name)]
    if asked == ["none"]:
        draft.put("log.to", [], name)
    elif asked != ["all"]:
        track(draft, {item: name for item in asked if item != "none"})


def track(draft: Draft, asked: Mapping[str, str]) -> None:
    """Write where metrics go, as far as packages and keys are here.

    Args:
        draft: the draft.
        asked: the setting that names it, by tracker.
    """
    usable: list[str] = []
    for item, name in asked.items():
        if item not in _TRACKERS:
            draft.change(name, f"{item}: not there; log.to takes {', '.join(_TRACKERS)}")
            continue
        try:
            check_trackers([_TRACKERS[item]])
        except InputError as error:
            draft.change(name, f"not written: {error}")
        else:
            usable.append(item)
    if usable:
        names = [name for item, name in asked.items() if item in usable]
        draft.put("log.to", usable, *dict.fromkeys(names))


def patience(draft: Draft, name: str) -> None:
    """Ending early: measurements without a better value."""
    count = draft.settings.whole(name)
    if not count:
        return
    if "eval.every_steps" in draft.values:
        draft.put("eval.patience", count, name)
    else:
        draft.change(name, f"eval.patience: {count} counts measurements; set eval.every_steps, too")


def run_name(draft: Draft, names: Sequence[str], fallback: str) -> None:
    """The run's name, of the first of these settings that has a value; others need nothing."""
    used = next((name for name in names if draft.settings.text(name)), None)
    text = (draft.settings.text(used) if used else None) or fallback
    parts = list(PurePosixPath(text.replace("\\", "/")).parts)
    while len(parts) > 1 and parts[0].lower().strip("/") in _PARENTS:
        parts.pop(0)
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts[-3:])).strip("-._")[-63:].strip("-._")
    if not plain or plain.lower() in RESERVED_NAMES or plain.lower() in _PARENTS:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", fallback).strip("-._")[-63:].strip("-._") or "run"
    draft.put("name", plain, *([used] if used else []))
    for name in names:
        if name != used and draft.settings.value(name) is not None:
            draft.fulfilled("the run's folder is <storage>/<name>", name)


def copy_the_rest(draft: Draft, method_keys: frozenset[str]) -> None:
    """Settings that mean the same in finray, of the method and the adapter as far as they have
    them."""
    settings = draft.settings
    has_adapter = any(key.startswith("adapter") for key in draft.values)
    for name, to in draft.dialect.copied.items():
        value = settings.value(name)
        if value is None or to in draft.values or name in {**draft.left, **draft.changed}:
            continue
        section, _, key = to.partition(".")
        is_missing = (section == "method" and key not in method_keys) or (
            section == "adapter" and not has_adapter
        )
        if is_missing or (to == "optim.lora_plus_ratio" and not has_adapter):
            continue
        draft.put(to, _plain(value), name)


def _plain(value: Any) -> Any:
    """A number or a flag also where it is written as text."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    number = finite(value)
    if number is None:
        return value
    return int(number) if number == int(number) and "e" not in value.lower() else number
