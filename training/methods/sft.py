"""Supervised fine-tuning: imitate the answers."""

from ..recipe import SftMethod
from .method import Method


def _trains_on_all(settings: SftMethod) -> bool:
    return settings.train_on == "all"


METHOD = Method(
    splits_overlong=False,
    has_answers=True,
    trains_on_all=_trains_on_all,
    starts_at_random=lambda _: False,
)
