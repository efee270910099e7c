"""The loss of a wide vocabulary: finray's, against cross-entropy of all logits at once.

Both take forward and backward passes of the same model on the same rows, in float32, each in a
process of its own. Their losses and gradients are compared before anything is measured.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from material import save_llama
from measure import (
    Figure,
    NotComparable,
    Options,
    Target,
    conclude,
    parse_options,
    print_result,
    ratios,
    reset_peak,
    resident_mb,
    run_child,
    scratch,
    take_turns,
)

WAYS = ("finray", "all logits")
FULL = {"vocabulary": 151_936, "hidden": 512, "layers": 2, "rows": 4, "length": 256, "passes": 3}
QUICK = {"vocabulary": 30_000, "hidden": 128, "layers": 2, "rows": 4, "length": 64, "passes": 2}
CASES = {
    "adapter, all tokens trained": {"share": 1.0, "adapter": True},
    "adapter, 30 % trained": {"share": 0.3, "adapter": True},
    "all weights, all tokens trained": {"share": 1.0, "adapter": False},
}
LARGEST_DIFFERENCE = 1e-5
"""Of losses and of gradients, relative to the largest entry."""


def child(folder: Path, way: str, sizes: dict[str, int], case: dict[str, Any]) -> dict[str, Any]:
    """Time and peak memory of some passes, and what they compute."""
    import torch

    model, step = build(folder, way, sizes, case)
    for weight in model.parameters():
        weight.detach().sum()  # its file is mapped, and read only now
    resident = resident_mb("VmRSS")
    loss = step()  # loads what the first pass needs
    gradients = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
    largest = {name: float(gradient.abs().max()) for name, gradient in gradients.items()}
    name = max(largest, key=lambda each: largest[each])
    sample = gradients[name].flatten()[:: max(1, gradients[name].numel() // 1000)].tolist()
    model.zero_grad()
    del gradients
    reset_peak()
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(sizes["passes"]):
        step()
        model.zero_grad()
    return {
        "seconds": (time.perf_counter() - started) / sizes["passes"],
        "cpu_seconds": (time.process_time() - cpu) / sizes["passes"],
        "peak_mb": resident_mb("VmHWM") - resident,
        "loss": loss,
        "largest": largest[name],
        "sample": sample,
        "threads": torch.get_num_threads(),
    }


def build(folder: Path, way: str, sizes: dict[str, int], case: dict[str, Any]) -> Any:
    """The model, and a function that takes a forward and a backward pass and returns the loss."""
    import numpy as np
    import torch

    from finray.training.config.recipe import recipe_from_dict
    from finray.training.data.batching import IGNORED, collate
    from finray.training.data.stream import Sequence
    from finray.training.engine.methods import objective_of
    from finray.training.models.loading import load_model
    from finray.training.objectives.objective import Setup

    values = {
        "name": "loss",
        "model": {"base": str(folder), "dtype": "float32"},
        "data": {"train": [{"path": "/rows"}], "max_length": sizes["length"]},
        **({"adapter": {"kind": "lora"}} if case["adapter"] else {}),
    }
    recipe = recipe_from_dict(values)
    torch.manual_seed(0)
    model: Any = load_model(recipe)
    random = np.random.default_rng(0)
    size = sizes["length"]
    rows = [
        Sequence(
            random.integers(3, sizes["vocabulary"], size, dtype=np.int32),
            np.array([size], np.int32),
            random.random(size) < case["share"],
            np.array([row]),
        )
        for row in range(sizes["rows"])
    ]
    batch = collate(rows)
    no_data: Any = None
    setup = Setup(recipe, model, None, no_data, 0, 1, torch.device("cpu"))
    objective = objective_of(setup)
    model.train()

    def all_logits() -> torch.Tensor:
        logits = model(**batch.inputs, use_cache=False).logits.flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(
            logits, batch.targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def step() -> float:
        is_own = way == "finray"
        total = objective.loss(model, batch, False).total if is_own else all_logits()
        loss = total / batch.loss_units
        loss.backward()
        return float(loss.detach())

    return model, step


def compare(case: str, results: dict[str, list[dict[str, Any]]]) -> None:
    """Check that both ways computed the same.

    Raises:
        NotComparable: losses or gradients differ.
    """
    own, plain = (results[way][0] for way in WAYS)
    bound = LARGEST_DIFFERENCE * plain["largest"]
    pairs = zip(own["sample"], plain["sample"], strict=True)
    if abs(own["loss"] - plain["loss"]) > LARGEST_DIFFERENCE * plain["loss"]:
        raise NotComparable(f"{case}: losses {own['loss']} and {plain['loss']}")
    if max(abs(a - b) for a, b in pairs) > bound:
        raise NotComparable(f"{case}: gradients differ by more than {bound}")


def figures_of(case: str, results: dict[str, list[dict[str, Any]]]) -> list[Figure]:
    """Ratios of speed and of peak memory above the model."""
    own, plain = (results[way] for way in WAYS)

    def over(value: str, first: Any, second: Any) -> tuple[float, ...]:
        return ratios([each[value] for each in first], [each[value] for each in second])

    least = 1.3 if CASES[case]["share"] < 1 else 1.0
    # The gradients of all weights are in both peaks, and are most of finray's.
    most = Target("at most", 0.3) if CASES[case]["adapter"] else None
    return [
        Figure(f"speed, {case}", over("seconds", plain, own), Target("at least", least)),
        Figure(f"speed by CPU time, {case}", over("cpu_seconds", plain, own)),
        Figure(f"peak above the model, {case}", over("peak_mb", own, plain), most),
    ]


def measure(folder: Path, options: Options, sizes: dict[str, int]) -> None:
    """Measure all cases, and write the results."""
    figures, values = [], {}
    for case, settings in CASES.items():
        ways = {
            way: partial(
                run_child,
                *(Path(__file__).name, "--child", str(folder), way),
                *(json.dumps(sizes), json.dumps(settings)),
                threads=options.threads,
            )
            for way in WAYS
        }
        results = take_turns(ways, options.repetitions)
        compare(case, results)
        figures += figures_of(case, results)
        for way in WAYS:
            values[f"{way}, {case}: seconds"] = [each["seconds"] for each in results[way]]
            values[f"{way}, {case}: MB"] = [each["peak_mb"] for each in results[way]]
    conclude("token_loss", options, figures, values, {**sizes, "cases": CASES})


def main() -> None:
    """Measure, or be the child that is measured."""
    options, given = parse_options(__doc__, add=add_arguments)
    if given.child:
        folder, way, sizes, case = given.child
        print_result(child(Path(folder), way, json.loads(sizes), json.loads(case)))
        return
    sizes = QUICK if options.quick else FULL
    with scratch() as folder:
        save_llama(folder, sizes["vocabulary"], sizes["hidden"], sizes["layers"], sizes["length"])
        measure(folder, options, sizes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a child."""
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)


if __name__ == "__main__":
    main()
