"""Charts as inline SVG: colors come from the page's style sheet, so light, dark and paper all work.

Series differ in dash as well as in color. Every chart has a title that a screen reader reads; the
numbers it shows are in a table beside it or in its last-value labels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from taopd.report.text import escape, shortened
from taopd.runs.shares import per_cent

NUM_COLORS = 8
"""Of `page.css`. Series beyond take them again, with dots for a line."""
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
    log: bool = False
    """Equal ratios are equally far apart; both ends must be above 0."""

    def __call__(self, value: float) -> float:
        """Pixels of a value."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low or 1.0)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, count: int = 4) -> list[float]:
        """Round numbers inside the range, about `count` of them."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1,), (1, 3), (1, 2, 5)):
                found = [f * 10.0**power for power in powers for f in factors]
                found = [tick for tick in found if self.low <= tick <= self.high]
                if len(found) > 1:
                    break
            return found
        span = self.high - self.low
        if not span > 0:
            return [self.low]
        rough = span / count
        power = 10 ** math.floor(math.log10(rough))
        step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda size: abs(size - rough))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        digits = max(12, 3 - math.floor(math.log10(step)))
        return [round(i * step, digits) for i in range(first, last + 1)]


def decimals(ticks: Sequence[float]) -> int:
    """Decimal places in which the ticks of an axis differ as they are, six at most."""
    apart = min((b - a for a, b in pairwise(ticks)), default=1.0)
    close = min(1e-9, 1e-3 * apart)
    return next((n for n in range(6) if all(abs(round(t, n) - t) < close for t in ticks)), 6)


def number(value: float) -> str:
    """Three significant digits, thousands with commas, no exponent between 1e-4 and 1e9."""
    if value == 0:
        return "0"
    # What rounds to a thousand is one: three digits of it would be 1e+03.
    text = f"{value:,.0f}" if 999.5 <= abs(value) < 1e9 else f"{value:.3g}"
    return text.replace("-", "−") if "e" not in text else text


def figure(title: str, chart: str, note: str = "", *, whole_row: bool = False) -> str:
    """A chart with its caption; alone in its row of a grid if it is much wider than high."""
    small = f" <small>{escape(note)}</small>" if note else ""
    row = ' class="row"' if whole_row else ""
    return f"<figure{row}><figcaption>{escape(title)}{small}</figcaption>{chart}</figure>"


def line_class(color: int) -> str:
    """The CSS classes of a series' line."""
    again = " again" if color >= NUM_COLORS else ""
    return f"line k{color % NUM_COLORS}{again}"


def key(labels: Sequence[tuple[str, int]]) -> str:
    """Which line is whose, by label and color; once for all charts of a section."""
    items = "".join(
        f'<li><svg width="28" height="8" aria-hidden="true">'
        f'<line x1="0" y1="4" x2="28" y2="4" class="{line_class(color)}"/></svg>'
        f"{escape(label)}</li>"
        for label, color in labels
    )
    return f'<ul class="key">{items}</ul>'


def lines(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "step",
    to: float | None = None,
    limit: float | None = None,
    log_x: bool = False,
    names: bool = False,
    size: tuple[int, int] = (360, 190),
) -> str:
    """Lines over a common x axis, the last value of each written at its end where there are few.

    The y axis begins at 0 unless the values differ, by less than a sixth of the largest: then it fits them.

    Args:
        to: the y axis reaches at least this far.
        names: the label of each line stands at its end too.
        limit: a horizontal line, drawn if the values come near it or the axis reaches it.
        log_x: the x axis is logarithmic; every x must be above 0.
    """
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in [*one.points, *one.low, *one.high]]
    width, height = size
    low, high = min(ys), max(ys)
    # Less apart than a float32 tells: a level line, and not its last digit as a curve.
    flat = to is None and limit is None and 1e-5 * high < high - low < high / 6
    if low >= 0 and not flat:
        low = 0.0
    high = high if to is None else max(high, to)
    if high == low:
        high = low + (abs(low) or 1.0)
    near = limit is not None and (max(ys) > 0.5 * limit or low <= limit <= high)
    high = max(high, limit or 0.0) if near else high
    longest = max(len(one.label) for one in series) if names and len(series) <= MOST_NAMED else 0
    margin = 56 + min(7 * longest, 160)
    # On a logarithmic axis the first and the last point stand off the frame.
    room = 1.3 if log_x else 1.0
    x_scale = Scale(min(xs) / room, max(xs) * room, 46, width - margin, log=log_x)
    # Room above what is highest: a line at 100 % must not lie on the frame.
    y_scale = Scale(low, high, height - 30, 16)
    parts = [_axes(x_scale, y_scale, x_label)]
    if near:
        y = y_scale(limit or 0.0)
        parts.append(
            f'<line x1="{x_scale.start}" x2="{x_scale.end}" y1="{y}" y2="{y}" class="limit"/>'
        )
    # The best one last: no other line hides it.
    ordered = sorted(series, key=lambda one: one.points[-1][1])
    for one in ordered:
        color = one.color % NUM_COLORS
        if one.low and one.high:
            edge = [*one.high, *reversed(one.low)]
            corners = " ".join(f"{x_scale(x)},{y_scale(y)}" for x, y in edge)
            parts.append(f'<polygon points="{corners}" class="band f{color}"/>')
        path = " ".join(f"{x_scale(x)},{y_scale(y)}" for x, y in thin(one.points))
        words = f"<title>{escape(one.label)}</title>"
        best = " best" if names and len(series) > 1 and one is ordered[-1] else ""
        parts.append(f'<polyline points="{path}" class="rim"/>')
        parts.append(
            f'<polyline points="{path}" class="{line_class(one.color)}{best}">{words}</polyline>'
        )
        if len(one.points) == 1:
            x, y = one.points[0]
            parts.append(f'<circle cx="{x_scale(x)}" cy="{y_scale(y)}" r="3" class="f{color}"/>')
    digits = decimals(y_scale.ticks()) if low > 0 else 0
    parts += _last_values(series, x_scale, y_scale, names, digits)
    return svg(title, size, parts)


