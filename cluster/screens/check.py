"""What `finray check` prints."""

from typing import Any

from ...training.common import formatting
from ...training.data.curation.funnel import describe_funnel
from ...training.data.row_facts import describe_lengths
from ...training.records.labels import adapted_text


def render(outlook: dict[str, Any]) -> str:
    """What `examine` returned, as text."""
    data, parameters = outlook["data"], outlook["parameters"]
    about = "" if data["is_exact"] else "about "
    rows = [("run", f"{outlook['name']}, {outlook['method']} of {outlook['base']}")]
    for source in outlook["sources"]:
        words = "" if source["is_exact"] else "about "
        rows.append(
            (
                source["split"],
                f"{source['path']}: {words}{formatting.counted(source['rows'], 'row')} of "
                f"{source['format']}, {formatting.counted(source['files'], 'file')}",
            )
        )
    if data["tokens"] is not None:
        rows.append(
            (
                "tokens",
                f"{about}{formatting.count(data['tokens'])} in "
                f"{formatting.counted(data['sequences'], 'sequence')}" + _how_to_measure(data),
            )
        )
    rows += _of_rows(data)
    rows += [("curated", line) for line in describe_funnel(data.get("funnel", ()))]
    rows += [("note", note) for note in data.get("notes", ())]
    rows += _unread(outlook["sources"])
    if outlook["steps"] is not None:
        each = formatting.counted(outlook["batch_size"], "sequence")
        rows.append(("steps", f"{about}{formatting.count(outlook['steps'])} of {each}"))
    if parameters is not None:
        share = parameters["trainable"] / parameters["total"]
        rows.append(
            (
                "parameters",
                f"{formatting.count(parameters['trainable'])} trained of "
                f"{formatting.count(parameters['total'])} ({formatting.percent(share)})",
            )
        )
    if outlook.get("adapted"):
        rows.append(("adapter", adapted_text(outlook["adapted"])))
    if outlook["memory"] is not None:
        rows.append(("memory", outlook["memory"]["text"]))
    rows += [("note", note) for note in outlook.get("machine", ())]
    rows.append(("rehearsal", outlook["rehearsal"]["text"]))
    rows += [("note", line) for line in outlook["rehearsal"]["lines"]]
    workers = outlook["workers"]
    count = " to ".join(map(str, workers)) if isinstance(workers, tuple) else workers
    where = f"{count} worker{'s'[: workers != 1]}" if workers else "this process"
    sweep = outlook.get("sweep")
    if sweep is not None:
        rows += _of_a_sweep(sweep)
    rows += [("trains in", where), ("results in", outlook["folder"]), ("state", outlook["state"])]
    rows += [(line["name"], line["text"]) for line in outlook.get("cluster", ())]
    return "\n".join(
        [
            f"{'recipe' if sweep is None else 'sweep'} OK",
            *(f"  {name:10}  {text}" for name, text in rows),
        ]
    )


def _how_to_measure(data: dict[str, Any]) -> str:
    is_final = data["is_exact"] or data.get("streams")
    return "" if is_final else " (exact once prepared: finray prepare)"


def _of_rows(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Lengths, and what is trained of them; of a sample, that is said."""
    if "overlong" not in data:
        return []
    sample = data.get("sample")
    of = "" if sample is None else f" (of the first {formatting.count(sample)} rows)"
    rows = [("lengths", f"{describe_lengths(data['lengths'], data['max_length'])}{of}")]
    if data["trained_share"] is not None:
        rows.append(("trained", f"{formatting.percent(data['trained_share'])} of the tokens{of}"))
    if data["overlong"]:
        limit = formatting.count(data["max_length"])
        longer = formatting.counted(data["overlong"], "row")
        verb = "is" if data["overlong"] == 1 else "are"
        rows.append(("note", f"{longer} {verb} longer than {limit} tokens{of}"))
    return rows


def _unread(sources: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Splits that neither training nor evaluation reads."""
    unread = {source["path"]: ", ".join(source["unread_splits"]) for source in sources}
    return [
        ("note", f"{path}: splits not read: {names}") for path, names in unread.items() if names
    ]


def _of_a_sweep(sweep: dict[str, Any]) -> list[tuple[str, str]]:
    valid = "" if sweep["settings"] is None else f" of {sweep['settings']:,} valid settings"
    objectives = [f"{item['name']} ({item['mode']})" for item in sweep["objectives"]]
    return [
        ("trials", f"at most {sweep['trials']:,}{valid}, chosen by {sweep['sampler']}"),
        ("objective", ", ".join(objectives)),
    ]
