"""Sharding: gradients equal those of one process; checkpoints fit any number of workers."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from bitsandbytes.nn import Params4bit
from safetensors.torch import load_file
from support.cases import mostly_slow
from support.mixtures import saved_mixture
from support.steps import by_workers, make_sequences, make_setup, one_step
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.integrations.bitsandbytes import Bnb4bitQuantize

from finray.training.common.errors import InputError
from finray.training.config.recipe import Recipe
from finray.training.data.batching import Rows, collate
from finray.training.data.stream import share
from finray.training.engine.methods import objective_of
from finray.training.engine.trainer import StepMeasures, StreamTrainer
from finray.training.engine.trainer_arguments import training_arguments
from finray.training.models import loading, placement
from finray.training.models.first_worker import made_once
from finray.training.models.generation import completion_texts, generate_completions
from finray.training.models.loading import load_model, load_tokenizer
from finray.training.models.out_of_memory import is_out_of_memory
from finray.training.models.placement import choose_strategy
from finray.training.models.sharding import shard
from finray.training.models.weights import gather_weights, save_result

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BATCH = 8
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "freeze": {"freeze": {"last_layers": 1}},
    "lora": {"adapter": {"rank": 4}},
    "dora": {"adapter": {"rank": 4, "dora": True, "modules_to_save": ["embed_tokens"]}},
    "nf4": {"adapter": {"rank": 4}, "model": {"quantize": "nf4"}},
    "recomputed": {"model": {"gradient_checkpointing": True}},
}
LOW: dict[str, dict[str, Any]] = {
    "bfloat16": {"adapter": {"rank": 4}, "model": {"dtype": "bfloat16"}},
}


def make_recipe(base: Path, kind: str | dict[str, Any], workers: int, **optim: Any) -> Recipe:
    parts = (KINDS | LOW)[kind] if isinstance(kind, str) else kind
    return Recipe.model_validate(
        {
            "name": "x",
            "data": {"train": [{"path": "/x"}]},
            "optim": {"batch_size": BATCH, "micro_batch_size": 1, **optim},
            "scale": {"workers": workers, "strategy": "fsdp" if workers > 1 else "auto"},
            **parts,
            "model": {"base": str(base), **parts.get("model", {})},
        }
    )


def make_model(settings: Recipe) -> Any:
    """A model whose adapter is not zero, so that all its weights get gradients."""
    torch.manual_seed(4)
    model = load_model(settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def assert_close(actual: dict[str, Any], expected: dict[str, Any], **tolerance: float) -> None:
    assert actual.keys() == expected.keys() and actual
    for name, value in actual.items():
        torch.testing.assert_close(
            value, expected[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "workers"),
    mostly_slow(
        [*((kind, 2) for kind in KINDS), ("full", 4), ("nf4", 4)],
        quick={("dora", 2), ("nf4", 2)},
    ),
)
def test_the_step_is_that_of_one_process(
    tiny_model: Path, tmp_path: Path, kind: str, workers: int
) -> None:
    """Gradients clipped to a tenth of their norm, over several microbatches; rank 0 alone loads."""
    whole = make_recipe(tiny_model, kind, 0, max_grad_norm=0.1)
    rows = make_sequences(BATCH)
    expected, logged, _ = one_step(make_model(whole), whole, rows, tmp_path, 0, 1)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert float(norm) == pytest.approx(0.1, rel=1e-4)
    settings = make_recipe(tiny_model, kind, workers, max_grad_norm=0.1)

    def work(rank: int, world_size: int) -> dict[str, Any]:
        def make() -> Any:
            assert rank == 0
            return make_model(settings)

        model = made_once(settings, "fsdp", make)
        if rank > 0:  # of each weight one value
            sizes = {w.untyped_storage().nbytes() - w.element_size() for w in model.parameters()}
            assert sizes == {0}
        measured, values, _ = one_step(model, settings, rows, tmp_path, rank, world_size)
        assert all(isinstance(weight, DTensor) for weight in model.parameters())
        return {"gradients": measured, "logged": values}

    for saved in by_workers(workers, tmp_path, work):
        assert saved["logged"] == pytest.approx(logged, abs=1e-5)
        assert_close(saved["gradients"], expected, atol=1e-5, rtol=1e-4)


def test_a_model_that_the_first_worker_cannot_hand_out(tiny_model: Path, tmp_path: Path) -> None:
    """All raise its error, also that it has no memory; a part without a name is made by each."""
    settings = make_recipe(tiny_model, "full", 2)

    def wrong() -> Any:
        raise InputError("model.base: no such folder")

    def large() -> Any:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def strange() -> Any:
        model = torch.nn.Linear(2, 2)
        model.register_forward_pre_hook(lambda *_: None)
        return model

    def work(rank: int, world_size: int) -> dict[str, Any]:
        del rank, world_size
        with pytest.raises(InputError, match="no such folder"):
            made_once(settings, "fsdp", wrong)
        with pytest.raises(RuntimeError) as raised:
            made_once(settings, "fsdp", large)
        assert is_out_of_memory(raised.value)
        return {"weight": made_once(settings, "fsdp", strange).weight.detach()}

    for made in by_workers(2, tmp_path, work):
        assert made["weight"].shape == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "quantize"), [("fsdp", "none"), ("ddp", "nf4")])
def test_experts_over_workers(tmp_path: Path, strategy: str, quantize: str) -> None:
    """Their gradients and their load are those of one process."""
    base = saved_mixture("qwen3_moe", tmp_path / "base", vocab_size=256)
    parts = {"adapter": {"rank": 4}, "model": {"quantize": quantize}}
    whole = make_recipe(base, parts, 0)
    rows = make_sequences(BATCH)
    expected, logged, _ = one_step(make_model(whole), whole, rows, tmp_path, 0, 1)
    assert logged["expert_load"] > 1
    settings = make_recipe(base, parts, 2)
    scale = settings.scale.model_copy(update={"strategy": strategy})
    settings = settings.model_copy(update={"scale": scale})

    def work(rank: int, world_size: int) -> dict[str, Any]:
        measured, values, _ = one_step(
            make_model(settings), settings, rows, tmp_path, rank, world_size
        )
        names = {name.removeprefix("module."): value for name, value in measured.items()}
        return {"gradients": names, "logged": values}

    for saved in by_workers(2, tmp_path, work):
        assert saved["logged"] == pytest.approx(logged, abs=1e-5)
        assert_close(saved["gradients"], expected, atol=1e-5, rtol=1e-4)


class _Written(TrainerCallback):  # type: ignore[misc]
    """Writes the state of a resumed trainer before its first step."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._write()


