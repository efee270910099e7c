"""A TRL configuration, or the command line of one of its scripts, as a recipe."""

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from ...training.common.errors import InputError
from ...training.config.methods import METHODS, ONLINE, DpoLoss
from . import adapting, trainer
from .axolotl import holdout
from .draft import NO_MODEL, Draft, ForeignSettings
from .places import Places, files_of
from .rewards import online
from .trainer import Defaults, Devices, leave_present

_RATES = {
    "sft": 2e-5,
    "reward": 1e-4,
    "dpo": 1e-6,
    "kto": 1e-6,
    "orpo": 1e-6,
    "cpo": 1e-6,
    "simpo": 1e-6,
    "grpo": 1e-6,
    "rloo": 1e-6,
    "pretrain": 2e-5,
}
_SIGNS = {
    "grpo": ("num_generations", "reward_funcs", "max_completion_length", "num_iterations"),
    "kto": ("desirable_weight", "undesirable_weight"),
    "reward": ("center_rewards_coefficient",),
    "cpo": ("cpo_alpha", "simpo_gamma"),
    "dpo": ("beta", "precompute_ref_log_probs", "rpo_alpha", "max_prompt_length", "loss_weights"),
}
_DPO_LOSSES = get_args(DpoLoss)
_OLD_LOSSES = {"kto_pair": "sigmoid", "apo_zero_unpaired": "apo_zero", "sigmoid_norm": "sigmoid"}

PRETRAINING = {"cpt": "pretrain"}
"""finray's method by a word of the alignment handbook's."""
_OLD_NAMES = {
    "model_name": "model_name_or_path",
    "batch_size": "per_device_train_batch_size",
    "seq_length": "max_seq_length",
    "num_train_epoch": "num_train_epochs",
    "peft_lora_r": "lora_r",
    "peft_lora_alpha": "lora_alpha",
    "r": "lora_r",
    "target_modules": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save",
}
"""What scripts around TRL and Unsloth, and its own old ones, call its settings."""
_OPEN_LENGTH = 8192
"""Tokens, where TRL cuts no row."""
_OF_ONE_DATASET = (
    *("dataset_name", "dataset_config", "dataset_config_name", "dataset_train_split"),
    *("dataset_splits", "dataset_configs", "dataset_mixer"),
)
_OF_A_MIXED = (
    *("id", "path", "name", "config", "split", "weight", "fraction", "columns", "data_files"),
    "data_dir",
)


