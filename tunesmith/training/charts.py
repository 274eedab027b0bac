"""Curves as plain geometry: what a chart of report.html draws, in percent of its plot area."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

Points = list[tuple[float, float | None]]
"""(step, value); None where the value was not finite."""

_BUCKETS = 400
"""A curve of more points is drawn by the first, lowest, highest and last of each bucket: no spike is lost."""


@dataclass
class Curve:
    """One line of a chart."""

    name: str
    points: Points
    color: str
    """Name of a color in the page's style."""
    is_faint: bool = False
    """Drawn thin and pale, behind the others."""
    path: str = ""
    dots: list[tuple[float, float, str]] = field(default_factory=list)
    """(x %, y %, text) of the points that can be hovered."""


@dataclass
class Chart:
    """One chart, ready to be drawn."""

    title: str
    unit: str
    curves: list[Curve]
    y_ticks: list[tuple[float, str]]
    """(% from the top, label)."""
    x_ticks: list[tuple[float, str]]
    """(% from the left, label)."""
    summary: str
    """What the chart shows, in words."""
    note: str = ""
    """What it does not show."""
    is_cut: bool = False
    """Whether values lie above the top."""


def build_chart(title: str, curves: Sequence[Curve], unit: str = "", from_zero: bool = False) -> Chart | None:
    """Lay out `curves` over their common steps; None if no point of theirs is finite."""
    shown = [curve for curve in curves if any(value is not None for _, value in curve.points)]
    if not shown:
        return None
    values = [value for curve in shown for _, value in curve.points if value is not None]
    steps = [step for curve in shown for step, _ in curve.points]
    low, high, is_cut = _range(values, from_zero)
    y_ticks = nice_ticks(low, high if high > low or not from_zero else low + 1)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1]) if not is_cut else high
    first, last = min(steps), max(steps)
    for curve in shown:
        _lay_out(curve, (first, last), (low, high), unit)
    missing = sum(value is None for _, value in shown[0].points)
    notes = [f"{missing:,} steps without a finite value are gaps"] if missing else []
    notes += (
        [f"values above {format_number(high)} are cut off (highest: {format_number(max(values))})"] if is_cut else []
    )
    return Chart(
        title,
        unit,
        shown,
        [(100 * (1 - _share(tick, low, high)), format_number(tick)) for tick in y_ticks if low <= tick <= high],
        [(100 * _share(tick, first, last), f"{tick:,.0f}") for tick in _step_ticks(first, last)],
        "; ".join(_in_words(curve) for curve in shown if not curve.is_faint) or title,
        "; ".join(notes),
        is_cut,
    )


def smooth(points: Points) -> Points:
    """Means over a window around each point, a thirtieth of all points wide (five at least); values that a chart would cut off count as its edge."""
    finite = [(step, value) for step, value in points if value is not None]
    if not finite:
        return points
    _, top, _ = _range([value for _, value in finite], False)
    sums = [0.0, *itertools.accumulate(min(value, top) for _, value in finite)]
    reach = max(2, len(finite) // 60)
    means = {}
    for index, (step, _) in enumerate(finite):
        near = max(
            min(reach, index, len(finite) - 1 - index), reach // 3
        )  # nearly symmetric at the ends too, or the ends would lag
        first, end = max(0, index - near), min(len(finite), index + near + 1)
        means[step] = (sums[end] - sums[first]) / (end - first)
    return [(step, means[step] if value is not None else None) for step, value in points]


def thin(points: Points, buckets: int = _BUCKETS) -> Points:
    """At most four points for each bucket of steps: first, lowest, highest, last, and a gap if there is one."""
    if len(points) <= 4 * buckets:
        return points
    size = len(points) / buckets
    kept: Points = []
    for number in range(buckets):
        part = points[int(number * size) : int((number + 1) * size)]
        finite = [(value, index) for index, (_, value) in enumerate(part) if value is not None]
        gaps = [index for index, (_, value) in enumerate(part) if value is None][:1]
        extremes = [min(finite)[1], max(finite)[1], finite[0][1], finite[-1][1]] if finite else []
        kept += [part[index] for index in sorted({*extremes, *gaps})]
    return kept


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that span low … high."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [round(index * distance, 12 - math.floor(math.log10(distance))) for index in range(first, last + 1)]


def format_number(value: float | None) -> str:
    """A number as a person reads it: 2.347, 2e-5, 12,345, 1.2M."""
    if value is None:
        return "not finite"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-2:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if size >= limit:
            return f"{value / limit:.3g}{unit}" if size < limit * 1e3 else f"{value:.3g}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _range(values: list[float], from_zero: bool) -> tuple[float, float, bool]:
    """Lowest and highest value to show; the top is cut where few values would flatten all others."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    bulk_low, bulk_high = ordered[int(0.02 * (len(ordered) - 1))], ordered[math.ceil(0.98 * (len(ordered) - 1))]
    limit = bulk_high + 3 * (bulk_high - bulk_low)
    is_cut = len(ordered) >= 20 and bulk_high > bulk_low and high > limit
    high = bulk_high + (bulk_high - bulk_low) if is_cut else high
    return (min(low, 0.0) if from_zero else low), high, is_cut


def _lay_out(curve: Curve, steps: tuple[float, float], values: tuple[float, float], unit: str) -> None:
    """Fill in the path (gaps where values are missing) and the points to hover."""
    parts, is_open, alone = [], False, False
    for step, value in thin(curve.points):
        if value is None:
            parts.append("h0" if alone else "")
            is_open = alone = False
            continue
        x, y = 100 * _share(step, *steps), 100 * (1 - _share(value, *values))
        parts.append(f"{'L' if is_open else 'M'}{x:.2f} {y:.2f}")
        alone, is_open = not is_open, True
        curve.dots.append(
            (round(x, 2), round(max(y, 0.0), 2), f"{step:,.0f}|{format_number(value)}{' ' + unit if unit else ''}")
        )
    curve.path = "".join(parts) + ("h0" if alone else "")  # a point alone becomes a dot


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _step_ticks(first: float, last: float) -> list[float]:
    if first == last:
        return [first]
    inner = [tick for tick in nice_ticks(first, last, 5) if first <= tick <= last and tick == int(tick)]
    ends = [first] if not inner or _share(inner[0], first, last) > 0.1 else []
    return [*ends, *inner] if inner else [first, last]


def _in_words(curve: Curve) -> str:
    finite = [(step, value) for step, value in curve.points if value is not None]
    (first, start), (last, end) = finite[0], finite[-1]
    return f"{curve.name}: {format_number(start)} at step {first:,.0f}, {format_number(end)} at step {last:,.0f}"
