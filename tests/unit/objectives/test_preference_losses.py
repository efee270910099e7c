"""Preference losses, compared with independent formulas on plain numbers."""

import math
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from finray.training.config.methods import (
    CpoMethod,
    DpoLoss,
    DpoMethod,
    KtoMethod,
    Method,
    SimpoMethod,
)
from finray.training.objectives.cpo import cpo_loss, simpo_loss
from finray.training.objectives.dpo_losses import PAIR_LOSSES, Pairs
from finray.training.objectives.kto import answer_losses
from finray.training.objectives.orpo import log_odds_ratio
from finray.training.objectives.preference import Answers

BETA, WRONG, TAU = 0.3, 0.1, 0.05
# log-probabilities of (chosen, rejected) under the policy, then the reference; tokens of both
PAIR = (-12.0, -15.5, -13.0, -14.0, 4.0, 5.0)


def ln_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def expected(w: float, lo: float, n: float, m: float) -> dict[str, float]:
    """Every loss of a pair by its paper's formula: log-ratios w and lo, n and m tokens."""
    z, e = BETA * (w - lo), WRONG
    mean = w / n - lo / m
    p = sigmoid(z)
    return {
        "sigmoid": -(1 - e) * ln_sigmoid(z) - e * ln_sigmoid(-z),
        "sigmoid_norm": -ln_sigmoid(BETA * mean),
        "hinge": max(0.0, 1 - z),
        "ipo": (mean - 1 / (2 * BETA)) ** 2,
        "exo_pair": p * math.log(p / (1 - e)) + (1 - p) * math.log((1 - p) / e),
        "nca_pair": -ln_sigmoid(BETA * w)
        - 0.5 * ln_sigmoid(-BETA * w)
        - 0.5 * ln_sigmoid(-BETA * lo),
        "robust": (-(1 - e) * ln_sigmoid(z) + e * ln_sigmoid(-z)) / (1 - 2 * e),
        "bco_pair": -ln_sigmoid(BETA * w) - ln_sigmoid(-BETA * lo),
        "sppo_hard": (w - 1 / (2 * BETA)) ** 2 + (lo + 1 / (2 * BETA)) ** 2,
        "aot": -(1 - e) * ln_sigmoid(z) - e * ln_sigmoid(-z),
        "aot_unpaired": -(1 - e) * ln_sigmoid(z) - e * ln_sigmoid(-z),
        "apo_zero": 1 - sigmoid(BETA * w) + sigmoid(BETA * lo),
        "apo_down": sigmoid(BETA * w) + 1 - sigmoid(z),
        "discopop": -ln_sigmoid(z) * (1 - sigmoid(z / TAU)) + math.exp(-z) * sigmoid(z / TAU),
    }


def pairs_of(*pairs: tuple[float, ...], settings: DpoMethod) -> Pairs:
    columns = torch.tensor(pairs).unbind(1)
    tokens = columns[4:]
    policy, reference = Answers(*columns[:2], *tokens), Answers(*columns[2:4], *tokens)
    return Pairs.of(policy, reference, settings)


def test_every_named_loss_is_there() -> None:
    assert PAIR_LOSSES.keys() | {"sft"} == set(get_args(DpoLoss))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_losses_of_a_pair(name: DpoLoss) -> None:
    smooths = name in ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")
    settings = DpoMethod(
        losses={name: 1.0}, beta=BETA, label_smoothing=WRONG if smooths else 0.0, discopop_tau=TAU
    )
    actual = PAIR_LOSSES[name](pairs_of(PAIR, settings=settings), settings)
    chosen, rejected, chosen_before, rejected_before, n, m = PAIR
    expected_loss = expected(chosen - chosen_before, rejected - rejected_before, n, m)[name]
    assert actual.tolist() == pytest.approx([expected_loss], rel=1e-5)


def test_optimal_transport_sorts_the_pairs_of_a_batch() -> None:
    settings = DpoMethod(losses={"aot": 1.0, "aot_unpaired": 1.0}, beta=BETA)
    # margins of the policy 1 and 5, of the reference 4 and 2: sorted differences -1 and 1
    two = pairs_of((-2, -3, -1, -5, 1, 1), (-1, -6, -1, -3, 1, 1), settings=settings)
    expected_losses = [-ln_sigmoid(BETA * (1 - 2)), -ln_sigmoid(BETA * (5 - 4))]
    assert PAIR_LOSSES["aot"](two, settings).tolist() == pytest.approx(expected_losses, rel=1e-5)
    # log-ratios of chosen -1 and 0, of rejected 2 and -3
    expected_losses = [-ln_sigmoid(BETA * (-1 + 3)), -ln_sigmoid(BETA * (0 - 2))]
    assert PAIR_LOSSES["aot_unpaired"](two, settings).tolist() == pytest.approx(
        expected_losses, rel=1e-5
    )


