"""A LLaMA-Factory configuration as a recipe."""

import json
import math
import os
from pathlib import Path
from typing import Any

from ...training.common.errors import InputError
from ...training.config.methods import METHODS
from ...training.config.yaml_file import read_foreign_file
from . import adapting, trainer
from .alpaca import template_of
from .axolotl import holdout
from .draft import NO_MODEL, Draft
from .places import Places
from .trainer import Defaults, Devices

_DEFAULTS = Defaults("LLaMA-Factory", 5e-5, 3.0, 8, "linear")
_STAGES = {"pt": "pretrain", "sft": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto"}
_FILE = "dataset_info.json"
_ONLINE = "ONLINE"
"""The dataset_dir under which names are those of data sets of the hub."""
_OTHER_WORK = {
    "export_dir": "exports a model; finray export does that",
    "infer_backend": "generates answers; nothing is trained",
    "task": "measures a finished model; nothing is trained",
    "eval_template": "measures a finished model; nothing is trained",
}
_OTHER_OPTIMIZERS = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")
_MODEL_PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)
_TEMPLATES = {
    "alpaca": template_of(
        (("", ""), ("### Instruction:\\n", "\\n\\n"), "### Response:\\n", "\\n\\n")
    ),
    "vicuna": template_of((("", ""), ("USER: ", " "), "ASSISTANT:", "")),
    "default": (
        "{% for message in messages %}{% if message.role == 'system' %}{{ 'System: ' + "
        "message.content + eos_token + '\\n' }}{% elif message.role == 'user' %}{{ 'Human: ' + "
        "message.content + eos_token + '\\n' }}{% elif message.role == 'assistant' %}{{ "
        "'Assistant:' + message.content + eos_token + '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
}
"""Those of LLaMA-Factory that take the place of a model's own."""
_SYSTEMS = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n"
    ),
    "chatml_de": "Du bist ein freundlicher und hilfsbereiter KI-Assistent.",
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions."
    ),
}
"""The system prompts that come with them."""
_OTHER_LOSSES = ("use_dft_loss", "use_eaft_loss", "use_asft_loss")


def convert(draft: Draft, devices: Devices, places: Places, info: Path | None) -> None:
    """Fill the draft.

    Args:
        draft: the draft.
        devices: the GPUs.
        places: where paths start.
        info: dataset_info.json, if the user names it.

    Raises:
        InputError: nothing is trained, or in a way that finray does not have.
    """
    settings = draft.settings
    kind = _method(draft)
    base = settings.text("model_name_or_path") or NO_MODEL
    draft.put("model.base", places.model(base), "model_name_or_path")
    revision = settings.text("model_revision")
    if revision not in (None, "main"):
        draft.put("model.revision", revision, "model_revision")
    elif revision:
        draft.fulfilled("main, as by default", "model_revision")
    names = ("run_name", "output_dir", "ray_run_name", "hub_model_id")
    trainer.run_name(draft, names, f"{base.rpartition('/')[2]}-{kind}")
    adapts = _trained(draft, places)
    _quantised(draft, adapts)
    _of_method(draft, kind, places)
    holds_out = _data(draft, kind, places, info)
    if workers := settings.whole("ray_num_workers", 1):
        devices = Devices(workers, f"ray_num_workers: {workers}")
        draft.fulfilled(f"scale.workers: {workers}", "ray_num_workers")
    share = math.prod(settings.whole(name, 1) or 1 for name in _MODEL_PARALLEL)
    devices = trainer.without_split_sequences(draft, devices, share)
    trainer.batch(draft, devices, _DEFAULTS, "per_device_train_batch_size")
    trainer.duration(draft, _DEFAULTS, "num_train_epochs")
    trainer.rate(draft, _DEFAULTS)
    trainer.schedule(draft, _DEFAULTS, "lr_scheduler_type")
    trainer.optimizer(draft, "optim")
    for name in _OTHER_OPTIMIZERS:
        if settings.flag(name):
            draft.change(name, "AdamW instead, which may need another learning rate")
    for name in _OTHER_LOSSES:
        if settings.flag(name):
            draft.change(name, "the cross-entropy of the next token instead")
    trainer.precision(draft)
    _checkpointing(draft)
    trainer.remote_code(draft)
    trainer.sharding(draft, devices)
    trainer.evaluation(draft, holds_out)
    trainer.patience(draft, "early_stopping_steps")
    trainer.saving(draft)
    trainer.trackers(draft)
    trainer.streaming(draft, ["streaming"] if settings.flag("streaming") else [])
    own = settings.text("flash_attn")
    if own is not None:
        draft.fulfilled("model.attention: auto, documents one at a time", "flash_attn")
    adapting.tokens(draft, "add_tokens", "add_special_tokens", "new_special_tokens")
    _listed_tokens(draft, places)
    if settings.flag("resize_vocab"):
        draft.fulfilled("rows for new tokens come with model.add_tokens", "resize_vocab")
    trainer.copy_the_rest(draft, frozenset(METHODS[draft.values["method.kind"]].model_fields))


