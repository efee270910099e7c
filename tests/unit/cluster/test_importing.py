"""`finray import`: configurations of Axolotl, LLaMA-Factory and TRL become recipes."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.foreign_configs import AXOLOTL, LLAMA_FACTORY, TRL

import finray
from finray.cluster.cli.main import main
from finray.cluster.starting import trainer
from finray.cluster.starting.command_line import is_command
from finray.cluster.starting.importing import Imported, import_settings
from finray.training.common.errors import FinrayError, InputError
from finray.training.common.storage import Folder
from finray.training.common.yaml_text import dump_yaml, load_yaml
from finray.training.config.foreign.lookup import dialect_of
from finray.training.config.llama_factory import named_source
from finray.training.config.methods import METHODS
from finray.training.config.recipe import load_recipe
from finray.training.config.source import Source
from finray.training.data.shown_rows import show_rows
from finray.training.inspection import inspect_recipe

CONFIGS = {
    **{f"Axolotl {name}": text for name, text in AXOLOTL.items()},
    **{f"LLaMA-Factory {name}": text for name, text in LLAMA_FACTORY.items()},
    **{f"TRL {name}": text for name, text in TRL.items()},
}
FILES = {name: text for name, text in CONFIGS.items() if ":" in text.partition(" ")[0]}
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**99), 10**99),
    st.floats(),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)), max_size=9),
    st.sampled_from(["all", "0.5,0.5", "~nobody/a", "**x", "a/b", "1e400", "a" * 300, "*.jsonl"]),
)
VALUES = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner)
)
MESSAGES = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
ROWS = {
    "documents": {"messages": MESSAGES},
    "pairs": {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": [
        {"role": "assistant", "content": "three"}
    ]},
    "labelled answers": {"messages": MESSAGES, "label": True},
    "prompts": {"prompt": MESSAGES[:1], "solution": "two"},
}  # fmt: skip
OF_THIS_MACHINE = re.compile(r"not installed|org/classifier")
"""Packages and models that recipes of GRPO and RLOO ask for."""
_TRL = "model_name_or_path: a/b\ndataset_name: c/d\n"
_MIXTURE = "model_name_or_path: a/b\nuse_peft: true\ndataset_mixture: {datasets: "
_AXOLOTL = "base_model: a/b\nsequence_len: 64\n"
REWARDS = "def score(prompts, completions, completion_ids, **columns):\n    return [0.0]\n"


def imported(text: str, folder: Path, gpus: int | None = None, **more: Any) -> Imported:
    """A configuration, or a command line, as a recipe."""
    if is_command(text) and not text.startswith(("-", "{")) and ":" not in text.partition(" ")[0]:
        return import_settings(text, gpus, folder, more.get("info"), more.get("method"))
    file = folder / more.get("name", "config.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return import_settings(str(file), gpus, folder, more.get("info"), more.get("method"))


def values_of(text: str, folder: Path, gpus: int | None = None, **more: Any) -> Any:
    """Its settings by dotted key."""
    return flat(load_yaml(imported(text, folder, gpus, **more).text))


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    items: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, dict) and name not in ("losses", "columns", "roles")
        items |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return items


@pytest.fixture(scope="module")
def long_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the positions of a large one."""
    folder = tmp_path_factory.mktemp("model") / "long"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 2**17
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def swapped(text: str, model: Path, folder: Path) -> dict[str, Any]:
    """The recipe with the tiny model and local rows of its method's shape."""
    values: dict[str, Any] = load_yaml(text)
    values["model"]["base"] = str(model)
    kind = values["method"]["kind"]
    row = ROWS[METHODS[kind].learns_from.replace("graded ", "")]
    file = folder / "rows.jsonl"
    file.write_text((json.dumps(row) + "\n") * 2000, encoding="utf-8")
    values["data"]["train"] = [{"path": str(file)}]
    if "eval" in values["data"]:
        values["data"]["eval"] = [{"path": str(file)}]
    for reward in values["method"].get("rewards", []):
        if "file" in reward:
            code = folder / "rewards.py"
            code.write_text(REWARDS + REWARDS.replace("score", "is_short"), encoding="utf-8")
            reward["file"] = f"{code}:{reward['file'].partition(':')[2]}"
    return values


@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGS)
def test_it_becomes_a_recipe(name: str, tmp_path: Path, long_model: Path) -> None:
    """`finray check` takes it with the tiny model and rows of its method."""
    result = imported(CONFIGS[name], tmp_path)
    assert result.dialect == name.partition(" ")[0]
    assert result.faults is None, result.faults
    values = swapped(result.text, long_model, tmp_path)
    recipe = load_recipe(values, ("storage=" + str(tmp_path / "runs"),))
    try:
        inspect_recipe(recipe)
    except InputError as error:
        assert OF_THIS_MACHINE.search(str(error)), error


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_left_out_in_silence(name: str, tmp_path: Path) -> None:
    """Each key is mapped, changed, left out with a reason, off, or unknown; and no key twice."""
    text = CONFIGS[name]
    result = imported(text, tmp_path)
    reported = {*result.mapped, *result.changed, *result.left, *result.off, *result.unknown}
    if ":" in text.partition(" ")[0]:
        assert load_yaml(text).keys() <= reported
    assert not result.unknown
    assert all(reason.strip() for reason in result.left.values())


def test_the_corpus_is_large() -> None:
    assert all(len(corpus) >= 25 for corpus in (AXOLOTL, LLAMA_FACTORY, TRL))


# traps


def test_a_batch_goes_over_all_gpus(tmp_path: Path) -> None:
    for gpus in (None, 1, 8):
        values = values_of(AXOLOTL["lora"], tmp_path, gpus)
        assert values["optim.batch_size"] == 2 * 4 * (gpus or 1)
        assert values["optim.micro_batch_size"] == 2
        assert values.get("scale.workers", 1) == (gpus or 1)
    assert "# For one GPU" in imported(AXOLOTL["lora"], tmp_path).text
    assert "# For one GPU" not in imported(AXOLOTL["ray"], tmp_path).text


def test_processes_of_a_command_are_gpus(tmp_path: Path) -> None:
    values = values_of(TRL["command-dpo"], tmp_path)
    assert values["scale.workers"] == 8 and values["optim.batch_size"] == 2 * 8 * 8
    assert values_of(TRL["command-orpo"], tmp_path)["scale.workers"] == 4
    assert values_of(TRL["command-orpo"], tmp_path, 2)["scale.workers"] == 2