def train(
    settings: Recipe, folder: Path, rank: int, world_size: int, steps: range
) -> dict[str, Any]:
    """Train some steps from the previous checkpoint, and write a new one.

    Returns:
        Loss and gradient norm of each step, and the size of the moments on this rank in bytes.
    """
    model = make_model(settings)
    setup = make_setup(settings, model, folder, rank, world_size)
    objective = objective_of(setup)
    if setup.strategy == "fsdp":
        setup.place(model)
    losses: list[float] = []
    norms: list[float] = []

    def rows() -> Iterator[Rows]:
        for step in steps:
            batch = make_sequences(BATCH, step)
            first = sum(share(BATCH, earlier, world_size) for earlier in range(rank))
            own = batch[first : first + share(BATCH, rank, world_size)]
            yield own

    def after_step(measures: StepMeasures) -> bool:
        assert not isinstance(measures.grad_norm, DTensor)
        logged = trainer.take_logged(1, measures.grad_norm)
        losses.append(logged.loss)
        norms.append(logged.grad_norm)
        return measures.step == steps.stop

    trainer = StreamTrainer(
        model,
        training_arguments(settings, 9, folder),
        objective=objective,
        passes=1,
        rows=rows,
        after_step=after_step,
        is_logged=lambda step: True,
        stop_requested=lambda: False,
    )
    again = folder / f"again-{steps.start}"
    again.mkdir(exist_ok=True)
    trainer.add_callback(_Written(lambda: trainer.write_state(again)))
    before = folder / f"step-{steps.start}"
    trainer.train(resume_from_checkpoint=str(before) if steps.start else None)
    after = folder / f"step-{steps.stop}"
    after.mkdir(exist_ok=True)
    trainer.write_state(after)
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    held = sum(local_bytes(moment) for moment in moments)
    return {"losses": losses, "norms": norms, "moments": held}