def _listed_tokens(draft: Draft, places: Places) -> None:
    """New tokens that a file lists, each with what it means."""
    name = "new_special_tokens_config"
    text = draft.settings.text(name)
    if text is None:
        return
    file = next((folder / text for folder in places.folders if (folder / text).is_file()), None)
    if file is None:
        draft.change(name, f"{text} is not there; model.add_tokens takes the tokens that it lists")
        return
    own = draft.values.get("model.add_tokens")
    before = own if isinstance(own, list) else []
    listed = [str(token) for token in read_foreign_file(file)]
    draft.put("model.add_tokens", list(dict.fromkeys([*before, *listed])), name)


def _method(draft: Draft) -> str:
    settings = draft.settings
    trains = settings.flag("do_train")
    if not trains:
        for name, what in _OTHER_WORK.items():
            if settings.value(name) is not None:
                raise InputError(f"{settings.where}: {name}: this file {what}")
        if trains is False or settings.flag("do_predict") or settings.flag("do_eval"):
            raise InputError(f"{settings.where}: do_train is not set: this file trains nothing")
    stage = (settings.text("stage") or "sft").lower()
    if stage not in _STAGES:
        hint = "finray has no PPO; grpo and rloo learn from rewards" if stage == "ppo" else (
            f"finray has no such stage; those it imports are {', '.join(_STAGES)}"
        )  # fmt: skip
        raise draft.refusal("stage", hint)
    kind = _STAGES[stage]
    name = "pref_loss" if settings.value("pref_loss") is not None else "dpo_loss"
    loss = (settings.text(name) or "sigmoid").lower()
    if kind == "dpo" and loss in ("orpo", "simpo"):
        kind = loss
    draft.put("method.kind", kind, "stage", *([name] if kind == loss else []))
    draft.fulfilled("finray train", "do_train")
    if kind == "dpo" and settings.value(name) is not None:
        if loss == "kto_pair":
            draft.change(name, "kto_pair: sigmoid instead")
        else:
            draft.put("method.losses", {loss: 1.0}, name)
    return kind


def _trained(draft: Draft, places: Places) -> bool:
    """What is trained; True if it is an adapter."""
    settings = draft.settings
    kind = (settings.text("finetuning_type") or "lora").lower()
    if kind == "full":
        draft.fulfilled("no adapter: the model's own weights", "finetuning_type")
        return False
    if kind == "freeze":
        _frozen(draft)
        return False
    draft.put("adapter.kind", "lora", "finetuning_type")
    if kind != "lora":
        draft.change("finetuning_type", f"{kind}: LoRA instead")
    is_new = settings.flag("create_new_adapter")
    if not is_new and adapting.existing_adapter(draft, "adapter_name_or_path", places):
        for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target"):
            if settings.value(name) is not None:
                draft.leave(name, "comes with the adapter that is trained on")
        return True
    rank = settings.whole("lora_rank") or 8
    alpha = settings.number("lora_alpha")
    note = "" if settings.value("lora_rank") else "LLaMA-Factory's default"
    draft.put("adapter.rank", rank, "lora_rank", note=note)
    note = "2 x lora_rank, LLaMA-Factory's default" if alpha is None else ""
    value = 2 * rank if alpha is None else alpha
    draft.put(
        "adapter.alpha", int(value) if value == int(value) else value, "lora_alpha", note=note
    )
    adapting.targets(draft, "lora_target", settings.texts("lora_target") or ["all"])
    if saved := settings.texts("additional_target"):
        draft.put("adapter.modules_to_save", saved, "additional_target")
    if settings.flag("pissa_init"):
        draft.put("adapter.init", "pissa", "pissa_init")
    return True


