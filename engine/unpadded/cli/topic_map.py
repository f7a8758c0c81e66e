"""A corpus in two dimensions: UMAP places the texts, HDBSCAN finds clusters, Plotly draws them."""

from __future__ import annotations

import html
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from unpadded.bulk.file_output import import_pyarrow
from unpadded.errors import InputError, OptionError, install_command

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import pyarrow as pa

NEIGHBORS = 15  # UMAP's default
CLUSTERED_POINTS = 20_000  # HDBSCAN is quadratic; the remaining points join the cluster of their nearest neighbor
MIN_CLUSTER = 20
MAX_CLUSTERS = 60
TOPIC_WORDS = 2
STEM = 4  # letters
MAX_LABELS = 20  # topics written on the map
MAX_CATEGORIES = 20  # of --color-column; the rest is drawn as "other"
HOVER_CHARACTERS = 300
MARKER = {"size": 5, "opacity": 0.7}
# The page follows the system's light or dark scheme; Plotly writes its colors into the elements, hence !important.
STYLE = """<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>
:root { color-scheme: light dark }
html, body { margin: 0; height: 100%; background: Canvas }
@media (prefers-color-scheme: dark) {
  .infolayer text, .colorbar text { fill: #eee !important }
  .annotation rect.bg { fill: #222 !important }
}
</style>"""


@dataclass(frozen=True, kw_only=True)
class Points:
    """A random sample of the rows of a Parquet file or dataset."""

    total_rows: int  # of the source
    vectors: np.ndarray  # [n, dimensions] fp32
    texts: np.ndarray  # [n] str objects
    colors: pa.ChunkedArray | None  # [n]


def import_umap() -> Any:
    """Return the module; OptionError when a package of the extra is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # umap warns that TensorFlow is not installed
            import plotly  # noqa: F401
            import sklearn  # noqa: F401
            import umap
    except ImportError as error:
        raise OptionError(f"{error.name} is not installed: a map needs it; {install_command('map')}") from error
    return umap


def read_points(source: str, vectors: str, texts: str, colors: str | None, sample: int) -> Points:
    """Read at most `sample` random rows of these columns, the same ones at each call."""
    import_pyarrow(f"reading {source!r}")
    import pyarrow as pa
    import pyarrow.dataset

    if not os.path.exists(source):
        raise InputError(f"the vectors do not exist: {source!r}; pass a .parquet file or a folder of them")
    try:
        options = pyarrow.dataset.ParquetFragmentScanOptions(page_checksum_verification=True)
        parquet = pyarrow.dataset.ParquetFileFormat(default_fragment_scan_options=options)
        dataset = pyarrow.dataset.dataset(source, format=parquet)
        names = dataset.schema.names
        if not names:
            raise InputError(f"the folder has no .parquet: {source!r}; pass a folder that unpadded embed wrote")
        columns = [name for name in (vectors, texts, colors) if name is not None]
        for name in (name for name in columns if name not in names):
            remedy = "embed with --carry text, or pass --text-column" if name == texts else "use one of them"
            raise OptionError(f"no column {name!r} in {source!r}, which has {', '.join(map(repr, names))}; {remedy}")
        total_rows = dataset.count_rows()
        if not total_rows:
            raise InputError(f"{source!r} has 0 rows; embed some texts")
        chosen = np.random.default_rng(0).choice(total_rows, min(total_rows, sample), replace=False)
        table = dataset.take(np.sort(chosen), columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"the vectors cannot be read: {source!r} ({error}); write them again") from error
    field = dataset.schema.field(vectors)
    precision = (field.metadata or {}).get(b"precision", b"").decode()
    return Points(
        total_rows=total_rows,
        vectors=_to_float(_matrix(source, field, table[vectors]), precision),
        texts=np.array(["" if text is None else str(text) for text in table[texts].to_pylist()], object),
        colors=None if colors is None else table[colors],
    )


def _matrix(source: str, field: Any, column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of lists as [rows, width], in the dtype that is stored."""
    import pyarrow.compute as pc

    lists = str(field.type).startswith(("list", "large_list", "fixed_size_list"))
    values = pc.list_flatten(column).to_numpy() if lists else np.empty(0, object)
    if values.dtype.kind not in "fiu":
        raise OptionError(f"not a column of vectors: {field.name!r} of {source!r} is {field.type}; use another")
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) != 1 or not lengths[0]:
        raise InputError(f"the vectors of {source!r} differ in length: {lengths!r:.80}; embed the texts again")
    rows: np.ndarray = values.reshape(len(column), -1)
    if broken := int((~np.isfinite(rows).all(axis=1)).sum()):
        raise InputError(f"{broken} vectors of {source!r} are not finite; embed the texts again")
    return rows


