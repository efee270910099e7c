"""An Axolotl configuration as a recipe."""

import json
import re

from ...training.config.methods import METHODS
from . import adapting, trainer
from .alpaca import write_template, writes_texts
from .axolotl_rows import Rows, read_rows
from .draft import NO_MODEL, Draft
from .places import Places
from .rewards import online
from .trainer import Defaults, Devices

_DEFAULTS = Defaults("Axolotl", 2e-4, 1.0, 1, "cosine", warmup=0.03)
_KINDS = {
    "dpo": "dpo",
    "ipo": "dpo",
    "kto": "kto",
    "orpo": "orpo",
    "simpo": "simpo",
    "cpo": "cpo",
    "grpo": "grpo",
    "gdpo": "grpo",
}
_ADAPTER = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_linear", "lora_target_modules"),
    *("lora_target_parameters", "lora_modules_to_save", "peft_init_lora_weights"),
    *("peft_use_dora", "peft_use_rslora", "lora_rank_pattern", "lora_alpha_pattern", "peft"),
    "loraplus_lr_ratio",
)
_PLUGINS = {
    "spectrum": "all weights are trained; freeze.train selects those of some layers",
    "grokfast": "gradients are not filtered",
    "mora": "LoRA instead of MoRA",
    "mixlora": "LoRA instead of MixLoRA",
    "densemixer": "the router learns nothing; finray leaves it as it is",
    "llm_compressor": "weights are neither sparse nor compressed",
    "lm_eval": "finray eval measures the result",
    "swanlab": "finray does not send to SwanLab; log.to says where metrics go",
}
"""What finray does instead of a plugin, by its package."""
_PLAIN_FORMATS = ("{prompt}", "{chosen}", "{rejected}", "{completion}")
_ROWS_OF_A_WEIGHT = re.compile(r"\s*\[\d*:\d*\]\Z")
"""The part of a weight that is trained, behind the expression for its name."""
_OWN_TEMPLATES = re.compile(r"tokenizer_default.*|jinja")


def convert(draft: Draft, devices: Devices, places: Places) -> None:
    """Fill the draft.

    Raises:
        InputError: the configuration trains in a way that finray does not have.
    """
    settings = draft.settings
    kind = _method(draft)
    base = settings.text("base_model") or settings.text("base_model_config") or NO_MODEL
    draft.put("model.base", places.model(base), "base_model")
    names = ("wandb_name", "output_dir", "hub_model_id")
    trainer.run_name(draft, names, f"{base.rpartition('/')[2]}-{kind}")
    adapts = _adapter(draft, places)
    holds_out = _data(draft, kind, places)
    if settings.flag("reinit_weights"):
        _fresh_weights(draft)
    _of_method(draft, kind, places)
    workers = settings.whole("ray_num_workers", 1) if settings.flag("use_ray") else None
    if workers:
        devices = Devices(workers, f"ray_num_workers: {workers}")
        draft.fulfilled(f"scale.workers: {workers}", "ray_num_workers", "use_ray")
    generations = int(draft.values.get("method.generations", 1)) if kind == "grpo" else 1
    devices = trainer.without_split_sequences(draft, devices, _gpus_of_a_sequence(draft))
    trainer.batch(draft, devices, _DEFAULTS, "micro_batch_size", generations)
    trainer.duration(draft, _DEFAULTS, "num_epochs")
    trainer.rate(draft, _DEFAULTS)
    trainer.schedule(draft, _DEFAULTS, "lr_scheduler")
    trainer.optimizer(draft, "optimizer")
    trainer.precision(draft, "torch_dtype")
    trainer.checkpointing(draft)
    trainer.remote_code(draft)
    trainer.sharding(draft, devices)
    trainer.evaluation(draft, holds_out)
    trainer.patience(draft, "early_stopping_patience")
    trainer.saving(draft, int(draft.values.get("method.passes", 1)))
    for name in ("flash_attention", "sdp_attention", "xformers_attention", "flex_attention"):
        draft.fulfilled("model.attention: auto, documents one at a time", name)
    if settings.flag("eager_attention"):
        draft.put("model.attention", "eager", "eager_attention")
    adapting.attention(draft, "attn_implementation")
    _trackers(draft)
    if not adapts:
        why = "an adapter's; the configuration trains the model's own weights"
        trainer.leave_present(draft, _ADAPTER, why)
    _special_tokens(draft)
    _plugins(draft)
    streams = settings.flag("streaming")
    is_streamed = settings.value("pretraining_dataset") and streams is not False
    asked = {"streaming": streams, "pretraining_dataset": is_streamed}
    trainer.streaming(draft, [name for name, is_asked in asked.items() if is_asked])
    trainer.copy_the_rest(draft, frozenset(METHODS[draft.values["method.kind"]].model_fields))


