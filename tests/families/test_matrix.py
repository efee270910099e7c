"""Every architecture trains as transformers alone trains it, and its result loads without finray.

Losses of two steps are compared with one document at a time under torch's AdamW, so that a packed
document that sees another, a gradient that is missing and a wrong mask all show.
"""

import pytest
from families.case import TOLERANCE, Case, cases
from families.matrix import (
    LEFT_OUT,
    REFUSED,
    REGISTRY,
    REMEDIES,
    ROUNDED,
    SAMPLE,
    TENTH,
    architectures,
)
from families.plain import assert_near, load, logits, with_adapter, with_new_adapter
from families.results import measure, note

from finray.training.common.errors import InputError

pytestmark = [
    pytest.mark.families,
    pytest.mark.filterwarnings("ignore"),  # of models that nobody tunes every day
]


def test_every_architecture_of_the_registry_has_a_row_or_a_reason() -> None:
    assert not (unknown := LEFT_OUT.keys() - REGISTRY.keys()), unknown
    assert len(architectures()) >= 120
    assert set(architectures()) >= SAMPLE | TENTH
    assert len(SAMPLE) == 15
    assert len(TENTH) >= len(architectures()) // 10


@pytest.mark.parametrize("case", cases(architectures(), how="lora"), indirect=True)
def test_lora(case: Case) -> None:
    run = case.run(case.recipe("lora", adapter={"rank": 4}))

    plain = with_new_adapter(load(case.base), run.folder)
    assert run.losses == pytest.approx(run.plain_losses(plain), rel=TOLERANCE)

    loaded = with_adapter(load(case.base), run.folder / "adapter")
    assert_near(logits(loaded), logits(plain), share=ROUNDED.get(case.kind, 1e-3))
    note(case.kind, "lora", packed=run.is_packed, **measure(loaded))


@pytest.mark.parametrize("case", cases(architectures(), how="full"), indirect=True)
def test_full(case: Case) -> None:
    run = case.run(case.recipe("full"))

    plain = load(case.base)
    assert run.losses == pytest.approx(run.plain_losses(plain), rel=TOLERANCE)

    loaded = load(run.folder / "model")
    assert_near(logits(loaded), logits(plain))
    note(case.kind, "full", packed=run.is_packed)


@pytest.mark.parametrize(("case", "how"), REFUSED, indirect=["case"])
def test_refused(case: Case, how: str) -> None:
    changes = {"adapter": {"rank": 4}} if how == "lora" else {}
    remedy = REMEDIES[REFUSED[case.kind, how]]
    with pytest.raises(InputError, match=f"^(model.base|adapter): .*; {remedy}$"):
        case.run(case.recipe(how, **changes))
