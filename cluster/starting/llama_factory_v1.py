"""A configuration of LLaMA-Factory's version 1 (USE_V1) as a recipe."""

from typing import Any

from ...training.common.errors import InputError
from ...training.config.yaml_file import read_foreign_file
from . import adapting, llama_factory, trainer
from .draft import Draft, ForeignSettings
from .places import Places
from .trainer import Defaults, Devices

_DEFAULTS = Defaults("LLaMA-Factory v1", 1e-4, 3.0, 1, "constant")
_FREEZE = ("name", "freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")
_LORA = (
    *("name", "adapter_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules"),
    *("modules_to_save", "use_dora", "use_rslora"),
)
_QUANTISATION = ("name", "quantization_bit")
_DATASET = ("path", "converter", "split", "size", "weight", "streaming", "source")
_VERBS = {None: "sft", "sft": "sft", "dpo": "dpo", "rm": "reward", "reward": "reward"}
_CONVERTERS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "pair": "preference"}


def convert(draft: Draft, devices: Devices, places: Places, verb: str | None) -> None:
    """Fill the draft.

    Args:
        draft: the draft.
        devices: the GPUs.
        places: where paths start.
        verb: the trainer that the command line names, sft if it is None.

    Raises:
        InputError: it trains in a way that finray does not have.
    """
    settings = draft.settings
    if verb not in _VERBS:
        raise InputError(f"{settings.where}: {verb}: finray imports sft, dpo and rm")
    kind = _VERBS[verb]
    draft.put("method.kind", kind)
    base = settings.text("model") or "Qwen/Qwen3-4B-Instruct-2507"
    draft.put("model.base", places.model(base), "model")
    trainer.run_name(draft, ("output_dir",), f"{base.rpartition('/')[2]}-{kind}")
    adapts = _adapted(draft, places)
    quantised = _plugin(draft, "quant_config")
    if quantised.values:
        bits = quantised.whole("quantization_bit") or 4
        adapting.quantise(draft, "int8" if bits == 8 else "nf4", "quant_config", adapts)
        draft.name_others("quant_config", quantised, _QUANTISATION)
    draft.put("data.train", _sources(draft, "train_dataset", "data.train", places), "train_dataset")
    if settings.value("eval_dataset") is not None:
        draft.put("data.eval", _sources(draft, "eval_dataset", "data.eval", places), "eval_dataset")
    length = settings.whole("cutoff_len")
    note = "" if length else "LLaMA-Factory's default"
    draft.put("data.max_length", max(8, length or 2048), "cutoff_len", note=note)
    draft.put("data.overlong", "truncate", note="LLaMA-Factory cuts at cutoff_len")
    if kind == "sft":
        draft.put("data.packing", False, note="a row a sequence, as in LLaMA-Factory")
    llama_factory.template(draft)
    _steps(draft, devices)
    trainer.precision(draft)
    _memory(draft, devices)
    trainer.remote_code(draft)
    trainer.streaming(draft, draft.streams)
    trainer.saving(draft)
    if settings.value("flash_attn") is not None:
        draft.fulfilled("model.attention: auto, documents one at a time", "flash_attn")
    trainer.copy_the_rest(draft, frozenset())


def _plugin(draft: Draft, name: str) -> ForeignSettings:
    """The settings of a plugin; none of one that is not set."""
    return draft.settings.inside(name, draft.settings.value(name) or {})


def _adapted(draft: Draft, places: Places) -> bool:
    """The adapter, or the layers that are trained; True for an adapter."""
    peft = _plugin(draft, "peft_config")
    kind = peft.text("name")
    if kind == "freeze":
        count = peft.whole("freeze_trainable_layers")
        draft.put("freeze.last_layers", max(1, abs(2 if count is None else count)), "peft_config")
        if count is not None and count < 0:
            draft.change(
                "peft_config.freeze_trainable_layers",
                f"the last {-count} layers instead of the first",
            )
        if peft.texts("freeze_trainable_modules") not in ([], ["all"]):
            draft.change(
                "peft_config.freeze_trainable_modules",
                "whole layers; freeze.train takes expressions",
            )
        if extra := peft.texts("freeze_extra_modules"):
            draft.put("freeze.train", extra, "peft_config")
        draft.name_others("peft_config", peft, _FREEZE)
        return False
    if kind is None:
        return False
    if kind != "lora":
        raise draft.refusal("peft_config", f"{kind}: finray has LoRA, and trains the last layers")
    draft.name_others("peft_config", peft, _LORA)
    if existing := peft.texts("adapter_name_or_path"):
        draft.put("model.adapter", places.model(existing[0]), "peft_config")
        for name in _LORA[2:]:
            if peft.value(name) is not None:
                draft.leave(f"peft_config.{name}", "comes with the adapter that is trained on")
        return True
    draft.put("adapter.kind", "lora", "peft_config")
    draft.put("adapter.rank", peft.whole("r", 1) or 8, "peft_config")
    draft.put("adapter.alpha", peft.number("lora_alpha") or 16, "peft_config")
    dropout = peft.number("lora_dropout")
    draft.put("adapter.dropout", 0.05 if dropout is None else dropout, "peft_config")
    adapting.targets(draft, "peft_config", peft.texts("target_modules") or ["all"])
    if saved := peft.texts("modules_to_save"):
        draft.put("adapter.modules_to_save", saved, "peft_config")
    for name, own in (("use_dora", "dora"), ("use_rslora", "rslora")):
        if peft.flag(name):
            draft.put(f"adapter.{own}", True, "peft_config")
    return True