def _gpus_of_a_sequence(draft: Draft) -> int:
    """GPUs that compute one sequence together, and so count once in a batch."""
    settings = draft.settings
    nested = settings.value("context_parallel")
    inner = settings.inside("context_parallel", nested).whole("size", 1) if nested else None
    names = ("context_parallel_size", "sequence_parallel_degree")
    context = next((size for name in names if (size := settings.whole(name, 1))), inner or 1)
    return context * (settings.whole("tensor_parallel_size", 1) or 1)


def _fresh_weights(draft: Draft) -> None:
    if draft.values["method.kind"] == "pretrain":
        draft.put("method.init", "random", "reinit_weights")
    else:
        draft.change("reinit_weights", "the base's weights; only pretrain starts from random ones")


def _plugins(draft: Draft) -> None:
    packages = {part for name in draft.settings.texts("plugins") for part in name.split(".")}
    if ignored := sorted(packages & _PLUGINS.keys()):
        draft.change("plugins", "; ".join(f"{name}: {_PLUGINS[name]}" for name in ignored))


def _trackers(draft: Draft) -> None:
    settings = draft.settings
    names = {name: f"use_{name}" for name in ("tensorboard", "wandb", "mlflow", "trackio")}
    asked = {item: name for item, name in names.items() if settings.flag(name)}
    if settings.text("wandb_project") and settings.flag("use_wandb") is not False:
        asked = {**asked, "wandb": "wandb_project"}
        if settings.flag("use_wandb"):
            draft.fulfilled("log.to", "use_wandb")
    trainer.track(draft, asked)


def _method(draft: Draft) -> str:
    """The kind of finray's method; sft until the rows say that it is pretraining."""
    settings = draft.settings
    rl = settings.text("rl")
    if settings.flag("reward_model"):
        draft.put("method.kind", "reward", "reward_model")
        return "reward"
    if rl is None:
        draft.put("method.kind", "sft")
        return "sft"
    if rl.lower() not in _KINDS:
        raise draft.refusal(
            "rl", f"finray has no such method; those it imports are {', '.join(_KINDS)}"
        )
    kind = _KINDS[rl.lower()]
    draft.put("method.kind", kind, "rl")
    if rl.lower() == "ipo":
        draft.put("method.losses", {"ipo": 1.0}, "rl")
    if rl.lower() == "gdpo":
        draft.change("rl", "gdpo: grpo, which normalises the sum of the rewards")
    return kind


def _adapter(draft: Draft, places: Places) -> bool:
    """The adapter and the base under it; True if there is one."""
    settings = draft.settings
    kind = (settings.text("adapter") or "").lower()
    adapts = kind in ("lora", "qlora", "oft", "ia3", "llama-adapter", "dora")
    if adapts:
        _lora(draft, kind, places)
    for name, bits in (("load_in_4bit", "nf4"), ("load_in_8bit", "int8")):
        if settings.flag(name) and "model.quantize" not in draft.values:
            adapting.quantise(draft, bits, name, adapts)
    if kind == "qlora" and "model.quantize" not in draft.values:
        draft.put("model.quantize", "nf4", "adapter")
    named = settings.texts("unfrozen_parameters")
    unfrozen = list(dict.fromkeys(_ROWS_OF_A_WEIGHT.sub("", text) for text in named))
    if unfrozen and not adapts:
        draft.put("freeze.train", unfrozen, "unfrozen_parameters")
        if any(map(_ROWS_OF_A_WEIGHT.search, named)):
            draft.change("unfrozen_parameters", "whole weights; finray trains no part of one")
    elif unfrozen:
        draft.fulfilled("the base is frozen beside an adapter", "unfrozen_parameters")
    return adapts


