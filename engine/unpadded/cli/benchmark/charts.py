"""Plots as SVG, small and the same for the same figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

COLORS = ("#0b6e99", "#d9730d", "#6b7280", "#4d9f57", "#9065b0", "#c14c8a", "#8a6d3b", "#2f3e4e")
WIDTH, LEFT, RIGHT, LINE = 760, 190, 70, 18  # pixels; LINE: of text
STYLE = "font:12px sans-serif;fill:#333"


def bars(title: str, groups: Mapping[str, Mapping[str, float]], form: str = "{:,.0f}") -> str:
    """Horizontal bars, a group of them for each key; a name has one color in all groups. form: of a value."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    most = max(value for group in groups.values() for value in group.values())
    body, y = [], 2 * LINE
    for group, values in groups.items():
        body.append(_text(8, y + 13, group, weight="bold"))
        for name, value in values.items():
            y += LINE
            width = (WIDTH - LEFT - RIGHT) * value / most
            body.append(_text(LEFT - 8, y + 13, name, anchor="end"))
            body.append(
                f'<rect x="{LEFT}" y="{y + 2}" width="{width:.1f}" height="{LINE - 4}" fill="{_color(names, name)}"/>'
            )
            body.append(_text(LEFT + width + 6, y + 13, form.format(value)))
        y += LINE + 8
    return _svg(title, y, body)


def lines(title: str, series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """A line a name through its (x, y); x doubles from tick to tick, y starts at 0."""
    points = [point for line in series.values() for point in line]
    xs = sorted({x for x, _ in points})
    low, high, most = math.log2(min(xs)), math.log2(max(xs)), max(y for _, y in points)
    top, bottom, left, right = 3 * LINE, 300, 80, WIDTH - 250

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - low) / (high - low) if high > low else 0.5
        return left + across * (right - left), bottom - y / most * (bottom - top)

    body = [f'<path d="M{left},{top}V{bottom}H{right}" fill="none" stroke="#999"/>']
    body += [_text(place(x, 0)[0], bottom + LINE, f"{x:,.0f}", anchor="middle") for x in xs]
    body += [_text(left - 6, place(xs[0], y)[1] + 4, f"{y:,.0f}", anchor="end") for y in (most / 2, most)]
    body += [_text((left + right) / 2, bottom + 2 * LINE, x_label, anchor="middle"), _text(8, top - 10, y_label)]
    for index, (name, line) in enumerate(series.items()):
        at = [place(x, y) for x, y in sorted(line)]
        color = COLORS[index % len(COLORS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        body.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in at]
        body.append(f'<rect x="{right + 20}" y="{top + index * LINE}" width="12" height="12" fill="{color}"/>')
        body.append(_text(right + 38, top + index * LINE + 11, name))
    return _svg(title, max(bottom + 3 * LINE, top + len(series) * LINE), body)


def _color(names: Sequence[str], name: str) -> str:
    return COLORS[names.index(name) % len(COLORS)]


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _svg(title: str, height: float, body: Iterable[str]) -> str:
    """The whole file, on white so that it reads on a dark page too."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" style="{STYLE}">'
    white = '<rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([head, white, _text(8, 16, title, weight="bold"), *body, "</svg>"]) + "\n"
