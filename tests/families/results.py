"""What the matrix found: build/families holds what tests found since, results.json the whole.

`python tests/families/results.py` adds the one to the other and writes docs/models.md, also after
a run of some architectures or some tests.
"""

import json
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from families.matrix import FAULTS, LEFT_OUT, REFUSED, architectures

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "families"
KEPT = Path(__file__).parent / "results.json"
PAGE = ROOT / "docs" / "models.md"


@dataclass(frozen=True)
class Result:
    """What is known of one architecture."""

    tried: tuple[str, ...] = ()
    """Names of `NAMES`."""
    packed: bool | None = None
    """Whether documents share a row."""
    experts: float | None = None
    """Share of the experts' values that the default adapter reaches; None without experts."""
    adapted: float | None = None
    """Share of all matrices' values that it reaches, without head and embedding."""
    left_out: str = ""
    """Matrices that it does not reach."""


def measure(model: Any) -> dict[str, Any]:
    """What an adapter reaches, counted on the model with its adapter in plain PEFT."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    reached: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            name = vars(module).get("parameter_name", "weight")
            reached.add(id(getattr(base, name)))
    matrices: dict[str, Any] = {}
    experts: dict[str, Any] = {}
    embeddings = {id(model.get_input_embeddings().weight)}
    if model.get_output_embeddings() is not None:
        embeddings.add(id(model.get_output_embeddings().weight))
    for name, parameter in model.named_parameters():
        if "lora_" in name or id(parameter) in embeddings or parameter.dim() < 2:
            continue
        plain = name.replace("base_layer.", "").removeprefix("base_model.model.")
        is_expert = "expert" in plain and parameter.dim() == 3 and "shared" not in plain
        owner = model.get_submodule(name.rpartition(".")[0])
        if is_expert:
            experts[plain] = parameter
        elif isinstance(owner, torch.nn.Linear) or id(parameter) in reached:
            matrices[plain] = parameter
    both = {**matrices, **experts}
    missed = {_short(name) for name, value in both.items() if id(value) not in reached}
    return {
        "experts": _share(experts, reached) if experts else None,
        "adapted": _share(both, reached),
        "left_out": ", ".join(sorted(missed)),
    }


def _share(matrices: dict[str, Any], reached: set[int]) -> float:
    values = sum(each.numel() for each in matrices.values())
    inside = sum(each.numel() for each in matrices.values() if id(each) in reached)
    return round(inside / values, 4) if values else 0.0


def _short(name: str) -> str:
    parts = [part for part in name.split(".") if not part.isdigit()]
    return parts[-2] if parts[-1] == "weight" else ".".join(parts[-2:])


def begin(kind: str, aspect: str) -> None:
    """Keep that an aspect of an architecture is tried: without a `note` it did not pass."""
    _write(kind, aspect, passed=False)


def note(kind: str, aspect: str, **measured: Any) -> None:
    """Keep what a test found of an architecture, until `main` writes it down."""
    _write(kind, aspect, passed=True, **measured)


def _write(kind: str, aspect: str, **values: Any) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"kind": kind, "aspect": aspect, **values})
    (FOLDER / f"{kind}.{aspect}.json").write_text(text, encoding="utf-8")


def collect() -> dict[str, Result]:
    """All that is kept, with what the tests found since; what was not tried stays."""
    results = read()
    for file in sorted(FOLDER.glob("*.json")):
        entry = json.loads(file.read_text(encoding="utf-8"))
        kind, aspect, passed = entry.pop("kind"), entry.pop("aspect"), entry.pop("passed")
        before = results.get(kind, Result())
        tried = {*before.tried, aspect} if passed else {*before.tried} - {aspect}
        results[kind] = replace(before, **entry, tried=tuple(sorted(tried)))
    current = set(architectures())
    return {kind: each for kind, each in results.items() if each.tried and kind in current}


def read() -> dict[str, Result]:
    """The results of the last whole run, by model type."""
    if not KEPT.exists():
        return {}
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    return {
        kind: Result(**{**values, "tried": tuple(values["tried"])}) for kind, values in kept.items()
    }


def untried(results: dict[str, Result]) -> list[str]:
    """Architectures with neither a result nor a reason."""
    reasons = {kind for kind, _ in FAULTS | REFUSED}
    return sorted(set(architectures()) - results.keys() - reasons)


def page(results: dict[str, Result]) -> str:
    """docs/models.md."""
    rows = [row(kind, results[kind]) for kind in sorted(results)]
    faults = {kind: reason for (kind, _), reason in (FAULTS | REFUSED).items()}
    reasons = [f"| {kind} | {reason} |" for kind, reason in sorted((LEFT_OUT | faults).items())]
    rest = ", ".join(untried(results))
    return _PAGE.format(
        count=len(results),
        version=version("transformers"),
        rows="\n".join(rows),
        reasons="\n".join(reasons),
        untried=f"Without a passing result yet: {rest}.\n\n" if rest else "",
    )


def row(kind: str, result: Result) -> str:
    """A line of the table."""
    packed = {True: "packed", False: "one a row", None: "–"}[result.packed]
    experts = "–" if result.experts is None else f"{result.experts:.0%}"
    adapted = "–" if result.adapted is None else f"{result.adapted:.0%}"
    tried = ", ".join(NAMES[aspect] for aspect in NAMES if aspect in result.tried)
    missing = result.left_out or "–"
    return f"| {kind} | {tried} | {packed} | {adapted} | {experts} | {missing} |"


NAMES = {
    "lora": "adapter",
    "full": "full",
    "nf4": "nf4",
    "dpo": "DPO",
    "workers": "2 workers",
    "merge": "merge",
}
"""What is tried, by the names of the tests."""

_PAGE = """\
# Models

finray trains causal language models that transformers loads, and the language model of
vision-language checkpoints. The {count} architectures in this table were trained for two steps on
small random copies, each of which has every kind of layer of the whole model: the losses are those
of plain transformers, PEFT and torch on one document at a time, within 1e-5 of their value, and the
result loads in plain PEFT and transformers with equal logits. `make test-families` repeats it and
writes this page (transformers {version}).

- **Tried**: an adapter, full fine-tuning; for some also an adapter on a base in 4 bits, DPO, two
  workers, and the merge of the adapter into its base.
- **Documents**: packed, several to a row and isolated from each other, or one a row, which finray
  decides by itself.
- **Adapted**: share of all matrices' values that the default adapter (`targets: all-linear`)
  reaches; embedding and head are not counted. **Experts**: the same share of the experts alone.

| Model type | Tried | Documents | Adapted | Experts | Not adapted |
| --- | --- | --- | --- | --- | --- |
{rows}

## Not in the table

{untried}| Model type | Why |
| --- | --- |
{reasons}
"""


def main() -> None:
    """Write the results down."""
    results = collect()
    kept = {kind: asdict(results[kind]) for kind in sorted(results)}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
