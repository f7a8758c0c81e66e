"""Vectors of a Parquet file or dataset as a page with a map of them, in two dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unpadded.bulk.atomic_files import atomic_file
from unpadded.cli.map_page.colors import color_points
from unpadded.cli.map_page.page import make_page
from unpadded.cli.map_page.projection import import_umap, project
from unpadded.cli.map_page.sample import EMBEDDING, read_sample
from unpadded.errors import OptionError

SAMPLE = 100_000  # points that a browser draws at once


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What `write_map` wrote."""

    path: Path
    points: int
    rows: int  # of the source


def write_map(
    source: str,
    output: str | None = None,
    *,
    vector_column: str = EMBEDDING,
    text_column: str | None = None,
    color_column: str | None = None,
    sample: int = SAMPLE,
) -> Drawn:
    """Write a self-contained HTML page with a point for each of at most `sample` rows, drawn at random.

    Equal input gives an equal page. text_column: what a point shows; None takes `text` or else the first column of
    strings. output: None writes beside the source, under its name.
    """
    name = Path(source).resolve().name.removesuffix(".parquet")
    path = Path(source).parent / f"{name}.html" if output is None else Path(output)
    if path.suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"the map is a page: {str(path)!r}; give a name that ends in .html")
    if sample < 1:
        raise OptionError(f"--sample is not positive: {sample}; pass the number of points, such as {SAMPLE}")
    import_umap()
    points = read_sample(
        source, vector_column=vector_column, text_column=text_column, color_column=color_column, sample=sample
    )
    color = None if points.colors is None else color_points(points.colors, str(color_column))
    page = make_page(name, points, project(points.vectors), color)
    final = path.resolve()
    with atomic_file(final, final.with_name(f".{final.name}.tmp"), str(path)) as file:
        file.write(page)
    return Drawn(path=path, points=len(points.ids), rows=points.rows)
