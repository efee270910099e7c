"""How often a step makes the host wait for the device, and what `deterministic` refuses there:
operations on the CPU stand for those on a GPU."""

import json
import traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.online_runs import REWARD, prompts, rows_of
from support.steps import make_sequences, make_setup
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from finray.training.config.recipe import Recipe, recipe_from_dict
from finray.training.data import batching, documents
from finray.training.data.batching import collate, in_batches
from finray.training.data.stream import Sequence
from finray.training.engine.methods import objective_of
from finray.training.engine.trainer import StepMeasures, StreamTrainer
from finray.training.engine.trainer_arguments import training_arguments
from finray.training.models import attention, devices
from finray.training.models.loading import forward_arguments, load_model, load_tokenizer
from finray.training.models.output_head import Finish, OutputHead
from finray.training.objectives import preference
from finray.training.rl import online
from finray.training.rl.online import OnlineObjective
from finray.training.rl.rollouts.rollout import Rollout
from finray.training.rl.scoring import Scores

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STEPS, BATCH, MICRO = 4, 6, 2
aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
"""Their result, or its shape, depends on values: the host waits for them."""
COPYING = {
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.new_tensor,
}
"""Copies between host and device that the host waits for, where the tensor is on the device."""
REFUSED = {
    aten.histc.default,
    aten.kthvalue.default,
    aten.median.dim,
    aten.nll_loss_forward.default,
    aten.put_.default,
}
"""What raises on a GPU with deterministic algorithms; also cumsum of floating-point numbers."""
ON_THE_HOST = ("counts.tolist()", "chosen.numpy(force=True)")
"""What reads a tensor that is on the host anyhow."""
METHODS: dict[str, dict[str, Any]] = {
    "sft": {},
    "rows of one document": {"data": {"packing": False}},
    "dpo": {"method": {"kind": "dpo", "losses": {"sigmoid": 1.0, "sft": 0.5}}},
    "dpo with many losses": {
        "method": {"kind": "dpo", "losses": {"ipo": 1.0, "robust": 0.5, "sppo_hard": 0.1}}
    },
    "kto": {"method": {"kind": "kto"}},
    "orpo": {"method": {"kind": "orpo"}},
    "simpo": {"method": {"kind": "simpo"}},
    "reward": {"method": {"kind": "reward", "center_coefficient": 0.1}},
    "grpo": {"method": {"kind": "grpo", "beta": 0.1}},
    "grpo, two passes": {"method": {"kind": "grpo", "passes": 2}},
    "rloo": {"method": {"kind": "rloo", "beta": 0.1}},
}
ONLINE = {
    "rewards": [{"file": "/x/rewards.py:worth", "source": REWARD}],
    "generations": 2,
    "max_completion": 6,
    "top_p": 0.9,
}