def _lora(draft: Draft, kind: str, places: Places) -> None:
    settings = draft.settings
    draft.put("adapter.kind", "lora", "adapter")
    if kind not in ("lora", "qlora"):
        draft.change("adapter", f"{kind}: LoRA instead")
    if adapting.existing_adapter(draft, "lora_model_dir", places):
        trainer.leave_present(draft, _ADAPTER, "comes with the adapter that is trained on")
        return
    named = settings.texts("lora_target_modules")
    if settings.flag("lora_target_linear"):
        draft.put("adapter.targets", "all-linear", "lora_target_linear")
        if named:
            draft.fulfilled("among all linear layers", "lora_target_modules")
    elif named:
        adapting.targets(draft, "lora_target_modules", named)
    parameters = settings.texts("lora_target_parameters")
    if parameters and isinstance(draft.values.get("adapter.targets"), list):
        draft.put(
            "adapter.targets", [*draft.values["adapter.targets"], *parameters],
            "lora_target_parameters",
        )  # fmt: skip
    elif parameters:
        draft.fulfilled("all-linear reaches experts", "lora_target_parameters")
    if (saved := settings.texts("lora_modules_to_save")) != []:
        draft.put("adapter.modules_to_save", saved, "lora_modules_to_save")
    _first_values(draft)


def _first_values(draft: Draft) -> None:
    settings = draft.settings
    init = settings.value("peft_init_lora_weights")
    name = "default" if init in (None, True) else str(init).lower().partition("_")[0]
    if name in ("gaussian", "orthogonal", "pissa", "olora", "loftq"):
        draft.put("adapter.init", name, "peft_init_lora_weights")
    elif init is not None:
        draft.change("peft_init_lora_weights", f"{init}: PEFT's default values")
    peft = settings.value("peft")
    if isinstance(peft, dict) and peft.get("loftq_config"):
        draft.put("adapter.init", "loftq", "peft")
        draft.put("model.quantize", "nf4", "peft")
        draft.name_others("peft", settings.inside("peft", peft), ("loftq_config",))


def _data(draft: Draft, kind: str, places: Places) -> bool:
    """Sources, template, lengths; True if rows are held out."""
    settings = draft.settings
    rows = read_rows(draft, "datasets", kind, places)
    texts = read_rows(draft, "pretraining_dataset", kind, places)
    rows.sources += texts.sources
    rows.systems += texts.systems
    if texts.sources:
        rows.strategies |= texts.strategies or {"pretrain"}
    if not rows.sources:
        raise draft.refusal("datasets", "a recipe needs rows to learn from; name them")
    if kind == "sft" and rows.are_texts:
        kind = "pretrain"
        draft.put("method.kind", kind, note="the rows are plain text")
    draft.put("data.train", rows.sources, "datasets", "pretraining_dataset")
    held_out = read_rows(draft, "test_datasets", draft.values["method.kind"], places)
    if held_out.sources:
        draft.put("data.eval", held_out.sources, "test_datasets")
    holds_out = holdout(draft, "val_set_size", bool(held_out.sources))
    length = settings.whole("sequence_len")
    note = "" if length else "Axolotl's default"
    draft.put("data.max_length", max(8, length or 512), "sequence_len", note=note)
    if kind in ("sft", "pretrain"):
        _packing(draft)
        cuts = str(settings.text("excess_length_strategy")).lower()
        if kind == "sft":
            draft.put(
                "data.overlong", "truncate" if cuts == "truncate" else "drop",
                "excess_length_strategy",
            )  # fmt: skip
    _template(draft, rows, places)
    if settings.flag("train_on_inputs") and kind == "sft":
        draft.put("method.train_on", "all", "train_on_inputs")
    elif settings.flag("train_on_inputs"):
        draft.fulfilled("every token is trained", "train_on_inputs")
    elif rows.trains and kind == "sft":
        draft.put("method.train_on", rows.trains)
        tokens = "every token" if rows.trains == "all" else "the last turn of the assistant"
        draft.change("datasets.0.roles_to_train", f"method.train_on: {rows.trains}, {tokens}")
    stages = ["deduplicate"] if settings.flag("dataset_exact_deduplication") else []
    if stages:
        draft.put("data.curate", stages, "dataset_exact_deduplication")
    draft.fulfilled("empty rows are refused", "min_sample_len")
    return holds_out