def local_bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().nbytes()


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and masters, by name."""
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    state = {
        f"{index}.{name}": value
        for index, moments in optimizer["state"].items()
        for name, value in moments.items()
    }
    state.update({f"master.{n}": value for n, value in enumerate(optimizer.get("masters", []))})
    return state | load_file(next(checkpoint.glob("*.safetensors")))


SHORT = ((1, "auto"), (2, "fsdp"), (2, "ddp"), (1, "auto"))
CHAIN = ((1, "auto"), (2, "fsdp"), (4, "fsdp"), (2, "ddp"), (2, "fsdp"), (1, "auto"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "groups"),
    mostly_slow([("full", SHORT), ("full", CHAIN), ("bfloat16", CHAIN)], quick={("full", SHORT)}),
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}-groups",
)
def test_a_checkpoint_belongs_to_no_number_of_workers(
    tiny_model: Path, tmp_path: Path, kind: str, groups: tuple[tuple[int, str], ...]
) -> None:
    """Several groups of workers continue one run: the checkpoints and steps are the same.

    In bfloat16 the optimizer has masters, and the losses are rounded.
    """
    settings = make_recipe(tiny_model, kind, 0, learning_rate=1e-3)
    alone, chain = tmp_path / "alone", tmp_path / "chain"
    alone.mkdir()
    chain.mkdir()
    expected = train(settings, alone, 0, 1, range(len(groups)))
    losses: list[float] = []
    norms: list[float] = []
    for step, (workers, strategy) in enumerate(groups):
        scale = settings.scale.model_copy(update={"workers": workers, "strategy": strategy})
        scaled = settings.model_copy(update={"scale": scale})

        def work(
            rank: int, world_size: int, scaled: Recipe = scaled, step: int = step
        ) -> dict[str, Any]:
            return train(scaled, chain, rank, world_size, range(step, step + 1))

        meeting = tmp_path / f"meeting-{step}"
        meeting.mkdir()
        parts = by_workers(workers, meeting, work) if workers > 1 else [work(0, 1)]
        for part in parts:
            assert part["losses"] == parts[0]["losses"]
            if strategy == "fsdp":
                assert part["moments"] < 1.1 * expected["moments"] / workers
        losses += parts[0]["losses"]
        norms += parts[0]["norms"]
        if step:
            written = state_of(chain / f"again-{step}")
            assert_close(written, state_of(chain / f"step-{step}"), atol=0, rtol=0)
    rounding = 1e-2 if kind == "bfloat16" else 1e-5
    assert losses == pytest.approx(expected["losses"], abs=rounding)
    assert len(set(losses)) == len(groups)
    if kind != "bfloat16":
        assert norms == pytest.approx(expected["norms"], rel=1e-4)
        chained, single = (state_of(folder / f"step-{len(groups)}") for folder in (chain, alone))
        assert_close(chained, single, atol=1e-5, rtol=1e-4)


def test_weights_trained_in_float32_are_gathered_in_the_compute_type(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The shards, their gradients and the optimizer's state are float32; autograd keeps no copy."""
    whole = make_recipe(tiny_model, "full", 0)
    rows = make_sequences(BATCH)
    expected, logged, _ = one_step(make_model(whole), whole, rows, tmp_path, 0, 1)
    full = make_recipe(tiny_model, "full", 2)
    low = full.model.model_copy(update={"dtype": "bfloat16"})
    settings = full.model_copy(update={"model": low})

    def work(rank: int, world_size: int) -> dict[str, Any]:
        model = make_model(settings)
        measured, measures, _ = one_step(model, settings, rows, tmp_path, rank, world_size)
        assert all(weight.dtype == torch.float32 for weight in model.parameters())
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if set(tensor.shape) == {32, 64} and tensor.ndim == 2:  # as the MLPs' weights
                kept.append(tensor)
            return tensor

        batch = collate([row for row in rows if len(row.input_ids) not in (32, 64)][:1])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(**batch.inputs, use_cache=False).logits
        assert len(kept) >= 6 and all(not t.untyped_storage().nbytes() for t in kept)
        logits.sum().backward()
        return {"gradients": measured, "logged": measures}

    for saved in by_workers(2, tmp_path, work):
        assert saved["logged"]["loss"] == pytest.approx(logged["loss"], abs=2e-2)
        for name, gradient in saved["gradients"].items():
            assert gradient.dtype == torch.float32
            similarity = torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), 0)
            assert similarity > 0.99, name


def settings_of(file: Path) -> dict[str, Any]:
    """The adapter's configuration with sorted lists, as PEFT writes sets in any order."""
    read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    modules = read.get("target_modules")
    return {**read, "target_modules": sorted(modules)} if modules else read


