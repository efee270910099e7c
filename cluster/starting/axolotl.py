"""An Axolotl configuration as a recipe."""

import json
import re

from ...training.config.methods import METHODS
from . import adapting, trainer
from .axolotl_rows import Rows, read_rows
from .draft import Draft
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
_ALPACA_TEMPLATE = """\
{% for message in messages %}{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}\
{% elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content + '\\n\\n' }}\
{% elif message.role == 'assistant' %}\
{{ '### Response:\\n' + message.content + eos_token }}\
{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""
_ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)
_ALPACA_LIKE = frozenset(
    "alpaca alpaca_instruct gpteacher oasst alpaca_w_system context_qa summarizetldr jeopardy "
    "orcamini alpaca_chat creative_acr user_defined".split()
)
_OWN_TEMPLATES = re.compile(r"tokenizer_default.*|jinja")


def convert(draft: Draft, devices: Devices, places: Places) -> None:
    """Fill the draft.

    Raises:
        InputError: the configuration trains in a way that finray does not have.
    """
    settings = draft.settings
    kind = _method(draft)
    base = settings.text("base_model") or settings.text("base_model_config") or "MODEL"
    draft.put("model.base", places.model(base), "base_model")
    names = ("wandb_name", "output_dir", "hub_model_id")
    trainer.run_name(draft, names, f"{base.rpartition('/')[2]}-{kind}")
    adapts = _adapter(draft, places)
    if draft.values.get("method.kind") == "pretrain" and settings.flag("reinit_weights"):
        draft.put("method.init", "random", "reinit_weights")
    holds_out = _data(draft, kind, places)
    _of_method(draft, kind, places)
    workers = settings.whole("ray_num_workers", 1) if settings.flag("use_ray") else None
    if workers:
        devices = Devices(workers, f"ray_num_workers: {workers}")
        draft.fulfilled(f"scale.workers: {workers}", "ray_num_workers", "use_ray")
    generations = int(draft.values.get("method.generations", 1)) if kind == "grpo" else 1
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
        for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_linear"):
            if settings.value(name) is not None:
                draft.leave(name, "an adapter's; the configuration trains the model's own weights")
    _special_tokens(draft)
    trainer.copy_the_rest(draft, frozenset(METHODS[draft.values["method.kind"]].model_fields))


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
    if settings.flag("process_reward_model"):
        raise draft.refusal("process_reward_model", "no method of finray rates single steps")
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
    unfrozen = [text.partition("[")[0].rstrip() for text in settings.texts("unfrozen_parameters")]
    if unfrozen and not adapts:
        draft.put("freeze.train", unfrozen, "unfrozen_parameters")
        if any("[" in text for text in settings.texts("unfrozen_parameters")):
            draft.change("unfrozen_parameters", "whole weights; finray trains no part of one")
    elif unfrozen:
        draft.fulfilled("the base is frozen beside an adapter", "unfrozen_parameters")
    return adapts


def _lora(draft: Draft, kind: str, places: Places) -> None:
    settings = draft.settings
    draft.put("adapter.kind", "lora", "adapter")
    if kind not in ("lora", "qlora"):
        draft.change("adapter", f"{kind}: LoRA in its place")
    if adapting.existing_adapter(draft, "lora_model_dir", places):
        for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_linear"):
            if settings.value(name) is not None:
                draft.leave(name, "comes with the adapter that is trained on")
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


def _data(draft: Draft, kind: str, places: Places) -> bool:
    """Sources, template, lengths; True if rows are held out."""
    settings = draft.settings
    rows = read_rows(draft, "datasets", kind, places)
    texts = read_rows(draft, "pretraining_dataset", kind, places)
    rows.sources += texts.sources
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
    elif rows.trains_all:
        draft.put("method.train_on", "all")
        draft.change("datasets.0.roles_to_train", "method.train_on: all, every token")
    stages = ["deduplicate"] if settings.flag("dataset_exact_deduplication") else []
    if stages:
        draft.put("data.curate", stages, "dataset_exact_deduplication")
    draft.fulfilled("empty rows are refused", "min_sample_len")
    return holds_out


def holdout(draft: Draft, name: str, has_sources: bool) -> bool:
    """The share of the rows that is held out; True if there are held-out rows."""
    share = draft.settings.number(name)
    if not share:
        return has_sources
    if has_sources:
        draft.leave(name, "a share of the training rows; the evaluation data comes before it")
    elif share < 1:
        draft.put("data.holdout", share, name)
    else:
        draft.put("data.holdout", 0.02)
        draft.change(name, f"{share:g} rows; finray takes a share of the rows: 0.02 stands there")
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
    if texts:
        draft.put("data.chat_template", texts[0], "chat_template_jinja", "chat_template")
    elif "chatml" in names:
        adapting.chatml(draft, "chat_template")
    elif jinja is not None:
        file = places.path(jinja)
        draft.put("data.chat_template", file, "chat_template_jinja", "chat_template")
    elif named is not None:
        draft.fulfilled("the model's own chat template", "chat_template")
    elif names and not all(map(_OWN_TEMPLATES.fullmatch, names)):
        listed = ", ".join(sorted(names))
        draft.notes.append(
            f"chat template {listed}: the model's own stands in its place; data.chat_template "
            "takes another"
        )
    elif draft.values["method.kind"] == "sft" and rows.strategies <= _ALPACA_LIKE:
        _alpaca_template(draft, rows)
    _system(draft)


def _alpaca_template(draft: Draft, rows: Rows) -> None:
    """The texts around instruction and answer that the strategy writes itself."""
    template, origin = _ALPACA_TEMPLATE, "Axolotl's strategy writes this text itself"
    if rows.formats:
        before, found, after = rows.formats[0].partition("{instruction}")
        if not found or "{" in before + after:
            draft.notes.append(
                f"datasets.0.type.format: {json.dumps(rows.formats[0])}: the model's own chat "
                "template stands in its place; data.chat_template takes another"
            )
            return
        template = (
            "{% for message in messages %}{% if message.role == 'user' %}{{ "
            f"{json.dumps(before)} + message.content + {json.dumps(after)} }}}}"
            "{% elif message.role == 'system' %}{{ message.content + '\\n' }}"
            "{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}"
        )
        origin = "datasets.0.type.format"
    elif rows.strategies <= {"alpaca", "gpteacher"}:
        for source in draft.values["data.train"]:
            source.setdefault("system", _ALPACA_SYSTEM)
    draft.put("data.chat_template", template, note=origin)


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
    adapting.tokens(draft, "tokens", "added_tokens_overrides")
    special = settings.value("special_tokens")
    if isinstance(special, dict):
        more = special.get("additional_special_tokens")
        if isinstance(more, list) and more and "method.reference_model" not in draft.values:
            own = draft.values.get("model.add_tokens")
            before = own if isinstance(own, list) else []
            draft.put("model.add_tokens", list(dict.fromkeys([*before, *map(str, more)])))
        listed = ", ".join(f"{name} {value}" for name, value in special.items() if value)
        draft.change(
            "special_tokens",
            f"{listed}: finray pads nothing, and takes the tokenizer's own; an answer ends with "
            "what the chat template writes",
        )
    if settings.value("eot_tokens") is not None:
        draft.fulfilled("an answer ends with what the chat template writes", "eot_tokens")


def _of_method(draft: Draft, kind: str, places: Places) -> None:
    settings = draft.settings
    beta = settings.number("rl_beta")
    name = "rl_beta" if beta is not None else "dpo_beta"
    beta = settings.number("dpo_beta") if beta is None else beta
    if kind in ("dpo", "kto", "simpo", "cpo") and beta:
        draft.put("method.beta", beta, name)
    if kind == "orpo" and (alpha := settings.number("orpo_alpha") or beta):
        draft.put("method.beta", alpha, "orpo_alpha", name)
    if kind == "simpo":
        draft.put("method.gamma", settings.number("simpo_gamma") or 0.5, "simpo_gamma")
        draft.put("method.sft_weight", settings.number("cpo_alpha") or 0.0, "cpo_alpha")
    if kind == "cpo" and (weight := settings.number("cpo_alpha")) is not None:
        draft.put("method.sft_weight", weight, "cpo_alpha")
    if kind == "dpo":
        if names := settings.texts("dpo_loss_type"):
            draft.put("method.losses", dict.fromkeys(names, 1.0), "dpo_loss_type")
        if weight := settings.number("rpo_alpha"):
            losses = {**draft.values.get("method.losses", {"sigmoid": 1.0}), "sft": weight}
            draft.put("method.losses", losses, "rpo_alpha")
        if smoothing := settings.number("dpo_label_smoothing"):
            draft.put("method.label_smoothing", smoothing, "dpo_label_smoothing")
    if kind == "reward" and (weight := settings.number("center_rewards_coefficient")):
        draft.put("method.center_coefficient", weight, "center_rewards_coefficient")
    if kind == "grpo":
        online(draft, places, "trl", settings.value("trl") or {})
        whole = int(draft.values["data.max_length"])
        most = int(draft.values["method.max_completion"])
        draft.put("data.max_length", whole + most, note="prompt (sequence_len) and completion")