def _to_float(stored: np.ndarray, precision: str) -> np.ndarray:
    """Return fp32 vectors with the directions that quantized ones stand for."""
    if precision in ("binary", "ubinary"):
        packed = stored.astype(np.int16) + (128 if precision == "binary" else 0)
        return np.unpackbits(packed.astype(np.uint8), axis=1).astype(np.float32) * 2 - 1
    return stored.astype(np.float32) - (128 if stored.dtype == np.uint8 else 0)


def project(vectors: np.ndarray) -> np.ndarray:
    """Project [n, dimensions] to [n, 2] by UMAP with cosine distance; seeded, so equal vectors give equal positions."""
    if len(vectors) <= 3:  # too few for UMAP
        return np.stack([np.arange(len(vectors)), np.zeros(len(vectors))], axis=1)
    model = import_umap().UMAP(n_neighbors=min(NEIGHBORS, len(vectors) - 1), metric="cosine", random_state=0, n_jobs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about graphs that are not connected
        positions: np.ndarray = model.fit_transform(vectors)
    return positions


def find_clusters(positions: np.ndarray) -> np.ndarray:
    """Return the cluster of each of [n, 2] positions, -1 for none. Clusters are numbered from the largest."""
    from sklearn.cluster import HDBSCAN
    from sklearn.neighbors import KNeighborsClassifier

    first = positions[:: -(-len(positions) // CLUSTERED_POINTS)]
    size = max(MIN_CLUSTER, len(first) // MAX_CLUSTERS)
    if len(first) < 2 * size:
        return np.full(len(positions), -1)
    # "leaf" finds the many small topics of a corpus, where the default merges them into one
    labels = HDBSCAN(size, min_samples=5, cluster_selection_method="leaf", copy=True).fit_predict(first)
    if len(first) < len(positions):
        labels = KNeighborsClassifier(1).fit(first, labels).predict(positions)
    order = [label for label in np.argsort(-np.bincount(labels + 1))[: labels.max() + 2] - 1 if label >= 0]
    numbers = np.full(labels.max() + 2, -1)
    numbers[order] = np.arange(len(order))  # the last entry stays -1, which is where label -1 points
    renumbered: np.ndarray = numbers[labels]
    return renumbered


def topic_words(texts: np.ndarray, clusters: np.ndarray) -> list[str]:
    """Name each cluster by the words of largest class-based TF-IDF (Grootendorst, arXiv 2203.05794, equation 2)."""
    from sklearn.feature_extraction.text import CountVectorizer

    documents = [" ".join(texts[clusters == cluster]) for cluster in range(clusters.max() + 1)]
    vectorizer = CountVectorizer(stop_words="english", token_pattern=r"(?u)\b[^\W\d_]{3,}\b", max_features=50_000)
    try:
        counts = vectorizer.fit_transform(documents).toarray()
    except ValueError:  # no cluster, or no words in any
        return [f"cluster {cluster + 1}" for cluster in range(len(documents))]
    words = vectorizer.get_feature_names_out()
    frequencies = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    weights = frequencies * np.log1p(counts.sum() / len(documents) / counts.sum(axis=0))
    ranked = (words[np.argsort(-row, kind="stable")[: np.count_nonzero(row)]] for row in weights)
    return [", ".join(_distinct(words)) or f"cluster {cluster + 1}" for cluster, words in enumerate(ranked)]


def _distinct(words: Iterable[str]) -> list[str]:
    """Return the first words that do not begin alike, such as "generator" and "generators"."""
    by_stem: dict[str, str] = {}
    for word in words:
        if len(by_stem) == TOPIC_WORDS:
            break
        by_stem.setdefault(word[:STEM], word)
    return list(by_stem.values())


def draw(points: Points, title: str, color_column: str | None) -> str:
    """Return the page as HTML that loads nothing."""
    import plotly.graph_objects as go

    positions = project(points.vectors)
    clusters = find_clusters(positions)
    topics = topic_words(points.texts, clusters)
    figure = go.Figure(layout=_layout(title))
    if points.colors is None:
        names = np.array([*topics, "no cluster"], object)[clusters]
        _add_groups(figure, positions, points.texts, names, [*topics, "no cluster"])
    else:
        _add_colors(figure, positions, points.texts, points.colors, str(color_column))
    for cluster, topic in enumerate(topics[:MAX_LABELS]):
        x, y = np.median(positions[clusters == cluster], axis=0)
        figure.add_annotation(x=x, y=y, text=_escape(topic), showarrow=False, bgcolor="white", opacity=0.85)
    page: str = figure.to_html(
        config={"responsive": True, "displayModeBar": False, "scrollZoom": True}, default_height="100vh"
    )
    return page.replace("<head>", "<head>" + STYLE.replace("{title}", _escape(title)), 1)


def _layout(title: str) -> dict[str, Any]:
    axis = {"visible": False}
    transparent = {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}
    legend = {"orientation": "h", "y": 0, "yanchor": "top", "itemsizing": "constant", "maxheight": 0.2}
    legend |= {"font": {"size": 11}}
    margin = {"l": 10, "r": 10, "t": 50, "b": 10}
    layout = {"title": _escape(title), "xaxis": axis, "yaxis": axis, "legend": legend, "margin": margin}
    return layout | transparent | {"dragmode": "pan", "hovermode": "closest", "template": "plotly"}


def _add_groups(
    figure: go.Figure, positions: np.ndarray, texts: np.ndarray, names: np.ndarray, order: Sequence[str]
) -> None:
    """Add one trace per name, so that the legend filters."""
    for name in dict.fromkeys(order):
        chosen = names == name
        color = {"color": "#999"} if name in ("no cluster", "other", "none") else {}
        if chosen.any():
            _add_trace(figure, positions[chosen], texts[chosen], f"{name} ({chosen.sum():,})", color)


def _add_colors(
    figure: go.Figure, positions: np.ndarray, texts: np.ndarray, colors: pa.ChunkedArray, title: str
) -> None:
    """Color numbers and dates by a scale, and anything else by its most frequent values."""
    import pyarrow as pa

    is_date = pa.types.is_temporal(colors.type)
    is_number = pa.types.is_floating(colors.type) or pa.types.is_integer(colors.type)
    if is_date:
        colors = colors.cast("timestamp[s]").cast("int64")
    values = np.array(["none" if value is None else str(value) for value in colors.to_pylist()], object)
    unique, counts = np.unique(values, return_counts=True)
    if len(unique) > MAX_CATEGORIES and (is_date or is_number):
        numbers = colors.cast("float64").to_numpy()
        bar: dict[str, Any] = {"title": _escape(title)}
        if is_date:
            ticks = np.linspace(np.nanmin(numbers), np.nanmax(numbers), 5)
            bar |= {"tickvals": ticks, "ticktext": [str(np.datetime64(int(tick), "s"))[:10] for tick in ticks]}
        _add_trace(figure, positions, texts, title, {"color": numbers, "colorscale": "Viridis", "colorbar": bar})
        figure.update_layout(showlegend=False)
        return
    common = list(unique[np.argsort(-counts, kind="stable")][:MAX_CATEGORIES])
    names = np.array([value if value in common else "other" for value in values], object)
    _add_groups(figure, positions, texts, names, [*common, "other"])


def _add_trace(figure: go.Figure, positions: np.ndarray, texts: np.ndarray, name: str, marker: dict[str, Any]) -> None:
    shown = [_hover_text(text) for text in texts]
    figure.add_scattergl(
        x=positions[:, 0].round(3),
        y=positions[:, 1].round(3),
        mode="markers",
        name=_escape(name),
        hovertext=shown,
        hoverinfo="text",
        marker=MARKER | marker,
    )


def _escape(text: str) -> str:
    """Return text as Plotly, which reads a subset of HTML, shows it unchanged."""
    return html.escape(text, quote=False)


def _hover_text(text: str) -> str:
    """Return the beginning of a text in lines of 60 characters, with HTML escaped."""
    cut = text if len(text) <= HOVER_CHARACTERS else text[:HOVER_CHARACTERS] + "…"
    return "<br>".join(_escape(cut[start : start + 60]) for start in range(0, len(cut), 60))
