"""Charts with one row per label: dots with intervals, and bars."""

from collections.abc import Sequence

from taopd.report.charts import NUM_COLORS, Scale, number, svg
from taopd.report.text import escape, shortened


def intervals(
    title: str,
    rows: Sequence[tuple[str, float, float | None, float | None]],
    *,
    x_label: str,
    reference: float | None = None,
    colors: Sequence[int] = (),
) -> str:
    """One row per label: a dot at the value, a line over its interval; hollow without one.

    Args:
        colors: of the rows; default: all the first one.
    """
    width, height = 460, 30 * len(rows) + 44
    values = [v for _, *numbers in rows for v in numbers if v is not None]
    values += [] if reference is None else [reference]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low or 1.0)
    scale = Scale(low - margin, high + margin, 178, width - 14)
    parts = []
    for tick in scale.ticks(5):
        x = scale(tick)
        parts.append(f'<line x1="{x}" x2="{x}" y1="4" y2="{height - 38}" class="axis"/>')
        parts.append(f'<text x="{x}" y="{height - 22}" text-anchor="middle">{number(tick)}</text>')
    if reference is not None:
        x = scale(reference)
        parts.append(f'<line x1="{x}" x2="{x}" y1="0" y2="{height - 38}" class="limit"/>')
    for index, (label, value, start, end) in enumerate(rows):
        y = 20 + 30 * index
        color = colors[index] % NUM_COLORS if colors else 0
        parts.append(
            f'<text x="168" y="{y + 4}" text-anchor="end" class="ink">{escape(shortened(label, 22))}'
            f"<title>{escape(label)}</title></text>"
        )
        if start is not None and end is not None:
            ends = f'x1="{scale(start)}" x2="{scale(end)}" y1="{y}" y2="{y}"'
            parts.append(f'<line {ends} class="line k{color} solid"/>')
            parts.append(f'<circle cx="{scale(value)}" cy="{y}" r="4.5" class="f{color}"/>')
        else:
            dot = f'cx="{scale(value)}" cy="{y}" r="4"'
            parts.append(f'<circle {dot} fill="none" class="line k{color} solid"/>')
    parts.append(
        f'<text x="{width - 14}" y="{height - 4}" text-anchor="end">{escape(x_label)}</text>'
    )
    return svg(title, (width, height), parts)


def bars(
    title: str,
    rows: Sequence[tuple[str, float, str]],
    *,
    labels: int = 120,
    reference: float | None = None,
    colors: Sequence[int] = (),
) -> str:
    """Horizontal bars from 0, to the left where negative; label in `labels` pixels, words on the right.

    Args:
        reference: a vertical line at this value.
        colors: of the bars; default: all the first one.
    """
    # The words stay inside, also where a narrow screen makes the letters of a wide chart larger.
    longest = max((len(words) for *_, words in rows), default=0)
    room = max(146, (9 if labels > 160 else 7) * longest + 8)
    width, height = labels + 94 + room, 24 * len(rows) + 6
    values = [0.0, reference or 0.0, *(value for _, value, _ in rows)]
    least, largest = min(values), max(values)
    scale = Scale(least, largest if largest > least else 1.0, labels, width - room)
    zero = scale(0.0)
    parts = []
    for index, (label, value, words) in enumerate(rows):
        y = 4 + 24 * index
        color = colors[index] % NUM_COLORS if colors else 0
        short = shortened(label, labels // 7)
        parts.append(
            f'<text x="{labels - 8}" y="{y + 13}" text-anchor="end" class="ink">{escape(short)}</text>'
        )
        size = max(1.0, abs(scale(value) - zero))
        begin = zero if value >= 0 else zero - size
        parts.append(
            f'<rect x="{begin:.1f}" y="{y + 2}" width="{size:.1f}" height="14" rx="2" class="f{color}"/>'
        )
        end = max(begin + size, scale(reference or 0.0))
        parts.append(f'<text x="{end + 6:.1f}" y="{y + 13}">{escape(words)}</text>')
    if reference is not None:
        x = scale(reference)
        parts.append(f'<line x1="{x}" x2="{x}" y1="2" y2="{height - 2}" class="limit"/>')
    return svg(title, (width, height), parts)
