"""What finray calls a setting of another project, and whose configuration a file is."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from .axolotl import AXOLOTL
from .dialect import Dialect, ForeignKey
from .llama_factory import LLAMA_FACTORY
from .llama_factory_v1 import LLAMA_FACTORY_V1
from .trl import TRL

DIALECTS = (AXOLOTL, LLAMA_FACTORY, TRL)
"""Those whose marks no other one has."""

_OTHERS = {
    "r": "adapter.rank",
    "lr": "optim.learning_rate",
    "epoch": "optim.epochs",
    "n_epochs": "optim.epochs",
    "num_epochs": "optim.epochs",
    "train_epochs": "optim.epochs",
    "train_batch_size": "optim.batch_size",
    "global_batch_size": "optim.batch_size",
    "target_modules": "adapter.targets",
    "modules_to_save": "adapter.modules_to_save",
    "init_lora_weights": "adapter.init",
    "use_lora": "adapter",
    "use_qlora": "model.quantize: nf4",
    "bits": "model.quantize: nf4",
    "quantization": "model.quantize",
    "model_name": "model.base",
    "base_model_name_or_path": "model.base",
    "tokenizer": "model.base",
    "dataset_path": "data.train",
    "data_path": "data.train",
    "train_file": "data.train",
    "train_files": "data.train",
    "validation_file": "data.eval",
    "eval_file": "data.eval",
    "test_size": "data.holdout",
    "max_seq_len": "data.max_length",
    "model_max_length": "data.max_length",
    "block_size": "data.max_length",
    "scheduler": "optim.schedule",
    "lr_scheduler": "optim.schedule",
    "num_gpus": "scale.workers",
    "n_gpus": "scale.workers",
    "num_workers": "scale.workers",
    "max_new_tokens": "eval.max_new_tokens",
    "trainer": "method.kind",
    "precision": "model.dtype",
    "devices": "scale.workers",
    "strategy": "scale.strategy",
}
"""Names of PEFT, Unsloth, Lightning and of scripts around them: finray's keys."""

_VALUES: dict[tuple[str, str], str] = {
    ("adapter", "qlora"): "write adapter: lora and model.quantize: nf4",
    ("adapter", "none"): "leave adapter out for full fine-tuning",
    ("adapter", "full"): "leave adapter out for full fine-tuning",
    ("optim.schedule", "constant_with_warmup"): "write constant; optim.warmup_ratio is apart",
    ("model.quantize", "4bit"): "write nf4",
    ("model.quantize", "int4"): "write nf4",
    ("model.quantize", "8bit"): "write int8",
    ("method.kind", "rm"): "write reward",
    ("method.kind", "pt"): "write pretrain",
    ("method.kind", "ipo"): "write {kind: dpo, losses: {ipo: 1.0}}",
    ("method.kind", "ppo"): "finray has no PPO; grpo and rloo learn from rewards",
}
_OPTIMIZERS = ("adamw", "paged_", "sgd", "adafactor", "lion")


@cache
def _index() -> dict[str, ForeignKey]:
    index = {name: ForeignKey("copied", to) for name, to in _OTHERS.items()}
    for dialect in (LLAMA_FACTORY_V1, *reversed(DIALECTS)):
        for name, entry in dialect.entries():
            if entry.fate != "left" or name not in index or index[name].fate == "left":
                index[name] = entry  # what one project has no use for may be a setting of another
    return index


def foreign_key(name: str) -> ForeignKey | None:
    """A setting of another project by its own name; None if no project has one."""
    return _index().get(name.lower().lstrip("-").replace("-", "_"))


def value_remedy(key: str, value: Any) -> str | None:
    """What to write instead of another project's value of a setting that has the same name."""
    if not isinstance(value, str):
        return None
    if key == "optim" and value.lower().startswith(_OPTIMIZERS):
        return "the optimizer is AdamW, and the section optim holds its settings"
    return _VALUES.get((key, value.lower()))


def marks_in(keys: Iterable[str]) -> dict[str, list[str]]:
    """The dialects that a file's keys belong to, each with the keys that only it has."""
    present = list(keys)
    of_v1 = [key for key in present if key in LLAMA_FACTORY_V1.marks]
    if len(of_v1) > 1:  # it shares names with the others
        return {LLAMA_FACTORY_V1.name: of_v1}
    marks_of = {
        dialect.name: [key for key in present if key in dialect.marks] for dialect in DIALECTS
    }
    return {name: marks for name, marks in marks_of.items() if marks}


def dialect_of(name: str) -> Dialect:
    """The dialect of a project's name."""
    return next(dialect for dialect in (*DIALECTS, LLAMA_FACTORY_V1) if dialect.name == name)


def whole_file(values: Mapping[str, Any], own: Iterable[str]) -> dict[str, list[str]]:
    """The dialects of a file that is another project's as a whole; empty for finray's own.

    Args:
        values: the file.
        own: the keys of finray's settings that such a file cannot lack.
    """
    marks = marks_in(values)
    if LLAMA_FACTORY_V1.name not in marks and any(name in values for name in own):
        return {}
    foreign = [key for key in values if foreign_key(key) is not None]
    return marks if len(foreign) >= 3 else {}