def current_names(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings under the names that TRL has today, and these by the names in the file."""
    renamed = {old: new for old, new in _OLD_NAMES.items() if old in values and new not in values}
    return {renamed.get(name, name): value for name, value in values.items()}, renamed


def method_by_keys(values: dict[str, Any], path: str) -> tuple[str, str]:
    """The method of a file, and what says so: words of its path, else its keys."""
    words = re.split(r"[/_\-.\s]+", path.lower())
    for kind in ("sft", "dpo", "kto", "orpo", "cpo", "simpo", "reward", "grpo", "rloo", "cpt"):
        if kind in words:
            return PRETRAINING.get(kind, kind), "the file's path"
    for kind, signs in _SIGNS.items():
        if present := [sign for sign in signs if values.get(sign) is not None]:
            return kind, ", ".join(present)
    return "sft", "no key of another method"


def convert(draft: Draft, devices: Devices, places: Places, kind: str, origin: str) -> None:
    """Fill the draft.

    Args:
        draft: the draft.
        devices: the GPUs.
        places: where paths start.
        kind: the trainer.
        origin: what says so.

    Raises:
        InputError: finray has no such method.
    """
    settings = draft.settings
    if kind not in METHODS:
        raise InputError(
            f"{settings.where}: {kind}: finray has no such method; those it has are "
            f"{', '.join(METHODS)}"
        )
    if kind == "cpo" and settings.text("loss_type") == "simpo":
        kind = "simpo"
    draft.put("method.kind", kind, note=f"by {origin}")
    defaults = Defaults("TRL", _RATES[kind], 3.0, 8, "linear")
    base = settings.text("model_name_or_path") or settings.text("sft_model_path") or NO_MODEL
    draft.put("model.base", places.model(base), "model_name_or_path", "sft_model_path")
    revision = settings.text("model_revision")
    if revision not in (None, "main"):
        draft.put("model.revision", revision, "model_revision")
    elif revision:
        draft.fulfilled("main, as by default", "model_revision")
    names = ("run_name", "output_dir", "hub_model_id")
    trainer.run_name(draft, names, f"{base.rpartition('/')[2]}-{kind}")
    _adapter(draft)
    if kind in ONLINE:
        online(draft, places)
    else:
        _of_method(draft, kind)
    holds_out = _data(draft, kind, places)
    generations = int(draft.values.get("method.generations", 1))
    trainer.batch(draft, devices, defaults, "per_device_train_batch_size", generations)
    trainer.duration(draft, defaults, "num_train_epochs")
    trainer.rate(draft, defaults)
    trainer.schedule(draft, defaults, "lr_scheduler_type")
    trainer.optimizer(draft, "optim")
    trainer.precision(draft, "dtype", "torch_dtype")
    trainer.checkpointing(draft)
    trainer.remote_code(draft)
    trainer.sharding(draft, devices)
    trainer.evaluation(draft, holds_out)
    trainer.saving(draft, int(draft.values.get("method.passes", 1)))
    trainer.trackers(draft)
    flags = [name for name in ("streaming", "dataset_streaming") if settings.flag(name)]
    trainer.streaming(draft, flags + draft.streams)
    adapting.attention(draft, "attn_implementation")
    if settings.value("use_flash_attention_2") is not None:
        draft.fulfilled("model.attention: auto, documents one at a time", "use_flash_attention_2")
    if settings.flag("use_cpu"):
        draft.put("scale.gpus_per_worker", 0, "use_cpu")
    trainer.copy_the_rest(draft, frozenset(METHODS[kind].model_fields))


def _adapter(draft: Draft) -> None:
    settings = draft.settings
    adapts = bool(settings.flag("use_peft"))
    if adapts:
        rank = settings.whole("lora_r") or 16
        alpha = settings.number("lora_alpha") or 32
        dropout = settings.number("lora_dropout")
        draft.put("adapter.kind", "lora", "use_peft")
        draft.put("adapter.rank", rank, "lora_r", note=_default(settings.value("lora_r")))
        whole = int(alpha) if alpha == int(alpha) else alpha
        draft.put("adapter.alpha", whole, "lora_alpha", note=_default(settings.value("lora_alpha")))
        value = 0.05 if dropout is None else dropout
        draft.put("adapter.dropout", value, "lora_dropout", note=_default(dropout))
        named = settings.texts("lora_target_modules")
        if named:
            adapting.targets(draft, "lora_target_modules", named)
        else:
            draft.notes.append(
                "adapter.targets: all linear layers; TRL without lora_target_modules adapts those "
                "that PEFT lists for the architecture, mostly q_proj and v_proj"
            )
        if saved := settings.texts("lora_modules_to_save"):
            draft.put("adapter.modules_to_save", saved, "lora_modules_to_save")
    else:
        for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"):
            if settings.value(name) is not None:
                draft.leave(name, "an adapter's; without use_peft the model's own weights train")
    for name, kind in (("load_in_4bit", "nf4"), ("load_in_8bit", "int8")):
        if settings.flag(name) and "model.quantize" not in draft.values:
            adapting.quantise(draft, kind, name, adapts)


def _default(value: Any) -> str:
    return "" if value is not None else "TRL's default"


def _of_method(draft: Draft, kind: str) -> None:
    settings = draft.settings
    fields = METHODS[kind].model_fields
    beta = settings.number("beta")
    if beta and "beta" in fields:
        draft.put("method.beta", beta, "beta")
    losses = settings.texts("loss_type")
    if kind == "dpo":
        _dpo_losses(draft, losses)
    elif kind == "kto" and losses:
        losses_here = {"kto": "kto", "apo_zero_unpaired": "apo_zero"}
        draft.put("method.loss", losses_here.get(losses[0], "kto"), "loss_type")
    elif kind == "cpo" and losses:
        losses_here = {name: name for name in ("sigmoid", "hinge", "ipo")}
        draft.put("method.loss", losses_here.get(losses[0], "sigmoid"), "loss_type")
    elif kind == "simpo":
        draft.fulfilled("method.kind: simpo", "loss_type")
        draft.put("method.gamma", settings.number("simpo_gamma") or 0.5, "simpo_gamma")
        weight = settings.number("cpo_alpha")
        draft.put("method.sft_weight", 1.0 if weight is None else weight, "cpo_alpha")
        if not beta:  # finray's own default is larger
            draft.put("method.beta", 0.1, note="TRL's default")
    elif losses and losses[0] in ("nll", "chunked_nll"):
        draft.fulfilled("the cross-entropy of the next token", "loss_type")
    elif losses:
        draft.change("loss_type", f"{', '.join(losses)}: the cross-entropy instead")
    if settings.number("label_smoothing") and kind == "kto":
        draft.leave("label_smoothing", "smoothed labels, which kto does not have")


def _dpo_losses(draft: Draft, names: list[str]) -> None:
    settings = draft.settings
    weights = settings.numbers("loss_weights")
    losses = {}
    for index, name in enumerate(names):
        own = name if name in _DPO_LOSSES else _OLD_LOSSES.get(name)
        if own is None:
            draft.change("loss_type", f"{name}: sigmoid instead")
        losses[own or "sigmoid"] = weights[index] if index < len(weights) else 1.0
    if weight := settings.number("rpo_alpha"):
        losses = {**(losses or {"sigmoid": 1.0}), "sft": weight}
    if losses:
        draft.put("method.losses", losses, "loss_type", "loss_weights", "rpo_alpha")
    smoothing = settings.number("label_smoothing")
    if "exo_pair" in losses and not smoothing:
        draft.put("method.label_smoothing", 0.001, "label_smoothing")
    elif not smoothing:
        draft.fulfilled("0, as by default", "label_smoothing")


def _data(draft: Draft, kind: str, places: Places) -> bool:
    settings = draft.settings
    sources, held_out = _sources(draft, places)
    if not sources:
        raise InputError(
            f"{settings.where}: dataset_name is missing: a recipe needs rows to learn from; name "
            "them"
        )
    _columns(draft, kind, sources)
    keys = ("dataset_name", "dataset_mixture", "dataset_mixer", "datasets", "dataset_configs")
    more = ("dataset_config", "dataset_config_name", "dataset_train_split", "dataset_splits")
    draft.put("data.train", sources, *keys, *more)
    strategy = settings.text("eval_strategy") or settings.text("evaluation_strategy")
    measures = str(strategy).lower() not in ("none", "no", "false")
    measures = measures or bool(settings.flag("do_eval")) or "dataset_test_split" in settings.values
    if held_out and measures:
        draft.put("data.eval", held_out, "dataset_test_split")
    elif settings.value("dataset_test_split") is not None:
        draft.leave("dataset_test_split", "held-out rows; nothing is measured")
    holds_out = holdout(draft, "test_split_size", bool(held_out and measures))
    _lengths(draft, kind)
    template = settings.text("chat_template") or settings.text("chat_template_path")
    if template:
        _template(draft, template, places)
    for name in ("eos_token", "pad_token"):
        if settings.value(name) is not None:
            draft.fulfilled("an answer ends as the chat template writes it; none is padded", name)
    if kind == "sft":
        _loss(draft)
    return holds_out


def _columns(draft: Draft, kind: str, sources: list[dict[str, Any]]) -> None:
    """The columns of texts and prompts, and the system prompt."""
    settings = draft.settings
    column = settings.text("dataset_text_field") or settings.text("text_column")
    if column and column not in ("text", "messages", "content"):
        for source in sources:
            source.setdefault("columns", {"text": column})
    draft.fulfilled("data.train", "dataset_text_field", "text_column")
    prompt = settings.text("dataset_prompt_column")
    if prompt is not None and kind in ONLINE:
        if prompt != "prompt":
            for source in sources:
                source["columns"] = {"prompt": prompt}
        draft.fulfilled(f"data.train.0.columns: {{prompt: {prompt}}}", "dataset_prompt_column")
    if (system := settings.text("system_prompt")) is not None:
        for source in sources:
            source["system"] = system
        draft.fulfilled("data.train.0.system", "system_prompt")


def _template(draft: Draft, template: str, places: Places) -> None:
    name = "chat_template" if draft.settings.text("chat_template") else "chat_template_path"
    if "{" not in template and template.lower() == "chatml":
        adapting.chatml(draft, name)
    elif "{" in template:
        draft.put("data.chat_template", template, name)
    elif places.exists(template) and not places.has_folder(template):
        draft.put("data.chat_template", places.path(template), name)
    else:
        adapting.own_template(draft, name, template)


def _sources(draft: Draft, places: Places) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The sources for training, and what they have for evaluation."""
    settings = draft.settings
    key = next((key for key in ("dataset_mixture", "datasets") if settings.value(key)), None)
    if key is not None:
        return _mixture(draft, key, places), []
    mixer = settings.value("dataset_mixer")
    if isinstance(mixer, dict):
        return _mixer(draft, mixer, places)
    name = settings.text("dataset_name")
    if name is None:
        return [], []
    subset = settings.text("dataset_config") or settings.text("dataset_config_name")
    subset = subset or next(iter(settings.texts("dataset_configs")), None)
    split = settings.text("dataset_train_split")
    part = {"subset": subset} if subset else {}
    [place] = places.source(name, [])
    source = {**place, **part, **({"split": split} if split and split != "train" else {})}
    test = settings.text("dataset_test_split") or "test"
    is_file = "path" in place and bool(Path(name).suffix)
    return [source], [] if is_file else [{"split": test}]


def _mixture(draft: Draft, key: str, places: Places) -> list[dict[str, Any]]:
    """The data sets of a mixture, and the share of their rows that is held out."""
    settings, where = draft.settings, key
    if isinstance(settings.value(key), dict):
        settings, where = settings.inside(key, settings.value(key)), f"{key}.datasets"
        _of_mixture(draft, key, settings)
    name = where.rpartition(".")[2]
    items = settings.value(name)
    if not isinstance(items, list):
        raise settings.fault(name, "a list of data sets")
    sources = []
    for index, item in enumerate(items):
        written = {"path": item} if isinstance(item, str) else item
        entry = settings.inside(f"{name}.{index}", written)
        sources += _mixed(draft, f"{where}.{index}", entry, places)
    leave_present(draft, _OF_ONE_DATASET, f"of a single data set; {key} comes before it")
    return sources


def _of_mixture(draft: Draft, key: str, settings: ForeignSettings) -> None:
    """What a mixture says of all its data sets."""
    size = settings.number("test_split_size")
    if size is not None and 0 < size < 1:
        draft.put("data.holdout", size)
    elif size:
        draft.put("data.holdout", 0.02)
        draft.change(
            f"{key}.test_split_size",
            f"{size:g} rows; finray takes a share of the rows: 0.02 is written",
        )
    if settings.flag("streaming"):
        draft.streams.append(f"{key}.streaming")
    if settings.value("seed") is not None:
        draft.leave(f"{key}.seed", "of the order of a mixture; finray's seed is the whole run's")
    draft.name_others(key, settings, ("datasets", "test_split_size", "streaming", "seed"))


def _mixed(
    draft: Draft, where: str, entry: ForeignSettings, places: Places
) -> list[dict[str, Any]]:
    """A data set of a mixture, none if its share is 0; what nothing comes of is named."""
    name = entry.text("id") or entry.text("path") or entry.text("name") or ""
    subset = entry.text("config") or (entry.text("name") if "path" in entry.values else None)
    part: dict[str, Any] = {"subset": subset} if subset else {}
    split = entry.text("split")
    if split not in (None, "train"):
        part["split"] = split
    weight, fraction = entry.number("weight"), entry.number("fraction")
    for key, share in (("weight", weight), ("fraction", fraction)):
        if share is not None and share < 0:
            raise entry.fault(key, "a share from 0 on")
    if weight and weight != 1.0:
        part["weight"] = weight
    _explain(draft, where, entry)
    files, folder = files_of(entry, split), entry.text("data_dir")
    if folder is not None:
        files = [posixpath.join(folder, file) for file in files] or [folder]
    if 0 in (weight, fraction):
        draft.leave(f"{where}.{'weight' if weight == 0 else 'fraction'}", "0: none of its rows")
        return []
    return [{**place, **part} for place in places.source(name, files)]


def _explain(draft: Draft, where: str, entry: ForeignSettings) -> None:
    """Say what becomes of the settings of a data set that a source does not have."""
    if entry.number("fraction"):
        draft.change(
            f"{where}.fraction",
            f"{entry.number('fraction'):g} of the mixture; all rows are used, and weight of the "
            "source says how often: how many rows each has decides it",
        )
    if entry.value("columns") is not None:
        draft.leave(
            f"{where}.columns",
            "which columns are kept; finray reads those of the shape that it finds, or that format "
            "of the source names",
        )
    draft.name_others(where, entry, _OF_A_MIXED)


def _mixer(
    draft: Draft, mixer: dict[str, Any], places: Places
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The alignment handbook's mixer: names with the share of each that is used."""
    splits = draft.settings.texts("dataset_splits") or ["train", "test"]
    subsets = draft.settings.texts("dataset_configs")
    train = next((split for split in splits if "train" in split), splits[0])
    test = next((split for split in splits if "test" in split or "val" in split), None)
    sources = []
    shares = draft.settings.inside("dataset_mixer", mixer)
    for index, name in enumerate(mixer):
        [place] = places.source(name, [])
        source: dict[str, Any] = dict(place)
        if index < len(subsets):
            source["subset"] = subsets[index]
        if train != "train":
            source["split"] = train
        share = shares.number(name)
        if share is not None and share < 0:
            raise shares.fault(name, "a share from 0 on")
        if share == 0:
            draft.leave(f"dataset_mixer.{name}", "0: none of its rows is used")
            continue
        if share is not None and share != 1:
            source["weight"] = share
        sources.append(source)
    return sources, [{"split": test}] if test else []


def _lengths(draft: Draft, kind: str) -> None:
    settings = draft.settings
    name = "max_length" if settings.value("max_length") is not None else "max_seq_length"
    length = settings.whole(name)
    is_open = length is None and "max_length" in settings.values
    value = max(8, length or (_OPEN_LENGTH if is_open else 1024))
    if kind in ONLINE:
        prompt = settings.whole("max_prompt_length") or 512
        value = prompt + int(draft.values["method.max_completion"])
        draft.put("data.max_length", value, "max_prompt_length", note="prompt and completion")
    else:
        if is_open:
            draft.change(
                "max_length",
                f"null: rows of any length; finray needs a bound: {value} is written",
            )
        draft.put("data.max_length", value, name, note="" if is_open else _default(length))
        mode = settings.text("truncation_mode")
        cut = "truncate_left" if mode == "keep_end" else "truncate"
        draft.put("data.overlong", cut, "truncation_mode", note="" if mode else "as TRL cuts")
        if settings.value("max_prompt_length") is not None:
            draft.change("max_prompt_length", "data.max_length holds prompt and answer together")
    if kind == "sft":
        _packing(draft)


def _packing(draft: Draft) -> None:
    settings = draft.settings
    if settings.flag("packing"):
        draft.put("data.packing", "auto", "packing", note="documents are kept apart")
        strategy = settings.text("packing_strategy")
        if strategy == "wrapped":
            draft.change(
                "packing_strategy", "wrapped: whole documents, which do not see each other"
            )
        elif strategy is not None:
            draft.fulfilled("whole documents, as full as they fit", "packing_strategy")
    else:
        draft.put("data.packing", False, "packing", note="a row a sequence, as in TRL")


def _loss(draft: Draft) -> None:
    settings = draft.settings
    names = [n for n in ("assistant_only_loss", "completion_only_loss") if n in settings.values]
    flags = [settings.flag(name) for name in names]
    if any(flags):
        draft.put("method.train_on", "completions", *names)
    elif False in flags:
        draft.put("method.train_on", "all", *names)
    else:
        draft.notes.append(
            "method.train_on: completions; TRL without assistant_only_loss trains every token of "
            "a conversation (method.train_on: all), of prompts with completions these alone"
        )
