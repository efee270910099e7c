"""Losses and gradients of every method in float64, against its formula on the log-probabilities of
each text alone, which transformers and torch compute."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.steps import Gradients, gradients, make_setup
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from finray.training.config.recipe import Recipe
from finray.training.config.sections import Isolation
from finray.training.data.stream import Sequence
from finray.training.engine.methods import objective_of
from finray.training.models.loading import load_model
from finray.training.rl.rollouts.rollout import Rollout
from finray.training.rl.scoring import Scores

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ROWS, TOLERANCE, BETA, WRONG = 6, 1e-10, 0.3, 0.1
GENERATIONS, MOST, TEMPERATURE = 2, 7, 0.7
REWARDS = torch.tensor([0.7, -1.1, 2.3, 0.1, 0.9, 0.35], dtype=torch.float64)
LABELS = [True, False, False, True, True, False]
MARGINS = [0.1, 0.7, 0.0, 1.3, 0.3, 0.9]


@dataclass(frozen=True)
class Alone:
    """A model of transformers that sees one text at a time."""

    model: Any
    seen: dict[bytes, Tensor] = field(default_factory=dict)

    def of(self, text: Sequence, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the trained tokens. A text is computed once: norms round gradients
        to float32, those of a sum as those of its parts."""
        key = text.input_ids.tobytes()
        if key not in self.seen:
            self.seen[key] = self._of_all(text, temperature)
        return self.seen[key][torch.from_numpy(text.trainable[1:])]

    def before(self, text: Sequence, temperature: float = 1.0) -> Tensor:
        """Those of the reference."""
        with torch.no_grad(), self.model.disable_adapter():
            return self._of_all(text, temperature)[torch.from_numpy(text.trainable[1:])]

    def _of_all(self, text: Sequence, temperature: float) -> Tensor:
        ids = torch.from_numpy(text.input_ids.astype(np.int64))
        logits = self.model(input_ids=ids[None], use_cache=False).logits[0, :-1] / temperature
        return -cross_entropy(logits, ids[1:], reduction="none")

    def ratio(self, text: Sequence) -> Tensor:
        """Log-ratio of the answer."""
        return (self.of(text) - self.before(text)).sum()

    def score(self, text: Sequence) -> Tensor:
        ids = torch.from_numpy(text.input_ids.astype(np.int64))
        score: Tensor = self.model(input_ids=ids[None], use_cache=False).logits[0, 0]
        return score


def halves(pair: Sequence) -> tuple[Sequence, Sequence]:
    cut = int(pair.lengths[0])
    parts = (slice(0, cut), slice(cut, None))
    one, other = (
        replace(pair, input_ids=pair.input_ids[part], trainable=pair.trainable[part])
        for part in parts
    )
    return one, other


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def sft(alone: Alone, rows: list[Sequence]) -> Tensor:
    return -torch.cat([alone.of(row) for row in rows]).mean()


def dpo(alone: Alone, rows: list[Sequence]) -> Tensor:
    pairs = [halves(row) for row in rows]
    above = [alone.ratio(one) - alone.ratio(other) for one, other in pairs]
    losses = [
        -(1 - WRONG) * logsigmoid(BETA * each) - WRONG * logsigmoid(-BETA * each) for each in above
    ]
    imitation = -torch.cat([alone.of(one) for one, _ in pairs]).mean()
    return mean(losses) + 0.7 * imitation


def ipo(alone: Alone, rows: list[Sequence]) -> Tensor:
    above = [
        alone.ratio(one) / one.trainable.sum() - alone.ratio(other) / other.trainable.sum()
        for one, other in map(halves, rows)
    ]
    return mean([(each - 1 / (2 * BETA)) ** 2 for each in above])


def kto(alone: Alone, rows: list[Sequence]) -> Tensor:
    """Each prompt with the answer of the row before gives the baseline."""
    mismatched = []
    for row, other in zip(rows, rows[-1:] + rows[:-1], strict=True):
        own, of_other = ~row.trainable, other.trainable
        ids = np.concatenate([row.input_ids[own], other.input_ids[of_other]])
        trained = np.arange(len(ids)) >= own.sum()
        mismatched.append(replace(row, input_ids=ids, trainable=trained))
    baseline = mean([alone.ratio(row).detach() for row in mismatched]).clamp(min=0)
    assert baseline > 0
    losses = []
    for row, is_good in zip(rows, LABELS, strict=True):
        above = alone.ratio(row) - baseline
        weight, sign = (1.1, 1) if is_good else (0.7, -1)
        losses.append(weight * (1 - torch.sigmoid(sign * BETA * above)))
    return mean(losses)


