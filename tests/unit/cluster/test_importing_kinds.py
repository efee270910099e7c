"""`finray import`: kinds of settings whose meaning is easily lost."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import finray
from finray.cluster.starting.importing import Imported, import_settings
from finray.training.common.errors import InputError
from finray.training.common.yaml_text import load_yaml
from finray.training.config.recipe import load_recipe

AXOLOTL = "base_model: org/model\nsequence_len: 512\n"
ALPACA = f"{AXOLOTL}datasets: [{{path: org/rows, type: alpaca}}]\n"
PAIRS = f"{AXOLOTL}datasets: [{{path: org/pairs, type: chatml.intel}}]\nrl: "
FACTORY = "model_name_or_path: org/model\nstage: sft\ndataset: identity\ntemplate: qwen\n"
TRL = "--model_name_or_path org/model --dataset_name org/rows"
V1 = """\
model: org/model
model_class: llm
template: qwen3_nothink
peft_config: {name: lora, r: 4, lora_alpha: 12, target_modules: all}
quant_config: {name: bnb, quantization_bit: 4}
dist_config: {name: fsdp2, dcp_path: null}
train_dataset: sets.yaml
output_dir: outputs/first
micro_batch_size: 2
global_batch_size: 8
cutoff_len: 256
"""


def imported(text: str, folder: Path, gpus: int | None = None) -> Imported:
    if text.startswith(("model", "base_model", "zero")):
        file = folder / "config.yaml"
        file.write_text(text, encoding="utf-8")
        text = str(file)
    result = import_settings(text, gpus, folder, None, None)
    assert result.faults is None, result.faults
    return result


def section(text: str, name: str, folder: Path, gpus: int | None = None) -> Any:
    return load_yaml(imported(text, folder, gpus).text).get(name, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{ALPACA}diffusion: {{eps: 0.1}}\n", "diffusion: a mapping (eps): a diffusion model"),
        (f"{ALPACA}plugins: [axolotl.integrations.kd.KDPlugin]\n", "distillation from a teacher"),
        (f"{ALPACA}kd_trainer: true\n", "distillation from a teacher"),
        (f"{ALPACA}hatchery: {{backend: tinker}}\n", "trains on a service"),
        (
            f"{ALPACA}processor_type: AutoProcessor\nskip_prepare_dataset: true\n",
            "for rows of text, remove it and skip_prepare_dataset",
        ),
        (f"{FACTORY}image_max_pixels: 262144\n", "finray trains text alone; for rows of text"),
        (f"python distillation.py {TRL}", "distillation: finray has no such method"),
        (f"trl sft {TRL} --teacher_model_name_or_path org/large", "distillation from a teacher"),
        ("zero_optimization: {stage: 3}\n", "DeepSpeed's own settings"),
    ],
)
def test_what_would_be_trained_as_something_else(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        imported(text, tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "gpus"),
    [
        ("accelerate launch --config_file launch.yaml sft.py", 6),
        ("accelerate launch --config_file launch.yaml --num_processes 2 sft.py", 2),
        ("trl sft --accelerate_config launch.yaml", 6),
        ("trl sft --accelerate_config zero3", 8),
        ("trl sft --accelerate_config single_gpu", 1),
        ("trl sft --accelerate_config absent.yaml", 1),
        ("CUDA_VISIBLE_DEVICES=0,2,5 python sft.py", 3),
        ("env NPROC_PER_NODE=4 NNODES=2 NODE_RANK=0 python sft.py", 8),
    ],
)
def test_the_gpus_of_a_launch(
    command: str, gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("launch.yaml").write_text("distributed_type: FSDP\nnum_processes: 6\n", encoding="utf-8")
    values = imported(f"{command} {TRL} --per_device_train_batch_size 2", tmp_path).values
    assert values["optim"]["batch_size"] == 2 * gpus
    assert values.get("scale", {}).get("workers", 1) == gpus
    shards = gpus > 1 and ("launch.yaml" in command or "zero3" in command)
    assert values.get("scale", {}).get("strategy") == ("fsdp" if shards else None)


def test_gpus_that_share_a_sequence_count_once(tmp_path: Path) -> None:
    text = f"{ALPACA}micro_batch_size: 2\ngradient_accumulation_steps: 3\n"
    assert section(text, "optim", tmp_path, 8)["batch_size"] == 2 * 3 * 8
    text += "context_parallel_size: 2\ntensor_parallel_size: 2\n"
    assert section(text, "optim", tmp_path, 8)["batch_size"] == 2 * 3 * 2


@pytest.mark.parametrize(
    ("lines", "share", "names"),
    [
        ("warmup_steps: 0.1\n", 0.1, {"warmup_steps"}),
        ("warmup_steps: 5\nmax_steps: 50\n", 0.1, {"warmup_steps"}),
        ("warmup_steps: 0\nwarmup_ratio: 0.2\n", 0.2, {"warmup_steps", "warmup_ratio"}),
        ("warmup_steps: 0\n", 0.0, {"warmup_steps"}),
    ],
)
def test_warmup(lines: str, share: float, names: set[str], tmp_path: Path) -> None:
    result = imported(ALPACA + lines, tmp_path)
    assert result.values["optim"]["warmup_ratio"] == share
    assert names <= result.mapped.keys()


def test_zeros_and_plugins_are_answered_with_what_they_mean(tmp_path: Path) -> None:
    text = (
        f"{ALPACA}val_set_size: 0.0\nlora_target_modules: [q_proj]\n"
        "plugins: [axolotl.integrations.spectrum.SpectrumPlugin]\nspectrum_top_fraction: 0.5\n"
    )
    result = imported(text, tmp_path)
    assert result.mapped["val_set_size"].startswith("no training rows are held out")
    assert result.left["lora_target_modules"].startswith("an adapter's")
    assert "all weights are trained" in result.changed["plugins"]
    assert not result.unknown


def test_names_of_weights_are_expressions(tmp_path: Path) -> None:
    """Only a part of a weight is cut off, no class of characters."""
    text = f"{ALPACA}unfrozen_parameters: ['layers.4[4-9]+.mlp', 'embed_tokens.weight$[:32000]']\n"
    result = imported(text, tmp_path)
    assert result.values["freeze"] == {"train": ["layers.4[4-9]+.mlp", "embed_tokens.weight$"]}
    assert "whole weights" in result.changed["unfrozen_parameters"]


def test_new_weights(tmp_path: Path) -> None:
    text = f"{AXOLOTL}pretraining_dataset: [{{path: org/texts, type: pretrain}}]\nmax_steps: 9\n"
    method = section(f"{text}reinit_weights: true\n", "method", tmp_path)
    assert method == {"kind": "pretrain", "init": "random"}
    assert (
        "only pretrain"
        in imported(f"{ALPACA}reinit_weights: true\n", tmp_path).changed["reinit_weights"]
    )


@pytest.mark.parametrize(
    ("text", "method"),
    [
        (f"{PAIRS}simpo\n", {"beta": 0.1, "gamma": 0.5, "sft_weight": 1.0}),
        (f"{PAIRS}simpo\ncpo_alpha: 0.0\nrl_beta: 2.0\n", {"beta": 2.0, "sft_weight": 0.0}),
        (f"{PAIRS}dpo\ntrl: {{beta: 0.3}}\n", {"beta": 0.3}),
        (
            f"{PAIRS}dpo\ndpo_loss_type: [sigmoid, sft]\ndpo_loss_weights: [1.0, 0.2]\n",
            {"losses": {"sigmoid": 1.0, "sft": 0.2}},
        ),
        (f"trl rloo {TRL}", {"generations": 2, "max_completion": 512}),
        (f"trl grpo {TRL}", {"generations": 8}),
        (f"python cpo.py {TRL} --loss_type simpo", {"kind": "simpo", "beta": 0.1}),
    ],
)
def test_defaults_of_methods(text: str, method: dict[str, Any], tmp_path: Path) -> None:
    own = section(text, "method", tmp_path)
    assert {name: own.get(name) for name in method} == method


def test_rows_of_axolotl(tmp_path: Path) -> None:
    text = (
        "rl: kto\ndatasets:\n- {path: org/a, type: chatml.argilla_chat, split: 'train[:9]'}\n"
        "- {path: org/b, type: chatml.intel}\n"
    )
    chats, answers = section(AXOLOTL + text, "data", tmp_path)["train"]
    assert chats["columns"] == {"messages": "completion"} and chats["split"] == "train[:9]"
    assert answers["columns"] == {"instruction": "question", "output": "completion"}
    plain = f"{AXOLOTL}rl: orpo\ndatasets: [{{path: org/c, type: chat_template.argilla}}]\n"
    assert section(plain, "data", tmp_path)["train"] == [{"dataset": "org/c"}]
    assert "datasets.0.type" not in imported(PAIRS.replace(".intel", "") + "dpo\n", tmp_path).left
    reward = "reward_model: true\ndatasets: [{path: org/c, type: bradley_terry.chat_template}]\n"
    [source] = section(AXOLOTL + reward, "data", tmp_path)["train"]
    assert source["columns"] == {"instruction": "input"}
    own = reward.replace("terry.chat_template", "terry.own")
    assert "datasets.0.type" in imported(AXOLOTL + own, tmp_path).left
    listed = ALPACA.replace("alpaca}", "alpaca, split: [train, 'test[:5%]']}")
    assert section(listed, "data", tmp_path)["train"][0]["split"] == "train+test[:5%]"
    weighted = ALPACA.replace("alpaca}", "alpaca, weight: 0.25}")
    [source] = section(weighted, "data", tmp_path)["train"]
    assert source["weight"] == 0.25


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo", "simpo"])
@pytest.mark.parametrize("kind", ["foo", "foo.intel", "my.module.default", "chatml.foo"])
def test_a_strategy_for_pairs_of_the_users_own_is_named(
    kind: str, method: str, tmp_path: Path
) -> None:
    made = imported(PAIRS.replace("chatml.intel", kind) + method, tmp_path)
    assert f"{kind}: a strategy that finray import does not know" in made.left["datasets.0.type"]
    assert "columns" not in made.values["data"]["train"][0]


@pytest.mark.parametrize(
    ("kind", "question"),
    [
        ("alpaca", "### Instruction:\\n"),
        ("alpaca:chat", "USER: "),
        ("alpaca_chat.load_qa", "USER: "),
        ("alpaca:phi", "<|user|>\\n"),
        ("alpaca:chatml", None),
    ],
)
def test_styles_of_prompts(kind: str, question: str | None, tmp_path: Path) -> None:
    text = ALPACA.replace("alpaca", f'"{kind}"')
    is_block = "chat_template: |-" in imported(text, tmp_path).text
    assert is_block is (question is not None), "a template is written without escapes"
    template = section(text, "data", tmp_path)["chat_template"]
    assert template == "chatml" if question is None else f"'{question}'" in template


def test_a_length_without_bound_gets_one_and_says_so(tmp_path: Path) -> None:
    text = "model_name_or_path: a/b\ndataset_name: c/d\nuse_peft: true\nmax_length: null\n"
    made = imported(text, tmp_path)
    assert made.values["data"]["max_length"] == 8192
    assert "rows of any length" in made.changed["max_length"]


def test_a_data_set_of_trl_has_its_subset_and_system_prompt(tmp_path: Path) -> None:
    text = (
        "model_name_or_path: a/b\ndataset_name: c/d\nuse_peft: true\ndataset_configs: [main]\n"
        "system_prompt: Be brief.\n"
    )
    [source] = section(text, "data", tmp_path)["train"]
    assert source == {"dataset": "c/d", "subset": "main", "system": "Be brief."}


def test_templates_by_name_are_the_models_own(tmp_path: Path) -> None:
    text = f"{AXOLOTL}datasets: [{{path: org/rows, type: chat_template}}]\nchat_template: "
    assert "the model's own" in imported(f"{text}gemma3\n", tmp_path).changed["chat_template"]
    own = imported(f"{text}tokenizer_default\n", tmp_path)
    assert own.mapped["chat_template"] == "the model's own chat template"


def test_version_1_of_llama_factory(tmp_path: Path) -> None:
    rows = {
        "own": {"path": "rows.json", "source": "local", "converter": "alpaca", "size": 5},
        "hub": {"path": "org/pairs", "split": "test"},
    }
    (tmp_path / "rows.json").write_text("[]", encoding="utf-8")
    (tmp_path / "sets.yaml").write_text(json.dumps(rows), encoding="utf-8")
    result = imported(V1, tmp_path, 2)
    values = load_yaml(result.text)
    assert result.dialect == "LLaMA-Factory v1" and not result.unknown
    assert values["adapter"] == {
        "kind": "lora", "rank": 4, "alpha": 12, "dropout": 0.05, "targets": "all-linear"
    }  # fmt: skip
    assert values["model"] == {"base": "org/model", "quantize": "nf4"}
    assert values["data"]["train"] == [
        {"path": "rows.json", "format": "alpaca", "limit": 5},
        {"dataset": "org/pairs", "split": "test"},
    ]
    assert values["data"]["max_length"] == 256 and values["data"]["overlong"] == "truncate"
    assert (values["optim"]["batch_size"], values["optim"]["micro_batch_size"]) == (8, 2)
    assert (values["optim"]["learning_rate"], values["optim"]["schedule"]) == (1e-4, "constant")
    assert values["scale"] == {"workers": 2, "strategy": "fsdp"}
    assert values["method"]["kind"] == "sft"
    command = f"USE_V1=1 llamafactory-cli dpo {tmp_path / 'config.yaml'}"
    assert section(command, "method", tmp_path)["kind"] == "dpo"


def test_a_recipe_that_is_such_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(V1, encoding="utf-8")
    with pytest.raises(InputError, match=r"a file with LLaMA-Factory v1's .* finray import"):
        load_recipe(file)


def test_tokens_that_a_file_lists(tmp_path: Path) -> None:
    (tmp_path / "tokens.yaml").write_text('"<a>": first\n"<b>": second\n', encoding="utf-8")
    text = f"{FACTORY}add_tokens: <c>\nnew_special_tokens_config: tokens.yaml\n"
    assert section(text, "model", tmp_path)["add_tokens"] == ["<c>", "<a>", "<b>"]
    absent = imported(text.replace("tokens.yaml", "absent.yaml"), tmp_path)
    assert "absent.yaml is not there" in absent.changed["new_special_tokens_config"]


def test_paths_start_from_the_projects_root(tmp_path: Path) -> None:
    """These projects' commands are started there, wherever the file lies."""
    (tmp_path / "pyproject.toml").touch()
    for folder in ("data", "examples/train"):
        (tmp_path / folder).mkdir(parents=True)
    info = tmp_path / "data" / "dataset_info.json"
    info.write_text(json.dumps({"identity": {"file_name": "rows.jsonl"}}), encoding="utf-8")
    [source] = section(FACTORY, "data", tmp_path / "examples" / "train")["train"]
    assert source["dataset_info"] == os.path.join("..", "..", "data", "dataset_info.json")  # noqa: PTH118


def test_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("axolotl.yml").write_text(ALPACA, encoding="utf-8")
    made = finray.import_recipe("axolotl.yml", gpus=2, to="recipe.yaml")
    assert finray.load_recipe("recipe.yaml") == finray.load_recipe(made.values)
    with pytest.raises(InputError, match=r"recipe\.yaml exists already"):
        finray.import_recipe("axolotl.yml", to="recipe.yaml")
    Path("rows.jsonl").touch()
    Path("local.yml").write_text(ALPACA.replace("org/rows", "rows.jsonl"), encoding="utf-8")
    made = finray.import_recipe("local.yml", to="sub/recipe.yaml")
    assert "path: ../rows.jsonl" in made.text
    for recipe in ("sub/recipe.yaml", made.values):
        path = finray.load_recipe(recipe).data.train[0].path
        assert path is not None and Path(path).resolve() == (tmp_path / "rows.jsonl").resolve()
