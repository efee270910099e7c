"""Every pair of features meets in a run: what it writes is what was trained, wherever it is used.

A case trains two steps on a tiny model. Its logits in training must be those of the result as plain
PEFT or transformers load it, as finray opens it, as another run starts from it, and after a merge.
"""

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from support.forking import ForkServer, fork_workers
from support.pairs import Case, pairwise_cases
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

import finray
from finray.training.common.storage import Folder
from finray.training.config.methods import RewardMethod
from finray.training.config.recipe import Recipe
from finray.training.export.export import export
from finray.training.models.loading import load_model
from finray.training.models.open_result import open_result
from finray.training.models.weights import load_weights
from finray.training.records.run_folder import finished_run

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

Settings = dict[str, Any]
TRAINED: dict[str, Settings] = {
    "full": {},
    "freeze-layers": {"freeze": {"last_layers": 1}},
    "freeze-pattern": {"freeze": {"train": ["mlp", "lm_head"]}},
    "lora": {"adapter": {}},
    "dora": {"adapter": {"dora": True}},
    "rslora": {"adapter": {"rslora": True}},
    "patterns": {"adapter": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 16}}},
    "embedding": {"adapter": {"targets": ["embed_tokens", "q_proj"]}},
    "head": {"adapter": {"targets": ["lm_head", "q_proj"]}},
}
REWARDS = "def length(completions, **columns):\n    return [float(len(c)) for c in completions]\n"
FACTORS: dict[str, list[str]] = {
    "trained": list(TRAINED),
    "init": ["default", "gaussian", "orthogonal", "pissa", "olora", "loftq"],
    "quantize": ["none", "nf4", "int8"],
    "whole": ["none", "embed_tokens", "lm_head"],
    "method": ["sft", "pretrain", "dpo", "kto", "orpo", "cpo", "simpo", "reward", "grpo", "rloo"],
    "strategy": ["one", "ddp", "fsdp"],
}
STEPS = 2
IDS = list(range(3, 35))


def settings_of(case: Case, folder: Path) -> Settings:
    """A recipe without its model; its files are in the folder."""
    settings = copy.deepcopy(TRAINED[case["trained"]])
    if "adapter" in settings:
        settings["adapter"].update(rank=4, alpha=8.0, init=case["init"])
        if case["whole"] != "none":
            settings["adapter"]["modules_to_save"] = [case["whole"]]
    method: Settings = {"kind": case["method"]}
    if case["method"] in ("grpo", "rloo"):
        method |= {"rewards": [{"file": str(folder / "rewards.py:length")}]}
        method |= {"generations": 2, "max_completion": 4}
    rows = {"reward": "pairs", "dpo": "pairs", "kto": "pairs", "orpo": "pairs", "cpo": "pairs"}
    name = rows.get(case["method"], "pairs" if case["method"] == "simpo" else "chat")
    return {
        "name": "-".join(case.values()),
        "method": method,
        "data": {"train": [{"path": str(folder / f"{name}.jsonl")}], "max_length": 64},
        "optim": {"learning_rate": 3e-2, "max_steps": STEPS, "batch_size": 8},
        "checkpoint": {"every_steps": STEPS},
        "scale": {
            "workers": 0 if case["strategy"] == "one" else 2,
            "strategy": "auto" if case["strategy"] == "one" else case["strategy"],
        },
        "log": {"to": []},
        "storage": str(folder / "runs"),
        **settings,
    }


def makes_sense(case: Case) -> bool:
    """False for what has no meaning: the start of an adapter that is not there."""
    has_adapter = "adapter" in TRAINED[case["trained"]]
    return has_adapter or (case["init"] == "default" and case["whole"] == "none")


def is_valid(case: Case) -> bool:
    """True unless the recipe refuses the case."""
    if not makes_sense(case):
        return False
    settings = {**settings_of(case, Path("/nowhere")), "model": {"base": "a/b"}}
    settings["model"]["quantize"] = case["quantize"]
    settings["method"].pop("rewards", None)
    if case["method"] in ("grpo", "rloo"):
        settings["method"]["rewards"] = [{"model": "a/judge"}]
    try:
        Recipe.model_validate(settings)
    except ValidationError:
        return False
    return True


CASES, REFUSED = pairwise_cases(FACTORS, is_valid)
QUICK = 6
NAMES = ["-".join(case.values()) for case in CASES]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, chat_rows: list[dict[str, Any]]) -> Path:
    """A folder with conversations, pairs and a reward function."""
    folder = tmp_path_factory.mktemp("pairs")
    pairs = []
    for row in chat_rows:
        question, answer = (turn["content"] for turn in row["messages"])
        pairs.append({"prompt": question, "chosen": answer, "rejected": answer[::-1]})
    for name, each in (("chat", chat_rows), ("pairs", pairs)):
        text = "".join(json.dumps(row) + "\n" for row in each[:64])
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def untied_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a head of its own."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("untied-model")
    config = LlamaConfig.from_pretrained(tiny_model, tie_word_embeddings=False)
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([IDS])).logits.float()  # type: ignore[no-any-return]