def orpo(alone: Alone, rows: list[Sequence]) -> Tensor:
    losses, imitated = [], []
    for one, other in map(halves, rows):
        chosen, rejected = alone.of(one).mean(), alone.of(other).mean()
        odds = [each - torch.log1p(-each.exp()) for each in (chosen, rejected)]
        losses.append(-BETA * logsigmoid(odds[0] - odds[1]))
        imitated.append(-alone.of(replace(one, trainable=np.ones_like(one.trainable))))
    return mean(losses) + torch.cat(imitated).mean()


def cpo(alone: Alone, rows: list[Sequence]) -> Tensor:
    pairs = [halves(row) for row in rows]
    above = [alone.of(one).sum() - alone.of(other).sum() for one, other in pairs]
    imitation = -torch.cat([alone.of(one) for one, _ in pairs]).mean()
    return mean([-logsigmoid(BETA * each) for each in above]) + 0.7 * imitation


def simpo(alone: Alone, rows: list[Sequence]) -> Tensor:
    above = [alone.of(one).mean() - alone.of(other).mean() for one, other in map(halves, rows)]
    return mean([-logsigmoid(2.1 * each - 0.6) for each in above])


def reward(alone: Alone, rows: list[Sequence]) -> Tensor:
    losses = []
    for row, margin in zip(rows, MARGINS, strict=True):
        chosen, rejected = map(alone.score, halves(row))
        losses.append(-logsigmoid(chosen - rejected - margin) + 0.1 * (chosen + rejected) ** 2)
    return mean(losses)


def by_group(rewards: Tensor) -> Tensor:
    return rewards.view(-1, GENERATIONS)


def grpo(alone: Alone, rows: list[Sequence], average: str) -> Tensor:
    """The ratio to the policy that sampled is 1, and its gradient that of the log-probability."""
    groups = by_group(REWARDS)
    above = groups - groups.mean(1, keepdim=True)
    advantages = (above / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    sums = []
    for row, advantage in zip(rows, advantages, strict=True):
        now, before = alone.of(row, TEMPERATURE), alone.before(row, TEMPERATURE)
        divergence = (before - now).exp() - (before - now) - 1
        sums.append(BETA * divergence - advantage * (now - now.detach()).exp())
    if average == "dapo":
        return torch.cat(sums).mean()
    if average == "grpo":
        return mean([each.mean() for each in sums])
    return mean([each.sum() / MOST for each in sums])


def rloo(alone: Alone, rows: list[Sequence]) -> Tensor:
    now = torch.stack([alone.of(row, TEMPERATURE).sum() for row in rows])
    before = torch.stack([alone.before(row, TEMPERATURE).sum() for row in rows])
    rewards = by_group(REWARDS - BETA * (now.detach() - before))
    advantages = (rewards - rewards.flip(1)).flatten()  # of two, the other is the rest
    return -(advantages * (now - now.detach()).exp()).mean()


METHODS: dict[str, tuple[dict[str, Any], Callable[[Alone, list[Sequence]], Tensor]]] = {
    "sft": ({"kind": "sft"}, sft),
    "dpo": (
        {
            "kind": "dpo",
            "losses": {"sigmoid": 1.0, "sft": 0.7},
            "beta": BETA,
            "label_smoothing": WRONG,
        },
        dpo,
    ),
    "ipo": ({"kind": "dpo", "losses": {"ipo": 1.0}, "beta": BETA}, ipo),
    "kto": (
        {"kind": "kto", "beta": BETA, "desirable_weight": 1.1, "undesirable_weight": 0.7},
        kto,
    ),
    "orpo": ({"kind": "orpo", "beta": BETA}, orpo),
    "cpo": ({"kind": "cpo", "beta": BETA, "sft_weight": 0.7}, cpo),
    "simpo": ({"kind": "simpo", "beta": 2.1, "gamma": 0.6}, simpo),
    "reward": ({"kind": "reward", "center_coefficient": 0.1}, reward),
    **{
        f"grpo {average}": (
            {"kind": "grpo", "beta": BETA, "loss": average},
            lambda alone, rows, average=average: grpo(alone, rows, average),
        )
        for average in ("dapo", "grpo", "dr_grpo")
    },
    "rloo": ({"kind": "rloo", "beta": BETA}, rloo),
}


def is_online(method: dict[str, Any]) -> bool:
    return method["kind"] in ("grpo", "rloo")


def make_rows(kind: str) -> list[Sequence]:
    """Prompts with their answers, one of a single token; of the online methods completions."""
    random = np.random.default_rng(7)
    texts = 1 if kind in ("sft", "kto", "grpo", "rloo") else 2
    rows = []
    for number in range(ROWS):
        prompts = random.integers(2, 9, texts)
        answers = random.integers(1, MOST, texts)
        answers[0] = 1 if number == 4 else answers[0]
        if kind in ("grpo", "rloo"):
            prompts[0] = 3 + number // GENERATIONS
        parts = zip(prompts, answers, strict=True)
        is_trained = [np.arange(prompt + own) >= prompt for prompt, own in parts]
        lengths = (prompts + answers).astype(np.int32)
        ids = random.integers(3, 250, lengths.sum()).astype(np.int32)
        if kind in ("grpo", "rloo") and number % GENERATIONS:
            ids[: prompts[0]] = rows[-1].input_ids[: prompts[0]]
        extra = {"kto": {"label": LABELS[number]}, "reward": {"margin": MARGINS[number]}}.get(kind)
        text = None if extra is None else json.dumps(extra)
        rows.append(Sequence(ids, lengths, np.concatenate(is_trained), np.array([number]), text))
    return rows


def make_recipe(base: Path, method: dict[str, Any]) -> Recipe:
    if is_online(method):
        rewards = [{"file": "/x.py:f", "source": "def f(**_): ..."}]
        method = {
            **method,
            "rewards": rewards,
            "generations": GENERATIONS,
            "max_completion": MOST,
            "temperature": TEMPERATURE,
        }
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": str(base), "dtype": "float32"},
            "adapter": {"rank": 4},
            "method": method,
            "data": {"train": [{"path": "/x"}], "max_length": 64},
            "optim": {"batch_size": ROWS, "micro_batch_size": 4},
        }
    )


