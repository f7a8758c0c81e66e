"""The results of a job: one vector per text, or spans, sparse weights or token vectors, of which a text has many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from unpadded.engine import Engine
    from unpadded.execution.batcher import Rows
    from unpadded.execution.pipeline import Advance
    from unpadded.tokenization.windows import Window

RESULT_COLUMNS = {  # of a Parquet output, by the kind of result
    "vectors": ("id", "embedding", "tokens", "truncated"),
    "spans": ("id", "embedding", "start", "end", "tokens"),
    "sparse": ("id", "ids", "weights", "tokens", "truncated"),
    "tokens": ("id", "vectors", "tokens", "truncated"),
}


@dataclass(frozen=True)
class Ragged:
    """Values of consecutive texts: those of text i are array[offsets[i] : offsets[i + 1]] of each array."""

    arrays: tuple[np.ndarray, ...]  # [values] or [values, dimensions]
    offsets: np.ndarray  # [texts + 1] int64

    def __getitem__(self, texts: slice) -> Ragged:
        first, stop, _ = texts.indices(len(self.offsets) - 1)
        offsets = self.offsets[first : max(first, stop) + 1]
        return Ragged(tuple(array[offsets[0] : offsets[-1]] for array in self.arrays), offsets - offsets[0])


# Of consecutive texts: np.ndarray [texts, dimensions] or Ragged, token counts [texts] int64, truncated [texts] bool.
Results: TypeAlias = tuple[Any, np.ndarray, np.ndarray]


def stream_results(
    engine: Engine, kind: str, texts: Iterable[str], show: bool | Advance | None, options: dict[str, Any]
) -> Iterator[Results]:
    """Yield the results of consecutive texts; those of no text if there are none.

    options: those of `Engine.stream`, `encode_spans`, `encode_sparse` or `encode_tokens`. show: as in `stream`.
    """
    found = False
    if kind == "vectors":
        for block in engine.stream(texts, show_progress=show, **options):
            found = True
            yield block.vectors, block.token_counts, block.truncated
        if not found:
            empty = engine.embed([], show_progress=False, **options)
            yield empty.vectors, empty.token_counts, empty.truncated
        return
    pipeline, rest = engine._pipeline, dict(options)
    if kind == "spans":
        plan = pipeline.span_plan((rest.pop("span_tokens"), rest.pop("overlap")), **rest)
    elif kind == "sparse":
        top_k = rest.pop("top_k")
        plan = pipeline.sparse_plan(**rest)
    else:
        plan, reduce = pipeline.token_plan(**rest)

    def collect(done: Sequence[tuple[Window, Rows]], first: int = 0, texts: int = 0) -> Ragged:
        if kind == "spans":
            spans = pipeline.collect_spans(done, plan)
            counts = np.bincount(spans.text_index - first, minlength=texts)
            arrays = (spans.vectors, spans.bounds[:, 0], spans.bounds[:, 1], spans.token_counts)
            return Ragged(arrays, np.append(0, np.cumsum(counts)))
        if kind == "sparse":
            sparse = pipeline.sparse(done, plan, top_k)
            return Ragged((sparse.ids, sparse.weights), sparse.indptr)
        tokens = pipeline.collect_tokens(done, plan, reduce)
        return Ragged((tokens.vectors,), tokens.offsets)

    for window, rows in engine._windows(texts, plan, show):
        found = True
        values = collect([(window, rows)], window.first_index, len(window.token_counts))
        yield values, window.token_counts, window.truncated
    if not found:
        yield collect([]), np.zeros(0, np.int64), np.zeros(0, bool)


def arrow_columns(
    kind: str, parts: Sequence[Any], token_counts: np.ndarray, truncated: np.ndarray
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Return the columns of results as Arrow arrays, and for spans the index of each row's text."""
    import pyarrow as pa

    def fixed(array: np.ndarray) -> Any:
        values = pa.array(array.reshape(-1))
        return values if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(values, array.shape[1])

    per_text = {"tokens": pa.array(token_counts, pa.int32()), "truncated": pa.array(truncated)}
    if kind == "vectors":
        return {"embedding": fixed(np.concatenate(parts))} | per_text, None
    columns = [fixed(np.concatenate(arrays)) for arrays in zip(*(part.arrays for part in parts), strict=True)]
    counts = np.concatenate([np.diff(part.offsets) for part in parts])
    if kind == "spans":
        columns[-1] = columns[-1].cast(pa.int32())
        return dict(zip(RESULT_COLUMNS[kind][1:], columns, strict=True)), np.repeat(np.arange(len(counts)), counts)
    offsets = pa.array(np.append(0, np.cumsum(counts)), pa.int32())
    lists = [pa.ListArray.from_arrays(offsets, column) for column in columns]
    return dict(zip(RESULT_COLUMNS[kind][1:-2], lists, strict=True)) | per_text, None
