"""The recipe: what is accepted, and the message of each error."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finray.training.common.errors import InputError
from finray.training.config.recipe import Recipe, load_recipe, recipe_from_dict
from finray.training.config.sections import RESERVED_NAMES
from finray.training.records.run_folder import PREPARED_FOLDER

GOOD = """\
name: support
model: {base: some/model}
data:
  train: [{path: rows.jsonl}]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(write(folder, text), overrides)
    return str(caught.value)


def test_defaults_and_resolved_paths(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.method.kind == "sft"
    assert recipe.adapter is None
    assert recipe.model.base == "some/model"
    assert recipe.data.train[0].path == str(tmp_path / "rows.jsonl")
    assert recipe.storage == str(Path.cwd() / "runs")


def test_a_local_base_is_searched_in_the_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    text = GOOD.replace("some/model", "base")
    assert load_recipe(write(tmp_path, text)).model.base == str(tmp_path / "base")


def test_uris_stay(tmp_path: Path) -> None:
    text = GOOD.replace("rows.jsonl", "s3://bucket/rows.jsonl") + "storage: gs://bucket/runs\n"
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.data.train[0].path == "s3://bucket/rows.jsonl"
    assert recipe.storage == "gs://bucket/runs"


@pytest.mark.parametrize(
    ("addition", "line", "message"),
    [
        ("optim: {learnin_rate: 1e-4}\n", 5, "did you mean 'learning_rate'?"),
        ("adaptr: {rank: 4}\n", 5, "did you mean 'adapter'?"),
        ("learning_rate: 1e-4\n", 5, "did you mean 'optim.learning_rate'?"),
        ("eval: {type: x}\n", 5, "eval.type: unknown key; possible keys: every_steps, "),
        (
            "method: {kind: sft, beta: 0.1}\n",
            5,
            "method.beta: unknown key; possible keys: kind, train_on, train_on_reasoning",
        ),
        (
            "method: {kind: kto, train_on: last}\n",
            5,
            "method.train_on: unknown key; possible keys: kind, ",
        ),
        ("optim:\n  batch_size: many\n", 6, "optim.batch_size: "),
        ("optim: {epochs: 1, max_steps: 3}\n", 5, "epochs and max_steps contradict"),
        ("method: {kind: sftt}\n", 5, "expected one of 'sft', 'pretrain'"),
        ("eval: {every_steps: 10}\n", 1, "needs held-out data"),
        ("optim: {batch_size: 2, micro_batch_size: 4}\n", 1, "is larger than"),
        (
            "optim: {micro_batch_size: 2, micro_batch_tokens: 9000}\n",
            5,
            "micro_batch_tokens and micro_batch_size contradict",
        ),
        ("optim: {micro_batch_tokens: 2047}\n", 1, "holds no row, which may have data.max_length"),
        (
            "method: dpo\noptim: {micro_batch_tokens: 4095}\n",
            1,
            "2 texts of data.max_length 2048 tokens; give at least 4096",
        ),
        *(
            (
                f"method: {method}\noptim: {{micro_batch_tokens: 4096}}\n",
                1,
                "optim.micro_batch_tokens: the loss (bnpo, aot or aot_unpaired) is computed over "
                "each forward pass, so it depends on which rows share one; set micro_batch_size to "
                "a number instead",
            )
            for method in (
                "{kind: dpo, losses: {aot: 1.0}}",
                "{kind: dpo, losses: {sigmoid: 1.0, aot_unpaired: 0.5}}",
                "{kind: grpo, loss: bnpo, rewards: [{run: r}]}",
            )
        ),
        ("scale: {workers: 64}\n", 1, "scale.workers 64 is larger"),
        ("scale: {workers: [2, 64]}\n", 1, "scale.workers 64 is larger"),
        ("scale: {workers: [4, 2]}\n", 5, "workers: [4, 2] is reversed"),
        ("scale: {workers: [0, 2]}\n", 5, "workers"),
        ("scale: {workers: two}\n", 5, "workers"),
        ("scale: {workers: 0, strategy: fsdp}\n", 1, "but scale.workers is 0; set 2 or more"),
        ("scale: {workers: 2, strategy: zero}\n", 5, "scale.strategy: "),
        ("seed: -1\n", 5, "seed: "),
        ("adapter: {targets: '(q_proj'}\n", 5, "is not a regular expression"),
        ("adapter: {dora: true, init: pissa}\n", 5, "dora and init pissa contradict"),
        ("adapter: {init: orthogonal, rank: 3}\n", 5, "needs even ranks"),
        (
            "adapter: {init: olora, rslora: true, rank_pattern: {q_proj: 2}}\n",
            5,
            "leave out rank_pattern",
        ),
        ("adapter: {init: loftq}\n", 1, "loftq needs model.quantize nf4"),
        ("freeze: {}\n", 5, "nothing is left to train"),
        ("freeze: {last_layers: 2}\nadapter: {}\n", 1, "freeze contradicts an adapter"),
        ("optim: {lora_plus_ratio: 16}\n", 1, "lora_plus_ratio needs an adapter"),
        ("method: {kind: pretrain, init: random}\nadapter: {}\n", 1, "contradicts an adapter"),
        ("name: again\n", 5, "already set on line 1"),
    ],
)
def test_each_error_has_its_place(tmp_path: Path, addition: str, line: int, message: str) -> None:
    error = refusal(tmp_path, GOOD + addition)
    where = f"{tmp_path / 'recipe.yaml'}:{line}:" if line > 1 else str(tmp_path / "recipe.yaml")
    assert error.startswith(where)
    assert message in error


@pytest.mark.parametrize("name", ["prepared", "Prepared"])
def test_names_that_finray_uses_in_a_storage(tmp_path: Path, name: str) -> None:
    error = refusal(tmp_path, GOOD.replace("support", name))
    assert error.startswith(f"{tmp_path / 'recipe.yaml'}:1: name: ")
    assert f"{name} is the folder where finray keeps prepared data" in error
    assert PREPARED_FOLDER in RESERVED_NAMES


@pytest.mark.parametrize(
    ("model", "addition", "message"),
    [
        ("quantize: nf4", "", "quantize nf4 contradicts full fine-tuning"),
        ("quantize: int8", "freeze: {last_layers: 1}\n", "quantize int8 contradicts freeze"),
        ("quantize: nf4", "adapter: {init: pissa}\n", "init pissa contradicts model.quantize nf4"),
        ("quantize: int8", "adapter: {init: loftq}\n", "loftq needs model.quantize nf4"),
        ("adapter: run", "adapter: {}\n", "adapter and model.adapter contradict"),
        ("adapter: run", "freeze: {last_layers: 1}\n", "freeze contradicts an adapter"),
        ("adapter: gone", "", "no such folder"),
        ("adapter: empty", "", "holds no adapter"),
    ],
)
def test_each_invalid_choice_of_weights(
    tmp_path: Path, model: str, addition: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    text = GOOD.replace("some/model}", f"some/model, {model}}}") + addition
    assert message in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("model: {base: some/model, quantize: int8}\nadapter: {}\n", "use nf4"),
        ("model: {base: b}\nmethod: {kind: grpo, rewards: [{run: r}]}\n", "method grpo samples"),
        (
            "model: {base: b}\nmethod: {kind: dpo, precompute_reference: true}\n",
            "computes on whole models; leave it out",
        ),
        ("model: {base: b}\nadapter: {init: pissa}\n", "use another init, or ddp"),
    ],
)
def test_what_cannot_be_sharded(tmp_path: Path, addition: str, message: str) -> None:
    """fsdp is an error; auto does not shard."""
    text = GOOD.replace("model: {base: some/model}\n", "") + addition
    assert message in refusal(tmp_path, text + "scale: {workers: 2, strategy: fsdp}\n")
    recipe = Recipe.model_validate(yaml.safe_load(text))
    assert recipe.scale.strategy == "auto" and message in str(recipe.why_not_shardable)