def holdout(draft: Draft, name: str, has_sources: bool) -> bool:
    """The share of the rows that is held out; True if there are held-out rows."""
    share = draft.settings.number(name)
    if not share:
        if share is not None:
            draft.fulfilled("no training rows are held out, as by default", name)
        return has_sources
    if has_sources:
        draft.leave(name, "a share of the training rows; the evaluation data comes before it")
    elif share < 1:
        draft.put("data.holdout", share, name)
    else:
        draft.put("data.holdout", 0.02)
        draft.change(name, f"{share:g} rows; finray takes a share of the rows: 0.02 is written")
    return True


def _packing(draft: Draft) -> None:
    settings = draft.settings
    packs = settings.flag("sample_packing")
    is_text = draft.values["method.kind"] == "pretrain"
    if packs or (is_text and packs is None):
        draft.put("data.packing", "auto", "sample_packing", note="documents are kept apart")
    else:
        draft.put("data.packing", False, "sample_packing", note="a row a sequence, as in Axolotl")


def _template(draft: Draft, rows: Rows, places: Places) -> None:
    settings = draft.settings
    named = settings.text("chat_template")
    jinja = settings.text("chat_template_jinja")
    names = {*rows.templates, *([named] if named else [])}
    texts = [text for text in (jinja, *rows.templates) if text and "{" in text]
    if draft.values["method.kind"] == "sft" and writes_texts(rows):
        write_template(draft, rows)
        why = "no matter of strategies that write the text of a row themselves"
        trainer.leave_present(draft, ("chat_template", "chat_template_jinja"), why)
    elif texts:
        draft.put("data.chat_template", texts[0], "chat_template_jinja", "chat_template")
    elif "chatml" in names:
        adapting.chatml(draft, "chat_template")
    elif jinja is not None:
        file = places.path(jinja)
        draft.put("data.chat_template", file, "chat_template_jinja", "chat_template")
    elif named is not None:
        _named_template(draft, named)
    elif names and not all(map(_OWN_TEMPLATES.fullmatch, names)):
        listed = ", ".join(sorted(names))
        draft.notes.append(
            f"chat template {listed}: the model's own is used; data.chat_template takes another"
        )
    elif any(text.strip() not in _PLAIN_FORMATS for text in rows.formats):
        listed = ", ".join(map(json.dumps, dict.fromkeys(rows.formats)))
        draft.notes.append(f"prompt formats {listed}: the chat template, or map of the source")
    _name_unwritten(draft, rows)
    _system(draft)


def _name_unwritten(draft: Draft, rows: Rows) -> None:
    """Say of texts that strategies of some data sets write that one chat template renders all."""
    written = ", ".join(sorted(rows.styles - {""}))
    if draft.values["method.kind"] == "sft" and written and not writes_texts(rows):
        draft.notes.append(
            f"styles of prompts {written}: other data sets have none, and one chat template "
            "renders all rows; data.chat_template takes another"
        )


def _named_template(draft: Draft, name: str) -> None:
    if _OWN_TEMPLATES.fullmatch(name):
        draft.fulfilled("the model's own chat template", "chat_template")
    else:
        adapting.own_template(draft, "chat_template", name)


