"""Pretraining, from scratch or continued: predict every token of plain text."""

from ..config.methods import PretrainMethod
from ..data.examples import Method
from ..data.shapes import Completion, Conversation, Text
from .sft import token_objective


def _starts_at_random(settings: PretrainMethod) -> bool:
    return settings.init == "random"


METHOD = Method(
    shapes=(Conversation, Completion, Text),
    objective=token_objective,
    measures=("token_accuracy", "entropy"),
    splits_overlong=True,
    trains_on_all=lambda _: True,
    starts_at_random=_starts_at_random,
)
