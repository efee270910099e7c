"""Vision-language checkpoints trained on text: the language model alone, in a whole checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.cases import mostly_slow
from support.composites import CONFIGS, make_composite
from support.finished_run import finished_run
from support.steps import by_workers, make_sequences, one_step
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BlipConfig,
    T5Config,
)

from finray.training.common.errors import InputError
from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe
from finray.training.data.stream import every_sequence
from finray.training.export.export import export
from finray.training.launch.in_process import InProcessLauncher
from finray.training.models.composite import is_in_towers, towers
from finray.training.models.loading import count_meta_parameters, count_parameters, load_model
from finray.training.run import prepare_data, train

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

IDS = torch.arange(3, 19)[None]
KINDS = sorted(CONFIGS)
TRAINED: dict[str, dict[str, Any]] = {"lora": {"adapter": {"rank": 4, "alpha": 8}}, "full": {}}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, chat_rows: list[object]) -> Path:
    """Eight conversations, which are one step."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in chat_rows[:8]), encoding="utf-8")
    return file


def recipe(base: Path, data: Path, storage: Path, **changes: Any) -> Recipe:
    source = [{"path": str(data)}]
    values = {
        "name": "run",
        "model": {"base": str(base)},
        "data": {"train": source, "eval": source, "max_length": 96, "packing": False},
        "optim": {"max_steps": 2, "batch_size": 8, "learning_rate": 1e-2},
        "eval": {"samples": 2, "max_new_tokens": 4},
        "scale": {"workers": 0},
        "log": {"every_steps": 1},
        "storage": str(storage),
        **changes,
    }
    return Recipe.model_validate(values)


