"""Data that is prepared while Ray starts."""

from collections.abc import Sequence
from concurrent.futures import Future

from ..training.common.background import beside
from ..training.config.recipe import Recipe


def prepare_early(recipes: Sequence[Recipe]) -> "Future[None]":
    """Begin to prepare what is prepared without Ray; it is found prepared later."""
    from ..training.run import Listener, prepare_here, prepares_on_ray

    unwatched = Listener(lambda _: None, lambda _: None)

    def work() -> None:
        for recipe in recipes:
            if not prepares_on_ray(recipe):
                prepare_here(recipe, unwatched)

    return beside(work, "prepare")
