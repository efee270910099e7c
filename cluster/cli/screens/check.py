"""What `finray check` prints."""

from typing import Any

from ....training.common import formatting


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
                f"{source['path']}: {words}{formatting.count(source['rows'])} rows of "
                f"{source['format']}, {source['files']} file{'s'[: source['files'] != 1]}",
            )
        )
    if data["tokens"] is not None:
        rows.append(
            (
                "tokens",
                f"{about}{formatting.count(data['tokens'])} in "
                f"{formatting.count(data['sequences'])} sequences"
                + ("" if data["is_exact"] else " (exact once prepared: finray prepare)"),
            )
        )
    if outlook["steps"] is not None:
        steps = f"{about}{formatting.count(outlook['steps'])}"
        rows.append(("steps", f"{steps} of {outlook['batch_size']} sequences"))
    if parameters is not None:
        share = parameters["trainable"] / parameters["total"]
        rows.append(
            (
                "parameters",
                f"{formatting.count(parameters['trainable'])} trained of "
                f"{formatting.count(parameters['total'])} ({formatting.percent(share)})",
            )
        )
    if outlook["memory"] is not None:
        rows.append(("memory", outlook["memory"]["text"]))
    workers = outlook["workers"]
    count = " to ".join(map(str, workers)) if isinstance(workers, tuple) else workers
    where = f"{count} worker{'s'[: workers != 1]}" if workers else "this process"
    rows += [("trains in", where), ("results in", outlook["folder"])]
    rows += [(line["name"], line["text"]) for line in outlook.get("cluster", ())]
    return "\n".join(["recipe OK", *(f"  {name:10}  {text}" for name, text in rows)])