def _frozen(draft: Draft) -> None:
    settings = draft.settings
    layers = settings.whole("freeze_trainable_layers")
    count = 2 if layers is None else abs(layers)
    draft.put("freeze.last_layers", max(1, count), "finetuning_type", "freeze_trainable_layers")
    if layers is not None and layers < 0:
        draft.change("freeze_trainable_layers", f"the last {count} layers instead of the first")
    if settings.flag("use_llama_pro"):
        draft.change("use_llama_pro", "the last layers, instead of layers spread over the model")
    modules = settings.texts("freeze_trainable_modules")
    if modules and modules != ["all"]:
        draft.change("freeze_trainable_modules", "whole layers; freeze.train takes expressions")
    elif modules:
        draft.fulfilled("whole layers", "freeze_trainable_modules")
    if extra := settings.texts("freeze_extra_modules"):
        draft.put("freeze.train", extra, "freeze_extra_modules")


def _quantised(draft: Draft, adapts: bool) -> None:
    bits = draft.settings.whole("quantization_bit")
    if bits is None:
        return
    kind = "int8" if bits == 8 else "nf4"
    adapting.quantise(draft, kind, "quantization_bit", adapts)
    if bits not in (4, 8):
        draft.change("quantization_bit", f"{bits} bits: nf4, 4 bits, instead")
    method = (draft.settings.text("quantization_method") or "bnb").lower()
    if method not in ("bnb", "bitsandbytes"):
        draft.change("quantization_method", f"{method}: bitsandbytes instead")


def _of_method(draft: Draft, kind: str, places: Places) -> None:
    settings = draft.settings
    olds = ("pref_beta", "dpo_beta", "orpo_beta", "kto_beta")
    name = next((name for name in olds if settings.value(name) is not None), None)
    beta = settings.number(name) if name else None
    if kind in ("dpo", "kto", "orpo", "simpo"):
        note = "" if name else "LLaMA-Factory's default"
        draft.put("method.beta", beta or 0.1, *([name] if name else []), note=note)
    if kind == "simpo":
        draft.put("method.gamma", settings.number("simpo_gamma") or 0.5, "simpo_gamma")
    ftx = next((n for n in ("pref_ftx", "dpo_ftx") if settings.number(n)), None)
    if kind == "dpo" and ftx is not None:
        losses = {**draft.values.get("method.losses", {"sigmoid": 1.0})}
        draft.put("method.losses", {**losses, "sft": settings.number(ftx)}, ftx)
    if kind == "dpo" and (smoothing := settings.number("dpo_label_smoothing")):
        draft.put("method.label_smoothing", smoothing, "dpo_label_smoothing")
    if kind == "kto":
        for own, theirs in (("desirable", "chosen"), ("undesirable", "rejected")):
            if weight := settings.number(f"kto_{theirs}_weight"):
                draft.put(f"method.{own}_weight", weight, f"kto_{theirs}_weight")
    reference = settings.text("ref_model")
    if reference and kind in ("dpo", "kto"):
        draft.put("method.reference_model", places.model(reference), "ref_model")
    if settings.flag("train_from_scratch") and kind == "pretrain":
        draft.put("method.init", "random", "train_from_scratch")


def _data(draft: Draft, kind: str, places: Places, info: Path | None) -> bool:
    settings = draft.settings
    names = settings.texts("dataset")
    if not names:
        raise draft.refusal("dataset", "a recipe needs rows to learn from; name them")
    file = info or _info_file(draft, places)
    limit = settings.whole("max_samples")
    draft.put(
        "data.train", [_source(draft, name, file, limit, places) for name in names], "dataset"
    )
    if limit:
        draft.fulfilled(f"limit: {limit} of each source", "max_samples")
    held_out = settings.texts("eval_dataset")
    if held_out:
        sources = [_source(draft, name, file, limit, places) for name in held_out]
        draft.put("data.eval", sources, "eval_dataset")
    holds_out = holdout(draft, "val_size", bool(held_out))
    length = settings.whole("cutoff_len")
    note = "" if length else "LLaMA-Factory's default"
    draft.put("data.max_length", max(8, length or 2048), "cutoff_len", note=note)
    if kind != "pretrain":
        draft.put("data.overlong", "truncate", note="LLaMA-Factory cuts at cutoff_len")
    if kind in ("sft", "pretrain"):
        _packing(draft, kind)
    if kind == "sft":
        _loss(draft)
    template(draft)
    return holds_out