@pytest.mark.parametrize("kind", mostly_slow(["full", "dora", "nf4"], quick={"dora"}))
def test_every_rank_holds_its_share_and_the_result_is_whole(
    tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    settings = make_recipe(tiny_model, kind, 2)
    tokenizer = load_tokenizer(settings)
    model = make_model(settings)
    held = sum(weight.nbytes for weight in model.parameters())
    save_result(settings, copy.deepcopy(model), tokenizer, tmp_path / "whole")

    def work(rank: int, world_size: int) -> dict[str, Any]:
        shard(model, settings, torch.device("cpu"))
        weights = gather_weights(model)
        if rank == 0:
            save_result(settings, model, tokenizer, tmp_path / "gathered", weights)
        return {"bytes": sum(map(local_bytes, model.parameters()))}

    for saved in by_workers(2, tmp_path, work):
        assert saved["bytes"] == pytest.approx(held / 2, rel=0.02)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "gathered").iterdir())
    for name in names:
        actual, expected = tmp_path / "gathered" / name, tmp_path / "whole" / name
        if name.endswith(".safetensors"):
            assert_close(load_file(actual), load_file(expected), atol=0, rtol=0)
        elif name.endswith(".json"):
            assert settings_of(actual) == settings_of(expected), name


@pytest.mark.parametrize("prompts", [1, 3])
def test_answers(tiny_model: Path, tmp_path: Path, prompts: int) -> None:
    """They equal those of one process, also if a rank has no prompt."""
    settings = make_recipe(tiny_model, "lora", 2)
    model, tokenizer = make_model(settings), load_tokenizer(settings)
    prompt_ids = [list(range(5 + 2 * number, 40)) for number in range(prompts)]

    def answers(rank: int, world_size: int) -> list[str]:
        completions = generate_completions(model, tokenizer, prompt_ids, 12, rank, world_size)
        return completion_texts(tokenizer, completions)

    expected = answers(0, 1)

    def work(rank: int, world_size: int) -> dict[str, Any]:
        shard(model, settings, torch.device("cpu"))
        return {"answers": answers(rank, world_size)}

    for saved in by_workers(2, tmp_path, work):
        assert saved["answers"] == expected


@pytest.mark.parametrize(
    ("spare", "older", "chosen"),
    [(0, "float32", "ddp"), (-1, "float32", "fsdp"), (-1, "float16", "ddp")],
)
def test_auto_shards_what_the_smallest_device_cannot_hold(
    tiny_model: Path, tmp_path: Path, spare: int, older: str, chosen: str
) -> None:
    """A weight trained in float32 takes 20 bytes; four fifths of the memory are usable. Nothing is
    sharded where one rank's device is too old for the type of the others."""
    settings = make_recipe(tiny_model, "full", 0)
    needed = 20 * sum(weight.numel() for weight in load_model(settings).parameters())
    cuda = torch.device("cuda", 0)

    def work(rank: int, world_size: int) -> dict[str, Any]:
        memory = 2 * needed if rank == 0 else math.ceil(needed / 0.8) + spare
        properties = SimpleNamespace(total_memory=memory)
        dtype = "float32" if rank == 0 else older
        with (
            patch.object(torch.cuda, "get_device_properties", return_value=properties),
            patch.object(placement, "choose_dtype", return_value=dtype),
        ):
            return {"strategy": choose_strategy(settings, world_size, cuda)}

    assert choose_strategy(settings, 1, cuda) == "ddp"
    assert {saved["strategy"] for saved in by_workers(2, tmp_path, work)} == {chosen}


def test_a_quantised_base_waits_on_the_host_for_its_shards(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU quantises each weight, and holds only one at a time; without shards it keeps them."""
    quantised: list[str] = []
    quantise = Bnb4bitQuantize.convert

    def convert(self: Any, weights: dict[str, Any], **more: Any) -> Any:
        quantised.extend(f"{name} on {value.device}" for name, value in weights.items())
        return quantise(self, weights, **more)

    monkeypatch.setattr(Bnb4bitQuantize, "convert", convert)
    monkeypatch.setattr("finray.training.models.loading.device_kind", lambda: "cuda")
    asked: list[Any] = []
    load = loading.load_pretrained

    def load_pretrained(*names: Any, **more: Any) -> Any:
        asked.append(more.get("device_map"))
        return load(*names, **more)

    monkeypatch.setattr(loading, "load_pretrained", load_pretrained)
    sharded = make_recipe(tiny_model, "nf4", 2)
    model = load_model(sharded)
    load_model(sharded.with_strategy("ddp"))
    assert asked == [{"": "cpu"}, None]
    assert len(quantised) == 28 and all(" on cpu" in one for one in quantised)
    weight = next(w for w in model.parameters() if isinstance(w, Params4bit))
    assert weight.device.type == "cpu" and weight.bnb_quantized