def test_alpha_of_llama_factory_is_twice_the_rank(tmp_path: Path) -> None:
    values = values_of(LLAMA_FACTORY["lora-sft"], tmp_path)
    assert (values["adapter.rank"], values["adapter.alpha"]) == (8, 16)
    values = values_of(LLAMA_FACTORY["alpha"], tmp_path)
    assert (values["adapter.rank"], values["adapter.alpha"]) == (16, 16)
    assert values["adapter.targets"] == ["q_proj", "v_proj"]
    assert values["adapter.modules_to_save"] == ["embed_tokens", "lm_head"]


def test_packing_that_mixes_is_reported(tmp_path: Path) -> None:
    mixing = imported(LLAMA_FACTORY["packing"], tmp_path)
    assert "mixes" in mixing.changed["packing"]
    neat = imported(LLAMA_FACTORY["neat-packing"], tmp_path)
    assert "packing" not in neat.changed
    for result in (mixing, neat):
        assert flat(load_yaml(result.text))["data.packing"] == "auto"
    assert values_of(LLAMA_FACTORY["lora-sft"], tmp_path)["data.packing"] is False


def test_cutoff_len_cuts(tmp_path: Path) -> None:
    values = values_of(LLAMA_FACTORY["lora-sft"], tmp_path)
    assert (values["data.max_length"], values["data.overlong"]) == (2048, "truncate")
    assert values_of(AXOLOTL["lora"], tmp_path)["data.overlong"] == "drop"


def test_rates_that_yaml_reads_as_text(tmp_path: Path) -> None:
    values = values_of(AXOLOTL["text-rates"], tmp_path)
    assert values["optim.learning_rate"] == 2e-4
    assert values["optim.weight_decay"] == 1e-2 and values["optim.beta2"] == 0.95
    assert values["optim.schedule"] == "constant"


def test_all_linear_layers(tmp_path: Path) -> None:
    assert values_of(AXOLOTL["qlora"], tmp_path)["adapter.targets"] == "all-linear"
    assert "q_proj" in values_of(AXOLOTL["lora"], tmp_path)["adapter.targets"]
    assert values_of(LLAMA_FACTORY["lora-sft"], tmp_path)["adapter.targets"] == "all-linear"


def test_field_maps_and_roles(tmp_path: Path) -> None:
    [source] = values_of(AXOLOTL["chat-template"], tmp_path)["data.train"]
    assert source["roles"] == {"human": "user", "gpt": "assistant"}
    [source] = values_of(AXOLOTL["field-map"], tmp_path)["data.train"]
    assert source["path"] == "data/chats.jsonl"
    assert source["columns"] == {"messages": "dialog"}
    assert source["message_keys"] == {"role": "speaker", "content": "text"}
    [source, more] = values_of(AXOLOTL["dpo-intel"], tmp_path)["data.train"]
    assert source["columns"] == {"instruction": "question"}
    assert more["columns"] == {"chosen": "chosen_response", "rejected": "rejected_response"}
    [source] = values_of(AXOLOTL["dpo-own"], tmp_path)["data.train"]
    assert source["columns"] == {"instruction": "question", "chosen": "good", "rejected": "bad"}
    [source] = values_of(AXOLOTL["test-datasets"], tmp_path)["data.train"]
    assert source["columns"] == {"instruction": "question", "output": "answer"}


def test_prompt_strategies_choose_method_and_template(tmp_path: Path) -> None:
    values = values_of(AXOLOTL["completion"], tmp_path)
    assert values["method.kind"] == "pretrain"
    assert values["data.train"] == [{"dataset": "org/texts", "columns": {"text": "body"}}]
    assert values_of(AXOLOTL["pretrain"], tmp_path)["method.kind"] == "pretrain"
    assert values_of(AXOLOTL["chatml"], tmp_path)["data.chat_template"] == "chatml"
    assert "### Response" in values_of(AXOLOTL["lora"], tmp_path)["data.chat_template"]
    assert "[INST] " in values_of(AXOLOTL["own-format"], tmp_path)["data.chat_template"]
    assert "data.chat_template" not in values_of(AXOLOTL["chat-template"], tmp_path)


def test_special_tokens(tmp_path: Path) -> None:
    result = imported(AXOLOTL["chatml"], tmp_path)
    assert "<|im_end|>" in result.changed["special_tokens"]
    assert flat(load_yaml(result.text))["model.add_tokens"] in (["<|im_start|>"], "auto")
    old = imported(f"{_AXOLOTL}datasets: [a/b]\ntokens: {{pad_token: '[PAD]'}}\n", tmp_path)
    assert "add_tokens" not in old.values["model"] and "pads nothing" in old.changed["tokens"]
    values = values_of(LLAMA_FACTORY["tokens"], tmp_path)
    assert values["model.add_tokens"] == ["<think>", "</think>"]


def test_methods(tmp_path: Path) -> None:
    kinds = {
        "Axolotl ipo": ("dpo", {"losses": {"ipo": 1.0}}),
        "Axolotl simpo": ("simpo", {"beta": 2.5, "gamma": 1.0}),
        "Axolotl kto": ("kto", {"beta": 0.5, "desirable_weight": 0.2}),
        "Axolotl reward": ("reward", {"center_coefficient": 0.01}),
        "LLaMA-Factory lora-ipo": ("dpo", {"losses": {"ipo": 1.0, "sft": 0.2}, "beta": 0.1}),
        "LLaMA-Factory lora-simpo": ("simpo", {"gamma": 0.5}),
        "LLaMA-Factory lora-reward": ("reward", {}),
        "LLaMA-Factory lora-pretrain": ("pretrain", {}),
        "TRL mpo": ("dpo", {"losses": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}}),
        "TRL command-cpo": ("simpo", {"gamma": 0.5, "beta": 2.0, "sft_weight": 1.0}),
        "TRL grpo": ("grpo", {"generations": 8, "max_completion": 256, "scale_rewards": "none"}),
        "TRL command-kto": ("kto", {}),
        "TRL command-rloo": ("rloo", {"rewards": [{"model": "org/classifier"}]}),
    }
    for name, (kind, others) in kinds.items():
        values = values_of(CONFIGS[name], tmp_path)
        assert values["method.kind"] == kind, name
        for key, value in others.items():
            assert values[f"method.{key}"] == value, (name, key)