@pytest.mark.parametrize(
    ("divergence", "derivative"),
    [
        ("reverse_kl", lambda t: math.log(t) + 1),
        ("forward_kl", lambda t: -1 / t),
        ("js", lambda t: math.log(2 * t / (t + 1))),
        ("alpha", lambda t: (t ** (0.3 - 1) - 1) / (0.3 - 1)),
    ],
)
def test_divergences(divergence: Any, derivative: Any) -> None:
    """Scores are f'(t) up to a constant, which cancels in differences."""
    settings = DpoMethod(divergence=divergence, divergence_alpha=0.3)
    pairs = pairs_of(PAIR, settings=settings)
    chosen, rejected, chosen_before, rejected_before, *_ = PAIR
    ratios = math.exp(chosen - chosen_before), math.exp(rejected - rejected_before)
    expected_loss = derivative(ratios[0]) - derivative(ratios[1])
    assert pairs.difference.tolist() == pytest.approx([expected_loss], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected_loss"),
    [
        (CpoMethod(beta=BETA), -ln_sigmoid(BETA * 2)),
        (
            CpoMethod(beta=BETA, label_smoothing=WRONG),
            -(1 - WRONG) * ln_sigmoid(BETA * 2) - WRONG * ln_sigmoid(-BETA * 2),
        ),
        (CpoMethod(beta=BETA, loss="hinge"), 1 - BETA * 2),
        (CpoMethod(beta=BETA, loss="ipo"), (2 - 1 / (2 * BETA)) ** 2),
    ],
)
def test_losses_of_cpo(settings: CpoMethod, expected_loss: float) -> None:
    losses = cpo_loss(torch.tensor([2.0]), settings)
    assert losses.tolist() == pytest.approx([expected_loss], rel=1e-5)


def test_loss_of_simpo() -> None:
    losses = simpo_loss(torch.tensor([2.0]), SimpoMethod(beta=BETA, gamma=0.5))
    assert losses.tolist() == pytest.approx([-ln_sigmoid(BETA * 2 - 0.5)], rel=1e-5)


def test_losses_of_labelled_answers() -> None:
    ratios, labels = torch.tensor([0.7, 0.7, -2.0]), torch.tensor([True, False, False])
    settings = KtoMethod(beta=BETA, desirable_weight=1.5, undesirable_weight=0.5)
    actual = answer_losses(ratios, labels, torch.tensor(0.2), settings).tolist()
    expected_losses = [
        1.5 * (1 - sigmoid(BETA * 0.5)),
        0.5 * (1 - sigmoid(-BETA * 0.5)),
        0.5 * (1 - sigmoid(BETA * 2.2)),
    ]
    assert actual == pytest.approx(expected_losses, rel=1e-5)


def test_odds_ratio() -> None:
    chosen, rejected = torch.tensor([-0.1, -3.0, -1e-9]), torch.tensor([-2.0, -0.2, -40.0])
    chosen.requires_grad_()
    actual = log_odds_ratio(chosen, rejected)

    def odds(x: float) -> float:
        return math.exp(x) / -math.expm1(x)

    expected_ratios = [math.log(odds(-0.1) / odds(-2.0)), math.log(odds(-3.0) / odds(-0.2))]
    assert actual[:2].tolist() == pytest.approx(expected_ratios, rel=1e-5)
    actual.sum().backward()
    assert torch.isfinite(actual).all() and torch.isfinite(chosen.grad).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "dpo", "losses": {"sft": 1.0}}, "sft alone ignores rejected"),
        ({"kind": "dpo", "losses": {}}, "at least 1 item"),
        ({"kind": "dpo", "losses": {"sigmoid": 0.0}}, "greater than 0"),
        ({"kind": "dpo", "losses": {"sigmod": 1.0}}, "should be 'sigmoid'"),
        ({"kind": "dpo", "label_smoothing": 0.5}, "less than 0.5"),
        ({"kind": "dpo", "losses": {"ipo": 1}, "label_smoothing": 0.1}, "losses are ipo"),
        ({"kind": "dpo", "losses": {"exo_pair": 1}}, "exo_pair needs label_smoothing above 0"),
        (
            {"kind": "dpo", "losses": {"nca_pair": 1}, "divergence": "js"},
            "divergence js is not defined for nca_pair",
        ),
        ({"kind": "dpo", "beta": 0}, "greater than 0"),
        ({"kind": "cpo", "loss": "ipo", "label_smoothing": 0.1}, "but loss is ipo"),
        ({"kind": "kto", "losses": {"kto": 1}}, "Extra inputs"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    from pydantic import TypeAdapter

    with pytest.raises(ValidationError, match=message):
        TypeAdapter(Method).validate_python(settings)
