"""Geometry of the report's line charts and histograms, without markup.

A chart is drawn in a box of 1000 x 1000 units that the page stretches. Ticks have positions in per
cent of the box, so their labels keep their size at any width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..common import formatting

BOX = 1000
MAX_POINTS = 1000
SMOOTH_FROM = 120
"""Minimum number of points for a smoothed line; fewer are drawn without smoothing."""
DOTS_TO = 60
"""Maximum number of held-out points drawn as dots; more dots would overlap."""

Point = tuple[float, float | None]
"""(step, value); the value is None if it is not a finite number."""
Format = Literal["loss", "exponent", "count", "percent"]
Style = str
"""Class of a line in the page's style sheet: main, faint, held-out, or one of `SERIES`."""
SERIES = tuple(f"series-{number}" for number in range(6))
"""Styles of lines that are compared, in their order; further lines repeat them."""
LOG_FROM = 10.0
"""Ratio of the largest to the smallest value above which an axis is logarithmic."""


@dataclass(frozen=True)
class Tick:
    at: float
    """Position in per cent, from the left or from the bottom."""
    label: str


@dataclass(frozen=True)
class Line:
    """One series of a chart, in units of the box."""

    label: str
    style: Style
    readout: list[tuple[float, float, str, str]]
    """(x and y in the box, step, value) of every point, for the page's script."""
    segments: list[str]
    """SVG polyline points, split where values are missing."""
    dots: list[str]
    """Points drawn as dots, as 'x y': isolated points, and all points of a short held-out line."""


@dataclass(frozen=True)
class Chart:
    title: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    summary: str
    """Description for screen readers."""
    note: str
    """A note about values that the chart cannot show, such as NaN; empty if there are none."""
    unit: str = "step"
    """What the horizontal axis counts."""
    is_log: bool = False
    """True if the vertical axis is logarithmic."""

    @property
    def readout(self) -> list[dict[str, object]]:
        """The points of every line, in the form that the page's script reads."""
        return [
            {"label": line.label, "style": line.style, "points": line.readout}
            for line in self.lines
        ]


@dataclass(frozen=True)
class Bar:
    label: str
    height: float
    """Height in per cent of the axis."""


@dataclass(frozen=True)
class Histogram:
    bars: list[Bar]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


def line_chart(
    title: str,
    points: Sequence[Point],
    *,
    format: Format,
    held_out: Sequence[Point] = (),
    from_zero: bool = False,
    noisy: bool = True,
    log: bool = False,
) -> Chart | None:
    """A chart of a series over steps; None if it contains no number.

    Args:
        title: title of the chart.
        points: the series on training data.
        format: format of the values.
        held_out: the same quantity on held-out data, drawn as dots.
        from_zero: start the axis at zero.
        noisy: if there are many points, draw them faintly, and their moving average over them.
        log: use a logarithmic axis where the values span much.
    """
    every = (*points, *held_out)
    frame = _frame([every], format, from_zero=from_zero, log=log)
    if frame is None:
        return None
    return frame.chart(
        title,
        _lines(points, held_out, frame, noisy),
        _summary(title, points or held_out, format),
        _missing_note(every),
    )


def overlay(
    title: str,
    series: Sequence[tuple[str, Sequence[Point]]],
    *,
    format: Format,
    unit: str = "step",
    styles: Sequence[Style] = SERIES,
) -> Chart | None:
    """A chart of several series over one another; None if they contain no number.

    Args:
        title: title of the chart.
        series: label and points of each.
        format: format of the values.
        unit: what the horizontal axis counts.
        styles: of each series, repeated where there are more.
    """
    frame = _frame([points for _, points in series], format, log=True, unit=unit)
    if frame is None:
        return None
    lines = [
        frame.line(label, styles[number % len(styles)], points)
        for number, (label, points) in enumerate(series)
        if any(value is not None for _, value in points)
    ]
    summary = "; ".join(_summary(label, points, format) for label, points in series)
    return frame.chart(title, lines, f"{title}: {summary}", "")


def scatter(
    title: str,
    points: Sequence[tuple[Any, float]],
    *,
    format: Format,
    unit: str,
    chosen: Sequence[int] = (),
) -> Chart | None:
    """A dot for each point; None if there is none.

    Args:
        title: title of the chart.
        points: (place, value); places are numbers, or words in columns of their own.
        format: format of the values.
        unit: what the horizontal axis shows.
        chosen: numbers of the points that are highlighted.
    """
    frame = _frame([[(0.0, value) for _, value in points]], format, log=True, unit=unit)
    if frame is None:
        return None
    places, ticks = _places([place for place, _ in points])
    dots = [
        (round(BOX * at, 1), frame.height(value), _place_text(place), value_text(value, format))
        for at, (place, value) in zip(places, points, strict=True)
    ]
    groups = {"trials": SERIES[0], "the best": SERIES[1]}
    lines = []
    for label, style in groups.items():
        own = [dot for n, dot in enumerate(dots) if (n in chosen) == (label == "the best")]
        if own:
            lines.append(Line(label, style, own, [], [f"{x:g} {y:g}" for x, y, _, _ in own]))
    chart = frame.chart(title, lines, f"{title} over {unit}", "")
    return replace(chart, x_ticks=ticks)


