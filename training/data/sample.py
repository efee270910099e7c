"""Figures of a recipe's first rows, for data that is too large to be prepared by a check."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ..config.recipe import Recipe
from .formats import read_examples
from .prepared import CUT
from .render_settings import RenderSettings
from .rendering import OVERLONG, load_renderer
from .resolve import ResolvedSource, all_rows, resolve_data
from .row_facts import count_common, count_fields, digest, quantiles, unused_fields
from .rows import BadRow, Row
from .shapes import Example, RowError

ROWS = 200
"""Rows of each source that are read."""


@dataclass(frozen=True)
class SourceFigures:
    """Figures of the first rows of one source."""

    rows: int
    """Usable rows in the sample."""
    documents: int
    """Documents of those that fit; a long text has several."""
    tokens: int
    """Tokens of these documents."""


@dataclass(frozen=True)
class SampleFigures:
    """Figures of the first rows of each source."""

    rows: int
    """Usable rows in the sample."""
    tokens: int
    """Tokens of those that fit."""
    overlong: int
    """Rows that are longer than data.max_length."""
    trained_share: float | None
    """Share of the tokens that are trained; None without any."""
    lengths: dict[str, int | None]
    """As `Manifest.length_quantiles`."""
    unused: dict[str, int]
    """As `Manifest.unused`."""
    in_train_too: int | None
    """Sampled rows of data.eval that are among the sampled rows of data.train."""
    unrendered: int
    """Usable rows whose texts the chat template cannot render."""
    fault: str
    """Why, of the first one; empty without any."""
    train: tuple[SourceFigures, ...]
    """Of each source of data.train, in order."""


def measure_sample(recipe: Recipe) -> SampleFigures:
    """Read and tokenise the first rows of each source.

    Raises:
        InputError: a source, the tokenizer or the chat template is wrong.
    """
    data = resolve_data(recipe)
    renderer = load_renderer(RenderSettings.of(recipe))
    lengths: Counter[int] = Counter()
    unused: Counter[str] = Counter()
    rows = overlong = tokens = trained = 0
    faults: list[str] = []
    digests: dict[str, list[int]] = {"train": [], "eval": []}
    parts: dict[str, list[SourceFigures]] = {"train": [], "eval": []}
    for split, sources in (("train", data.train), ("eval", data.eval)):
        for source in sources:
            examples: list[Example] = []
            before, documents = (rows, tokens), 0
            for row, of_row in usable_rows(recipe, source, ROWS):
                rows += 1
                examples += of_row
                digests[split] += map(digest, of_row)
                columns = recipe.method.columns
                count_fields(
                    unused,
                    unused_fields(row, source.format, recipe.method.kind, columns, renderer.reads),
                )
            for rendered in renderer.render(examples):
                overlong += rendered.dropped == OVERLONG or CUT in rendered.notes
                faults += [] if rendered.error is None else [str(rendered.error)]
                documents += len(rendered.documents)
                for document in rendered.documents:
                    lengths.update(document.lengths)
                    tokens += len(document.input_ids)
                    trained += int(np.count_nonzero(document.trainable))
            parts[split].append(SourceFigures(rows - before[0], documents, tokens - before[1]))
    train, held_out = (np.array(digests[split], np.uint64) for split in ("train", "eval"))
    longer = overlong * recipe.method.sequences_per_row if recipe.data.overlong == "drop" else 0
    return SampleFigures(
        rows=rows,
        tokens=tokens,
        overlong=overlong,
        trained_share=trained / tokens if tokens else None,
        lengths=quantiles(lengths, longer),
        unused=dict(unused.most_common()),
        in_train_too=count_common([train], [held_out]) if data.eval else None,
        unrendered=len(faults),
        fault=faults[0] if faults else "",
        train=tuple(parts["train"]),
    )


def usable_rows(
    recipe: Recipe, source: ResolvedSource, most: int
) -> Iterator[tuple[Row, list[Example]]]:
    """The first rows of a source that can be used, with their examples as they are tokenised.

    Args:
        recipe: the recipe.
        source: one of its sources.
        most: rows that are read, those that cannot be used included.
    """
    method = recipe.method
    rows = all_rows(source.files, source.changes, recipe.data.max_row_bytes)
    for _, row in islice(rows, most):
        if isinstance(row, BadRow):
            continue
        try:
            _, examples = read_examples(row, source.format, method.kind, method.columns)
        except RowError:
            continue
        yield row, [example for example, _ in examples]
