"""Complete runs in this process, for each choice of trained weights: result and resume."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.cases import mostly_slow
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe
from finray.training.export.export import export
from finray.training.launch.in_process import InProcessLauncher
from finray.training.models.loading import load_model
from finray.training.models.weights import load_weights
from finray.training.run import train

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STEPS, HALF = 16, 8
NF4 = {"quantize": "nf4"}
GENTLE: dict[str, Any] = {"data": {"holdout": 0.2}, "optim": {"learning_rate": 1e-2}}

PLAIN: dict[str, Any] = {"adapter": {"rank": 4, "alpha": 8}}


def adapter(**settings: Any) -> dict[str, Any]:
    return {"adapter": {"rank": 4, "alpha": 8, **settings}}


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": PLAIN,
    "dora": adapter(dora=True),
    "rslora": adapter(rslora=True),
    "gaussian": adapter(init="gaussian"),
    "orthogonal": adapter(init="orthogonal"),
    "pissa": adapter(init="pissa"),
    "pissa-rslora": adapter(init="pissa", rslora=True),
    "pissa-pattern": adapter(
        init="pissa", rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 4}
    ),
    "olora": adapter(init="olora"),
    "modules-to-save": adapter(modules_to_save=["embed_tokens"]),
    "rank-pattern": adapter(rank_pattern={"layers.0.*q_proj": 8}, alpha_pattern={"v_proj": 32}),
    "regular-expression": adapter(targets=r".*layers\.1\..*(q|v|up|down)_proj"),
    "lora-plus": {**PLAIN, "optim": {"lora_plus_ratio": 4}},
    "bfloat16": {**PLAIN, "model": {"dtype": "bfloat16"}},
    "bfloat16-autocast": {**adapter(dtype="float32"), "model": {"dtype": "bfloat16"}},
    "bfloat16-pissa": {**adapter(init="pissa"), "model": {"dtype": "bfloat16"}},
    "nf4": {**PLAIN, "model": NF4},
    "nf4-bfloat16": {**PLAIN, "model": {**NF4, "dtype": "bfloat16"}},
    "nf4-dora": {**adapter(dora=True), "model": NF4},
    "loftq": {**adapter(init="loftq"), "model": NF4},
    "int8": {**PLAIN, "model": {"quantize": "int8"}},
    "existing": {**GENTLE, "model": {"adapter": "lora"}},
    "existing-nf4": {**GENTLE, "model": {"adapter": "nf4", **NF4}},
    "freeze-layers": {"freeze": {"last_layers": 1}},
    "freeze-pattern": {"freeze": {"train": [r"mlp\.", "lm_head"]}},
    "full": {},
}
RESUMED = [
    *("lora", "dora", "pissa", "olora", "modules-to-save", "lora-plus", "bfloat16", "nf4"),
    *("bfloat16-autocast", "bfloat16-pissa", "loftq", "int8", "existing", "freeze-layers"),
]


QUICK = {
    *("lora", "pissa", "bfloat16-autocast", "nf4", "existing-nf4"),
    *("freeze-layers", "full"),
}
"""Of each kind one; the others differ in a setting."""


@dataclass
class Runs:
    """Runs in one storage, each made at its first use."""

    base: Path
    data: Path
    storage: Path

    def recipe(self, variant: str) -> Recipe:
        changes = VARIANTS[variant]
        model = {"base": str(self.base), **changes.get("model", {})}
        if "adapter" in model:
            model["adapter"] = str(self.run(model["adapter"]) / "adapter")
        optim = {
            "learning_rate": 3e-2,
            "max_steps": STEPS,
            "batch_size": 8,
            "micro_batch_size": 4,
            **changes.get("optim", {}),
        }
        values = {
            "name": variant,
            "scale": {"workers": 0},
            "storage": str(self.storage),
            "log": {"every_steps": 1},
            "checkpoint": {"every_steps": HALF, "keep": 9},
            **changes,
            "data": {
                "train": [{"path": str(self.data)}],
                "max_length": 96,
                **changes.get("data", {}),
            },
            "model": model,
            "optim": optim,
        }
        return Recipe.model_validate(values)

    def run(self, variant: str) -> Path:
        folder = self.storage / variant
        if not (folder / "run.json").exists():
            self.train(self.recipe(variant))
        return folder

    def train(self, recipe: Recipe) -> None:
        record = train(recipe, InProcessLauncher())
        assert record["status"] == "finished"


@pytest.fixture(scope="module")
def runs(tiny_model: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_model, chat_file, tmp_path_factory.mktemp("runs"))


def logged(run: Path) -> dict[int, float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def tensors(run: Path) -> dict[str, torch.Tensor]:
    (result,) = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    loaded: dict[str, torch.Tensor] = load_file(result)
    return loaded


def in_memory(recipe: Recipe, run: Path) -> Any:
    """The model in training, with the weights of its last checkpoint."""
    model = load_model(recipe)
    weights = run / "checkpoints" / f"step-{STEPS:08d}"
    if isinstance(model, PeftModel):
        load_weights(model, weights)
    else:
        model.load_state_dict(load_file(weights / "model.safetensors"), strict=False)
    return model.eval()


def loaded_alone(recipe: Recipe, run: Path) -> Any:
    """The result, loaded by transformers and PEFT."""
    dtype = getattr(torch, recipe.model.dtype) if recipe.model.dtype != "auto" else torch.float32
    if not recipe.trains_adapter:
        return AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    config = {
        "none": None,
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    }[recipe.model.quantize]
    base = AutoModelForCausalLM.from_pretrained(
        recipe.model.base, dtype=dtype, quantization_config=config
    )
    for module in base.modules():  # on this CPU, inference would repack the weights, lossily
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(base, run / "adapter", autocast_adapter_dtype=False).eval()


@pytest.mark.long
@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, QUICK))
def test_it_learns_and_loads_alone(runs: Runs, variant: str) -> None:
    recipe, run = runs.recipe(variant), runs.run(variant)
    losses = logged(run)
    assert sorted(losses) == list(range(1, STEPS + 1))
    if variant.startswith("existing"):
        # What is left to learn is less than batches differ by: the same rows tell.
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        assert record["metrics"]["eval_loss"] < record["before"]["eval_loss"] - 0.02
    else:
        assert losses[STEPS] < losses[1] - 0.1, losses
    tokens = torch.arange(3, 67).reshape(2, 32)
    with torch.no_grad():
        actual = in_memory(recipe, run)(tokens).logits.float()
        expected = loaded_alone(recipe, run)(tokens).logits.float()
        base = AutoModelForCausalLM.from_pretrained(runs.base, dtype=torch.float32).eval()
        untrained = base(tokens).logits
    # bfloat16 rounds what PiSSA leaves of the base, and autocast the adapter.
    rounded = variant in ("bfloat16-pissa", "bfloat16-autocast")
    tolerance = 0.05 if rounded else 1e-5
    assert distance(actual, expected) < tolerance
    assert distance(actual, untrained) > 0.2


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, QUICK))
def test_its_export_is_the_model_that_was_trained(runs: Runs, variant: str, tmp_path: Path) -> None:
    """Covers an adapter merged into its (quantised) base, and a full model."""
    recipe, run = runs.recipe(variant), runs.run(variant)
    to = tmp_path / "whole"
    export(Folder(str(run)), to, merge=recipe.trains_adapter)
    tokens = torch.arange(3, 67).reshape(2, 32)
    with torch.no_grad():
        actual = in_memory(recipe, run)(tokens).logits.float()
        expected = AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32)(tokens).logits
    # A float32 model does not round as bfloat16 and int8 activations do.
    rounded = recipe.model.dtype == "bfloat16" or recipe.model.quantize == "int8"
    assert distance(actual, expected) < (0.05 if rounded else 1e-4)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, in standard deviations."""
    return float((actual - expected).square().mean().sqrt() / actual.std())


@pytest.mark.parametrize("variant", mostly_slow(RESUMED, QUICK))
def test_a_resumed_run_ends_the_same(runs: Runs, variant: str, tmp_path: Path) -> None:
    run = runs.run(variant)
    again = tmp_path / variant
    shutil.copytree(run, again)
    shutil.copytree(runs.storage / "prepared", tmp_path / "prepared")
    shutil.rmtree(again / "checkpoints" / f"step-{STEPS:08d}")
    for result in ("adapter", "model"):
        shutil.rmtree(again / result, ignore_errors=True)
    record = json.loads((again / "run.json").read_text(encoding="utf-8"))
    (again / "run.json").write_text(json.dumps({**record, "status": "running"}), encoding="utf-8")
    runs.train(runs.recipe(variant).model_copy(update={"storage": str(tmp_path)}))
    before, after = tensors(run), tensors(again)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert logged(run) == logged(again)
    record = json.loads((again / "run.json").read_text(encoding="utf-8"))
    assert len(record["restarts"]) == 1
