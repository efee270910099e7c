"""`finray init`: a recipe from data, model and machine, whose comments explain each choice."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finray.cluster.api.outlook import data_outlook
from finray.cluster.api.recipes import prepare_process
from finray.cluster.api.starting import init_recipe
from finray.cluster.cli.main import main
from finray.cluster.gpus import Gpu
from finray.cluster.starting.first_recipe import FirstRecipe, first_recipe
from finray.training.common.errors import InputError
from finray.training.common.yaml_text import load_yaml
from finray.training.config.recipe import Recipe, load_recipe
from finray.training.models.memory_estimate import estimate, sizes_of
from finray.tuning.default_search import suggested_learning_rate

QUESTION = {"role": "user", "content": "What comes after 1?"}
ANSWER = {"role": "assistant", "content": "Two comes after one."}
WORSE = {"role": "assistant", "content": "Three."}
SHAPES: dict[str, dict[str, Any]] = {
    "sft": {"messages": [QUESTION, ANSWER]},
    "dpo": {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [WORSE]},
    "kto": {"messages": [QUESTION, ANSWER], "label": True},
    "pretrain": {"text": "One comes before two."},
}
OFFLINE = "org/absent-7B"


@pytest.fixture(autouse=True)
def process() -> None:
    """Libraries are quiet, as in the command."""
    prepare_process()


def rows_of(row: dict[str, Any], folder: Path, count: int = 120) -> Path:
    """A file of such rows with other numbers."""
    file = folder / "rows.jsonl"
    text = json.dumps(row)
    lines = [text.replace("after 1?", f"after {n}?").replace("two", str(n)) for n in range(count)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def gpu(gib: float) -> Gpu:
    return Gpu("Card", round(gib * 2**30))


def made(file: Path, model: Path | str | None, *gpus: Gpu, **more: Any) -> FirstRecipe:
    method, rewards = more.get("method"), more.get("rewards", ())
    name = None if model is None else str(model)
    return first_recipe(str(file), name, method, rewards, gpus, file.parent)


def recipe_of(first: FirstRecipe, folder: Path) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(first.text, encoding="utf-8")
    return load_recipe(file)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_rows_choose_the_method(kind: str, tmp_path: Path, tiny_model: Path) -> None:
    first = made(rows_of(SHAPES[kind], tmp_path), tiny_model)
    recipe = recipe_of(first, tmp_path)
    assert first.method == recipe.method.kind == kind
    assert recipe.optim.learning_rate == suggested_learning_rate(recipe)


def test_paths_start_from_the_recipes_folder(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows and rewards, also where the folder is reached through a link."""
    monkeypatch.chdir(tmp_path)
    rows_of({"prompt": [QUESTION]}, tmp_path)
    Path("rewards.py").write_text("def f(completions, **columns):\n    return [0.0]\n")
    Path("real/recipes").mkdir(parents=True)
    Path("link").symlink_to("real/recipes")
    first = init_recipe(
        "rows.jsonl", to=Path("link/a.yaml"), model=str(tiny_model), rewards=["rewards.py:f"]
    )
    values = load_yaml(Path("link/a.yaml").read_text(encoding="utf-8"))
    assert values["method"]["rewards"] == [{"file": "../../rewards.py:f"}]
    assert values["data"]["train"] == [{"path": "../../rows.jsonl"}]
    monkeypatch.chdir("/")
    for recipe in (load_recipe(tmp_path / "link/a.yaml"), load_recipe(first.values)):
        assert Path(str(recipe.data.train[0].path)).resolve() == tmp_path / "rows.jsonl"


@pytest.mark.long
def test_each_setting_is_explained(tmp_path: Path, tiny_model: Path) -> None:
    """A comment stands beside or above each value."""
    text = made(rows_of(SHAPES["sft"], tmp_path, 500), tiny_model, gpu(80)).text
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if re.match(r"  +[a-z_]+: \S", line):
            assert "  # " in line or lines[number - 1].lstrip().startswith("#"), line
    assert lines[0].startswith("# Made by finray init from")


