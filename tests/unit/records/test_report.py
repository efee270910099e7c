"""report: a page that needs no other file, shows the numbers, and treats no text as markup."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import finray
from finray.training.common.errors import InputError
from finray.training.common.storage import Folder
from finray.training.records.charts import histogram, line_chart, smooth, thin
from finray.training.records.report import render_report, write_report
from finray.training.records.run_folder import write_rollouts, write_run, write_samples

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """The page's elements and their text; asserts that every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self) -> str:
        return " ".join(
            " ".join(t for tag, t in self.texts if tag not in ("style", "script")).split()
        )

    def lines(self, chart: int) -> list[dict[str, Any]]:
        """The read-out data of the n-th line chart."""
        plots = [a["data-lines"] for _, a in self.elements if "data-lines" in a]
        return json.loads(plots[chart])  # type: ignore[no-any-return]


def points(polyline: dict[str, str]) -> list[tuple[float, float]]:
    pairs = (pair.split(",") for pair in polyline["points"].split())
    return [(float(x), float(y)) for x, y in pairs]


def make_run(tmp_path: Path, lines: list[dict[str, Any]] | None = None, **record: Any) -> Folder:
    folder = Folder(str(tmp_path / "demo")).create()
    write_run(folder, {"status": "finished", "name": "demo", "method": "sft", **record})
    if lines is not None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        folder.write("metrics.jsonl", text.encode())
    return folder