def _info_file(draft: Draft, places: Places) -> Path | None:
    """dataset_info.json: in dataset_dir, or beside the configuration."""
    folder = draft.settings.text("dataset_dir") or "data"
    if folder == _ONLINE:
        draft.fulfilled("data.train: data sets of the hub", "dataset_dir")
        return None
    candidates = [base / folder / _FILE for base in places.folders]
    candidates += [base / _FILE for base in places.folders]
    registry = next((file for file in candidates if file.is_file()), None)
    if registry is None:
        where = f"dataset_dir: {folder}" if draft.settings.value("dataset_dir") else f"{folder}/"
        draft.notes.append(
            f"{_FILE} is not there ({where}): it says what the names of dataset mean; give it with "
            "--dataset-info, or write paths into data.train"
        )
    return registry


def _source(
    draft: Draft, name: str, file: Path | None, limit: int | None, places: Places
) -> dict[str, Any]:
    more = {"limit": limit} if limit else {}
    if file is None:
        folder = draft.settings.text("dataset_dir") or "data"
        if folder.startswith("REMOTE:"):
            draft.leave("dataset_dir", "where dataset_info.json is on the hub; finray reads a file")
            return {"dataset": name, **more}
        if places.is_local(name):
            return {"path": places.path(name), **more}
        if folder == _ONLINE:
            return {"dataset": name, **more}
        return {"dataset": name, "dataset_info": f"{folder.rstrip('/')}/{_FILE}", **more}
    written = os.path.relpath(file, places.target)
    _check_entry(draft, name, file)
    draft.fulfilled(f"dataset_info: {written}", "dataset_dir")
    return {"dataset": name, "dataset_info": written, **more}


def _check_entry(draft: Draft, name: str, file: Path) -> None:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read: {error}; give LLaMA-Factory's {_FILE}") from None
    entry = entries.get(name) if isinstance(entries, dict) else None
    if not isinstance(entry, dict):
        draft.notes.append(f"{name}: {file} has no such data set; correct data.train")
        return
    columns = entry.get("columns")
    named = columns if isinstance(columns, dict) else {}
    if any(named.get(kind) for kind in ("images", "videos", "audios")):
        draft.notes.append(f"{name}: rows with images, videos or sounds are refused, not trained")


def _packing(draft: Draft, kind: str) -> None:
    settings = draft.settings
    packs = settings.flag("packing")
    neat = settings.flag("neat_packing")
    if packs or neat or (kind == "pretrain" and packs is None):
        draft.put("data.packing", "auto", "packing", "neat_packing", note="documents kept apart")
        if packs and not neat:
            draft.change(
                "packing",
                "data.packing: auto, whose documents do not see each other; LLaMA-Factory's "
                "packing mixes them (its neat_packing does not)",
            )
    else:
        draft.put(
            "data.packing", False, "packing", "neat_packing",
            note="a row a sequence, as in LLaMA-Factory",
        )  # fmt: skip


def _loss(draft: Draft) -> None:
    settings = draft.settings
    if settings.flag("train_on_prompt"):
        draft.put("method.train_on", "all", "train_on_prompt")
    elif settings.flag("mask_history"):
        draft.put("method.train_on", "last", "mask_history")


def template(draft: Draft) -> None:
    """The chat template, by its name: mostly the model's own."""
    settings = draft.settings
    name = (settings.text("template") or "").lower()
    if name in ("chatml", "chatml_de"):
        adapting.chatml(draft, "template")
    elif name in _TEMPLATES:
        draft.put("data.chat_template", _TEMPLATES[name], "template", note="LLaMA-Factory's")
    elif name:
        adapting.own_template(draft, "template", name)
    if (system := settings.text("default_system") or _SYSTEMS.get(name)) is not None:
        for source in draft.values["data.train"]:
            source["system"] = system
        draft.fulfilled("data.train.0.system", "default_system")
    if settings.value("enable_thinking") is not None:
        draft.change("enable_thinking", "reasoning is trained where the rows have some")


def _checkpointing(draft: Draft) -> None:
    if draft.settings.flag("disable_gradient_checkpointing"):
        draft.put("model.gradient_checkpointing", False, "disable_gradient_checkpointing")
    else:
        trainer.checkpointing(draft)