def test_the_method_of_a_trl_file(tmp_path: Path) -> None:
    text = "model_name_or_path: a/b\ndataset_name: c/d\n"
    assert values_of(text, tmp_path)["method.kind"] == "sft"
    assert values_of(text, tmp_path, name="kto/config.yaml")["method.kind"] == "kto"
    assert values_of(text, tmp_path, method="reward")["method.kind"] == "reward"


def test_defaults_of_a_project_are_written(tmp_path: Path) -> None:
    text = "model_name_or_path: a/b\ndataset_name: c/d\nmax_length: 64\n"
    values = values_of(text, tmp_path, method="dpo")
    assert values["optim.learning_rate"] == 1e-6 and values["optim.epochs"] == 3.0
    assert values["optim.batch_size"] == values["optim.micro_batch_size"] == 8
    assert values["optim.schedule"] == "linear" and values["optim.warmup_ratio"] == 0.0


def test_dataset_info(tmp_path: Path) -> None:
    """Names of data sets are read from the file beside the configuration, or the named one."""
    (tmp_path / "data").mkdir()
    info = tmp_path / "data" / "dataset_info.json"
    info.write_text(json.dumps({"identity": {"file_name": "rows.jsonl"}}), encoding="utf-8")
    text = LLAMA_FACTORY["lora-sft"].replace("identity,alpaca_en_demo", "identity")
    written = imported(text, tmp_path)
    [source] = load_yaml(written.text)["data"]["train"]
    assert source == {
        "dataset": "identity",
        "dataset_info": "data/dataset_info.json",
        "limit": 1000,
    }
    assert not any("dataset_info.json" in note for note in written.notes)
    info.rename(tmp_path / "info.json")
    assert any("--dataset-info" in note for note in imported(text, tmp_path).notes)
    [source] = values_of(text, tmp_path, info=tmp_path / "info.json")["data.train"]
    assert source["dataset_info"] == "info.json"
    (tmp_path / "info.json").write_text('{"identity": {"file_name": "a", "columns": null}}')
    [source] = values_of(text, tmp_path, info=tmp_path / "info.json")["data.train"]
    assert source["dataset"] == "identity"
    online = imported(f"{text}dataset_dir: ONLINE\n", tmp_path)
    assert online.values["data"]["train"] == [{"dataset": "identity", "limit": 1000}]
    assert not online.notes
    absent = imported(text.replace("identity", "other"), tmp_path, info=tmp_path / "info.json")
    assert any("other" in note for note in absent.notes)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('{"file_name": "a", "columns": null, "tags": null}', None),
        ('{"file_name": "a", "columns": {"prompt": [1]}}', "not as LLaMA-Factory writes it"),
        ('{"file_name": "a", "num_samples": "x"}', "not as LLaMA-Factory writes it"),
        ('{"hf_hub_url": [1]}', "not as LLaMA-Factory writes it"),
        ("[" * 10**5, "cannot read"),
    ],
)
def test_entries_of_dataset_info(entry: str, message: str | None, tmp_path: Path) -> None:
    info = tmp_path / "info.json"
    info.write_text(f'{{"own": {entry}}}', encoding="utf-8")
    source = Source(dataset="own", dataset_info="info.json")
    if message is None:
        assert named_source(source, info) == Source(path=str(tmp_path / "a"))
        return
    with pytest.raises(InputError, match=message):
        named_source(source, info)


def test_a_folder_of_a_data_set_is_read_alone(tmp_path: Path) -> None:
    info = tmp_path / "info.json"
    entry = {"hf_hub_url": "a/b", "folder": "python", "columns": {"prompt": "content"}}
    info.write_text(json.dumps({"own": entry, "far": {"cloud_file_name": "s3://a/b.jsonl"}}))
    source = named_source(Source(dataset="own", dataset_info="info.json"), info)
    assert source == Source(path="hf://datasets/a/b/python", columns={"text": "content"})
    source = named_source(Source(dataset="far", dataset_info="info.json"), info)
    assert source == Source(path="s3://a/b.jsonl")


def test_sharding_needs_several_gpus(tmp_path: Path) -> None:
    assert "scale.strategy" not in values_of(AXOLOTL["full-fsdp"], tmp_path)
    assert values_of(AXOLOTL["full-fsdp"], tmp_path, 8)["scale.strategy"] == "fsdp"
    assert values_of(AXOLOTL["full"], tmp_path, 2)["scale.strategy"] == "fsdp"
    assert imported(AXOLOTL["full-fsdp"], tmp_path, 8).faults is None


