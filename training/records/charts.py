"""Geometry of the report's line charts and histograms, without markup.

A chart is drawn in a box of 1000 x 1000 units that the page stretches. Ticks have positions in per
cent of the box, so their labels keep their size at any width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
Style = Literal["main", "faint", "held-out"]


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
    """In per cent of the axis."""


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
) -> Chart | None:
    """A chart of a series over steps; None if it contains no number.

    Args:
        title: title of the chart.
        points: the series on training data.
        format: format of the values.
        held_out: the same quantity on held-out data, drawn as dots.
        from_zero: start the axis at zero.
        noisy: if there are many points, draw them faintly, and their moving average over them.
    """
    values = [value for _, value in (*points, *held_out) if value is not None]
    if not values:
        return None
    last = max(step for step, _ in (*points, *held_out))
    x_range = (0.0, float(max(last, 1)))
    low, high = min(values), max(values)
    y_step = _tick_step(min(low, 0.0) if from_zero else low, high)
    y_range = _range(min(low, 0.0) if from_zero else low, high, y_step)
    x_step = max(1.0, _tick_step(0.0, x_range[1], count=6))
    return Chart(
        title=title,
        lines=_lines(points, held_out, _Frame(x_range, y_range, format), noisy),
        x_ticks=_ticks(x_range, x_step, formatting.count),
        y_ticks=_ticks(y_range, y_step, lambda value: _label(value, y_step, format)),
        summary=_summary(title, points or held_out, format),
        note=_missing_note([*points, *held_out]),
    )


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


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """Reduce to about `limit` points: each section keeps its lowest and highest point and a gap.

    Taking every n-th point would be simpler, but would hide spikes.
    """
    if len(points) <= limit:
        return list(points)
    kept = {0, len(points) - 1}
    buckets = limit // 3
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


@dataclass(frozen=True)
class _Frame:
    """The axes of a chart, which map values to positions in the box."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    format: Format

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
        (left, right), (bottom, top) = self.x_range, self.y_range
        x, y = (step - left) / (right - left), (top - value) / (top - bottom)
        return round(BOX * x, 1), round(BOX * y, 1)


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
