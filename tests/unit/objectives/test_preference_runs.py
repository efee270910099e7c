"""Complete runs of the preference methods: resume, precomputed reference, reward model."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.cases import mostly_slow
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from finray.training.common.errors import InputError
from finray.training.config.recipe import Recipe, load_recipe
from finray.training.launch.in_process import InProcessLauncher
from finray.training.objectives.objective import Setup
from finray.training.objectives.precomputed import _key
from finray.training.run import train

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STEPS, HALF = 8, 4


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 conversations: the chosen answer continues to count, the rejected one does not."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What comes after {number}?"}],
            "chosen": [{"role": "assistant", "content": f"After {number} comes {number + 1}."}],
            "rejected": [{"role": "assistant", "content": "The lazy dog."}],
        }
        for number in range(120)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_recipe(base: Path, data: Path, storage: Path, **changes: Any) -> Recipe:
    optim = {"learning_rate": 1e-2, "max_steps": STEPS, "batch_size": 8, "micro_batch_size": 4}
    return Recipe.model_validate(
        {
            "name": "run",
            "model": {"base": str(base)},
            "adapter": {"rank": 4},
            "data": {"train": [{"path": str(data)}], "max_length": 96, "holdout": 0.1},
            "optim": optim,
            "scale": {"workers": 0},
            "storage": str(storage),
            "log": {"every_steps": 1},
            "checkpoint": {"every_steps": HALF, "keep": 9},
            **changes,
        }
    )


def run(recipe: Recipe) -> Path:
    record = train(recipe, InProcessLauncher())
    assert record["status"] == "finished"
    return Path(recipe.storage) / recipe.name


def lines(folder: Path) -> list[dict[str, Any]]:
    """Logged lines, without the values that depend on time."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    timed = ("seconds", "tokens_per_second", "data_wait")
    return [{key: line[key] for key in line if key not in timed} for line in records]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    (result,) = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    loaded: dict[str, torch.Tensor] = load_file(result)
    return loaded


def interrupted(folder: Path) -> None:
    """Make the run look as if it was killed after half of its steps."""
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
    for result in ("adapter", "model"):
        shutil.rmtree(folder / result, ignore_errors=True)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps({**record, "status": "running"}), encoding="utf-8")