def test_an_adapter_is_searched_in_the_recipes_folder_here_and_in_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def revision() -> str | None:
        text = GOOD.replace("some/model}", "some/model, adapter: sft}") + "storage: runs\n"
        recipe = load_recipe(write(tmp_path / "recipes", text))
        assert recipe.trains_adapter and recipe.adapter is None
        return recipe.model.adapter

    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    for place in ("runs", ".", "recipes"):
        folder = tmp_path / place / "sft" / "adapter"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
        assert revision() == str(folder)


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD + "adaptr: {}\noptim: {batch_size: many}\n")
    assert len(message.splitlines()) == 2


def test_missing_key_and_broken_yaml(tmp_path: Path) -> None:
    assert "model: missing" in refusal(tmp_path, "name: x\ndata: {train: [{path: a}]}\n")
    assert "not valid YAML" in refusal(tmp_path, "name: [x\n")
    assert "expected a mapping" in refusal(tmp_path, "- a\n")
    with pytest.raises(InputError, match="cannot read the file"):
        load_recipe(tmp_path / "absent.yaml")


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    overrides = ("optim.learning_rate=1e-3", "adapter.rank=4", "data.train.0.weight=2")
    recipe = load_recipe(path, overrides)
    assert recipe.optim.learning_rate == 1e-3
    assert recipe.adapter is not None and recipe.adapter.rank == 4
    assert recipe.data.train[0].weight == 2
    assert "--set optim.learnin=1: optim.learnin: unknown key; did you mean" in refusal(
        tmp_path, GOOD, "optim.learnin=1"
    )
    assert "expected key=value" in refusal(tmp_path, GOOD, "optim.learning_rate")
    assert "no key or list item" in refusal(tmp_path, GOOD, "name.first=x")