def _system(draft: Draft) -> None:
    text = draft.settings.text("default_system_message")
    if text is None:
        return
    for source in draft.values["data.train"]:
        source.setdefault("system", text)
    draft.fulfilled("data.train.0.system", "default_system_message")


def _special_tokens(draft: Draft) -> None:
    """Tokens with rows of their own; padding needs none, and the tokenizer has the others."""
    settings = draft.settings
    is_old = isinstance(settings.value("tokens"), dict)  # its first name for special_tokens
    adapting.tokens(draft, *([] if is_old else ["tokens"]), "added_tokens_overrides")
    for name in ("special_tokens", "tokens"):
        special = settings.value(name)
        if not isinstance(special, dict):
            continue
        more = special.get("additional_special_tokens")
        if isinstance(more, list) and more and "method.reference_model" not in draft.values:
            own = draft.values.get("model.add_tokens")
            before = own if isinstance(own, list) else []
            draft.put("model.add_tokens", list(dict.fromkeys([*before, *map(str, more)])))
        listed = ", ".join(f"{token} {value}" for token, value in special.items() if value)
        draft.change(
            name,
            f"{listed}: finray pads nothing, and takes the tokenizer's own; an answer ends with "
            "what the chat template writes",
        )
    if settings.value("eot_tokens") is not None:
        draft.fulfilled("an answer ends with what the chat template writes", "eot_tokens")


def _of_method(draft: Draft, kind: str, places: Places) -> None:
    settings = draft.settings
    if kind in ("dpo", "kto", "orpo", "simpo", "cpo"):
        _beta(draft, kind)
    if kind == "simpo":
        draft.put("method.gamma", settings.number("simpo_gamma") or 0.5, "simpo_gamma")
    if kind in ("simpo", "cpo"):
        weight = settings.number("cpo_alpha")
        note = "TRL's default" if weight is None else ""
        value = 1.0 if weight is None else weight
        draft.put("method.sft_weight", value, "cpo_alpha", note=note)
    if kind == "dpo":
        _dpo(draft)
    if kind == "reward" and (weight := settings.number("center_rewards_coefficient")):
        draft.put("method.center_coefficient", weight, "center_rewards_coefficient")
    if kind == "grpo":
        online(draft, places, "trl", settings.value("trl") or {})
        whole = int(draft.values["data.max_length"])
        most = int(draft.values["method.max_completion"])
        draft.put("data.max_length", whole + most, note="prompt (sequence_len) and completion")


def _beta(draft: Draft, kind: str) -> None:
    """The distance from the reference; trl.beta comes first, as in Axolotl."""
    settings = draft.settings
    trl = settings.value("trl")
    inner = settings.inside("trl", trl).number("beta") if trl is not None else None
    if inner is not None:
        draft.fulfilled("method.beta", "trl")
    names = ("rl_beta", "dpo_beta", *(["orpo_alpha"] if kind == "orpo" else []))
    candidates = [inner, *(settings.number(name) for name in names)]
    value = next((number for number in candidates if number), None)
    if value is not None or kind == "simpo":  # finray's own default for simpo is larger
        note = "TRL's default" if value is None else ""
        draft.put("method.beta", value or 0.1, *names, note=note)


def _dpo(draft: Draft) -> None:
    settings = draft.settings
    weights = settings.numbers("dpo_loss_weights")
    if names := settings.texts("dpo_loss_type"):
        pairs = zip(names, [*weights, *[1.0] * len(names)], strict=False)
        draft.put("method.losses", dict(pairs), "dpo_loss_type", "dpo_loss_weights")
    if weight := settings.number("rpo_alpha"):
        losses = {**draft.values.get("method.losses", {"sigmoid": 1.0}), "sft": weight}
        draft.put("method.losses", losses, "rpo_alpha")
    if smoothing := settings.number("dpo_label_smoothing"):
        draft.put("method.label_smoothing", smoothing, "dpo_label_smoothing")