def opened(folder: Path) -> Any:
    """The checkpoint as transformers loads it, every tensor in its place."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


@torch.no_grad()
def plain_loss(model: Any, settings: Recipe) -> float:
    """The mean loss of the trained tokens, one document at a time, in plain transformers."""
    prepared, total, count = prepare_data(settings), 0.0, 0
    for row in every_sequence(prepared.files, prepared.manifest.train, 0, 1):
        ids = torch.from_numpy(row.input_ids.copy()).long()
        labels = ids.where(torch.from_numpy(row.trainable.copy()), -100)
        tokens = int((labels[1:] != -100).sum())
        total += float(model(input_ids=ids[None], labels=labels[None]).loss) * tokens
        count += tokens
    return total / count


@pytest.mark.long
@pytest.mark.rehearses  # which tells the models whose rows must be padded
@pytest.mark.parametrize(
    ("kind", "trained"),
    mostly_slow(
        [(kind, trained) for kind in KINDS for trained in TRAINED],
        {("gemma3", "lora"), ("mistral3", "full")},
    ),
)
def test_a_run(kind: str, trained: str, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    """Losses of plain transformers, and a result that is, or belongs to, the whole checkpoint."""
    base = make_composite(kind, tiny_model, tmp_path / "base")
    changes = dict(TRAINED[trained])
    if kind == "llama4" and trained == "lora":
        changes["adapter"] = {"rank": 4, "targets": ["q_proj", "v_proj"]}
    settings = recipe(base, rows, tmp_path / "runs", **changes)
    record = train(settings, InProcessLauncher())
    run = tmp_path / "runs" / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before = next(line["loss"] for line in lines if "loss" in line)
    assert before == pytest.approx(plain_loss(opened(base), settings), abs=1e-6)
    if trained == "lora":
        result = PeftModel.from_pretrained(opened(base), run / "adapter").eval()
        export(Folder(str(run)), tmp_path / "whole", merge=True)
        whole = opened(tmp_path / "whole")
    else:
        whole = result = opened(run / "model")
    after = plain_loss(result, settings)
    assert record["metrics"]["eval_loss"] == pytest.approx(after, abs=1e-6)
    assert after < before - 1e-3
    torch.testing.assert_close(whole(input_ids=IDS).logits, result(input_ids=IDS).logits)
    check_rest(opened(base), whole)
    assert record["model_class"] == "AutoModelForImageTextToText"
    folder = tmp_path / "whole" if trained == "lora" else run / "model"
    assert json.loads((folder / "preprocessor_config.json").read_text()) == {"size": 28}


def check_rest(base: Any, whole: Any) -> None:
    """What text does not reach has not changed by a bit; the rest has."""
    outside, own, others = towers(base), base.state_dict(), whole.state_dict()
    assert outside and own.keys() == others.keys()
    same = {name for name in own if torch.equal(own[name], others[name])}
    assert {name for name in own if is_in_towers(name, outside)} <= same
    assert any(name.endswith("q_proj.weight") for name in own.keys() - same)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_composite("gemma3", tiny_model, tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_composite("llava", tiny_model, tmp_path_factory.mktemp("llava"))


def model_recipe(base: Path, **changes: Any) -> Recipe:
    return recipe(base, Path("/x"), Path("/y"), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": "lora"},
        {"adapter": {"targets": ["q_proj", "o_proj"]}},
        {"adapter": {"targets": r".*\.(q|k|v)_proj"}},
        {"adapter": {"targets": ["q_proj"], "modules_to_save": ["embed_tokens", "k_proj"]}},
        {"freeze": {"last_layers": 1}},
        {"freeze": {"train": ["q_proj"]}},
        {},
    ],
)
def test_only_what_text_reaches_is_trained(llava: Path, changes: dict[str, Any]) -> None:
    """And all of it gets a gradient. CLIP's layers are called as Llama's."""
    settings = model_recipe(llava, **changes)
    notes: list[str] = []
    model = load_model(settings, notify=notes.append)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained and not any("vision" in name or "projector" in name for name in trained)
    model.train()(input_ids=IDS, use_cache=False).logits.sum().backward()
    assert not [name for name in trained if model.get_parameter(name).grad is None]
    assert count_parameters(model) == count_meta_parameters(settings)
    assert notes == [
        "model.base: text does not reach model.vision_tower, model.multi_modal_projector; they "
        "stay as they are"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"targets": ["out_proj"]}}, r"adapter\.targets: 'out_proj' matches no module"),
        ({"adapter": {"targets": r".*vision_tower.*"}}, r"adapter\.targets: the regular expres"),
        ({"adapter": {"modules_to_save": ["linear_1"]}}, r"adapter\.modules_to_save: 'linear_1'"),
        ({"freeze": {"train": ["vision_tower"]}}, r"freeze\.train: .* no parameter that text r"),
    ],
)
def test_names_of_what_text_does_not_reach(
    llava: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        count_meta_parameters(model_recipe(llava, **changes))


def test_an_adapter_that_reaches_into_a_tower_goes_on_outside_it(
    llava: Path, tmp_path: Path
) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    adapter = get_peft_model(opened(llava), config)
    assert any("vision_tower" in name for name in adapter.state_dict() if "lora" in name)
    adapter.save_pretrained(tmp_path)
    model = load_model(model_recipe(llava, model={"base": str(llava), "adapter": str(tmp_path)}))
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained and not any("vision_tower" in name for name in trained)


def test_a_quantised_base_and_its_merge(llava: Path, tmp_path: Path) -> None:
    """The merge takes from the base, not from 4 bits, what text does not reach."""
    run = finished_run(tmp_path, llava, quantize="nf4")
    (run / "run.json").write_text(
        json.dumps({**json.loads((run / "run.json").read_text()), "dtype": "float32"})
    )
    export(Folder(str(run)), tmp_path / "whole", merge=True)
    check_rest(opened(llava), opened(tmp_path / "whole"))


def test_reward_heads(gemma: Path, llava: Path) -> None:
    """Where transformers has a classifier with a tower, its head is trained; else it is refused."""
    changes = {"adapter": "lora", "method": {"kind": "reward"}, "eval": {}}
    model = load_model(model_recipe(gemma, **changes), "score")
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("score" in name for name in trained)
    assert not any("vision" in name or "projector" in name for name in trained)
    with pytest.raises(
        InputError, match=r"^model\.base: transformers has no sequence class.*llava"
    ):
        count_meta_parameters(model_recipe(llava, **changes), "score")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(d_model=16, num_layers=1, num_heads=2), "no causal language model for a t5 mo"),
        (BlipConfig(), "a blip model does not take text alone: it needs pixel_values"),
    ],
)
def test_models_that_text_cannot_train(config: Any, message: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"^model\.base: .*{message}"):
        count_meta_parameters(model_recipe(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"adapter": {"rank": 2}}], ids=["full", "lora"])
def test_shards(gemma: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """The gradients of one process, with a tower whose layers are as many as the decoder's."""

    def settings(workers: int) -> Recipe:
        scale = {"workers": workers, "strategy": "fsdp" if workers else "auto"}
        optim = {"batch_size": 4, "micro_batch_size": 1}
        return model_recipe(gemma, scale=scale, optim=optim, **changes)

    def model(workers: int) -> Any:
        torch.manual_seed(4)
        made = load_model(settings(workers))
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        return made

    rows = make_sequences(4)
    expected, _, _ = one_step(model(0), settings(0), rows, tmp_path, 0, 1)

    def work(rank: int, world_size: int) -> dict[str, Any]:
        return one_step(model(2), settings(2), rows, tmp_path, rank, world_size)[0]

    for measured in by_workers(2, tmp_path, work):
        assert measured.keys() == expected.keys() and measured
        for name, gradient in measured.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def test_a_model_whose_package_is_not_installed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("\nA tower requires the timm library.\nInstall it with pip.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", missing)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(InputError, match=r"^model\.base: A tower requires the timm library\. Inst"):
        count_meta_parameters(model_recipe(tiny_model))
    with pytest.raises(InputError, match=r"^model\.base: cannot load .*: A tower requires"):
        load_model(model_recipe(tiny_model))
