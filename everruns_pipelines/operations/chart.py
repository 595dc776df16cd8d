"""A line chart as SVG in Markdown, which Dagster's UI shows in a materialization's metadata."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape

_WIDTH, _HEIGHT = 720, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 16, 28, 26


@dataclass(frozen=True)
class Line:
    """A number over time, with a title that says its unit."""

    title: str
    color: str
    values: Sequence[float]


def as_markdown(times: Sequence[datetime], lines: Sequence[Line]) -> str:
    """One chart under the other, over the same times, the oldest first. At least one time."""
    height = _HEIGHT * len(lines)
    panels = [_panel(times, line, number * _HEIGHT) for number, line in enumerate(lines)]
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}"'
        f' width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="12">'
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>{"".join(panels)}</svg>'
    )
    picture = b64encode(svg.encode()).decode()
    alternative = ", ".join(line.title for line in lines)
    return f"![{alternative}](data:image/svg+xml;base64,{picture})"


def _panel(times: Sequence[datetime], line: Line, top: int) -> str:
    highest = max(*line.values, 1.0)
    span = (times[-1] - times[0]).total_seconds() or 1.0
    floor = top + _HEIGHT - _BOTTOM
    points = [
        (
            _LEFT + (time - times[0]).total_seconds() / span * (_WIDTH - _LEFT - _RIGHT),
            floor - value / highest * (_HEIGHT - _TOP - _BOTTOM),
        )
        for time, value in zip(times, line.values, strict=True)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, y = points[-1]
    return (
        f'<text x="8" y="{top + 16}" font-weight="bold">{escape(line.title)}: '
        f"{line.values[-1]:,.0f}</text>"
        f'<text x="{_LEFT - 6}" y="{top + _TOP + 8}" text-anchor="end" fill="#666">'
        f"{highest:,.0f}</text>"
        f'<text x="{_LEFT - 6}" y="{floor}" text-anchor="end" fill="#666">0</text>'
        f'<path d="M{_LEFT} {floor}H{_WIDTH - _RIGHT}" stroke="#ccc"/>'
        f'<polyline points="{path}" fill="none" stroke="{line.color}" stroke-width="2"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{line.color}"/>'
        f'<text x="{_LEFT}" y="{floor + 16}" fill="#666">{times[0]:%F %R} UTC</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{floor + 16}" text-anchor="end" fill="#666">'
        f"{times[-1]:%F %R} UTC</text>"
    )