def make_model(settings: Recipe) -> Any:
    """In float64, with an adapter that is not zero."""
    torch.manual_seed(4)
    model = load_model(settings, settings.method.head).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "score" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def step(
    settings: Recipe, model: Any, rows: list[Sequence], folder: Path, isolation: Isolation | None
) -> tuple[float, Gradients]:
    """Loss and gradients of a step."""
    model = copy.deepcopy(model)
    setup = make_setup(settings, model, folder, 0, 1)
    objective: Any = objective_of(replace(setup, isolation=isolation))
    if settings.method.samples_online:
        rollouts = [Rollout(row.input_ids[row.trainable].tolist(), ended=True) for row in rows]
        scores = Scores(REWARDS, REWARDS[None], 0, [""] * ROWS)
        objective._tokenizer = SimpleNamespace(pad_token_id=0, decode=lambda ids: "")
        objective._rollouts = lambda *_: (rollouts, scores)
        rows = [
            replace(row, input_ids=row.input_ids[~row.trainable]) for row in rows[::GENERATIONS]
        ]
    with torch.no_grad():
        batches = objective.batches(0, rows)
    assert len(batches) == 2
    units = sum(batch.loss_units for batch in batches)
    total = sum(objective.loss(model, batch, measured=True).total for batch in batches) / units
    cast(Tensor, total).backward()
    return float(cast(Tensor, total).detach()), gradients(model)


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_every_text_is_computed_as_if_alone(tiny_model: Path, tmp_path: Path, name: str) -> None:
    method, formula = METHODS[name]
    settings, rows = make_recipe(tiny_model, method), make_rows(method["kind"])
    model = make_model(settings)
    expected = formula(Alone(model), rows)
    expected.backward()
    by_name = gradients(model)
    largest = max(float(gradient.abs().max()) for gradient in by_name.values())
    assert largest > 1e-3
    for way in (None, "documents"):
        loss, actual = step(settings, model, rows, tmp_path, way)  # type: ignore[arg-type]
        assert loss == pytest.approx(float(expected.detach()), rel=TOLERANCE)
        assert actual.keys() == by_name.keys()
        for key, gradient in actual.items():
            difference = float((gradient - by_name[key]).abs().max())
            assert difference <= TOLERANCE * largest, (way, key, difference / largest)