def in_training(recipe: Recipe, run: finray.RunResult) -> torch.Tensor:
    """What the model computes in training, with the weights of its last checkpoint."""
    torch.manual_seed(recipe.seed)
    model = load_model(recipe, recipe.method.head)
    load_weights(model, run.folder / "checkpoints" / f"step-{STEPS:08d}")
    return logits(model)


def plain(recipe: Recipe, run: finray.RunResult) -> torch.Tensor:
    """What transformers and PEFT compute with the result."""
    scores = recipe.method.head == "score"
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    more: Settings = {"num_labels": 1} if scores else {}
    if not recipe.trains_adapter:
        return logits(auto.from_pretrained(run.folder / "model", dtype=torch.float32, **more))
    config = {
        "none": None,
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    }[recipe.model.quantize]
    base = auto.from_pretrained(
        recipe.model.base, dtype=torch.float32, quantization_config=config, **more
    )
    for module in base.modules():  # on this CPU, inference would repack the weights, lossily
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False
    return logits(PeftModel.from_pretrained(base, run.folder / "adapter"))


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float) -> None:
    scale = expected.square().mean().sqrt().clamp(min=1e-3)
    distance = float((actual - expected).square().mean().sqrt() / scale)
    assert distance < tolerance, f"{what}: off by {distance:.2g} of the logits' size"


def check_case(case: Case, base: Path, rows: Path, scratch: Path) -> Path | None:
    """Train a case, and compare every use of its result; returns the result's folder.

    Returns:
        None for a case that the model refuses: then `check` refuses it too.
    """
    settings = settings_of(case, rows)
    settings["model"] = {"base": str(base), "quantize": case["quantize"]}
    try:
        run = finray.train(settings, quiet=True)
    except finray.InputError as error:
        assert str(error).startswith(("settings: adapter", "settings: freeze.train: "))
        with pytest.raises(finray.InputError, match=re.escape(str(error))):
            finray.check(settings)
        return None
    recipe = run.recipe
    expected = in_training(recipe, run)
    # LLM.int8() finds outliers among all tokens of a batch, and rounds by them.
    tolerance = 0.05 if recipe.model.quantize == "int8" else 1e-4
    assert_equal(plain(recipe, run), expected, "plain PEFT", tolerance)
    head = recipe.method.head
    if recipe.model.quantize == "none":
        opened = open_result(finished_run(Folder(run.uri)), head, torch.float32, "a reference")
        assert_equal(logits(opened.model), expected, "a reference or reward model", tolerance)
    if not recipe.trains_adapter:
        return run.folder / "model"
    model = recipe.model.model_copy(update={"adapter": str(run.folder / "adapter")})
    again = recipe.model_copy(update={"model": model, "adapter": None})
    assert_equal(logits(load_model(again, head)), expected, "a run that starts from it", tolerance)
    export(Folder(run.uri), scratch / "whole", merge=True)
    scores = head == "score"
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    whole = auto.from_pretrained(scratch / "whole", dtype=torch.float32)
    assert_equal(logits(whole), expected, "merged", max(tolerance, 1e-3))
    if not scores:  # a reward model may start from it: the head for tokens is left out
        judge = load_model(again.model_copy(update={"method": _REWARD}), "score")
        assert logits(judge).shape == (1, 1)
    return run.folder / "adapter"


_REWARD = RewardMethod()


@pytest.fixture
def forked(fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers come from the fork server."""
    monkeypatch.setattr(subprocess, "Popen", fork_workers(fork_server))


@pytest.mark.long
@pytest.mark.parametrize(
    "index",
    [
        pytest.param(index, id=name, marks=() if index < QUICK else pytest.mark.slow)
        for index, name in enumerate(NAMES)
    ],
)
@pytest.mark.usefixtures("forked")
def test_every_pair(
    index: int, tiny_model: Path, untied_model: Path, rows: Path, tmp_path: Path
) -> None:
    case = CASES[index]
    base = tiny_model if index % 2 else untied_model
    check_case(case, base, rows, tmp_path)


def test_every_pair_is_covered() -> None:
    """Counts of what the matrix holds; a pair that a recipe refuses is refused in every case."""
    print(f"{len(CASES)} cases; {len(REFUSED)} pairs are refused")
    assert len(CASES) >= len(FACTORS["method"]) * len(FACTORS["trained"])
    pairs = {tuple(sorted(dict(pair).values())) for pair in REFUSED}
    assert ("int8", "dora") in pairs or ("dora", "int8") in pairs
    assert all(
        not is_valid(dict(zip(FACTORS, values, strict=True)) | dict(pair))
        for pair in REFUSED
        for values in [[options[0] for options in FACTORS.values()]]
    )
