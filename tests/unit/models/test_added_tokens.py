"""Tokens that a run adds: trained rows of embedding and head, in the adapter and its merge."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.cases import mostly_slow
from support.composites import make_composite
from support.steps import by_workers, make_sequences, one_step
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from finray.training.common.errors import InputError
from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe, load_recipe
from finray.training.data.added_tokens import marks_of, tokens_to_add
from finray.training.data.stream import every_sequence
from finray.training.export.export import export
from finray.training.inspection import inspect_recipe
from finray.training.launch.in_process import InProcessLauncher
from finray.training.models.loading import count_meta_parameters, count_parameters, load_model
from finray.training.models.open_result import open_model
from finray.training.models.tokens import make_room
from finray.training.run import prepare_data, train

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

MARKS = ["<|im_start|>", "<|im_end|>"]
IDS = torch.tensor([[300, 5, 6, 301, 7, 8]])
CHATML = {"chat_template": "chatml", "max_length": 96, "packing": False}


def without_marks(tokenizer: Path, folder: Path) -> None:
    """Write the tokenizer with other tokens in place of ChatML's, and without a template."""
    text = (tokenizer / "tokenizer.json").read_text(encoding="utf-8")
    text = text.replace(MARKS[0], "<s>").replace(MARKS[1], "</s>")
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    config["eos_token"] = "</s>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model, of 300 tokens and tied, whose tokenizer lacks ChatML's marks."""
    folder = tmp_path_factory.mktemp("unmarked")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    without_marks(tiny_model, folder)
    return folder


