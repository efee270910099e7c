"""The loss and its gradient, against independent computations."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import steps
from support.cases import mostly_slow
from support.steps import Gradients, gradients, make_sequences
from transformers import AutoModelForCausalLM

from finray.training.config.recipe import Recipe
from finray.training.data.batching import IGNORED, Batch, collate, collate_flat
from finray.training.data.stream import Sequence
from finray.training.engine.gradient_sums import GradientSums
from finray.training.engine.methods import objective_of
from finray.training.engine.trainer import StreamTrainer
from finray.training.engine.trainer_arguments import training_arguments
from finray.training.models.generation import generate_completions
from finray.training.models.loading import load_model, load_tokenizer
from finray.training.objectives.logprobs import cross_entropies

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BATCH = 8


def documents(sequence: Sequence) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (input_ids, trainable), one for each document."""
    ids = torch.from_numpy(sequence.input_ids.astype(np.int64))
    trainable = torch.from_numpy(sequence.trainable)
    sizes = sequence.lengths.tolist()
    return list(zip(ids.split(sizes), trainable.split(sizes), strict=True))


def unpacked_loss(model: Any, sequences: list[Sequence]) -> torch.Tensor:
    """Mean loss over trainable tokens, one document at a time, token by token."""
    total, count = torch.zeros(()), 0
    for sequence in sequences:
        for ids, trainable in documents(sequence):
            log_probabilities = model(ids[None]).logits[0].log_softmax(-1)
            for at in range(1, len(ids)):
                if trainable[at]:
                    total = total - log_probabilities[at - 1, ids[at]]
                    count += 1
    return total / count


def summed_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Of the logits of a batch's kept columns."""
    rows, tokens = logits.flatten(0, 1)[batch.trained], batch.targets.flatten()[batch.trained]
    return cross_entropies(rows, tokens, None, summed=True)[0]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def recipe(base: Path, **optim: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": str(base)},
            "data": {"train": [{"path": "/x"}]},
            "optim": {"batch_size": BATCH, "micro_batch_size": 2, **optim},
        }
    )


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_unpacked(tiny_model: Path, attention: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation=attention
    )
    sequences = make_sequences(4)
    batch = collate(sequences)
    logits = model(**batch.inputs, use_cache=False).logits
    loss = summed_loss(logits, batch) / batch.loss_units
    loss.backward()
    packed = gradients(model)
    model.zero_grad()
    expected = unpacked_loss(model, sequences)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert_close(packed, gradients(model))


def test_the_first_token_of_a_document_is_no_target() -> None:
    """Nothing predicts it, however the row marks it and whichever way rows share a pass."""
    (row,) = make_sequences(1, seed=3)
    assert len(row.lengths) > 1
    marked = replace(row, trainable=np.ones_like(row.trainable))
    expected = row.lengths.sum() - len(row.lengths)
    assert {collate([marked]).loss_units, collate_flat([marked]).loss_units} == {expected}


def test_a_neighbour_changes_nothing(model: Any) -> None:
    """A document's logits do not depend on the documents packed with it."""
    first, second = (make_sequences(1, seed)[0] for seed in (1, 2))
    joined = Sequence(
        np.concatenate([first.input_ids, second.input_ids]),
        np.concatenate([first.lengths, second.lengths]),
        np.concatenate([first.trainable, second.trainable]),
        np.array([0, 1]),
    )
    alone, together = collate([second]), collate([joined])
    kept = alone.targets.shape[1]
    with torch.no_grad():
        torch.testing.assert_close(
            model(**alone.inputs, use_cache=False).logits,
            model(**together.inputs, use_cache=False).logits[:, -kept:],
            atol=1e-5,
            rtol=1e-5,
        )