class Counter(TorchDispatchMode):
    """Counts operations whose result the host needs, or whose shape depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.refused: list[str] = []

    def add(self, what: str, depth: int) -> None:
        """Note a place."""
        frames = traceback.extract_stack()[:-depth]
        own = [frame for frame in frames if "/finray/" in frame.filename] or frames
        if not any(text in (own[-1].line or "") for text in ON_THE_HOST):
            place = f"{frames[-1].filename}:{frames[-1].lineno}"
            self.places.append(f"{what} in {place}, for {own[-1].filename}:{own[-1].lineno}")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        chosen = args[1] if func in (aten.index.Tensor, aten.index_put_.default) else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in chosen)
        if func in WAITING or by_mask:
            self.add(str(func), 2)
        sums_up = func is aten.cumsum.default and args[0].is_floating_point()
        if func in REFUSED or sums_up:
            self.refused.append(str(func))
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Counts copies between the host and the device."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func is torch.tensor and (kwargs or {}).get("device") is not None
        if func in COPYING or made:
            self._counter.add(getattr(func, "__name__", str(func)), 2)
        return func(*args, **(kwargs or {}))


def rows_for(recipe: Recipe, tokenizer: Any) -> list[Sequence]:
    """Rows for all steps."""
    method = recipe.method
    if method.samples_online:
        return rows_of(prompts(STEPS * recipe.rows_per_step), tokenizer)
    if method.learns_from == "documents":
        made = make_sequences(BATCH * STEPS)
        if recipe.data.packing is not False:
            return made
        return [
            Sequence(row.input_ids, row.lengths.sum(keepdims=True), row.trainable, row.rows)
            for row in made
        ]
    random, rows = np.random.default_rng(0), []
    for number in range(BATCH * STEPS):
        lengths = random.integers(6, 20, size=1 if method.kind == "kto" else 2).astype(np.int32)
        starts = np.cumsum(lengths) - lengths
        positions = np.arange(lengths.sum()) - np.repeat(starts, lengths)
        extra = {"kto": {"label": number % 2 == 0}, "reward": {"margin": number / 4}}
        own = extra.get(method.kind)
        ids = random.integers(3, 250, lengths.sum()).astype(np.int32)
        text = None if own is None else json.dumps(own)
        rows.append(Sequence(ids, lengths, positions > 2, np.array([number]), text))
    return rows


def recipe_of(base: Path, settings: dict[str, Any], dtype: str = "float32") -> Recipe:
    method = settings.get("method", {})
    if method.get("kind") in ("grpo", "rloo"):
        method = {**ONLINE, **method}
    return recipe_from_dict(
        {
            "name": "x",
            "model": {"base": str(base), "dtype": dtype},
            "adapter": {"rank": 4},
            "data": {"train": [{"path": "/x"}], "max_length": 64, **settings.get("data", {})},
            "optim": {"batch_size": BATCH, "micro_batch_size": MICRO},
            **({"method": method} if method else {}),
        }
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "logs"), [*((name, False) for name in METHODS), ("sft", True), ("dpo", True)]
)
def test_a_step_waits_for_the_flag_of_an_earlier_one(
    name: str, logs: bool, tiny_model: Path, tmp_path: Path
) -> None:
    """A step that is logged waits for its own flag, and once for all that is logged. Of the online
    methods, the training pass is counted, not the sampling.

    Of a padded batch transformers asks in each forward pass whether documents are packed.
    """
    recipe = recipe_of(tiny_model, METHODS[name])
    model, tokenizer = load_model(recipe, recipe.method.head), load_tokenizer(recipe)
    counter, by_step = Counter(), []
    isolation = None if recipe.data.packing is False else "documents"
    setup = make_setup(recipe, model, tmp_path, 0, 1)
    setup = replace(setup, tokenizer=tokenizer, isolation=isolation)
    padded: list[int] = []

    def after_step(step: StepMeasures) -> bool:
        by_step.append(list(counter.places))
        counter.places.clear()
        if logs:
            trainer.take_logged(1, step.grad_norm)
        padded.append(sum(batch.documents is None for batch in trainer._current))
        return False

    def on_phase(phase: str) -> None:
        if phase == "step" and recipe.method.samples_online:
            counter.places.clear()

    trainer = StreamTrainer(
        model,
        training_arguments(recipe, STEPS, tmp_path),
        objective=objective_of(setup),
        passes=recipe.method.repeats,
        rows=lambda: in_batches(iter(rows_for(recipe, tokenizer)), recipe.rows_per_step),
        after_step=after_step,
        on_phase=on_phase,
        is_logged=lambda step: True,
        stop_requested=lambda: False,
    )
    with counter, Copies(counter):
        trainer.train()
    assert len(by_step) == STEPS and not counter.refused
    assert any(padded) == (name == "rows of one document")
    passes = {"dpo": 2, "kto": 4}.get(recipe.method.kind, 1)  # with the reference's
    for places, number in zip(by_step[1:], padded[1:], strict=True):
        assert len(places) <= 1 + logs + passes * number, "\n".join(places)


def test_a_batch_knows_its_trained_tokens() -> None:
    """From the host, so that no device has to look for them."""
    batch = collate(make_sequences(3))
    assert batch.trained.tolist() == (batch.targets.flatten() >= 0).nonzero().flatten().tolist()


META = torch.device("meta")
"""Stands for a GPU: an operation on it and the CPU together raises, and so does reading a value."""


def as_a_gpu(monkeypatch: pytest.MonkeyPatch, by_kernel: bool) -> None:
    """Let finray take the meta device for a GPU."""
    for module in (batching, documents, preference, online):
        monkeypatch.setattr(module, "moved", lambda tensor, device: tensor.to(device))
    states = SimpleNamespace(get_rng_state=torch.get_rng_state, set_rng_state=lambda _: None)
    monkeypatch.setattr(devices, "_module", lambda _: states)
    monkeypatch.setattr(attention, "_fits_kernel", lambda *_: by_kernel)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    host = torch.Tensor.cpu  # rewards and their measures are on the host
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda t: torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else host(t)
    )
    monkeypatch.setattr(preference, "_imitated", lambda _: 1)


def sampled(requests: list[Any], prompts: list[Sequence]) -> tuple[list[Rollout], Scores]:
    """Rollouts that nobody had to sample."""
    values = torch.arange(len(requests), dtype=torch.float64)
    texts = [""] * len(requests)
    return [Rollout([5, 6, 7], True)] * len(requests), Scores(values, values[None], 0, texts)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "by_kernel"),
    [("sft", False), *((name, True) for name in METHODS if name != "rows of one document")],
)
def test_a_step_stays_on_its_device(
    name: str, by_kernel: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention by the kernel, and by groups of documents; no value is read on the way."""
    recipe = recipe_of(tiny_model, METHODS[name], "bfloat16" if by_kernel else "float32")
    model, tokenizer = load_model(recipe, recipe.method.head), load_tokenizer(recipe)
    model.to(META)
    as_a_gpu(monkeypatch, by_kernel)
    setup = replace(make_setup(recipe, model, tmp_path, 0, 1), tokenizer=tokenizer, device=META)
    objective = objective_of(setup)
    layer = model.get_base_model().get_output_embeddings()
    head = None if layer is None else OutputHead(layer, Finish(layer.out_features))
    for mode in (True, False):  # a look for the head would read values
        objective._traits[(id(model), mode)] = forward_arguments(model), head
    if isinstance(objective, OnlineObjective):
        monkeypatch.setattr(objective, "_rollouts", sampled)
        monkeypatch.setattr(objective, "_any_reward", lambda _: True)
        monkeypatch.setattr(objective, "_keep_examples", lambda *_: None)
    with torch.no_grad():
        batches = objective.batches(0, rows_for(recipe, tokenizer)[: recipe.rows_per_step])
    for batch in batches:
        loss = objective.loss(model, batch.to(META), True)
        loss.total.backward()
        assert loss.measures is not None and loss.measures.device == META
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert len(batches) == 3 and norm.device == META
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert trained and all(weight.grad is not None for weight in trained)