def _sources(draft: Draft, name: str, own: str, places: Places) -> list[dict[str, Any]]:
    """The data sets of a file that lists them, or a data set alone."""
    text = draft.settings.text(name)
    if text is None:
        raise draft.refusal(name, "a recipe needs rows to learn from; name them")
    if not text.endswith((".yaml", ".yml")):
        return places.source(text, [])
    file = next((folder / text for folder in places.folders if (folder / text).is_file()), None)
    if file is None:
        draft.notes.append(f"{text} is not there: it lists the data sets; write them into {own}")
        return [{"path": text}]
    listed = read_foreign_file(file)
    whole = ForeignSettings(listed, str(file))
    return [_source(draft, f"{name}.{k}", whole.inside(k, v), places) for k, v in listed.items()]


def _source(draft: Draft, where: str, entry: ForeignSettings, places: Places) -> dict[str, Any]:
    [source] = places.source(entry.text("path") or "", [])
    if (converter := entry.text("converter")) in _CONVERTERS:
        source["format"] = _CONVERTERS[str(converter)]
    elif converter is not None:
        draft.change(
            f"{where}.converter",
            f"{converter}: finray looks at the rows; map of the source does it",
        )
    if entry.flag("streaming"):
        draft.streams.append(f"{where}.streaming")
    if entry.text("source") == "ms_hub":
        draft.change(f"{where}.source", "ms_hub: a data set of this name on the hub, or a path")
    draft.name_others(where, entry, _DATASET)
    if (split := entry.text("split")) not in (None, "train"):
        source["split"] = split
    if (size := entry.whole("size", 1)) is not None:
        source["limit"] = size
    if (weight := entry.number("weight")) is not None and weight > 0:
        source["weight"] = weight
    return source


def _steps(draft: Draft, devices: Devices) -> None:
    """Batch, duration and rate; global_batch_size counts all GPUs already."""
    settings = draft.settings
    spread = _plugin(draft, "dist_config")
    share = spread.whole("cp_size", 1) or 1
    devices = trainer.without_split_sequences(draft, devices, share)
    trainer.batch(draft, devices, _DEFAULTS, "micro_batch_size")
    if (whole := settings.whole("global_batch_size", 1)) is not None:
        draft.put("optim.batch_size", max(whole, devices.count), "global_batch_size")
        least = min(int(draft.values["optim.micro_batch_size"]), whole)
        draft.put("optim.micro_batch_size", least, "micro_batch_size")
    trainer.duration(draft, _DEFAULTS, "num_train_epochs")
    trainer.rate(draft, _DEFAULTS)
    trainer.schedule(draft, _DEFAULTS, "")
    for name, text in (
        ("optim_config", "AdamW instead, which may need another learning rate"),
        ("lr_scheduler_config", "optim.schedule: constant; finray also has cosine and linear"),
    ):
        if (kind := _plugin(draft, name).text("name")) is not None:
            draft.change(name, f"{kind}: {text}")


def _memory(draft: Draft, devices: Devices) -> None:
    settings = draft.settings
    if (recomputes := settings.flag("enable_activation_checkpointing")) is not None:
        draft.put("model.gradient_checkpointing", recomputes, "enable_activation_checkpointing")
    if settings.value("dist_config") is None:
        return
    if devices.count < 2:
        draft.change("dist_config", "one GPU has no other to share the weights with; see --gpus")
    elif draft.values.get("model.quantize") == "int8":
        draft.change("dist_config", "scale.strategy: auto; int8 weights are not sharded")
    else:
        draft.put("scale.strategy", "fsdp", "dist_config")