def test_trackers_that_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those without a package or key would end the run before it starts, so they are reported."""
    text = TRL["sft"].replace("[wandb]", "[tensorboard, wandb, swanlab]")
    refusing = {"wandb"}

    def check(names: list[str]) -> None:
        if refusing & set(names):
            raise InputError("log.to: wandb has no key")

    monkeypatch.setattr(trainer, "check_trackers", check)
    result = imported(text, tmp_path)
    assert flat(load_yaml(result.text))["log.to"] == ["tensorboard"]
    assert "no key" in result.text and "swanlab: not there" in result.changed["report_to"]
    refusing.clear()
    assert values_of(text, tmp_path)["log.to"] == ["tensorboard", "wandb"]
    named = AXOLOTL["lora"].replace("wandb_project:", "wandb_project: shop")
    assert values_of(named, tmp_path)["log.to"] == ["wandb"]


def test_early_stopping(tmp_path: Path) -> None:
    text = LLAMA_FACTORY["lora-sft"] + "early_stopping_steps: 3\n"
    assert values_of(text, tmp_path)["eval.patience"] == 3


@pytest.mark.parametrize(
    ("files", "paths"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("[a.jsonl, b.jsonl]", ["a.jsonl", "b.jsonl"]),
        ("{train: a.jsonl, test: b.jsonl}", ["a.jsonl"]),
        ("{train: [a.jsonl, b.jsonl]}", ["a.jsonl", "b.jsonl"]),
        ("{first: a.jsonl, second: [b.jsonl]}", ["a.jsonl", "b.jsonl"]),
    ],
)
def test_data_files(files: str, paths: list[str], tmp_path: Path) -> None:
    """A text, a list, or these by split, as the datasets library takes them."""
    axolotl = AXOLOTL["lora"].replace("path: org/alpaca", f"path: json\n    data_files: {files}")
    trl = f"{_MIXTURE}[{{id: json, data_files: {files}}}]}}\n"
    for text in (axolotl, trl):
        sources = values_of(text, tmp_path)["data.train"]
        assert [source["path"] for source in sources] == paths
    hub = trl.replace("id: json", "id: org/rows, split: 'train[:9]'")
    sources = values_of(hub, tmp_path)["data.train"]
    assert [source["path"] for source in sources] == [f"hf://datasets/org/rows/{p}" for p in paths]


@pytest.mark.parametrize(
    ("command", "kind", "gpus"),
    [
        ("python -m trl.scripts.dpo", "dpo", 1),
        ("python -m trl dpo", "dpo", 1),
        ("python -mtrl.cli kto", "kto", 1),
        ("python -m accelerate.commands.launch --num_processes 8 dpo.py", "dpo", 8),
        ("accelerate launch -m --num_processes 8 trl.scripts.reward", "reward", 8),
        ("python -m torch.distributed.run --nproc_per_node 8 sft.py", "sft", 8),
        ("python3 -m torch.distributed.launch --nnodes=2 --nproc-per-node=4 kto.py", "kto", 8),
        ("torchrun --nproc_per_node 4 --module trl.scripts.orpo", "orpo", 4),
        ("python -m deepspeed.launcher.runner --num_gpus 4 examples/dpo.py", "dpo", 4),
        ("deepspeed --num_nodes 2 --num_gpus 4 grpo_with_rewards.py", "grpo", 8),
    ],
)
def test_launchers_and_modules(command: str, kind: str, gpus: int, tmp_path: Path) -> None:
    values = values_of(f"{command} --model_name_or_path a/b --dataset_name c/d", tmp_path)
    assert values["method.kind"] == kind and values.get("scale.workers", 1) == gpus


def test_modules_of_other_projects(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(AXOLOTL["lora"], encoding="utf-8")
    (tmp_path / "l.yaml").write_text(LLAMA_FACTORY["lora-sft"], encoding="utf-8")
    for module, name, file in (
        ("axolotl.cli.train", "Axolotl", "a.yaml"),
        ("axolotl.cli.main train", "Axolotl", "a.yaml"),
        ("llamafactory.cli train", "LLaMA-Factory", "l.yaml"),
        ("llamafactory.launcher", "LLaMA-Factory", "l.yaml"),
    ):
        result = imported(
            f"accelerate launch --num_processes 2 -m {module} {tmp_path / file}", tmp_path
        )
        assert result.dialect == name
        assert load_yaml(result.text)["scale"]["workers"] == 2


def test_paths_start_from_the_recipes_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of models, adapters, rows, templates and code, all beside the configuration."""
    monkeypatch.chdir(tmp_path)
    to = tmp_path / "recipes"
    for folder in ("base", "adapter", "reference", "judge", "my"):
        Path(folder).mkdir()
    for file in ("a.jsonl", "b.jsonl", "chat.jinja", "rewards.py", "my/code.py"):
        Path(file).touch()
    factory = LLAMA_FACTORY["lora-dpo"].replace("org/model", "base") + "ref_model: reference\n"
    factory += "adapter_name_or_path: adapter\neval_dataset: b.jsonl\n"
    factory = factory.replace("dpo_en_demo", "a.jsonl")
    axolotl = AXOLOTL["chat-template"].replace("chat_template: ", "chat_template: jinja #")
    axolotl += "chat_template_jinja: chat.jinja\nlora_model_dir: adapter\n"
    axolotl += "test_datasets: [{path: b.jsonl, type: chat_template}]\n"
    grpo = TRL["grpo"].replace("accuracy_reward, think_format_reward", "rewards.f, my.code.g")
    for text, paths in (
        (factory, ["base", "reference", "adapter", "a.jsonl", "b.jsonl"]),
        (axolotl, ["chat.jinja", "adapter", "b.jsonl"]),
        (grpo, ["rewards.py:f", "my/code.py:g"]),
        (TRL["command-rloo"].replace("org/classifier", "judge"), ["judge"]),
        (TRL["sft-chatml"].replace("chatml", "chat.jinja"), ["chat.jinja"]),
    ):
        source = text
        if not is_command(text) or ":" in text.partition(" ")[0]:
            source = "config.yaml"
            Path(source).write_text(text, encoding="utf-8")
        made = import_settings(source, None, to, None, None).text
        assert [path for path in paths if f"../{path}" not in made] == []


@pytest.mark.parametrize(
    ("more", "scale"),
    [
        ("num_processes: 4\n", {"workers": 4}),
        ("accelerate_config: zero2\n", {"workers": 8}),
        ("accelerate_config: fsdp2\n", {"workers": 8, "strategy": "fsdp"}),
        ("accelerate_config: zero3\nnum_processes: 2\n", {"workers": 2, "strategy": "fsdp"}),
        ("env: {CUDA_VISIBLE_DEVICES: '0,1'}\n", {"workers": 2}),
        ("env: {CUDA_VISIBLE_DEVICES: '0,1'}\naccelerate_config: zero2\n", {"workers": 2}),
    ],
)
def test_a_file_of_trl_says_how_it_is_launched(
    more: str, scale: dict[str, Any], tmp_path: Path
) -> None:
    result = imported(_TRL + more, tmp_path)
    assert result.values["scale"] == scale and not result.unknown
    assert result.values["optim"]["batch_size"] == 8 * scale["workers"]
    (tmp_path / "config.yaml").write_text(_TRL + more)
    command = imported(f"trl sft --config {tmp_path / 'config.yaml'} --learning_rate 1", tmp_path)
    assert command.values["scale"] == scale


def test_a_launch_file_that_is_not_here_shards_by_its_name(tmp_path: Path) -> None:
    start = "accelerate launch --config_file recipes/zero3.yaml --num_processes=4 sft.py"
    values = values_of(f"{start} --model_name_or_path a/b --dataset_name c/d", tmp_path)
    assert values["scale.workers"] == 4 and values["scale.strategy"] == "fsdp"


