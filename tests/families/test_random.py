"""Every architecture with random settings: each document's losses and gradients are those of plain
transformers on it alone, in whatever way finray puts documents into forward passes."""

import random
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families.case import cases
from families.matrix import FAULTS, REFUSED, architectures, without_dropout
from families.published import FIELDS
from support.steps import make_setup
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING

from finray.training.config.recipe import recipe_from_dict
from finray.training.config.sections import FLAT
from finray.training.data.stream import Sequence
from finray.training.engine.methods import objective_of
from finray.training.models import output_head
from finray.training.models.composite import freeze_towers
from finray.training.models.output_head import LogitSizes
from finray.training.models.shrunk import random_copy, shrink
from finray.training.rehearsal.packing import find_isolation, shares_prefixes
from finray.training.rehearsal.small_copy import VOCABULARY, SmallCopy

pytestmark = [pytest.mark.families, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 2e-5
"""Of the largest gradient: norms, routers and scans compute in float32 whatever their weights."""
WINDOW, LONGEST = (2, 12), 24
LEFT_OUT = {kind for kind, _ in (*FAULTS, *REFUSED)}


@dataclass
class Drawn:
    """A model, and how finray keeps its texts apart."""

    model: Any
    unused: Any
    """The same, before its first pass: some keep a state that cannot be copied."""
    isolation: Any
    shares: bool


def draw(kind: str, generator: random.Random) -> Drawn:
    """A small model with a random window, caps and head."""
    small = shrink(CONFIG_MAPPING[kind](**FIELDS.get(kind, {})), vocabulary=VOCABULARY)
    without_dropout(small)
    text = small.get_text_config()
    for name, value in list(vars(text).items()):
        if name == "sliding_window" and isinstance(value, int):
            text.sliding_window = generator.randint(*WINDOW)
        elif name in ("final_logit_softcapping", "attn_logit_softcapping"):
            setattr(text, name, generator.choice([1.5, 30.0]))
        elif name in ("logit_scale", "logits_scaling"):
            setattr(text, name, generator.choice([0.3, 1.0, 1.7]))
    model: Any = random_copy(small, seed=generator.randrange(1000))
    model.config.get_text_config().use_cache = False
    unused = deepcopy(model)
    copy = SmallCopy(Path(), model, LONGEST)
    isolation, _ = find_isolation(copy, VOCABULARY)
    shares = isolation == "documents" and shares_prefixes(copy, VOCABULARY)
    model.zero_grad()
    for each in (model, unused):
        freeze_towers(each.train())
    return Drawn(model, unused, isolation, shares)


def row_of(generator: random.Random, lengths: list[int], beginning: list[int]) -> Sequence:
    """Documents, a random share of whose tokens is trained; they may begin alike."""
    share = generator.choice([1.0, 0.4, 0.1])
    ids, trained = list[int](), list[bool]()
    for length in lengths:
        own = [generator.randrange(3, VOCABULARY) for _ in range(length)]
        common = generator.choice([0, length // 2, length - 1])
        own[:common] = beginning[:common]
        ids += own
        trained += [place > 0 and generator.random() < share for place in range(length)]
    numbers = np.arange(len(lengths), dtype=np.int64)
    sizes = np.array(lengths, np.int32)
    return Sequence(np.array(ids, np.int32), sizes, np.array(trained), numbers)


Result = tuple[float, dict[str, torch.Tensor]]


def taken(model: Any, total: float) -> Result:
    gradients = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in model.named_parameters()
    }
    model.zero_grad()
    return total, gradients


def alone(model: Any, rows: list[Sequence]) -> Result:
    """The sum of all trained tokens' losses, one document at a time."""
    total = 0.0
    for row in rows:
        borders = np.cumsum(row.lengths)[:-1]
        parts = (np.split(each, borders) for each in (row.input_ids, row.trainable))
        for own, trained in zip(*parts, strict=True):
            if not trained.any():
                continue
            ids = torch.from_numpy(own.astype(np.int64))
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            losses = cross_entropy(logits.float(), ids[1:], reduction="none")
            loss = losses[torch.from_numpy(trained[1:].copy())].sum()
            torch.autograd.backward(loss)
            total += float(loss.detach())
    return taken(model, total)


def together(
    drawn: Drawn, rows: list[Sequence], method: str, generator: random.Random, folder: Path
) -> Result:
    """The same, as an objective computes it."""
    recipe = recipe_from_dict(
        {
            "name": "x",
            "model": {"base": str(folder)},
            "data": {"train": [{"path": "/x"}], "max_length": 4096},
            "method": method,
            "optim": {"batch_size": 8, "micro_batch_size": generator.randint(1, 4)},
        }
    )
    packs = recipe.method.packs
    recipe = recipe.with_isolation(drawn.isolation is not None, drawn.isolation)
    way = drawn.isolation if packs or drawn.isolation in FLAT else None
    model = deepcopy(drawn.unused)
    setup = make_setup(recipe, model, folder, 0, 1)
    shares = drawn.shares and not packs
    objective = objective_of(replace(setup, isolation=way, shares_prefixes=shares))
    total = 0.0
    if packs:
        losses = [objective.loss(model, batch, True).total for batch in objective.batches(0, rows)]
    else:
        batch = objective.assemble(rows)
        losses = [-objective.log_probabilities(model, batch).sum()]
    for loss in losses:
        if loss.requires_grad:
            torch.autograd.backward(loss)
        total += float(loss.detach())
    return taken(model, total)


KINDS = [kind for kind in architectures() if kind not in LEFT_OUT]


@pytest.mark.parametrize("case", cases(KINDS, frozenset()))
def test_random_documents(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(case)
    drawn = draw(case, generator)
    for method in ("sft", "simpo"):
        count = 6 if method == "sft" and drawn.isolation is not None else 1
        beginning = [generator.randrange(3, VOCABULARY) for _ in range(2 * LONGEST)]
        rows = []
        for _ in range(generator.randint(2, 4)):
            least = 1 if count > 1 else 2
            lengths = [generator.randint(least, 2 * LONGEST) for _ in range(count)]
            lengths[0] = generator.choice([least, lengths[0]])
            rows.append(row_of(generator, lengths, beginning))
        sizes = LogitSizes(
            VOCABULARY * generator.randint(1, 50), VOCABULARY * generator.randint(1, 9)
        )
        monkeypatch.setitem(output_head._SIZES, "cpu", sizes)
        expected = alone(drawn.model, rows)
        actual = together(drawn, rows, method, generator, tmp_path)
        assert actual[0] == pytest.approx(expected[0], rel=TOLERANCE)
        largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
        for name, gradient in actual[1].items():
            difference = float((gradient - expected[1][name]).abs().max())
            assert difference <= TOLERANCE * largest, (method, name, difference / largest)