MOST_NAMED = 4
"""Lines of a chart that are labelled at their ends."""


def _last_values(
    series: Sequence[Series], x_scale: Scale, y_scale: Scale, names: bool, digits: int
) -> list[str]:
    """The last value of each line behind a dot of its color, moved apart where they would touch.

    A single point has it beside itself: a leader across the chart would look like a line.

    Args:
        digits: decimal places that a value has at least; on an axis that does not begin at 0.
    """
    if len(series) > MOST_NAMED:
        return []
    pitch = 17 if names else 13
    parts = []
    for single in (False, True):
        own = [one for one in series if (len(one.points) == 1) is single]
        ends = sorted(((y_scale(one.points[-1][1]), one) for one in own), key=lambda pair: pair[0])
        places = _apart([place for place, _ in ends], y_scale.start, pitch)
        for y, (place, one) in zip(places, ends, strict=True):
            end, value = x_scale(one.points[-1][0]), one.points[-1][1]
            x = end if single else x_scale.end + 8
            if not single:
                if y != place or end < x_scale.end:
                    ends_at = f'x1="{end}" y1="{place}" x2="{x}" y2="{y}"'
                    parts.append(f'<line {ends_at} class="leader"/>')
                parts.append(f'<circle cx="{x}" cy="{y}" r="3" class="f{one.color % NUM_COLORS}"/>')
            shown = number(value)
            shown = f"{value:.{digits}f}" if len(shown.partition(".")[2]) < digits else shown
            text = f"{escape(shortened(one.label, 22))} {shown}" if names else shown
            parts.append(f'<text x="{x + 7}" y="{y + 4}" class="ink">{text}</text>')
    return parts


def _apart(places: Sequence[float], bottom: float, pitch: float = 13) -> list[float]:
    """Ascending heights of labels, at least `pitch` apart and none below `bottom`."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + pitch) if moved else place)
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], bottom - pitch * (len(moved) - 1 - index))
    return moved


def areas(title: str, series: Sequence[Series]) -> str:
    """Shares that add up to one, stacked from below, each named with its last value in per cent.

    The colors are those of the quadrants, which no arm has.
    """
    size = (360, 190)
    xs = [x for x, _ in series[0].points]
    x_scale = Scale(min(xs), max(xs) if len(xs) > 1 else min(xs) + 1, 46, size[0] - 92)
    y_scale = Scale(0.0, 100.0, size[1] - 30, 10)
    parts, labels = [], []
    below: Points = [(x, 0.0) for x in xs]
    for one in series:
        pairs = zip(below, one.points, strict=True)
        above = [(x, low + 100 * share) for (x, low), (_, share) in pairs]
        corners = [*thin(above), *reversed(thin(below))]
        path = " ".join(f"{x_scale(x)},{y_scale(y)}" for x, y in corners)
        name = f"<title>{escape(one.label)}</title>"
        parts.append(f'<polygon points="{path}" class="area q{one.color}">{name}</polygon>')
        last = f"{one.label.partition(':')[0]} {per_cent(one.points[-1][1], 0)} %"
        labels.append((y_scale((above[-1][1] + below[-1][1]) / 2), last))
        below = above
    labels.sort()
    places = _apart([place for place, _ in labels], y_scale.start, 15)
    for y, (_, text) in zip(places, labels, strict=True):
        parts.append(f'<text x="{x_scale.end + 6}" y="{y + 4}" class="ink">{escape(text)}</text>')
    return svg(title, size, [_axes(x_scale, y_scale, "step"), *parts])


def thin(points: Points, limit: int = 240) -> Points:
    """At most `limit` points: the mean of each stretch, with the first and the last point kept."""
    if len(points) <= limit:
        return points
    size = math.ceil(len(points) / limit)
    inner = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in inner]
    return [points[0], *means[1:-1], points[-1]]


def _axes(x_scale: Scale, y_scale: Scale, x_label: str) -> str:
    left, bottom, right = x_scale.start, y_scale.start, x_scale.end
    parts = []
    ticks = y_scale.ticks()
    digits = decimals(ticks)
    alike = len({number(tick) for tick in ticks}) < len(ticks)
    for tick in ticks:
        y, shown = y_scale(tick), number(tick)
        # Below 1e-4 six places would be zeros.
        if (digits > 2 or alike) and tick and (digits < 6 or max(map(abs, ticks)) >= 1e-4):
            shown = f"{tick:.{digits}f}".replace("-", "−")
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y}" y2="{y}" class="axis"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{shown}</text>')
    for tick in x_scale.ticks(3):
        x = x_scale(tick)
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<text x="{right}" y="{bottom + 29}" text-anchor="end">{escape(x_label)}</text>')
    return "".join(parts)


def svg(title: str, size: tuple[int, int], parts: Sequence[str]) -> str:
    """An image of a size, named for screen readers."""
    width, height = size
    wide = ' class="wide"' if width > 400 else ""
    return (
        f'<svg{wide} viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