def _places(values: Sequence[Any]) -> tuple[list[float], list[Tick]]:
    """Shares of the width for places, and the ticks."""
    if all(formatting.is_number(value) for value in values):
        return _numbered(values)
    names = sorted({str(value) for value in values})
    centre = {name: (number + 0.5) / len(names) for number, name in enumerate(names)}
    ticks = [Tick(round(100 * share, 3), name[:20]) for name, share in centre.items()]
    return [centre[str(value)] for value in values], ticks


def _numbered(values: Sequence[float]) -> tuple[list[float], list[Tick]]:
    """Places of numbers: on a logarithmic axis where they span much."""
    low, high = min(values), max(values)
    if low > 0 and high >= LOG_FROM * low:
        edges = _log_edges(low, high)
        scale: Callable[[float], float] = math.log
        marks = [edge for edge in edges if math.log10(edge) % 1 == 0 or len(edges) < 5]
    else:
        step = _tick_step(low, high, count=3)
        first, last = _range(low, high, step)
        edges = marks = [first + n * step for n in range(round((last - first) / step) + 1)]
        scale = float
    start, end = scale(edges[0]), scale(edges[-1])
    shares = [(scale(value) - start) / (end - start) for value in (*values, *marks)]
    ticks = [
        Tick(round(100 * share, 3), _place_text(mark))
        for share, mark in zip(shares[len(values) :], marks, strict=True)
    ]
    return shares[: len(values)], ticks


def _place_text(value: Any) -> str:
    return f"{value:.3g}" if formatting.is_number(value) else str(value)


def histogram(edges: Sequence[float], counts: Sequence[int]) -> Histogram | None:
    """A histogram with bars of equal width; None if all counts are zero.

    Args:
        edges: n + 1 increasing bin edges, in tokens.
        counts: number of documents in each of the n bins.
    """
    if len(edges) != len(counts) + 1 or not any(counts):
        return None
    step = max(1.0, _tick_step(0.0, float(max(counts)), count=3))
    top = _range(0.0, float(max(counts)), step)[1]
    bars = [
        Bar(
            f"{formatting.count(low)} to {formatting.count(high)} tokens: "
            f"{formatting.count(number)}",
            100 * number / top,
        )
        for low, high, number in zip(edges, edges[1:], counts, strict=False)
    ]
    every = max(1, math.ceil(len(counts) / 8))
    x_ticks = [
        Tick(100 * index / len(counts), formatting.count(edges[index]))
        for index in range(0, len(edges), every)
    ]
    return Histogram(bars, x_ticks, _ticks((0.0, top), step, formatting.short_count))


def smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about 2% of the points, corrected for start bias."""
    decay = 1 - 2 / (max(5, len(points) // 50) + 1)
    total = weight = 0.0
    smoothed: list[Point] = []
    for step, value in points:
        if value is not None:
            total = decay * total + value
            weight = decay * weight + 1
        smoothed.append((step, None if value is None else total / weight))
    return smoothed


def thin(points: Sequence[Point]) -> list[Point]:
    """About `MAX_POINTS` of the points: each section keeps its lowest, its highest and a gap.

    Taking every n-th point would be simpler, but would hide spikes.
    """
    if len(points) <= MAX_POINTS:
        return list(points)
    kept = {0, len(points) - 1}
    buckets = MAX_POINTS // 3
    for bucket in range(buckets):
        start, end = (len(points) * edge // buckets for edge in (bucket, bucket + 1))
        values = [(value, i) for i in range(start, end) if (value := points[i][1]) is not None]
        if values:
            kept |= {min(values)[1], max(values)[1]}
        if len(values) < end - start:
            kept.add(next(i for i in range(start, end) if points[i][1] is None))
    return [points[i] for i in sorted(kept)]


def _lines(
    points: Sequence[Point], held_out: Sequence[Point], frame: "_Frame", noisy: bool
) -> list[Line]:
    lines = []
    if noisy and sum(value is not None for _, value in points) >= SMOOTH_FROM:
        lines.append(frame.line("each step", "faint", points))
        lines.append(frame.line("smoothed", "main", smooth(points)))
    elif points:
        lines.append(frame.line("training", "main", points))
    if held_out:
        lines.append(frame.line("held-out", "held-out", held_out))
    return lines


def _frame(
    series: Sequence[Sequence[Point]],
    format: Format,
    *,
    from_zero: bool = False,
    log: bool = False,
    unit: str = "step",
) -> "_Frame | None":
    """The axes on which all series fit; None if they contain no number."""
    points = [point for each in series for point in each]
    values = [value for _, value in points if value is not None]
    if not values:
        return None
    x_range = (0.0, max(1.0, *(float(step) for step, _ in points)))
    low, high = min(values), max(values)
    if log and format != "percent" and low > 0 and high >= LOG_FROM * low:
        edges = _log_edges(low, high)
        return _Frame(x_range, (edges[0], edges[-1]), format, unit, tuple(edges))
    low = min(low, 0.0) if from_zero else low
    step = _tick_step(low, high)
    return _Frame(x_range, _range(low, high, step), format, unit, y_step=step)


def _log_edges(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: 1, 2 and 5 times powers of ten, or the powers alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if len(powers) <= 3 else (1,)
    ticks = [digit * 10.0**power for power in powers for digit in digits]
    first = max(index for index, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    last = min(index for index, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    return ticks[first : last + 1]


@dataclass(frozen=True)
class _Frame:
    """The axes of a chart, which map values to positions in the box."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    format: Format
    unit: str = "step"
    log_ticks: tuple[float, ...] = ()
    """Ticks of a logarithmic vertical axis; empty for a linear one."""
    y_step: float = 1.0
    """Distance of the ticks of a linear one."""

    def chart(self, title: str, lines: list[Line], summary: str, note: str) -> Chart:
        """A chart with these axes."""
        x_step = max(1.0, _tick_step(0.0, self.x_range[1], count=6))
        write = formatting.count if self.unit == "step" else formatting.short_count
        return Chart(
            title=title,
            lines=lines,
            x_ticks=_ticks(self.x_range, x_step, write),
            y_ticks=self._y_ticks(),
            summary=summary,
            note=note,
            unit=self.unit,
            is_log=bool(self.log_ticks),
        )

    def _y_ticks(self) -> list[Tick]:
        if not self.log_ticks:
            label = lambda value: _label(value, self.y_step, self.format)  # noqa: E731
            return _ticks(self.y_range, self.y_step, label)
        return [
            Tick(round(100 - self.height(tick) / BOX * 100, 3), _label(tick, tick, self.format))
            for tick in self.log_ticks
        ]

    def height(self, value: float) -> float:
        """Distance of a value from the top of the box."""
        bottom, top = self.y_range
        if self.log_ticks:
            bottom, top, value = math.log(bottom), math.log(top), math.log(value)
        return round(BOX * (top - value) / (top - bottom), 1)

    def line(self, label: str, style: Style, points: Sequence[Point]) -> Line:
        segments: list[list[str]] = [[]]
        readout = []
        for step, value in thin(points):
            if value is None:
                segments.append([])
                continue
            x, y = self._place(step, value)
            segments[-1].append(f"{x:g},{y:g}")
            readout.append((x, y, formatting.count(step), value_text(value, self.format)))
        dots = [segment[0] for segment in segments if len(segment) == 1]
        if style == "held-out" and len(readout) <= DOTS_TO:
            dots = [point for segment in segments for point in segment]
        return Line(
            label,
            style,
            readout,
            [" ".join(segment) for segment in segments if len(segment) > 1],
            [point.replace(",", " ") for point in dots],
        )

    def _place(self, step: float, value: float) -> tuple[float, float]:
        left, right = self.x_range
        return round(BOX * (step - left) / (right - left), 1), self.height(value)


def _tick_step(low: float, high: float, count: int = 4) -> float:
    """The distance of ticks: 1, 2 or 5 times a power of ten, for about `count` ticks."""
    size = max(abs(low), abs(high)) or 1.0
    span = high - low if high - low > 1e-6 * size else size  # flat, except for rounding
    power = 10.0 ** math.floor(math.log10(span / count))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit * count >= span * 0.999)


def _range(low: float, high: float, step: float) -> tuple[float, float]:
    bottom, top = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    if top > bottom:
        return bottom, top
    return (bottom - step if bottom else bottom), top + step


def _ticks(between: tuple[float, float], step: float, label: Callable[[float], str]) -> list[Tick]:
    low, high = between
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [
        Tick(round(100 * (index * step - low) / (high - low), 3), label(index * step))
        for index in range(first, last + 1)
    ]


def _label(value: float, step: float, format: Format) -> str:
    if format == "count" or step >= 1000:
        return formatting.short_count(value)
    if format == "exponent":
        mantissa, _, power = f"{value:.1e}".partition("e")
        return "0" if value == 0 else f"{mantissa.removesuffix('.0')}e{int(power)}"
    scaled, unit = (100.0, "%") if format == "percent" else (1.0, "")
    decimals = max(0, -math.floor(math.log10(step * scaled) + 1e-9))
    return f"{value * scaled:.{decimals}f}{unit}"


def value_text(value: Any, format: Format) -> str:
    """A value as text in the given format; – if it is missing."""
    write = {
        "loss": formatting.loss,
        "exponent": formatting.exponent,
        "count": formatting.count,
        "percent": formatting.percent,
    }
    return write[format](value)


def _summary(title: str, points: Sequence[Point], format: Format) -> str:
    numbers = [(step, value) for step, value in points if value is not None]
    if not numbers:
        return title
    (first_step, first), (last_step, last) = numbers[0], numbers[-1]
    return (
        f"{title}: {value_text(first, format)} at step {formatting.count(first_step)}, "
        f"{value_text(last, format)} at step {formatting.count(last_step)}"
    )


def _missing_note(points: Sequence[Point]) -> str:
    missing = [step for step, value in points if value is None]
    if not missing:
        return ""
    return (
        f"Not a number at {len(missing)} of {len(points)} logged points, "
        f"first at step {formatting.count(min(missing))}: a gap in the line."
    )