def test_a_script_for_a_shell(tmp_path: Path) -> None:
    """Its variables have their values; redirections, pipes and other commands are none of it."""
    script = (
        "#!/bin/bash\nset -e  # it's a script\nexport CUDA_VISIBLE_DEVICES=0,1\n"
        "MODEL=a/b LR=1\nMORE='--packing --max_length 99'\ncd dir && torchrun sft.py \\\n"
        '  --model_name_or_path "$MODEL" --dataset_name c/d \\\n'
        "  --learning_rate ${LR}e-5 --num_train_epochs ${EPOCHS:-7} $MORE \\\n"
        "  --run_name 'one two' > log.txt 2>&1 | tee out &\necho 'done'\n"
    )
    result = imported(script, tmp_path, name="train.sh")
    values = flat(result.values)
    assert values["model.base"] == "a/b" and values["optim.learning_rate"] == 1e-5
    assert values["optim.epochs"] == 7.0 and values["data.max_length"] == 99
    assert values["scale.workers"] == 2 and values["name"] == "one-two"
    assert not result.unknown
    quoted = (
        script.partition(" > ")[0] + " --system_prompt 'a `b` $c $(d)' --chat_template \"\\$e\""
    )
    (source,) = imported(quoted, tmp_path, name="train.sh").values["data"]["train"]
    assert source["system"] == "a `b` $c $(d)"
    assert values_of(f"python get.py --x 1\ntrl env\n{script}", tmp_path) == values
    lines = "trl sft\n  --model_name_or_path a/b\n  --dataset_name c/d\ntrl dpo"
    assert values_of(lines, tmp_path)["method.kind"] == "sft"


def test_old_names_of_trl(tmp_path: Path) -> None:
    text = "model_name: a/b\ndataset_name: c/d\nuse_peft: true\npeft_lora_r: 4\nbatch_size: 3\n"
    result = imported(f"{text}seq_length: 77\ntarget_modules: [q_proj]\n", tmp_path)
    values = flat(result.values)
    assert values["model.base"] == "a/b" and values["adapter.rank"] == 4
    assert values["optim.batch_size"] == 3 and values["data.max_length"] == 77
    assert values["adapter.targets"] == ["q_proj"]
    assert not result.unknown and {"model_name", "batch_size", "peft_lora_r"} <= set(result.mapped)


def test_a_model_that_is_missing_is_noted(tmp_path: Path) -> None:
    result = imported("sequence_len: 64\nmicro_batch_size: 1\ndatasets: [a/b]\n", tmp_path)
    assert any("no model is named" in note for note in result.notes)


def test_unknown_secrets_are_hidden(tmp_path: Path) -> None:
    key = "0123456789abcdef" * 2
    assert key not in imported(f"{_AXOLOTL}datasets: [a/b]\nmy_api_key: {key}\n", tmp_path).text


def test_streamed_rows(tmp_path: Path) -> None:
    """They stream in finray, too, where the number of steps is set."""
    axolotl = f"{_AXOLOTL}pretraining_dataset: [{{path: a/b, type: pretrain}}]\n"
    trl = f"{_TRL}streaming: true\n"
    mixed = "model_name_or_path: a/b\ndataset_mixture: {streaming: true, datasets: [c/d]}\n"
    factory = LLAMA_FACTORY["lora-sft"] + "streaming: true\n"
    for text in (axolotl, trl, mixed, factory):
        result = imported(f"{text}max_steps: 5\n", tmp_path)
        assert result.values["data"]["prepare"] == "streaming" and result.faults is None
        result = imported(text, tmp_path)
        assert "prepare" not in result.values["data"]
        assert any("data.prepare: streaming" in text for text in result.changed.values())
    whole = imported(f"{trl}max_steps: 5\nprecompute_ref_log_probs: true\n", tmp_path)
    assert "prepare" not in whole.values["data"] and "need all" in whole.changed["streaming"]
    ahead = imported(f"{axolotl}streaming: false\nmax_steps: 5\n", tmp_path)
    assert "prepare" not in ahead.values["data"]


def test_texts_of_some_data_sets_alone_are_named(tmp_path: Path) -> None:
    text = f"{_AXOLOTL}datasets:\n- {{path: a/b, type: alpaca}}\n- {{path: c/d, type: %s}}\n"
    mixed = imported(text % "chat_template", tmp_path)
    assert "chat_template" not in mixed.values["data"]
    assert any("instruct: other data sets have none" in note for note in mixed.notes)
    assert not any("styles of" in note for note in imported(text % "alpaca", tmp_path).notes)


def test_templates_of_llama_factory(tmp_path: Path) -> None:
    """Those that replace a model's own are written, with the system prompts that they bring."""
    text = LLAMA_FACTORY["lora-sft"]
    for name, part in (("chatml", "chatml"), ("alpaca", "### Response"), ("default", "Human: ")):
        replaced = re.sub(r"template: .*", f"template: {name}", text)
        data = imported(replaced, tmp_path).values["data"]
        assert part in data["chat_template"]
        assert ("system" in data["train"][0]) == (name == "alpaca")
    assert "chat_template" not in imported(text, tmp_path).values["data"]


@pytest.mark.parametrize("system", ["a\n\n", "a\n" * 40 + "\n\n", "\n", "it's: {x}\n" * 20])
def test_texts_of_several_lines_stay_what_they_are(system: str, tmp_path: Path) -> None:
    text = f"{_AXOLOTL}datasets: [a/b]\ndefault_system_message: {json.dumps(system)}\n"
    result = imported(f"{text}optimizer: {json.dumps(system)}\n", tmp_path)  # into a comment
    assert result.values["data"]["train"][0]["system"] == system
    assert "\n" not in result.changed.get("optimizer", "")


def test_what_is_said_of_turns(tmp_path: Path) -> None:
    """Which of them count, where their reasoning stands, and the old way to train the last one."""
    start = f"{_AXOLOTL}datasets:\n- path: a/b\n  type: chat_template\n"
    result = imported(
        f"{start}  message_field_training: counts\n  field_thinking: why\n"
        "  message_property_mappings: {role: who, content: text, tool_calls: calls}\n",
        tmp_path,
    )
    keys = {"role": "who", "content": "text", "tool_calls": "calls"}
    [source] = result.values["data"]["train"]
    assert source["message_keys"] == {**keys, "reasoning_content": "why", "weight": "counts"}
    result = imported(f"{start}  message_field_training: train\n", tmp_path)
    assert "message_keys" not in result.values["data"]["train"][0]
    assert result.mapped["datasets.0.message_field_training"] == "finray reads train"
    result = imported(f"{start}  roles_to_train:\n  train_on_eos:\n", tmp_path)
    assert result.values["method"]["train_on"] == "last"
    result = imported(f"{start}  roles_to_train:\n", tmp_path)
    assert "train_on" not in result.values["method"]


