"""Bar and line charts of benchmark results, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

WIDTH, BAR, HEIGHT = 9, 0.22, 4.5  # inches: of a figure, of one bar with its gap, of a line chart


def bar_chart(title: str, groups: Mapping[str, Mapping[str, float]], label: str = "{:,.0f}") -> Figure:
    """Draw horizontal bars, one group per key; a name has the same color in every group.

    label: format of the value written at the end of its bar.
    """
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    rows = sum(len(values) + 1.5 for values in groups.values())  # a group's title and the gap below it take 1.5 bars
    figure = Figure(figsize=(WIDTH, BAR * rows + 1), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    place, ticks = 0.0, {}
    for group, values in groups.items():
        axes.text(0, place, f" {group}", weight="bold", verticalalignment="center")
        for name, value in values.items():
            place += 1
            ticks[place] = name
            bar = axes.barh(place, value, color=f"C{names.index(name)}")
            axes.bar_label(bar, [label.format(value)], padding=4)
        place += 1.5
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_xticks([])
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


def line_chart(title: str, series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> Figure:
    """Draw one line per name through its (x, y) points; x is logarithmic, y starts at 0."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    for name, points in series.items():
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({x for points in series.values() for x, _ in points}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the file's ending; an SVG has the same bytes each time."""
    with matplotlib.rc_context({"svg.hashsalt": "unpadded", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