def one_step(
    model: Any, settings: Recipe, scratch: Path, rank: int, world_size: int
) -> tuple[Gradients, float]:
    """The gradient and the logged loss of one optimizer step over BATCH sequences."""
    sequences = make_sequences(BATCH)
    measured, logged, counts = steps.one_step(model, settings, sequences, scratch, rank, world_size)
    assert counts.units == sum(int(s.trainable.sum()) for s in sequences)
    assert counts.tokens == sum(len(s.input_ids) for s in sequences)
    return measured, logged["loss"]


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_the_step_is_that_of_the_whole_batch(
    tiny_model: Path, model: Any, tmp_path: Path, micro: int
) -> None:
    settings = recipe(tiny_model, micro_batch_size=micro, max_grad_norm=0)
    measured, loss = one_step(copy.deepcopy(model), settings, tmp_path, 0, 1)
    reference = copy.deepcopy(model)
    expected = unpacked_loss(reference, make_sequences(BATCH))
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), abs=1e-5)
    assert_close(measured, gradients(reference))


@pytest.mark.parametrize("world_size", mostly_slow([2, 3, 4], quick={3}))
def test_gradients_agree_whatever_the_workers(
    tiny_model: Path, model: Any, tmp_path: Path, world_size: int
) -> None:
    settings = recipe(tiny_model, max_grad_norm=0)
    expected, loss = one_step(copy.deepcopy(model), settings, tmp_path, 0, 1)

    def work(rank: int, world_size: int) -> dict[str, Any]:
        measured, loss = one_step(copy.deepcopy(model), settings, tmp_path, rank, world_size)
        return {"gradients": measured, "loss": loss}

    for saved in steps.by_workers(world_size, tmp_path, work):
        assert saved["loss"] == pytest.approx(loss, abs=1e-5)
        for name, gradient in saved["gradients"].items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)


def test_a_batch_without_loss_has_no_gradient(model: Any) -> None:
    silent = make_sequences(1)[0]
    nothing = Sequence(
        silent.input_ids, silent.lengths, np.zeros_like(silent.trainable), silent.rows
    )
    batch: Batch = collate([nothing])
    own = copy.deepcopy(model)
    logits = own(**batch.inputs, use_cache=False).logits
    loss = summed_loss(logits, batch)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(float(gradient.abs().max()) == 0.0 for gradient in gradients(own).values())


def test_measures_against_their_definitions() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 50, 17)
    targets = torch.randint(0, 17, (2, 50))
    targets[:, ::5] = logits[:, ::5].argmax(-1)
    targets[0, :20] = IGNORED
    is_trained = targets != IGNORED
    _, statistics = cross_entropies(
        logits[is_trained], targets[is_trained], None, summed=True, measured=True
    )
    correct, entropy = statistics.tolist()
    distribution = torch.distributions.Categorical(logits=logits[is_trained])
    assert correct == int((logits.argmax(-1) == targets)[is_trained].sum()) > 0
    assert entropy == pytest.approx(float(distribution.entropy().sum()), rel=1e-5)


def bfloat16_adapter(base: Path) -> Any:
    torch.manual_seed(3)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    return get_peft_model(model, adapter, autocast_adapter_dtype=False)


def summed_gradients(model: Any, settings: Recipe, folder: Path) -> Gradients:
    """Those of each row, added up in float32."""
    sequences = make_sequences(BATCH)
    objective = objective_of(steps.make_setup(settings, model, folder, 0, 1))
    units = sum(int(s.trainable.sum()) for s in sequences)
    total: Gradients = {}
    for sequence in sequences:
        model.zero_grad()
        (objective.loss(model, objective.collate([sequence]), False).total / units).backward()
        for name, gradient in gradients(model).items():
            total[name] = total.get(name, 0.0) + gradient.float()
    return total