# refusals and the command


def test_a_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.py: a program; finray import reads"):
        imported("x:int = 1\n", tmp_path, name="train.py")


def test_two_dialects_are_refused(tmp_path: Path) -> None:
    text = AXOLOTL["lora"] + "finetuning_type: lora\ncutoff_len: 10\n"
    with pytest.raises(InputError, match=r"Axolotl's base_model.* and LLaMA-Factory's "):
        imported(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: ppo\nmodel_name_or_path: a/b\ndataset: c\n", "stage: 'ppo': finray has no PPO"),
        ("model_name_or_path: a\nexport_dir: b\ntemplate: c\n", "exports a model"),
        ("model_name_or_path: a\ninfer_backend: vllm\ntemplate: c\n", "nothing is trained"),
        ("base_model: a\nrl: ebft\ndatasets: [{path: a/b}]\n", "rl: 'ebft': finray has no such"),
        ("base_model: a\nsequence_len: 10\n", "a recipe needs rows to learn from"),
        ("base_model: a\nsequence_len: many\ndatasets: [a/b]\n", "expected a number, found 'many'"),
        ("compute_environment: LOCAL_MACHINE\n", "accelerate's own settings"),
        ("name: a\nmodel: b\ndata: {train: c}\n", "a recipe of finray's already"),
        (f"{_TRL}loss_type: [sft, ipo]\nloss_weights: [0.5, b]\n", "expected a list of numbers"),
        (f"{_TRL}reward_funcs: a\nreward_weights: [a]\n", "reward_weights: expected a list"),
        (f"{_TRL}num_generations: 0\n", "num_generations: expected a whole number from 1 on"),
        (f"{_TRL}num_generations: 2\nnum_iterations: 0\n", "expected a whole number from 1 on"),
        (f"{_MIXTURE}[{{id: a/b, weight: all}}]}}\n", "datasets.0: weight: expected a number"),
        (f"{_MIXTURE}[{{id: a/b, fraction: -1}}]}}\n", "datasets.0: fraction: expected a share"),
        (f"{_MIXTURE}[3]}}\n", "datasets.0: expected a mapping, found 3"),
        (f"{_MIXTURE}3}}\n", "dataset_mixture: datasets: expected a list of data sets"),
        (f"{_AXOLOTL}datasets: [{{path: a/b, shards: many}}]\n", "shards: expected a number"),
        (
            f"{_AXOLOTL}datasets: [a/b]\nmicro_batch_size: .inf\n",
            "micro_batch_size: expected a number",
        ),
        (
            f"{_AXOLOTL}datasets: [a/b]\nmicro_batch_size: 1e30\n",
            "micro_batch_size: expected a whole number",
        ),
        ("trl sft --model_name_or_path " + "a" * 300 + " --dataset_name ''", "dataset_name"),
        ("a: 1\n", "no configuration of Axolotl, LLaMA-Factory and TRL"),
        ("model: {a: 1}\ndataset: {b: 1}\nepochs: 1\n", "its keys: model, dataset, epochs"),
        ("data: {train_files: a}\ntrainer: {}\n", "its keys: data, trainer"),
        ("'a\nb' c", "names no training script: a"),
        ("trl sft --learning_rate $LR", "$LR is a variable of the shell without a value"),
        ("trl sft --run_name x-$(date | md5sum) --seed 1", "$(date | md5sum) is computed by a"),
        ("trl sft --run_name `date +%s` --seed 1", "`date +%s` is computed by a shell"),
        ("N=$(nproc | wc -l)\ntrl sft --seed $N", "$(nproc is computed by a shell"),
        ('trl sft "${ARGS[@]}"', "${ARGS[@]} is a variable of the shell without a value"),
        ('trl sft --config a.yaml "$@"', "$@ is a variable of the shell without a value"),
        ("trl sft --model_name_or_path 'a", "a quote is not closed"),
        ("llamafactory-cli export a.yaml", "llamafactory-cli export trains nothing"),
        ("axolotl merge-lora a.yaml", "axolotl merge-lora trains nothing"),
        ("- a\n", "expected a mapping"),
        ("bash train.sh --x 1", "names no training script"),
        ("trl ppo --model_name_or_path a/b", "ppo: finray has no such method"),
        ("trl sft --model_name_or_path a/b", "a recipe needs rows to learn from"),
    ],
)
def test_what_cannot_be_imported(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        imported(text, tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_setting_of_a_mixture_is_dropped_without_a_word(tmp_path: Path) -> None:
    text = (
        "model_name_or_path: a/b\ndataset_name: e/f\ndataset_mixture:\n  seed: 3\n  odd: 1\n"
        "  streaming: true\n  test_split_size: 50\n  datasets:\n"
        "  - {path: c/d, data_dir: parts/de/, columns: [messages], fraction: 0.3, wrong: 1}\n"
        "  - {path: json, data_dir: rows, data_files: [a.jsonl], fraction: 0.7}\n"
        "  - {path: g/h, fraction: 0}\n"
    )
    result = imported(text, tmp_path)
    assert result.values["data"]["train"] == [
        {"path": "hf://datasets/c/d/parts/de/"},
        {"path": "rows/a.jsonl"},
    ]
    each = "dataset_mixture.datasets"
    assert {f"{each}.0.columns", f"{each}.2.fraction", "dataset_mixture.seed"} <= set(result.left)
    assert "dataset_mixture comes before it" in result.left["dataset_name"]
    assert result.unknown == ("dataset_mixture.odd", f"{each}.0.wrong")
    changed = {f"{each}.0.fraction", f"{each}.1.fraction", "dataset_mixture.streaming"}
    assert changed | {"dataset_mixture.test_split_size"} <= set(result.changed)
    assert result.faults is None


def test_the_options_of_a_launcher_count_or_are_named(tmp_path: Path) -> None:
    script = f"{tmp_path}/sft.py --model_name_or_path a/b --dataset_name c/d"
    start = "accelerate launch --num_processes 8 --mixed_precision bf16"
    result = imported(f"{start} --use_deepspeed --zero_stage 3 {script}", tmp_path)
    assert result.values["scale"] == {"workers": 8, "strategy": "fsdp"}
    assert result.mapped["zero_stage"] == "scale.strategy: fsdp, as --zero_stage 3"
    assert result.left.keys() == {"mixed_precision"}
    for start in ("deepspeed --include a:0,1@b:0", "accelerate launch --gpu_ids 0,1,2"):
        scale = imported(f"{start} {script}", tmp_path).values["scale"]
        assert scale["workers"] == 3
    assert imported(f"deepspeed --include a {script}", tmp_path).values.get("scale") is None
    file = tmp_path / "launch.yaml"
    file.write_text(
        "distributed_type: DEEPSPEED\nnum_processes: 4\n"
        "deepspeed_config: {deepspeed_config_file: ds_z3.json}\n"
    )
    result = imported(f"accelerate launch --config_file {file} {script}", tmp_path)
    assert result.values["scale"] == {"workers": 4, "strategy": "fsdp"}


def test_what_files_of_open_r1_say(tmp_path: Path) -> None:
    """Keys that stand twice with the same value, and the column of the prompt."""
    text = f"{_TRL}num_generations: 2\ndo_eval: false\ndo_eval: false\ndataset_prompt_column: q\n"
    result = imported(text, tmp_path)
    assert result.values["data"]["train"] == [{"dataset": "c/d", "columns": {"prompt": "q"}}]
    assert "dataset_prompt_column" in result.mapped and not result.unknown
    with pytest.raises(InputError, match=r"do_eval: already set on line 4; keep one of them"):
        imported(text.replace("false", "true", 1), tmp_path)


def test_what_a_program_passes(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: a/b\ntrain_dataset: rows.yaml\ncutoff_len: 64\nmodel_class: llm\n")
    made = finray.import_recipe(file, gpus=2, method="dpo").values
    assert made["method"] == {"kind": "dpo"} and made["scale"]["workers"] == 2
    for gpus in (2.5, "8", True, 0):
        with pytest.raises(InputError, match="--gpus: expected at least 1, found"):
            finray.import_recipe(file, gpus=gpus)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="source: expected a text or a path, found nothing"):
        finray.import_recipe(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="data: expected a text or a path, found 3"):
        finray.init_recipe(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="there is no such file or folder"):
        finray.init_recipe(tmp_path / "absent.jsonl", model="a/b")
    file.write_text(f"{_AXOLOTL}datasets: [a/b]\n")
    with pytest.raises(InputError, match="is Axolotl's, which says its method; leave it out"):
        finray.import_recipe(file, method="dpo")


def test_what_fsdp_config_nests_is_named(tmp_path: Path) -> None:
    text = f"{_AXOLOTL}datasets: [a/b]\nfsdp_config: {{offload_params: true, cpu_ram: false}}\n"
    result = imported(text, tmp_path, 2)
    assert result.values["scale"]["strategy"] == "fsdp"
    assert result.left.keys() == {"fsdp_config.offload_params"}


@pytest.mark.parametrize("key", ["activation_checkpointing", "fsdp_activation_checkpointing"])
def test_fsdp_recomputes_only_where_it_says_so(key: str, tmp_path: Path) -> None:
    """Its false leaves the choice open; its true counts beside gradient_checkpointing: false."""
    text = f"{_AXOLOTL}datasets: [a/b]\nfsdp_config: {{{key}: VALUE}}\n"
    for more in ("", "gradient_checkpointing: false\n"):
        result = imported(text.replace("VALUE", "true") + more, tmp_path)
        assert result.values["model"]["gradient_checkpointing"] is True
        assert f"fsdp_config.{key}" not in result.left
    off = imported(text.replace("VALUE", "false"), tmp_path).values["model"]
    assert "gradient_checkpointing" not in off
    kept = imported(text.replace("VALUE", "false") + "gradient_checkpointing: true\n", tmp_path)
    assert kept.values["model"]["gradient_checkpointing"] is True


def test_what_version_1_of_llama_factory_nests_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text(
        "one: {path: a/b, converter: own, odd: 1}\ntwo: {path: c/d, streaming: true}\n"
    )
    text = "model: a/b\ntrain_dataset: rows.yaml\nquant_config: {quantization_type: fp4}\n"
    result = imported(f"{text}peft_config: {{name: lora, bias: all}}\n", tmp_path)
    named = {"peft_config.bias", "quant_config.quantization_type", "train_dataset.one.odd"}
    assert set(result.unknown) == named
    assert {"train_dataset.one.converter", "train_dataset.two.streaming"} <= set(result.changed)
    frozen = "{name: freeze, freeze_trainable_layers: -3, freeze_trainable_modules: [mlp]}"
    result = imported(f"{text}peft_config: {frozen}\n", tmp_path)
    each = "peft_config.freeze_trainable_"
    assert {f"{each}layers", f"{each}modules"} <= set(result.changed)


def keys_of(values: Any, key: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys of all values inside a value."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    keys: list[tuple[Any, ...]] = []
    for name, value in items:
        keys.append((*key, name))
        keys += keys_of(value, (*key, name)) if isinstance(value, dict | list) else []
    return keys


@pytest.mark.long
def test_any_value_becomes_a_recipe_or_a_message(tmp_path: Path) -> None:
    """Of a setting in a file, or of one that its project has beside them; each equally often."""
    files = {name: load_yaml(text) for name, text in FILES.items()}
    by_key: dict[str, list[tuple[str, tuple[Any, ...]]]] = {}
    for name, values in files.items():
        table = dialect_of(name.partition(" ")[0]).entries()
        for key in [*keys_of(values), *((own,) for own, entry in table if entry.fate != "left")]:
            by_key.setdefault(".".join(map(str, key)), []).append((name, key))

    @settings(
        max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(st.sampled_from(sorted(by_key)).flatmap(lambda k: st.sampled_from(by_key[k])), VALUES)
    def is_handled(place: tuple[str, tuple[Any, ...]], value: Any) -> None:
        name, (*parents, last) = place
        values = copy.deepcopy(files[name])
        target = values
        for part in parents:
            target = target[part]
        target[last] = value
        try:
            imported(dump_yaml(values), tmp_path)
        except FinrayError as error:
            assert "\n" not in str(error)

    is_handled()


def test_an_unknown_key_is_listed(tmp_path: Path) -> None:
    text = AXOLOTL["lora"].replace("type: alpaca", "type: alpaca\n    strange: 1") + "odd: 7\n"
    result = imported(text, tmp_path)
    assert result.unknown == ("datasets.0.strange", "odd")
    assert "odd: 7" in result.text.rpartition("Not known")[2]


def test_a_json_file(tmp_path: Path) -> None:
    text = json.dumps(load_yaml(LLAMA_FACTORY["lora-sft"]), indent="\t")
    assert values_of(text, tmp_path, name="args.json")["adapter.rank"] == 8


def test_the_alpaca_text_is_axolotls(tmp_path: Path, tiny_model: Path) -> None:
    """What the model reads and learns, in the prompt that Axolotl's strategy writes."""
    source = {"instruction": "Add.", "input": "", "output": "Done."}
    (tmp_path / "rows.jsonl").write_text((json.dumps(source) + "\n") * 50, encoding="utf-8")
    text = AXOLOTL["lora"].replace("org/alpaca", str(tmp_path / "rows.jsonl"))
    values = load_yaml(imported(text, tmp_path).text)
    values["model"]["base"] = str(tiny_model)
    storage = tmp_path / "runs"
    recipe = load_recipe({**values, "storage": str(storage)})
    [row] = show_rows(recipe, 1, Folder(str(storage)) / "prepared").rows
    assert row.texts, row.problem
    pieces = row.texts[0].pieces
    whole = "".join(piece.text for piece in pieces)
    assert whole == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\nDone.<|im_end|>"
    )
    assert "".join(p.text for p in pieces if p.trained) == "Done.<|im_end|>"


BELOW = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)
STRATEGIES = [
    (
        "oasst",
        {"INSTRUCTION": "I", "RESPONSE": "O"},
        f"{BELOW}\n\n### Instruction:\nI\n\n### Response:\n",
    ),
    ("alpaca_chat", {"instruction": "I", "output": "O"}, f"SYSTEM: {BELOW}\nUSER: I\nASSISTANT:"),
    ("alpaca_chat.load_no_prompt", {"instruction": "I", "output": "O"}, "USER: I\nASSISTANT:"),
    (
        "alpaca_w_system",
        {"system": "S", "instruction": "I", "output": "O"},
        "SYSTEM: S\nUSER: I\nASSISTANT:",
    ),
    (
        "alpaca_w_system.load_open_orca",
        {"system_prompt": "S", "question": "I", "response": "O"},
        "### System:\nS\n### Human:\nI\n### Assistant:\n",
    ),
    (
        "orcamini",
        {"system_prompt": "S", "question": "I", "response": "O"},
        "### System:\nS\n\n### User:\nI\n\n### Response:\n",
    ),
    (
        "summarizetldr",
        {"article": "I", "summary": "O"},
        "USER: Summarize the following article as a TL;DR.\nI\nASSISTANT:",
    ),
    (
        "context_qa",
        {"article": "A", "question": "I", "answer": "O"},
        "SYSTEM: Use the following contextual information to concisely answer the question.\n\n"
        "USER: A\n\nI\nASSISTANT:",
    ),
    (
        "{system_prompt: S, field_instruction: q, field_output: a, format: 'Q {instruction} A', "
        "system_format: '<{system}>'}",
        {"q": "I", "a": "O"},
        "<S>Q I A",
    ),
    ("{field_instruction: q, field_output: a}", {"q": "I", "a": "O"}, "I "),
]  # fmt: skip


@pytest.mark.long
def test_the_texts_of_other_strategies_are_axolotls(tmp_path: Path, tiny_model: Path) -> None:
    """Prompt and answer as its prompters write them; of an input, which has a place of its own
    there, only that it is read."""
    storage = tmp_path / "runs"
    for number, (strategy, row, prompt) in enumerate(STRATEGIES):
        rows = tmp_path / f"{number}.jsonl"
        rows.write_text(json.dumps(row) + "\n", encoding="utf-8")
        data = f"datasets: [{{path: {rows}, type: {strategy}}}]\n"
        text = f"base_model: {tiny_model}\nsequence_len: 128\n{data}chat_template: chatml\n"
        result = imported(text, tmp_path)
        recipe = load_recipe({**result.values, "storage": str(storage)})
        [shown] = show_rows(recipe, 1, Folder(str(storage)) / "prepared").rows
        assert shown.texts, (strategy, shown.problem)
        pieces = shown.texts[0].pieces
        assert "".join(p.text for p in pieces if not p.trained) == prompt, strategy
        assert "".join(p.text for p in pieces if p.trained) == "O<|im_end|>", strategy
        assert "write the text of a row" in result.left["chat_template"]
    [source] = values_of(
        f"{_AXOLOTL}datasets: [{{path: a, type: alpaca}}, {{path: b, type: chat_template}}]\n",
        tmp_path,
    )["data.train"][:1]
    assert "system" not in source


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("axolotl.yml").write_text(AXOLOTL["chat-template"], encoding="utf-8")
    assert main(["import", "axolotl.yml", "-o", "recipe.yaml", "--gpus", "4"]) == 0
    out, err = capsys.readouterr()
    assert out == "recipe.yaml\n"
    assert "micro_batch_size" in err and "next: finray check recipe.yaml" in err
    assert load_recipe(Path("recipe.yaml")).optim.batch_size == 2 * 4 * 4
    assert main(["import", "axolotl.yml", "-o", "recipe.yaml"]) == 2
    assert "recipe.yaml exists already" in capsys.readouterr().err
    assert main(["import", TRL["command-sft"], "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert not err and load_yaml(out)["data"]["packing"] == "auto"
    assert main(["import", "axolotl.yml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mapped"]["lora_r"] == "adapter.rank: 32"
    assert main(["import", "trl", "sft", "--beta", "1"]) == 2
    assert "put a command line into quotes" in capsys.readouterr().err
    assert main(["import", "absent.yml"]) == 2
    assert "absent.yml" in capsys.readouterr().err
