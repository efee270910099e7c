"""Settings of Axolotl, LLaMA-Factory and TRL in a recipe are answered with finray's own name."""

from collections import Counter
from pathlib import Path

import pytest

from finray.training.common.errors import InputError
from finray.training.config.foreign.lookup import DIALECTS, foreign_key
from finray.training.config.recipe import Recipe, load_recipe
from finray.training.config.validation import has_key
from finray.training.config.yaml_file import split_key

NAMES = {
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.targets",
    "lora_target_modules": "adapter.targets",
    "lora_target_linear": "adapter.targets: all-linear",
    "lora_modules_to_save": "adapter.modules_to_save",
    "use_dora": "adapter.dora",
    "peft_use_dora": "adapter.dora",
    "use_rslora": "adapter.rslora",
    "use_peft": "adapter: lora",
    "lr": "optim.learning_rate",
    "learning_rate": "optim.learning_rate",
    "num_train_epochs": "optim.epochs",
    "num_epochs": "optim.epochs",
    "max_steps": "optim.max_steps",
    "per_device_train_batch_size": "optim.micro_batch_size",
    "micro_batch_size": "optim.micro_batch_size",
    "gradient_accumulation_steps": "optim.batch_size",
    "lr_scheduler_type": "optim.schedule",
    "lr_scheduler": "optim.schedule",
    "warmup_steps": "optim.warmup_ratio",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.max_grad_norm",
    "adam_beta2": "optim.beta2",
    "loraplus_lr_ratio": "optim.lora_plus_ratio",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "val_set_size": "data.holdout",
    "val_size": "data.holdout",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "eval_dataset": "data.eval",
    "test_datasets": "data.eval",
    "sample_packing": "data.packing",
    "packing": "data.packing",
    "chat_template": "data.chat_template",
    "output_dir": "name",
    "base_model": "model.base",
    "model_name_or_path": "model.base",
    "load_in_4bit": "model.quantize: nf4",
    "load_in_8bit": "model.quantize: int8",
    "quantization_bit": "model.quantize",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "eval.every_steps",
    "logging_steps": "log.every_steps",
    "report_to": "log.to",
    "stage": "method.kind",
    "rl": "method.kind",
    "beta": "method.beta",
    "pref_beta": "method.beta",
    "num_generations": "method.generations",
    "max_completion_length": "method.max_completion",
    "reward_funcs": "method.rewards",
    "train_on_inputs": "method.train_on: all",
    "ref_model": "method.reference_model",
    "deepspeed": "scale.strategy: fsdp",
    "fsdp": "scale.strategy: fsdp",
    "max_length": "data.max_length",
    "temperature": "method.temperature",
    "streaming": "data.prepare: streaming",
    "trainer": "method.kind",
    "precision": "model.dtype",
    "devices": "scale.workers",
    "strategy": "scale.strategy",
}
RECIPE = "name: a\nmodel: org/model\ndata: {train: rows.jsonl}\n"


def refused(text: str, folder: Path, *overrides: str) -> str:
    file = folder / "r.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_recipe(file, overrides)
    return str(caught.value).replace(f"{file}", "r.yaml")


def test_sixty_names_at_the_top(tmp_path: Path) -> None:
    """One line each, with its place."""
    for part in (dict(list(NAMES.items())[:40]), dict(list(NAMES.items())[40:])):
        text = refused(RECIPE + "".join(f"{name}: 1\n" for name in part), tmp_path)
        lines = text.splitlines()
        assert len(lines) == len(part)
        for number, (name, own) in enumerate(part.items(), start=4):
            line = next(line for line in lines if line.startswith(f"r.yaml:{number}: "))
            assert line.startswith(f"r.yaml:{number}: {name}: unknown key; did you mean '{own}'")
    assert len(NAMES) >= 60


def test_in_a_section_and_in_set(tmp_path: Path) -> None:
    text = refused(f"{RECIPE}optim: {{lr: 1}}\n", tmp_path)
    assert text == "r.yaml:4: optim.lr: unknown key; did you mean 'optim.learning_rate'?"
    text = refused(RECIPE, tmp_path, "lora_r=8")
    assert text == "--set lora_r=8: lora_r: unknown key; did you mean 'adapter.rank'?"


def test_what_finray_does_not_have_is_explained(tmp_path: Path) -> None:
    text = refused(f"{RECIPE}neftune_noise_alpha: 5\n", tmp_path)
    assert text.endswith("unknown key; remove it: noise on embeddings (NEFTune), which finray does "
                         "not have")  # fmt: skip


def test_values_of_other_projects(tmp_path: Path) -> None:
    text = refused(f"{RECIPE}adapter: qlora\n", tmp_path)
    assert text.endswith("found 'qlora'; write adapter: lora and model.quantize: nf4")
    text = refused(f"{RECIPE}optim: adamw_torch\n", tmp_path)
    assert "the optimizer is AdamW" in text


FILES = {
    "Axolotl": "base_model: a/b\ndatasets: [{path: c/d, type: alpaca}]\nsequence_len: 512\n",
    "LLaMA-Factory": "model_name_or_path: a/b\nstage: sft\ndataset: identity\ntemplate: qwen\n",
    "TRL": "model_name_or_path: a/b\ndataset_name: c/d\nlearning_rate: 1e-5\nuse_peft: true\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_whole_file_is_named(name: str, tmp_path: Path) -> None:
    text = refused(FILES[name], tmp_path)
    assert text.startswith(f"r.yaml:1: no recipe, but a file with {name}'s ")
    assert "finray import r.yaml" in text and "\n" not in text


def test_a_file_in_two_dialects(tmp_path: Path) -> None:
    text = refused(FILES["Axolotl"] + "cutoff_len: 10\n", tmp_path)
    assert "Axolotl's base_model" in text and "LLaMA-Factory's cutoff_len" in text


def test_the_tables_lead_to_settings() -> None:
    for dialect in DIALECTS:
        counts = Counter(name for name, _ in dialect.entries())
        assert not [name for name, count in counts.items() if count > 1], dialect.name
        assert dialect.marks <= counts.keys(), dialect.marks - counts.keys()
        for name, key in dialect.entries():
            own = key.to.partition(":")[0]
            assert (own == "") == (key.fate == "left"), name
            assert not own or has_key(Recipe, split_key(own)), (name, own)
            assert key.fate == "copied" or key.text, name
            assert foreign_key(name) is not None


def test_no_dialect_has_the_marks_of_another() -> None:
    for dialect in DIALECTS:
        others = {name for other in DIALECTS if other is not dialect for name, _ in other.entries()}
        assert not dialect.marks & others, dialect.name