def steps(losses: list[float]) -> list[dict[str, Any]]:
    return [{"step": 10 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]


def test_untrusted_text_stays_text(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path,
        steps([2.0, 1.0]),
        name=EVIL,
        status="failed",
        error=EVIL,
        restarts=[{"step": 1, "reason": EVIL}],
        data={"rows_read": 2, "dropped": {EVIL: 1}, "sources": [{"path": EVIL, "rows": 2}]},
    )
    folder.write("recipe.yaml", json.dumps({"name": EVIL, "model": {"base": EVIL}}).encode())
    sample = {"row": 1, "prompt": EVIL, "reference": EVIL, "before": EVIL, "after": "'\"><b>"}
    write_samples(folder, [sample])

    page = Page(render_report(folder))

    assert len(page.all("script")) == 1
    assert page.all("img") == []
    handlers = [name for _, attributes in page.elements for name in attributes if name[:2] == "on"]
    assert handlers == []
    assert ("pre", EVIL) in page.texts
    assert ("pre", "'\"><b>") in page.texts


def test_nothing_is_fetched(tmp_path: Path) -> None:
    page = Page(render_report(make_run(tmp_path, steps([2.0, 1.0]), result="adapter")))
    fetching = [
        attributes[name]
        for _, attributes in page.elements
        for name in ("src", "href", "srcset", "action", "data", "xlink:href", "poster")
        if name in attributes
    ]
    assert fetching == ["data:,"]
    code = " ".join(text for tag, text in page.texts if tag in ("style", "script"))
    assert len(code) > 1000
    assert not any(word in code for word in ("url(", "@import", "://", "fetch(", "import("))
    policy = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy[0].startswith("default-src 'none'")


def test_curves_hold_every_point(tmp_path: Path) -> None:
    metrics = [
        {"step": 0, "eval_loss": 3.0},
        *({"step": s, "loss": 4 - s / 10, "learning_rate": 1e-4} for s in range(1, 21)),
        {"step": 20, "eval_loss": 2.5},
    ]
    page = Page(render_report(make_run(tmp_path, metrics)))
    loss, held_out, rate = page.all("polyline")
    assert [len(points(line)) for line in (loss, held_out, rate)] == [20, 2, 20]
    heights = [y for _, y in points(loss)]
    assert heights == sorted(heights), "a falling loss goes down the page"
    assert points(loss)[-1][0] == 1000
    assert points(held_out)[0][0] == 0
    readout = page.lines(0)
    assert [line["label"] for line in readout] == ["training", "held-out"]
    assert readout[0]["points"][-1][2:] == ["20", "2.000"]


def test_thousands_of_lines_are_thinned_and_spikes_stay(tmp_path: Path) -> None:
    losses = [2.0 + 0.1 * (i % 7) for i in range(5000)]
    losses[3333] = 9.0
    page = Page(render_report(make_run(tmp_path, steps(losses))))
    raw, smoothed = page.all("polyline")
    assert 300 < len(points(raw)) <= 1000
    assert 300 < len(points(smoothed)) <= 1000
    assert [p[2:] for p in page.lines(0)[0]["points"] if p[3] == "9.000"] == [["33,340", "9.000"]]


def test_losses_that_are_not_finite_leave_a_gap(tmp_path: Path) -> None:
    losses = [3.0, 2.0, math.nan, math.inf, 2.5, 2.0, 1.0]
    html = render_report(make_run(tmp_path, [*steps(losses), {"step": 80, "loss": None}]))
    page = Page(html)
    assert [len(points(line)) for line in page.all("polyline")] == [2, 3]
    assert "Not a number at 3 of 8 logged points, first at step 30" in page.text()
    assert "Training loss 3.000 → nan" in page.text()
    assert "NaN" not in html


def test_a_single_point_is_a_dot(tmp_path: Path) -> None:
    page = Page(render_report(make_run(tmp_path, steps([2.0]), status="running")))
    assert page.all("polyline") == []
    assert len(page.all("path")) == 1
    assert "Training loss 2.000" in page.text()


def test_for_a_repeated_step_the_later_line_counts(tmp_path: Path) -> None:
    again = [{"step": 15, "loss": 2.75}, {"step": 20, "loss": 2.5}, {"step": 30, "loss": 2.25}]
    metrics = [*steps([3.0, 2.0, 1.0]), *again]
    page = Page(render_report(make_run(tmp_path, metrics)))
    assert [point[3] for point in page.lines(0)[0]["points"]] == [
        "3.000",
        "2.750",
        "2.500",
        "2.250",
    ]


def test_key_figures_compare_before_and_after(tmp_path: Path) -> None:
    speeds = [(10, 900.0), (20, 5120.0), (30, 5500.0)]
    folder = make_run(
        tmp_path,
        [{"step": n, "loss": 1.0, "tokens_per_second": speed} for n, speed in speeds],
        before={"eval_loss": 2.5, "exact_match": 0.125},
        metrics={"loss": 1.0, "eval_loss": 0.5, "exact_match": 0.875},
        tokens=1_234_567,
        wall_seconds=3725,
        result="adapter",
    )
    text = Page(render_report(folder)).text()
    for part in (
        "Held-out loss 2.500 → 0.500",
        "Exact match 12.5% → 87.5%",
        "Tokens trained on 1.23M",
        "Tokens per second 5.12k",
        "Wall time 1h02m",
        f"{folder}/adapter",
    ):
        assert part in text


def test_samples_show_matches(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    write_samples(
        folder,
        [
            {"row": 1, "prompt": "1+1", "reference": "2", "before": "3", "after": " 2\n"},
            {"row": 2, "prompt": "2+2", "reference": "4", "before": "4", "after": "5"},
            {"row": 3, "prompt": "3+3", "reference": "6", "before": "1", "after": None},
            *({"row": n, "prompt": "x", "reference": "y", "after": "y"} for n in range(4, 9)),
        ],
    )
    page = Page(render_report(folder))
    assert "6 of 7 tuned answers match the reference exactly" in page.text()
    marked = [a for a in page.all("div") if a.get("class") == "answer matches"]
    assert len(marked) == 1 + 1 + 5
    assert "4 more" in page.text()


def test_data_statistics_and_histogram(tmp_path: Path) -> None:
    data = {
        "rows_read": 1200,
        "dropped": {"empty": 3},
        "train": {"sequences": 40, "documents": 1100, "tokens": 81000, "trainable_tokens": 300,
                  "fill": 0.934},
        "eval": None,
        "length_histogram": {"edges": [0, 10, 20, 30], "counts": [5, 20, 0]},
    }  # fmt: skip
    page = Page(render_report(make_run(tmp_path, data=data)))
    for part in ("Read 1,200", "Dropped: empty 3", "Trainable tokens 300", "Fill 93.4%"):
        assert part in page.text()
    bars = [a for a in page.all("i") if "title" in a]
    assert [bar["style"] for bar in bars] == ["height:25.0%", "height:100.0%", "height:0.0%"]
    assert bars[1]["title"] == "10 to 20 tokens: 20"


def test_a_failed_run_shows_its_error_and_where_it_got_to(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path, status="failed", error="loss is nan & <gone>", step=43, total_steps=400
    )
    page = Page(render_report(folder))
    assert ("pre", "loss is nan & <gone>") in page.texts
    assert "Failed step 43 of 400" in page.text()
    assert "No step has been logged yet." in page.text()


def test_the_barest_run_has_a_page(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "bare")).create()
    write_run(folder, {})
    assert "bare" in Page(render_report(folder)).text()


def test_settings_are_shown_with_their_sections(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    folder.write(
        "recipe.yaml",
        b"name: demo\nmodel: {base: some/model}\nadapter: null\n"
        b"data: {train: [{path: a.jsonl, weight: 2.0}], eval: []}\n",
    )
    text = Page(render_report(folder)).text()
    assert "Base model some/model" in text
    assert "every parameter" in text
    assert "train a.jsonl, weight 2.0" in text
    assert "data: {train:" in text, "the YAML itself is there too"


@pytest.mark.parametrize(
    ("record", "recipe", "commands"),
    [
        (
            {"result": "adapter", "metrics": {"eval_loss": 1.0}},
            "optim: {max_steps: 8}",
            ("--to demo --merge", "--set optim.max_steps=N", "--sort eval_loss"),
        ),
        (
            {"result": "model", "metrics": {"loss": 1.0}},
            "optim: {epochs: 2}",
            ("--to demo Train", "--set optim.epochs=N", "--storage {} Curves"),
        ),
    ],
)
def test_the_commands_that_come_next_are_possible(
    record: dict[str, Any], recipe: str, commands: tuple[str, ...], tmp_path: Path
) -> None:
    folder = make_run(tmp_path, steps([2.0, 1.0]), **record)
    folder.write("recipe.yaml", recipe.encode())
    text = Page(render_report(folder)).text()
    for command in commands:
        assert command.format(tmp_path) in text


def test_no_run_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no run: there is no run\.json"):
        render_report(Folder(str(tmp_path)))


def test_written_report_survives_text_without_utf8(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    write_samples(folder, [{"row": 1, "prompt": "\ud800", "reference": "a", "after": "b"}])
    write_report(folder)
    assert folder.read("report.html").startswith(b"<!doctype html>")


@pytest.mark.parametrize(
    "values",
    [[2.0, 2.0], [0.0], [1.0, math.nextafter(1.0, 2)], [-5.0, 3.0], [1e-9, 2e-9], [1e30, 1.0]],
)
def test_any_values_get_an_axis(values: list[float]) -> None:
    chart = line_chart("x", [(float(i), value) for i, value in enumerate(values)], format="loss")
    assert chart is not None
    assert 2 <= len(chart.y_ticks) <= 8
    assert len({tick.label for tick in chart.y_ticks}) == len(chart.y_ticks)
    assert all(0 <= y <= 1000 for line in chart.lines for _, y, _, _ in line.readout)


def test_chart_without_numbers_is_none() -> None:
    assert line_chart("x", [(1.0, None)], format="loss") is None
    assert line_chart("x", [], format="loss") is None


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value() -> None:
    assert [value for _, value in smooth([(i, 2.0) for i in range(9)])] == pytest.approx([2.0] * 9)
    assert smooth([(0, 5.0), (1, None), (2, 1.0)])[:2] == [(0, 5.0), (1, None)]


def test_thinning_keeps_ends_extremes_and_gaps() -> None:
    points = [(float(i), float(i % 10)) for i in range(10_000)]
    points[5_000] = (5_000.0, -1.0)
    given = [*points[:7_000], (7_000.0, None), *points[7_001:]]
    kept = thin(given)
    assert len(kept) <= 1002
    assert {given[0], given[-1], (5_000.0, -1.0), (7_000.0, None)} <= set(kept)
    assert kept == sorted(kept, key=lambda point: point[0])


def test_all_pages_have_one_head() -> None:
    """So none is without the policy that lets text of the user's rows load nothing."""
    home = Path(finray.__file__).parent
    folders = [home / name for name in ("training", "tuning", "cluster")]
    pages = [page for folder in folders for page in folder.rglob("*.html")]
    heads = [page.name for page in pages if "<head>" in page.read_text(encoding="utf-8")]
    assert heads == ["macros.html"] and len(pages) == 6


def test_histogram_refuses_edges_that_do_not_fit() -> None:
    assert histogram([0, 1], [3, 4]) is None
    assert histogram([0, 1], [0]) is None
    assert histogram([], []) is None


def test_rollouts_of_the_first_and_the_last_step(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps([2.0, 1.0]), method="grpo")
    write_rollouts(
        folder,
        [
            {
                "step": step,
                "prompt": "What?",
                "completion": f"{EVIL} {step} {n}",
                "reward": 0.25 * n,
                "advantage": n - 0.5,
            }
            for step in (10, 20, 30)
            for n in range(2)
        ],
    )
    page = Page(render_report(folder))
    shown = [text for tag, text in page.texts if tag == "pre" and text.startswith(EVIL)]
    assert shown == [f"{EVIL} {step} {n}" for step in (10, 30) for n in range(2)]
    assert ("h4", "Reward 0.250 · advantage +0.50") in page.texts