def test_chat_template_file_travels_with_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages }}", encoding="utf-8")
    text = GOOD.replace("data:\n", "data:\n  chat_template: t.jinja\n")
    assert load_recipe(write(tmp_path, text)).data.chat_template == "{{ messages }}"
    assert "cannot read" in refusal(tmp_path, text.replace("t.jinja", "u.jinja"))


@pytest.mark.long
@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "learning_rate": st.floats(1e-8, 1.0),
            "batch_size": st.integers(4, 512),
            "schedule": st.sampled_from(["constant", "linear", "cosine"]),
            "epochs": st.floats(0.1, 10),
        },
    ),
    st.integers(1, 64) | st.none(),
)
def test_a_recipe_survives_being_written_as_yaml(
    optim: dict[str, object], rank: int | None
) -> None:
    values = {
        "name": "x",
        "model": {"base": "b"},
        "adapter": None if rank is None else {"rank": rank},
        "data": {"train": [{"path": "/a"}]},
        "optim": optim,
    }
    recipe = Recipe.model_validate(values)
    text = yaml.safe_dump(recipe.model_dump(mode="json"))
    assert recipe_from_dict(yaml.safe_load(text)) == recipe


@settings(deadline=None)
@given(st.integers(1, 10_000), st.integers(1, 64), st.floats(0.25, 4))
def test_every_sequence_is_seen_epochs_times(sequences: int, batch: int, epochs: float) -> None:
    values = {
        "name": "x",
        "model": {"base": "b"},
        "data": {"train": [{"path": "/a"}]},
        "optim": {"batch_size": batch, "micro_batch_size": 1, "epochs": epochs},
    }
    steps = Recipe.model_validate(values).total_steps(sequences)
    assert steps * batch >= round(epochs * sequences, 6)
    assert (steps - 1) * batch < epochs * sequences


@pytest.mark.long
def test_refusing_a_recipe_imports_nothing_heavy(tmp_path: Path) -> None:
    write(tmp_path, GOOD + "adaptr: {}\n")
    script = (
        "import sys; from finray.cluster.cli.main import main;"
        "code = main(['check', 'recipe.yaml']);"
        "heavy = {'torch', 'ray', 'transformers', 'pandas'} & set(sys.modules);"
        "assert code == 2, code; assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "unknown key" in done.stderr and "Traceback" not in done.stderr
