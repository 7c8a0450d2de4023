"""Charts as inline SVG: colors come from the page's style sheet, so light, dark and paper all work.

Series differ in dash as well as in color. Every chart has a title that a screen reader reads; the
numbers it shows are in a table beside it or in its last-value labels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from taopd.report.text import escape

NUM_COLORS = 8
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line, with a band where `low` and `high` are given."""

    label: str
    points: Points
    color: int = 0
    low: Points = field(default_factory=list)
    high: Points = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to pixels, and where the ticks are."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Pixels of a value."""
        span = self.high - self.low or 1.0
        return round(self.start + (value - self.low) / span * (self.end - self.start), 1)

    def ticks(self, count: int = 4) -> list[float]:
        """Round numbers inside the range, about `count` of them."""
        span = self.high - self.low
        if not span > 0:
            return [self.low]
        rough = span / count
        power = 10 ** math.floor(math.log10(rough))
        step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda size: abs(size - rough))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """Three significant digits, thousands with commas, no exponent between 1e-4 and 1e9."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return text.replace("-", "−") if "e" not in text else text


def figure(title: str, svg: str, note: str = "") -> str:
    """A chart with its caption."""
    small = f" <small>{escape(note)}</small>" if note else ""
    return f"<figure><figcaption>{escape(title)}{small}</figcaption>{svg}</figure>"


def key(labels: Sequence[str]) -> str:
    """Which line is whose; once for all charts of a section."""
    items = "".join(
        f'<li><svg width="28" height="8" aria-hidden="true">'
        f'<line x1="0" y1="4" x2="28" y2="4" class="line k{index % NUM_COLORS}"/></svg>'
        f"{escape(label)}</li>"
        for index, label in enumerate(labels)
    )
    return f'<ul class="key">{items}</ul>'


def lines(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "step",
    from_zero: bool = True,
    to: float | None = None,
    size: tuple[int, int] = (360, 190),
) -> str:
    """Lines over a common x axis, the last value of each written at its end where there are few."""
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in [*one.points, *one.low, *one.high]]
    width, height = size
    low, high = min(ys), max(ys)
    if from_zero and low >= 0:
        low = 0.0
    high = high if to is None else max(high, to)
    if high == low:
        high = low + (abs(low) or 1.0)
    x_scale = Scale(min(xs), max(xs), 46, width - 48)
    y_scale = Scale(low, high, height - 30, 10)
    parts = [_axes(x_scale, y_scale, x_label, size)]
    for one in series:
        color = one.color % NUM_COLORS
        if one.low and one.high:
            edge = [*one.high, *reversed(one.low)]
            corners = " ".join(f"{x_scale(x)},{y_scale(y)}" for x, y in edge)
            parts.append(f'<polygon points="{corners}" class="band f{color}"/>')
        path = " ".join(f"{x_scale(x)},{y_scale(y)}" for x, y in thin(one.points))
        words = f"<title>{escape(one.label)}</title>"
        parts.append(f'<polyline points="{path}" class="line k{color}">{words}</polyline>')
        if len(one.points) == 1:
            x, y = one.points[0]
            parts.append(f'<circle cx="{x_scale(x)}" cy="{y_scale(y)}" r="3" class="f{color}"/>')
    parts += _last_values(series, x_scale, y_scale)
    return _svg(title, size, parts)


def _last_values(series: Sequence[Series], x_scale: Scale, y_scale: Scale) -> list[str]:
    """The last value of each line, moved apart where they would overlap; none for many lines."""
    if len(series) > 4:
        return []
    ends = sorted(((y_scale(one.points[-1][1]), one) for one in series), key=lambda pair: pair[0])
    parts, above = [], -math.inf
    for place, one in ends:
        above = max(place, above + 13)
        text = number(one.points[-1][1])
        x = x_scale(one.points[-1][0]) + 6
        parts.append(f'<text x="{x}" y="{above + 4}" class="ink">{text}</text>')
    return parts


def thin(points: Points, limit: int = 240) -> Points:
    """At most `limit` points: the mean of each stretch, with the first and the last point kept."""
    if len(points) <= limit:
        return points
    size = math.ceil(len(points) / limit)
    inner = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in inner]
    return [points[0], *means[1:-1], points[-1]]


def _axes(x_scale: Scale, y_scale: Scale, x_label: str, size: tuple[int, int]) -> str:
    left, bottom, right = x_scale.start, y_scale.start, x_scale.end
    parts = []
    for tick in y_scale.ticks():
        y = y_scale(tick)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y}" y2="{y}" class="axis"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{number(tick)}</text>')
    for tick in x_scale.ticks(3):
        x = x_scale(tick)
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>')
    parts.append(
        f'<text x="{right}" y="{bottom + 29}" text-anchor="end">{escape(x_label)}</text>'
        if x_label
        else ""
    )
    return "".join(parts)


def intervals(
    title: str,
    rows: Sequence[tuple[str, float, float | None, float | None]],
    *,
    x_label: str,
    reference: float | None = None,
    bounds: tuple[float, float] | None = None,
) -> str:
    """One row per label: a dot at the value, a line over its interval; hollow without one."""
    width, height = 560, 30 * len(rows) + 44
    values = [v for _, *numbers in rows for v in numbers if v is not None]
    values += [] if reference is None else [reference]
    low, high = bounds or (min(values), max(values))
    margin = 0.0 if bounds else 0.06 * (high - low or 1.0)
    scale = Scale(low - margin, high + margin, 190, width - 14)
    parts = []
    for tick in scale.ticks(5):
        x = scale(tick)
        parts.append(f'<line x1="{x}" x2="{x}" y1="4" y2="{height - 38}" class="axis"/>')
        parts.append(f'<text x="{x}" y="{height - 22}" text-anchor="middle">{number(tick)}</text>')
    if reference is not None:
        x = scale(reference)
        parts.append(f'<line x1="{x}" x2="{x}" y1="0" y2="{height - 38}" class="line k3"/>')
    for index, (label, value, start, end) in enumerate(rows):
        y = 20 + 30 * index
        short = label if len(label) <= 27 else f"{label[:26]}…"
        parts.append(
            f'<text x="180" y="{y + 4}" text-anchor="end" class="ink">{escape(short)}'
            f"<title>{escape(label)}</title></text>"
        )
        if start is not None and end is not None:
            ends = f'x1="{scale(start)}" x2="{scale(end)}" y1="{y}" y2="{y}"'
            parts.append(f'<line {ends} class="line k0"/>')
            parts.append(f'<circle cx="{scale(value)}" cy="{y}" r="4.5" class="f0"/>')
        else:
            dot = f'cx="{scale(value)}" cy="{y}" r="4"'
            parts.append(f'<circle {dot} fill="none" class="line k0"/>')
    parts.append(
        f'<text x="{width - 14}" y="{height - 4}" text-anchor="end">{escape(x_label)}</text>'
    )
    return _svg(title, (width, height), parts)


def bars(title: str, rows: Sequence[tuple[str, float, str]], *, labels: int = 120) -> str:
    """Horizontal bars from 0, label on the left in `labels` pixels, words on the right."""
    width, height = 240 + labels, 24 * len(rows) + 6
    largest = max((abs(value) for _, value, _ in rows), default=0.0) or 1.0
    scale = Scale(0.0, largest, labels, width - 146)
    parts = []
    for index, (label, value, words) in enumerate(rows):
        y = 4 + 24 * index
        short = label if len(label) <= labels // 7 else f"{label[: labels // 7 - 1]}…"
        parts.append(
            f'<text x="{labels - 8}" y="{y + 13}" text-anchor="end" class="ink">{escape(short)}</text>'
        )
        size = max(1.0, scale(abs(value)) - labels)
        parts.append(
            f'<rect x="{labels}" y="{y + 2}" width="{size:.1f}" height="14" rx="2" class="f0"/>'
        )
        parts.append(f'<text x="{labels + 6 + size:.1f}" y="{y + 13}">{escape(words)}</text>')
    return _svg(title, (width, height), parts)


def _svg(title: str, size: tuple[int, int], parts: Sequence[str]) -> str:
    width, height = size
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