@pytest.fixture(scope="module")
def direct(tiny_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of DPO that is compared with its base; only read."""
    storage = tmp_path_factory.mktemp("direct")
    return run(make_recipe(tiny_model, pairs, storage, method={"kind": "dpo"}))


def references(storage: Path) -> list[Path]:
    return sorted(storage.glob("prepared/*/reference-*.parquet"))


def flip_a_bit(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


PRECOMPUTED = {"kind": "dpo", "precompute_reference": True}
RESUMED: list[tuple[dict[str, Any], bool]] = [
    ({"method": {"kind": "dpo"}}, True),
    ({"method": PRECOMPUTED}, True),
    ({"method": PRECOMPUTED}, False),
    ({"method": {"kind": "dpo"}, "adapter": None}, True),
    ({"method": PRECOMPUTED, "adapter": None}, True),
    ({"method": PRECOMPUTED, "adapter": None}, False),
    ({"method": {"kind": "kto"}, "adapter": {"rank": 4, "dropout": 0.1}}, True),
    ({"method": {"kind": "reward"}}, True),
]
"""Recipes, and whether the file of the precomputed reference is still intact."""


@pytest.mark.long
@pytest.mark.parametrize(
    ("changes", "keeps_reference"),
    mostly_slow(RESUMED, quick=[RESUMED[2], *RESUMED[-2:]]),
    ids=str,
)
def test_a_resumed_run_ends_the_same(
    tiny_model: Path,
    pairs: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    keeps_reference: bool,
) -> None:
    precomputes = changes["method"].get("precompute_reference", False)
    recipe = make_recipe(tiny_model, pairs, tmp_path, **changes)
    folder = run(recipe)
    undisturbed, weights = lines(folder), tensors(folder)
    assert len(references(tmp_path)) == int(precomputes)
    interrupted(folder)
    if not keeps_reference:
        intact = references(tmp_path)[0].read_bytes()
        flip_a_bit(references(tmp_path)[0], len(intact) // 3)
    run(recipe)
    assert lines(folder) == undisturbed
    if not keeps_reference:
        assert pq.read_table(references(tmp_path)[0]).equals(pq.read_table(pa.BufferReader(intact)))
    again = tensors(folder)
    assert weights.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
    assert len(json.loads((folder / "run.json").read_text(encoding="utf-8"))["restarts"]) == 1


@pytest.mark.long
def test_a_precomputed_reference(
    tiny_model: Path, pairs: Path, direct: Path, tmp_path: Path
) -> None:
    """It equals the model's own values for every row, and later runs load it by its key."""
    assert not references(direct.parent)
    recipe = make_recipe(tiny_model, pairs, tmp_path, method=PRECOMPUTED, name="precomputed")
    folder = run(recipe)
    for actual, expected in zip(lines(direct), lines(folder), strict=True):
        # At the start all rewards are 0, but for what rounding makes of them.
        tied = ("reward_accuracy",) if actual["step"] == 1 else ()
        assert {k: v for k, v in actual.items() if k not in tied} == pytest.approx(
            {k: v for k, v in expected.items() if k not in tied}, abs=1e-4, rel=5e-3
        )
    (file,) = references(tmp_path)
    table = pq.read_table(file).to_pylist()
    assert len({(row["split"], row["row"]) for row in table}) == len(table) == 120
    written = file.stat().st_mtime_ns
    run(recipe.model_copy(update={"name": "again", "seed": 3}))
    assert references(tmp_path) == [file] and file.stat().st_mtime_ns == written
    named = recipe.method.model_copy(update={"reference_model": str(folder / "adapter")})
    run(recipe.model_copy(update={"name": "named", "method": named}))
    assert len(references(tmp_path)) == 2


def first_loss(folder: Path) -> float:
    return float(next(line["loss"] for line in lines(folder) if "loss" in line))


@pytest.mark.long
def test_each_start_of_an_adapter_has_its_own_reference(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    """A model that starts as its reference has a first loss of log 2, whatever ran before."""
    for rank in (4, 32):
        recipe = make_recipe(
            tiny_model,
            pairs,
            tmp_path,
            name=f"rank-{rank}",
            model={"base": str(tiny_model), "quantize": "nf4"},
            adapter={"rank": rank, "init": "loftq"},
            method=PRECOMPUTED,
            optim={"learning_rate": 1e-4, "max_steps": 1, "batch_size": 8, "micro_batch_size": 8},
        )
        assert first_loss(run(recipe)) == pytest.approx(0.693147, abs=1e-4)
    assert len(references(tmp_path)) == 2


STARTS: list[dict[str, Any]] = [
    {},
    {"rank": 8},
    {"alpha": 4},
    {"targets": ["q_proj"]},
    {"rank_pattern": {"q_proj": 2}},
    {"alpha_pattern": {"q_proj": 2}},
    {"rslora": True},
    {"modules_to_save": ["norm"]},
]
"""Settings of an adapter, each of which changes what loftq starts from."""


def keys(base: Path, settings: list[dict[str, Any]], **changes: Any) -> list[str]:
    prepared = SimpleNamespace(manifest=SimpleNamespace(fingerprint="f"))
    recipes = [
        make_recipe(base, Path("/x"), Path("/x"), adapter=each, method=PRECOMPUTED, **changes)
        for each in settings
    ]
    setups = [cast(Setup, SimpleNamespace(recipe=r, prepared=prepared)) for r in recipes]
    return [_key(setup, None) for setup in setups]


def test_the_key_of_a_reference_covers_what_it_depends_on(tiny_model: Path, tmp_path: Path) -> None:
    quantised = {"base": str(tiny_model), "quantize": "nf4"}
    starts = [{**each, "init": "loftq"} for each in STARTS]
    assert len(set(keys(tiny_model, starts, model=quantised))) == len(STARTS)
    # Without an own start every adapter is compared with the same base.
    (plain,) = set(keys(tiny_model, STARTS))
    assert keys(tiny_model, [{}], seed=5) == [plain]
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    assert keys(moved, [{}]) == [plain]
    config = json.loads((moved / "config.json").read_bytes())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert keys(moved, [{}]) != [plain]
    for model in ({"quantize": "nf4"}, {"dtype": "bfloat16"}, {"attention": "eager"}):
        assert keys(tiny_model, [{}], model={"base": str(tiny_model), **model}) != [plain]


@pytest.mark.long
def test_a_named_reference(tiny_model: Path, pairs: Path, direct: Path, tmp_path: Path) -> None:
    """A reference named as the base equals the adapter's base; an earlier run's result differs."""
    by_name = {"kind": "dpo", "reference_model": str(tiny_model)}
    same = run(make_recipe(tiny_model, pairs, tmp_path, method=by_name, name="same"))
    for actual, expected in zip(lines(direct), lines(same), strict=True):
        assert actual == pytest.approx(expected, abs=1e-5)
    by_run = {"kind": "dpo", "reference_model": str(direct / "adapter")}
    other = run(make_recipe(tiny_model, pairs, tmp_path, method=by_run, name="other"))
    start = next(line for line in lines(other) if "loss" in line)
    assert abs(start["loss"] - 0.6931) > 0.01


def test_training_on_from_an_adapter_is_compared_with_it(
    tiny_model: Path, pairs: Path, direct: Path, tmp_path: Path
) -> None:
    on = make_recipe(
        tiny_model,
        pairs,
        tmp_path,
        name="on",
        method={"kind": "dpo"},
        model={"base": str(tiny_model), "adapter": str(direct / "adapter")},
        adapter=None,
        optim={"learning_rate": 1e-3, "max_steps": STEPS, "batch_size": 8},
    )
    losses = [line["loss"] for line in lines(run(on)) if "loss" in line]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[-1] < 0.69


def test_preferences_are_learnt(direct: Path) -> None:
    end = lines(direct)[-1]
    assert end["eval_reward_accuracy"] > 0.9
    assert end["eval_reward_margin"] > 0.1


@pytest.mark.parametrize(
    ("pad", "adapted"),
    mostly_slow(
        [("own", True), ("eos", True), ("own", False), ("eos", False)],
        quick={("eos", True), ("own", False)},
    ),
)
def test_a_reward_model_scores_alone(
    tiny_model: Path, pairs: Path, tmp_path: Path, pad: str, adapted: bool
) -> None:
    """transformers and PEFT compute the training's scores, for single and for padded texts."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    if pad == "eos":
        settings = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings["pad_token"] = "<|im_end|>"
        (base / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
        settings["pad_token_id"] = settings["eos_token_id"]
        (base / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    recipe = make_recipe(
        base,
        pairs,
        tmp_path,
        method={"kind": "reward"},
        adapter={"rank": 4} if adapted else None,
    )
    folder = run(recipe)
    end = lines(folder)[-1]
    assert end["eval_reward_accuracy"] > 0.9
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["best_checkpoint"]
    result = folder / ("adapter" if adapted else "model")
    tokenizer = AutoTokenizer.from_pretrained(result)
    if adapted:
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
        )
        model = PeftModel.from_pretrained(model, result)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(result, dtype=torch.float32)
    scores = {"chosen": 0.0, "rejected": 0.0}
    held_out = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    table = pq.read_table(next(iter((tmp_path / "prepared").glob("*/*/eval/*.parquet"))))
    numbers = [rows[0] for rows in table["rows"].to_pylist()]
    for name in scores:
        texts = [
            tokenizer.apply_chat_template(held_out[n]["prompt"] + held_out[n][name], tokenize=False)
            for n in numbers
        ]
        alone = [float(score(model.eval(), tokenizer, [text])) for text in texts]
        together = score(model, tokenizer, texts).tolist()
        assert alone == pytest.approx(together, abs=1e-5)
        scores[name] = sum(alone) / len(alone)
    assert scores["chosen"] == pytest.approx(end["eval_chosen_reward"], abs=1e-4)
    assert scores["rejected"] == pytest.approx(end["eval_rejected_reward"], abs=1e-4)


@torch.no_grad()
def score(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    encoded = tokenizer(texts, padding=True, return_tensors="pt", padding_side="right")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    logits: torch.Tensor = model(**inputs).logits.squeeze(-1)
    return logits


def written(folder: Path, base: Path, data: Path, method: str, **more: str) -> Path:
    path = folder / "recipe.yaml"
    text = f"name: x\nmodel: {{base: {base}}}\ndata: {{train: [{{path: {data}}}]}}\n"
    path.write_text(text + f"method: {method}\n" + "".join(more.values()), encoding="utf-8")
    return path


def test_a_reference_that_is_not_there(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    path = written(tmp_path, tiny_model, pairs, "{kind: dpo, reference_model: ./gone}")
    with pytest.raises(InputError, match=r"reference_model: there is no such folder: .*gone"):
        load_recipe(path)
    (tmp_path / "gone").mkdir()
    with pytest.raises(InputError, match="gone holds no model"):
        load_recipe(path)
    (tmp_path / "gone" / "model").mkdir()
    (tmp_path / "gone" / "model" / "config.json").write_text("{}")
    recipe = load_recipe(path)
    assert recipe.method.model_dump()["reference_model"] == str(tmp_path / "gone" / "model")


def test_a_reference_of_another_tokenizer(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    tokenizer = json.loads((copied / "tokenizer.json").read_text(encoding="utf-8"))
    first, second = list(tokenizer["model"]["vocab"])[10:12]
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    method = {"kind": "dpo", "reference_model": str(copied)}
    with pytest.raises(InputError, match=r"tokenizer of .*other differs from that of"):
        run(make_recipe(tiny_model, pairs, tmp_path, method=method))


def test_a_batch_of_one_has_no_baseline(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    path = written(
        tmp_path,
        tiny_model,
        pairs,
        "{kind: kto}",
        optim="optim: {batch_size: 1, micro_batch_size: 1}",
    )
    with pytest.raises(InputError, match=r"optim\.batch_size: method kto compares"):
        load_recipe(path)
