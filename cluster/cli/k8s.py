"""`finray k8s`: a recipe as Kubernetes manifests."""

import argparse

from ...training.common.errors import InputError
from ...training.config.recipe import load_recipe
from ...tuning.sweep import is_sweep
from ..kubernetes.render import Target
from ..kubernetes.render import render as render_manifests


def render(options: argparse.Namespace) -> None:
    """Write a recipe as a RayJob."""
    if is_sweep(options.recipe):
        raise InputError(
            f"{options.recipe} is a sweep, and k8s render writes runs; start the overlay's "
            "RayCluster and submit the sweep to it: finray job submit"
        )
    target = Target(options.overlay, options.namespace, options.image, options.memory)
    text = render_manifests(load_recipe(options.recipe, tuple(options.overrides)), target)
    if options.to is None:
        print(text, end="")
        return
    try:
        options.to.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--to {options.to}: cannot write the file: {error.strerror}") from None
