"""`finray k8s`: a recipe as Kubernetes manifests."""

import argparse
import hashlib
import sys
from dataclasses import replace

from ...training.common.errors import InputError, writing
from ...training.common.storage import Folder
from ...training.config.recipe import load_recipe
from ...tuning.sweep import is_sweep
from ..api.planning import place
from ..kubernetes.refusals import Refusal
from ..kubernetes.render import RETRIES, Target, memory_note
from ..kubernetes.render import render as render_manifests


def render(options: argparse.Namespace) -> None:
    """Write a recipe as a RayJob."""
    if is_sweep(options.recipe):
        raise InputError(
            f"{options.recipe} is a sweep, and k8s render writes runs; start the overlay's "
            "RayCluster and submit the sweep to it: finray job submit"
        )
    target = Target(
        *(options.overlay, options.namespace, options.image, options.memory), disk=options.disk
    )
    if options.gpu is None:
        recipe = load_recipe(options.recipe, tuple(options.overrides))
    else:
        recipe, memory = place(options.recipe, options.overrides, gpu=options.gpu)
        target = replace(target, least_memory=memory)
    text = render_manifests(recipe, target)
    if (note := memory_note(target)) and not options.quiet:
        print(f"note: {note}", file=sys.stderr)
    if options.to is None:
        print(text, end="")
        return
    with writing(f"--to {options.to}", "give another file"):
        options.to.write_text(text, encoding="utf-8")


def run(options: argparse.Namespace) -> None:
    """Train, unless an earlier attempt of the same job refused the recipe.

    Training checks the recipe and prepares small data before it asks for nodes. KubeRay repeats a
    job that failed, also one that can only be refused again.
    """
    from .train import train

    recipe = load_recipe(options.recipe, tuple(options.overrides))
    digest = hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()
    refusal = Refusal(Folder(recipe.storage), recipe.name, digest)
    if (reason := refusal.take()) is not None:
        raise InputError(f"an earlier attempt of this job was refused: {reason}")
    try:
        train(options)
    except InputError as error:
        refusal.write(str(error), RETRIES)
        raise