@pytest.fixture(scope="module")
def bases(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases of 300 tokens: tied, with a head of its own, and of several modalities."""
    folder = tmp_path_factory.mktemp("bases")
    model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.02)
    shutil.copytree(base, folder / "untied")
    model.save_pretrained(folder / "untied")
    for kind in ("gemma3", "llava"):
        make_composite(kind, base, folder / kind)
    return {"tied": base, **{name: folder / name for name in ("untied", "gemma3", "llava")}}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, chat_rows: list[object]) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in chat_rows[:8]), encoding="utf-8")
    return file


def recipe(base: Path, rows: Path, storage: Path, **changes: Any) -> Recipe:
    source = [{"path": str(rows)}]
    values = {
        "name": "run",
        "model": {"base": str(base), "add_tokens": "auto"},
        "data": {"train": source, "eval": source, **CHATML},
        "optim": {"max_steps": 2, "batch_size": 8, "learning_rate": 1e-2},
        "eval": {"samples": 2, "max_new_tokens": 4},
        "scale": {"workers": 0},
        "log": {"every_steps": 1},
        "storage": str(storage),
        **changes,
    }
    return Recipe.model_validate(values)


def opened(folder: Path) -> Any:
    is_whole = "vision_config" in json.loads((folder / "config.json").read_text())
    make = AutoModelForImageTextToText if is_whole else AutoModelForCausalLM
    return make.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def plain_loss(model: Any, settings: Recipe) -> float:
    prepared, total, count = prepare_data(settings), 0.0, 0
    for row in every_sequence(prepared.files, prepared.manifest.train, 0, 1):
        ids = torch.from_numpy(row.input_ids.copy()).long()
        assert {300, 301} <= {*ids.tolist()}
        labels = ids.where(torch.from_numpy(row.trainable.copy()), -100)
        tokens = int((labels[1:] != -100).sum())
        total += float(model(input_ids=ids[None], labels=labels[None]).loss) * tokens
        count += tokens
    return total / count


LORA: dict[str, Any] = {"adapter": {"rank": 4, "alpha": 8}}
TRAINED: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "whole": {"adapter": {"rank": 4, "modules_to_save": ["embed_tokens", "lm_head"]}},
    "full": {},
}


@pytest.mark.parametrize(
    ("kind", "trained"),
    mostly_slow(
        [
            *((kind, "lora") for kind in ("tied", "untied", "gemma3", "llava")),
            *(("tied", "whole"), ("untied", "whole"), ("tied", "full"), ("gemma3", "full")),
        ],
        {("untied", "lora")},
    ),
)
def test_a_run(kind: str, trained: str, bases: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    """The result in plain transformers and PEFT, merged, and trained further."""
    settings = recipe(bases[kind], rows, tmp_path / "runs", **TRAINED[trained])
    record = train(settings, InProcessLauncher())
    run = tmp_path / "runs" / "run"
    assert record["embedding_rows"] == 302
    if trained != "full":
        result = opened(bases[kind])
        result.resize_token_embeddings(302)
        result = PeftModel.from_pretrained(result, run / "adapter").eval()
        export(Folder(str(run)), tmp_path / "whole", merge=True)
        whole, folder = opened(tmp_path / "whole"), tmp_path / "whole"
        torch.testing.assert_close(whole(input_ids=IDS).logits, result(input_ids=IDS).logits)
    else:
        whole = result = opened(run / "model")
        folder = run / "model"
    assert record["metrics"]["eval_loss"] == pytest.approx(plain_loss(result, settings), abs=1e-6)
    assert whole.get_input_embeddings().weight.shape[0] == 302
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(MARKS) == [300, 301] and tokenizer.chat_template
    if trained == "lora":
        check_rows(run / "adapter", kind)
        check_continued(settings, run, record, tmp_path)


def check_rows(adapter: Path, kind: str) -> None:
    """Two rows of each matrix, which are no longer the mean; nothing else of it."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    values = {name: value for name, value in tensors.items() if "lora_" not in name}
    assert len(values) == (2 if kind in ("untied", "llava") else 1)
    for value in values.values():
        assert value.shape == (2, 32) and not torch.equal(value[0], value[1])


def check_continued(settings: Recipe, run: Path, record: Any, tmp_path: Path) -> None:
    """The tokens come with the adapter, and training goes on from its loss."""
    values = settings.model_dump(mode="json", exclude={"adapter", "storage"})
    values["name"] = "again"
    values["storage"] = str(tmp_path / "runs")
    values["model"] |= {"adapter": str(run), "add_tokens": []}
    again = train(load_recipe(values), InProcessLauncher())
    assert again["before"]["eval_loss"] == pytest.approx(record["metrics"]["eval_loss"], abs=1e-6)
    assert again["metrics"]["eval_loss"] < again["before"]["eval_loss"]
    config = json.loads((tmp_path / "runs/again/adapter/adapter_config.json").read_text())
    assert {tuple(ids) for ids in config["trainable_token_indices"].values()} == {(300, 301)}
    with pytest.raises(InputError, match=r"model\.add_tokens: .* trains <\|im_start\|>, <\|im_en"):
        load_recipe({**values, "model": {**values["model"], "add_tokens": ["<x>"]}})
    name = str(run / "adapter")
    assert open_model(name, "causal", torch.float32, "x")(input_ids=IDS).logits.shape[-1] == 302


def test_new_rows_start_at_the_mean(bases: dict[str, Path]) -> None:
    """Also rows that the base has but its tokenizer never used."""
    model = opened(bases["untied"])
    before = {"model.embed_tokens": model.model.embed_tokens, "lm_head": model.lm_head}
    weights = {name: module.weight.detach().clone() for name, module in before.items()}
    make_room(model, [7, 299, 300, 301], [299, 300, 301])
    for name, weight in weights.items():
        after = model.get_submodule(name).weight
        mean = weight[:299].mean(dim=0)
        assert torch.equal(after[:299], weight[:299]) and after.shape == (302, 32)
        torch.testing.assert_close(after[299:], mean.expand(3, -1))
    assert model.config.vocab_size == 302


def test_rows_that_the_base_has_are_trained_without_others(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    model_settings = {"base": str(base), "add_tokens": ["<s>"]}
    settings = recipe(base, rows, tmp_path, **LORA, model=model_settings)
    model = load_model(settings)
    assert model.get_base_model().config.vocab_size == 300
    delta = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
    assert [tuple(value.shape) for value in delta] == [(1, 32)]
    assert count_parameters(model) == count_meta_parameters(settings)


def test_auto_adds_what_the_template_names() -> None:
    vocabulary = {"<|im_end|>", "a"}
    assert tokens_to_add("auto", vocabulary, "chatml") == ["<|im_start|>"]
    assert tokens_to_add("auto", vocabulary, "{{ '<|user|>' + x + '<|im_end|>' }}") == ["<|user|>"]
    assert tokens_to_add("auto", vocabulary, None) == [] == marks_of("no <marks> | here")
    assert tokens_to_add(["a"], vocabulary, "chatml") == ["a"]


def test_marks_that_are_no_tokens_are_refused_without_it(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"set model\.add_tokens: auto"):
        inspect_recipe(recipe(base, rows, tmp_path, model={"base": str(base)}))
    inspect_recipe(recipe(base, rows, tmp_path))


def test_tokens_beyond_the_embedding_are_named(base: Path, rows: Path, tmp_path: Path) -> None:
    """A tokenizer that learnt tokens of which the model knows nothing."""
    shutil.copytree(base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([*MARKS, "What"])
    tokenizer.save_pretrained(tmp_path / "base")
    model = {"base": str(tmp_path / "base")}
    with pytest.raises(InputError, match=r"300 rows, and none for <\|im_start\|>, <\|im_end\|>"):
        inspect_recipe(recipe(base, rows, tmp_path / "runs", model=model))
    model["add_tokens"] = MARKS
    with pytest.raises(InputError, match=r"none for What, which the data needs; list them there"):
        prepare_data(recipe(base, rows, tmp_path / "runs", model=model))
    model["add_tokens"] = [*MARKS, "What"]
    settings = recipe(base, rows, tmp_path / "runs", model=model, **LORA)
    prepare_data(settings)
    assert load_model(settings).get_base_model().config.vocab_size == 303


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": {"last_layers": 1}}, r"add_tokens: model\.embed_tokens stay frozen"),
        (
            {"adapter": {"targets": ["embed_tokens"]}},
            r"adapter\.targets: model\.embed_tokens has",
        ),
    ],
)
def test_rows_that_would_not_be_trained(
    base: Path, rows: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        count_meta_parameters(recipe(base, rows, tmp_path, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_shards(bases: dict[str, Path], rows: Path, tmp_path: Path, kind: str) -> None:
    def settings(workers: int) -> Recipe:
        scale = {"workers": workers, "strategy": "fsdp" if workers else "auto"}
        optim = {"batch_size": 4, "micro_batch_size": 1}
        return recipe(bases[kind], rows, tmp_path, scale=scale, optim=optim, **LORA)

    def model(workers: int) -> Any:
        torch.manual_seed(4)
        made = load_model(settings(workers))
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        return made

    sequences = make_sequences(4)
    for sequence in sequences:
        sequence.input_ids[:2] = (300, 301)
    expected, _, _ = one_step(model(0), settings(0), sequences, tmp_path, 0, 1)
    assert any("trainable_tokens_delta" in name for name in expected)

    def work(rank: int, world_size: int) -> dict[str, Any]:
        return one_step(model(2), settings(2), sequences, tmp_path, rank, world_size)[0]

    for measured in by_workers(2, tmp_path, work):
        assert measured.keys() == expected.keys()
        for name, gradient in measured.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)
