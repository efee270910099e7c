"""What `finray plan` prints."""

import shlex
from collections.abc import Sequence
from typing import Any

from ...training.common import formatting

# On two lines, so that a table fits a terminal of 80 columns.
_HEADINGS = [
    ["", "", "micro-", "check-", "peak,", "most", "", "", "", "GPU"],
    ["placement", "base", "batch", "points", "GiB", "in", "fits", "tokens/s", "hours", "hours"],
]
_NUMBERS = (2, 4, 7, 8, 9)
"""Columns that are flush right."""


def render(planned: dict[str, Any], changes: Sequence[str] = ()) -> str:
    """What `plan` returned, as text.

    Args:
        planned: that.
        changes: the `key=value` settings that it was given, which belong to the best ones.
    """
    gpus = f"{planned['gpus']} x {planned['gpu']}"
    share = f"{100 * planned['utilisation']:g}%"
    steps = "steps unknown"
    if planned["steps"] is not None:
        steps = formatting.counted(planned["steps"], "step")
    header = f"{planned['name']} on {gpus}, at {share} of their 16-bit speed; {steps}"
    table = _aligned([*_HEADINGS, *(_row(row) for row in planned["placements"])])
    if planned["best"] is not None:
        decided = {setting.partition("=")[0] for setting in planned["best"]}
        given = [change for change in changes if change.partition("=")[0] not in decided]
        chosen = " ".join(f"--set {shlex.quote(one)}" for one in [*given, *planned["best"]])
        end = f"with the best, {_host(planned['placements'][0])} of host memory\nbest: {chosen}"
    elif planned["nearest"] is not None:
        end = f"none fits; the nearest that would: {planned['nearest']}"
    else:
        end = "none fits, nor would a shorter data.max_length, or up to 64 GPUs of another card"
    notes = [f"note: {line}" for line in (planned["note"] or "").splitlines()]
    return "\n".join([header, *notes, "", *table, "", end])


def _host(row: dict[str, Any]) -> str:
    first, others = (row[name] / 2**30 for name in ("host", "host_of_others"))
    if first == others:
        return f"a worker takes up to {first:.1f} GiB"
    return f"the first worker takes up to {first:.1f} GiB, and each other {others:.1f} GiB,"


def _row(row: dict[str, Any]) -> list[str]:
    phase = max(row["phases"], key=row["phases"].get)
    workers = f" x {row['workers']}" if row["workers"] > 1 else ""
    return [
        f"{row['strategy']}{workers}",
        "16 bits" if row["quantize"] == "none" else row["quantize"],
        str(row["micro_batch_size"]),
        "yes" if row["gradient_checkpointing"] else "no",
        f"{row['peak'] / 2**30:.1f}",
        phase,
        "no" if not row["fits"] else "tight" if row["is_tight"] else "yes",
        formatting.count(round(row["tokens_per_second"])),
        _hours(row["hours"]),
        _hours(row["gpu_hours"]),
    ]


def _hours(hours: float | None) -> str:
    if hours is None:
        return ""
    if hours < 1e-4:
        return "<0.0001"
    if hours < 0.1:
        return f"{hours:.4f}"
    return f"{hours:,.2f}" if hours < 100 else f"{hours:,.0f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            text.rjust(width) if column in _NUMBERS else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
