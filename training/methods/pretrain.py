"""Pretraining, from scratch or continued: predict every token of plain text."""

from ..recipe import PretrainMethod
from .method import Method


def _starts_at_random(settings: PretrainMethod) -> bool:
    return settings.init == "random"


METHOD = Method(
    splits_overlong=True,
    has_answers=False,
    trains_on_all=lambda _: True,
    starts_at_random=_starts_at_random,
)
