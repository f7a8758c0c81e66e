"""The page: a template, its style and its script, and the points as data, all in one file that loads nothing."""

from __future__ import annotations

import base64
import html
import json
import re
from importlib.resources import files

import numpy as np

from unpadded.cli.map_page.colors import Color
from unpadded.cli.map_page.sample import Points

TEXT_LENGTH = 400  # characters of a text that a point shows
GRID = 65535  # places of points along the longer side


def make_page(title: str, points: Points, places: np.ndarray, color: Color | None) -> bytes:
    """UTF-8 of the page; no value of the points is read as HTML or as script."""
    data = {
        "ids": points.ids,
        "texts": None if points.texts is None else [_cut(text) for text in points.texts],
        "places": _encode(_on_grid(places).astype("<u2")),
        "color": None if color is None else _legend(color),
    }
    counts = f"{len(points.ids):,} texts, {points.dimensions:,} dimensions"
    if len(points.ids) < points.rows:
        counts = f"{len(points.ids):,} of {points.rows:,} texts, {points.dimensions:,} dimensions"
    folder = files("unpadded.cli.map_page")
    parts = {
        "title": html.escape(title),
        "counts": counts,
        "style": folder.joinpath("page.css").read_text(encoding="utf-8"),
        "script": folder.joinpath("page.js").read_text(encoding="utf-8"),
        # A script element ends at </script, whatever stands around it.
        "data": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = folder.joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], template).encode()


def _legend(color: Color) -> dict[str, object]:
    return {
        "name": color.name,
        "codes": _encode(color.codes),
        "shown": [_cut(value) for value in color.shown],
        "labels": [_cut(label) for label in color.labels],
        "counts": color.counts,
        "rest": color.rest,
    }


def _on_grid(places: np.ndarray) -> np.ndarray:
    """[n, 2] from 0 to GRID, centered, in equal steps both ways."""
    least, greatest = places.min(axis=0), places.max(axis=0)
    span = float((greatest - least).max()) or 1.0
    grid: np.ndarray = np.round(((places - (least + greatest) / 2) / span + 0.5) * GRID)
    return grid


def _encode(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_LENGTH else f"{text[:TEXT_LENGTH]}…"
