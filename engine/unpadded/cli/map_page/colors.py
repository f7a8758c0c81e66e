"""A column as colors: a few categories, or steps between the least and the greatest number or day."""

from __future__ import annotations

import datetime
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

CATEGORIES = 12  # colors that can be told apart, the last of them for all other values
STEPS = 64  # of numbers
NONE = "(none)"


@dataclass(frozen=True, kw_only=True)
class Color:
    """What the page's legend says of a column."""

    name: str
    codes: np.ndarray  # [n] uint8: a category, or a step
    shown: list[str]  # [n], the value of each point
    labels: list[str]  # of the categories, or of the least and the greatest value
    counts: list[int] | None  # points of each category; None for numbers
    rest: int  # how many of the last codes are gray: for categories without a color of their own, and for no value


def color_points(column: Any, name: str) -> Color:
    """Numbers and days as steps, if there are more than a few; anything else as categories, the most common first."""
    values = column.to_pylist()
    shown = [NONE if value is None else str(value) for value in values]
    if len(set(shown)) > CATEGORIES and (numbers := _numbers(values)) is not None:
        return _steps(name, numbers, shown)
    counts = Counter(str(value) for value in values if value is not None)
    most_common = sorted(counts, key=lambda label: (-counts[label], label))
    own = most_common if len(counts) <= CATEGORIES else most_common[: CATEGORIES - 1]
    others = [f"{len(counts) - len(own):,} others"] if len(own) < len(counts) else []
    labels = [*own, *others, *([NONE] if None in values else [])]
    code_of = {label: code for code, label in enumerate(own)}
    codes = np.array(
        [
            len(labels) - 1 if value is None else code_of.get(label, len(own))
            for value, label in zip(values, shown, strict=True)
        ],
        np.uint8,
    )
    return Color(
        name=name,
        codes=codes,
        shown=shown,
        labels=labels,
        counts=np.bincount(codes).tolist(),
        rest=len(labels) - len(own),
    )


def _steps(name: str, numbers: np.ndarray, shown: list[str]) -> Color:
    known = np.isfinite(numbers)
    least, greatest = int(np.nanargmin(numbers)), int(np.nanargmax(numbers))
    span = numbers[greatest] - numbers[least]
    steps = np.where(known, (numbers - numbers[least]) / span * (STEPS - 1), STEPS)
    return Color(
        name=name,
        codes=np.round(steps).astype(np.uint8),
        shown=shown,
        labels=[shown[least], shown[greatest]],
        counts=None,
        rest=int(not known.all()),
    )


def _numbers(values: list[Any]) -> np.ndarray | None:
    """[n] fp64, NaN where there is none; None where a value is neither a number, a day, nor text that is a number."""
    numbers = [_number(value) for value in values]
    if None in numbers:
        return None
    array = np.array(numbers, np.float64)
    array[~np.isfinite(array)] = np.nan
    return array if np.nanmin(array, initial=np.inf) < np.nanmax(array, initial=-np.inf) else None


def _number(value: Any) -> float | None:
    if value is None:
        return math.nan
    if isinstance(value, datetime.datetime):
        return value.replace(tzinfo=value.tzinfo or datetime.UTC).timestamp()
    if isinstance(value, datetime.date):
        return float(value.toordinal())
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
