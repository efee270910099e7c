"""Data that is prepared while Ray starts."""

from collections.abc import Sequence
from concurrent.futures import Future

from ..training.common.background import run_in_thread
from ..training.config.recipe import Recipe


def prepare_early(recipes: Sequence[Recipe]) -> "Future[None]":
    """Begin to prepare what is prepared without Ray; it is found prepared later."""
    from ..training.run import prepare_here, prepares_on_ray

    def work() -> None:
        for recipe in recipes:
            if not prepares_on_ray(recipe):
                prepare_here(recipe)

    return run_in_thread(work, "prepare")