def test_lengths_are_those_of_the_tokenizer(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    long = {**ANSWER, "content": "after " * 9}
    file = rows_of({"prompt": [QUESTION], "chosen": [long], "rejected": [WORSE]}, tmp_path)
    asked = {**QUESTION, "content": "What comes after 119?"}
    ids = tokenizer.apply_chat_template([asked, long], tokenize=True, return_dict=False)
    length = recipe_of(made(file, tiny_model), tmp_path).data.max_length
    assert length == max(64, math.ceil(len(ids) / 64) * 64)
    assert f"99% up to {len(ids)}" in made(file, tiny_model).text.replace("\n  #   ", " ")


def test_the_model_limits_the_length(tmp_path: Path, tiny_model: Path) -> None:
    """It takes 128 tokens; rows of text would be packed into 1,024."""
    recipe = recipe_of(made(rows_of(SHAPES["pretrain"], tmp_path), tiny_model), tmp_path)
    assert recipe.data.max_length == 128


def test_rows_that_are_longer_than_the_model_takes(tmp_path: Path, tiny_model: Path) -> None:
    """The model takes 128 tokens: two thirds of the pairs are left out; text would be split."""
    file = rows_of(SHAPES["dpo"], tmp_path)
    lines = file.read_text(encoding="utf-8").splitlines()
    long = [line.replace("Three.", "after " * 99) for line in lines[:80]]
    file.write_text("\n".join([*long, *lines[80:]]), encoding="utf-8")
    first = made(file, tiny_model)
    text = first.text.replace("\n  #   ", " ")
    assert "66.7% of the first rows are longer than the model takes" in text
    assert "the longest" not in text and "data.overlong: truncate" in first.notes[0]
    assert recipe_of(first, tmp_path).data.max_length == 128
    assert "About 36 rows make" in text, "of 40, as a tenth is held out"
    assert "About 4 rows measure" in text
    file = rows_of({"text": "One comes before two. " * 2000}, tmp_path, 3)
    text = made(file, OFFLINE).text.replace("\n  #   ", " ")
    assert "Longer ones are split into pieces of up to 8,192 tokens." in text


def test_long_texts_are_split(tmp_path: Path, tiny_model: Path) -> None:
    """The model takes 128 tokens: the lengths of pieces are not those of the texts."""
    file = rows_of({"text": "One comes before two. " * 200}, tmp_path, 3)
    first = made(file, tiny_model)
    text = first.text.replace("\n  #   ", " ")
    assert "Texts are split into pieces of up to 128 tokens. Short ones share" in text
    assert "of the rows have up to" not in text and "the longest" not in text
    assert first.fault is None and "left out" not in text
    short = made(rows_of(SHAPES["pretrain"], tmp_path), tiny_model).text
    assert "are split" not in short and "the longest" in short.replace("\n  #   ", " ")


def test_samples_are_of_held_out_rows_that_fit(tmp_path: Path, tiny_model: Path) -> None:
    """Of 12 held-out chats 6 fit."""
    file = rows_of(SHAPES["sft"], tmp_path)
    lines = file.read_text(encoding="utf-8").splitlines()
    long = [line.replace(ANSWER["content"], "after " * 99) for line in lines[:60]]
    file.write_text("\n".join([*long, *lines[60:]]), encoding="utf-8")
    first = made(file, tiny_model)
    assert "About 6 rows measure" in first.text.replace("\n  #   ", " ")
    assert load_yaml(first.text)["eval"]["samples"] == 6


def test_where_no_row_fits_one_message_says_so(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its remedy the recipe passes the check."""
    long = {**ANSWER, "content": "after " * 99}
    rows, recipe = rows_of({"messages": [QUESTION, long]}, tmp_path), tmp_path / "recipe.yaml"
    assert main(["init", "--data", str(rows), "--model", str(tiny_model), "-o", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"finray: all of the first rows are longer than {tiny_model} takes, and left out; "
        "data.overlong: truncate cuts them instead; "
    )
    assert error.count("\n") == 1 and "max_length" not in error
    text = recipe.read_text(encoding="utf-8").replace("\n  #   ", " ")
    assert "All of the first rows are longer than the model takes. Longer ones are left" in text
    assert "Short ones" not in text and "packed sequence" not in text
    assert data_outlook(load_recipe(recipe, ["data.overlong=truncate"]))["sequences"] > 80


def test_one_of_a_thing_is_singular(tmp_path: Path, tiny_model: Path) -> None:
    text = made(rows_of(SHAPES["sft"], tmp_path, 1), tiny_model).text
    assert "1 row of messages" in text.replace("\n#   ", " ")
    assert "About 1 packed sequence makes 3 steps" in text.replace("\n  #   ", " ")


def test_a_large_gpu_needs_no_savings(tmp_path: Path, tiny_model: Path) -> None:
    first = made(rows_of(SHAPES["sft"], tmp_path, 2000), tiny_model, gpu(80))
    recipe = recipe_of(first, tmp_path)
    assert recipe.model.quantize == "none" and recipe.model.gradient_checkpointing is False
    sizes = sizes_of(recipe)
    assert estimate(recipe, sizes, "bfloat16").peak <= 80 * 2**30


def test_a_small_gpu_gets_less(tmp_path: Path, tiny_model: Path) -> None:
    """What is written fits by the estimate."""
    file = rows_of(SHAPES["sft"], tmp_path, 2000)
    large = recipe_of(made(file, tiny_model, gpu(80)), tmp_path)
    least = estimate(large.with_placement(1, True), sizes_of(large), "bfloat16").peak
    room = 1.2 * least
    recipe = recipe_of(made(file, tiny_model, gpu(room / 2**30)), tmp_path)
    assert estimate(recipe, sizes_of(recipe), "bfloat16").peak <= room


def test_a_gpu_that_is_too_small(tmp_path: Path, tiny_model: Path) -> None:
    text = made(rows_of(SHAPES["sft"], tmp_path), tiny_model, gpu(0.001)).text
    assert "may not fit" in text


@pytest.mark.long
def test_each_gpu_gets_a_worker(tmp_path: Path, tiny_model: Path) -> None:
    file = rows_of(SHAPES["dpo"], tmp_path, 500)
    recipe = recipe_of(made(file, tiny_model, gpu(80), gpu(80)), tmp_path)
    assert recipe.scale.workers == 2


def test_a_model_is_proposed_that_fits(tmp_path: Path) -> None:
    file = rows_of(SHAPES["sft"], tmp_path)
    names = [made(file, None, *gpus).model for gpus in ((), (gpu(16),), (gpu(24),), (gpu(80),))]
    assert names == ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B", "Qwen/Qwen3-8B"]
    assert "no GPU" in made(file, None).text
    assert made(rows_of(SHAPES["pretrain"], tmp_path), None).model.endswith("-Base")


def test_without_the_model_its_name_tells(tmp_path: Path) -> None:
    file = rows_of(SHAPES["sft"], tmp_path)
    first = made(file, OFFLINE, gpu(12))
    assert not first.has_model and OFFLINE in first.notes[0]
    assert load_yaml(first.text)["model"] == {"base": OFFLINE, "quantize": "nf4"}
    assert "quantize" not in load_yaml(made(file, OFFLINE, gpu(80)).text)["model"]
    assert "characters" in first.text


def test_a_tokenizer_without_template(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    for file in tiny_model.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).write_bytes(file.read_bytes())
    recipe = recipe_of(made(rows_of(SHAPES["sft"], tmp_path), folder), tmp_path)
    assert recipe.data.chat_template == "chatml"


def test_rewards(tmp_path: Path, tiny_model: Path) -> None:
    file = rows_of({"prompt": [QUESTION]}, tmp_path)
    with pytest.raises(InputError, match="that needs a reward function"):
        made(file, tiny_model)
    (tmp_path / "rewards.py").write_text(
        "def score(prompts, completions, completion_ids, **columns):\n    return [0.0]\n",
        encoding="utf-8",
    )
    rewards = (f"{tmp_path / 'rewards.py'}:score",)
    own = rows_of({"question": "after 1?", "answer": "two"}, tmp_path)
    text = made(own, tiny_model, method="grpo", rewards=rewards).text.replace("\n  #  ", "")
    assert "Reward functions get them as instruction and output." in text
    recipe = recipe_of(made(file, tiny_model, method="grpo", rewards=rewards), tmp_path)
    assert recipe.method.kind == "grpo" and recipe.optim.batch_size % 8 == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("{\n", "not valid JSON"),
        ('{"foo": 1, "bar": 2}\n', "no row format has these keys: foo, bar"),
        ('{"prompt": "a", "completions": ["b"], "labels": [true]}\n', "holds several steps"),
    ],
)
def test_data_that_cannot_be_used(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        made(file, None)
    assert str(caught.value).startswith("--data: ")


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (
            {"question": "after 1?", "answer": "two"},
            {"instruction": "question", "output": "answer"},
        ),
        (
            {"instruction": "after 1?", "context": "", "response": "two"},
            {"output": "response", "input": "context"},
        ),
        (
            {"question": "after 1?", "chosen": "two", "rejected": "four"},
            {"instruction": "question"},
        ),
    ],
)
def test_usual_columns_are_read(
    row: dict[str, Any], columns: dict[str, str], tmp_path: Path, tiny_model: Path
) -> None:
    first = made(rows_of(row, tmp_path), tiny_model)
    [source] = recipe_of(first, tmp_path).data.train
    assert source.columns == columns
    assert first.method == ("dpo" if "chosen" in row else "sft")
    assert "columns says which of yours" in first.text


def test_what_a_newcomer_should_know_of_the_rows(tmp_path: Path, tiny_model: Path) -> None:
    """Texts that no template touches, rows that cannot be used, and tools without a place."""
    file = rows_of({"prompt": "after 1?", "completion": "two"}, tmp_path)
    assert "without the chat template" in made(file, tiny_model).text.replace("\n  #  ", "")
    file = rows_of(SHAPES["sft"], tmp_path)
    file.write_text(file.read_text(encoding="utf-8") + "{\n", encoding="utf-8")
    assert "Of the first 121, 1 cannot be used" in made(file, tiny_model).text
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    first = made(rows_of({**SHAPES["sft"], "tools": [tool]}, tmp_path), tiny_model)
    assert "None can be used with this model: the chat template renders no tools" in (
        first.text.replace("\n  #  ", "")
    )
    assert first.fault is not None
    assert first.fault.startswith(f"None of the rows can be used with {tiny_model}: the chat")
    assert "by their characters, as the chat template" in first.text.replace("\n  #  ", "")


def test_arguments_that_are_wrong(tmp_path: Path, tiny_model: Path) -> None:
    file = rows_of(SHAPES["sft"], tmp_path)
    with pytest.raises(InputError, match=r"--data: .*absent\.jsonl: there is no such file"):
        made(tmp_path / "absent.jsonl", None)
    with pytest.raises(InputError, match="method dpo learns from pairs"):
        made(file, tiny_model, method="dpo")
    with pytest.raises(InputError, match="--method: expected one of sft"):
        made(file, tiny_model, method="ppo")
    with pytest.raises(InputError, match="--model: nowhere is neither a folder nor a hub id"):
        made(file, "nowhere")


def test_rows_that_the_template_cannot_render_are_one_message(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A third has tools: more than data.max_bad_rows allows."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    lines = [
        json.dumps({**SHAPES["sft"], **({"tools": [tool]} if n < 3 else {})}) for n in range(9)
    ]
    rows, recipe = tmp_path / "rows.jsonl", tmp_path / "recipe.yaml"
    rows.write_text("\n".join(lines), encoding="utf-8")
    words = ["init", "--data", str(rows), "--model", str(tiny_model), "-o", str(recipe)]
    assert main(words) == 2 and recipe.exists()
    error = capsys.readouterr().err
    assert error.startswith(f"finray: 33.3% of the rows cannot be used with {tiny_model}: the chat")
    assert error.endswith(f"finray check {recipe}\n") and error.count("\n") == 1


@pytest.mark.long
def test_the_command(
    tmp_path: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    rows_of(SHAPES["dpo"], tmp_path)
    words = ["init", "--data", "rows.jsonl", "--model", str(tiny_model)]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out == "recipe.yaml\n"
    assert "recipe OK" in err and err.endswith("next: finray train recipe.yaml\n")
    assert load_yaml(Path("recipe.yaml").read_text(encoding="utf-8"))["data"]["train"] == [
        {"path": "rows.jsonl"}
    ]
    before = Path("recipe.yaml").read_bytes()
    assert main(words) == 2
    assert "recipe.yaml exists already" in capsys.readouterr().err
    assert Path("recipe.yaml").read_bytes() == before
    assert main([*words[:3], "--model", OFFLINE, "-o", "sub/r.yaml"]) == 0
    assert "once it is on this machine" in capsys.readouterr().err
    assert load_yaml(Path("sub/r.yaml").read_text(encoding="utf-8"))["data"]["train"] == [
        {"path": "../rows.jsonl"}
    ]