def test_workers_add_up_gradients_that_some_of_them_lack(tmp_path: Path) -> None:
    """Such as those of an expert that no token of a microbatch is sent to."""

    def work(rank: int, world_size: int) -> dict[str, Any]:
        weights = [torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)) for _ in range(3)]
        sums = GradientSums(weights, world_size)
        for microbatch in range(3):
            for number, weight in enumerate(weights):
                is_last = microbatch == 2
                if is_last or number != rank + microbatch:
                    value = 0.0 if is_last else float(10**number)
                    weight.grad = torch.full((2,), value, dtype=torch.bfloat16)
            sums.add(is_last)
        # One whose worker has none at all, before the last.
        lone = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
        alone = GradientSums([lone], world_size)
        lone.grad = torch.full_like(lone, 3.0) if rank == 0 else None
        alone.add(False)
        lone.grad = torch.zeros_like(lone)
        alone.add(True)
        return {"gradients": torch.stack([e.grad for e in (*weights, lone) if e.grad is not None])}

    # Of four microbatches one leaves out the first, two the second, one the third; halved.
    expected = torch.tensor([[1.5, 1.5], [10.0, 10.0], [150.0, 150.0], [1.5, 1.5]])
    for saved in steps.by_workers(2, tmp_path, work):
        torch.testing.assert_close(saved["gradients"], expected, rtol=0.0, atol=0.0)


def test_gradients_of_bfloat16_are_added_up_in_float32(tiny_model: Path, tmp_path: Path) -> None:
    settings = recipe(tiny_model, micro_batch_size=1, max_grad_norm=0)
    expected = summed_gradients(bfloat16_adapter(tiny_model), settings, tmp_path)
    measured, _ = one_step(bfloat16_adapter(tiny_model), settings, tmp_path, 0, 1)
    assert measured.keys() == expected.keys() and measured
    for name, gradient in measured.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


def test_so_they_are_by_several_workers(tiny_model: Path, tmp_path: Path) -> None:
    settings = recipe(tiny_model, micro_batch_size=1, max_grad_norm=0)
    expected, _ = one_step(bfloat16_adapter(tiny_model), settings, tmp_path, 0, 1)

    def work(rank: int, world_size: int) -> dict[str, Any]:
        model = bfloat16_adapter(tiny_model)
        return {"gradients": one_step(model, settings, tmp_path, rank, world_size)[0]}

    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for saved in steps.by_workers(2, tmp_path, work):
        for name, gradient in saved["gradients"].items():
            assert gradient.dtype == torch.float32
            # Each worker scales its losses by 2, and the mean of the last gradients is rounded.
            difference = float((gradient - expected[name]).abs().max())
            assert difference <= 2e-3 * largest, name


@pytest.mark.parametrize("parts", [{}, {"adapter": {"rank": 4, "dtype": "float32"}}])
def test_what_is_computed_beside_the_steps_has_their_type(
    tiny_model: Path, tmp_path: Path, parts: dict[str, Any]
) -> None:
    """Before the first step too, when the Trainer has not wrapped the model yet."""
    values = {**recipe(tiny_model).model_dump(mode="json", exclude={"adapter"}), **parts}
    values["model"] |= {"dtype": "bfloat16"}
    settings = Recipe.model_validate(values)
    adapted = load_model(settings)
    setup = steps.make_setup(settings, adapted, tmp_path, 0, 1)
    trainer = StreamTrainer(
        adapted,
        training_arguments(settings, 1, tmp_path),
        objective=objective_of(setup),
        passes=1,
        rows=lambda: iter(()),
        after_step=lambda _: False,
        is_logged=lambda _: True,
        stop_requested=lambda: False,
    )
    types: set[torch.dtype] = set()
    for name, module in adapted.named_modules():
        if name.endswith(("gate_proj", "gate_proj.lora_A.default")):
            module.register_forward_hook(lambda _, args, output: types.add(output.dtype))
    trainer.evaluate_held_out(iter([make_sequences(2)]))
    with trainer.in_compute_type():
        generate_completions(adapted, load_tokenizer(settings), [[5, 6, 7]], 2, 0, 1)
    assert types == {torch.bfloat16}
