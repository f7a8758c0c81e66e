"""Ray Data: embed a dataset with one engine per actor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from ray.data import ActorPoolStrategy, Dataset

import unpadded
from unpadded.errors import InputError, OptionError
from unpadded.options import EncodeKeywords

# Rows per call of an actor, which are embedded again if it crashes: as many as the engine sorts by length at a time.
BATCH_ROWS = 4096


class UnpaddedEmbedder:
    """A class for `Dataset.map_batches` in the formats "pyarrow" and "numpy"; it adds columns to each batch.

    column: name of the column of texts. output: name of the column of vectors, fixed-size lists in the dtype of
    `precision`. tokens, truncated: names of the columns of token counts and of whether a text was truncated; None
    omits them. settings: the options of `unpadded.load` and of `Engine.encode`. int8 and uint8 require `ranges`,
    because a vector would otherwise depend on its batch.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        column: str = "text",
        output: str = "embedding",
        tokens: str | None = "tokens",
        truncated: str | None = "truncated",
        **settings: Any,
    ) -> None:
        self._column = column
        self._output_names = (output, tokens, truncated)
        self._options = {name: settings.pop(name) for name in EncodeKeywords.__annotations__ if name in settings}
        self._engine = unpadded.load(model, **settings)
        self._engine.stream((), **self._options)  # raises OptionError for wrong options

    def __call__(self, batch: pa.Table | Mapping[str, Any]) -> pa.Table | dict[str, Any]:
        """Return the batch with the columns added."""
        if not isinstance(batch, pa.Table | Mapping):
            raise OptionError(f"batches are {type(batch).__name__}, which is not supported; use batch_format='pyarrow'")
        is_table = isinstance(batch, pa.Table)
        columns = {name: batch[name] for name in (batch.column_names if isinstance(batch, pa.Table) else batch)}
        names = ", ".join(map(repr, columns))
        if self._column not in columns:
            raise InputError(f"no column {self._column!r}: the dataset has {names}; pass column= with one of them")
        texts = columns[self._column]
        embeddings = self._engine.embed(
            texts.to_pylist() if is_table else texts.tolist(), show_progress=False, **self._options
        )
        vectors = embeddings.vectors
        results = (
            pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1]),
            pa.array(embeddings.token_counts.astype(np.int32)),
            pa.array(embeddings.truncated),
        )
        for name, values in zip(self._output_names, results, strict=True):
            if name in columns:
                raise OptionError(
                    f"the dataset has a column {name!r} already (its columns: {names}); pass another name as output=, "
                    "tokens= or truncated="
                )
            if name is not None:
                columns[name] = values
        return pa.table(columns) if is_table else columns


def embed(
    dataset: Dataset,
    model: str | os.PathLike[str],
    *,
    actors: int | tuple[int, int | None] = (1, None),
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    **settings: Any,
) -> Dataset:
    """Return the dataset with the columns that an `UnpaddedEmbedder` with these settings adds.

    actors: their number, or the minimum and the maximum. num_cpus, num_gpus: resources per actor. If an actor crashes,
    it is restarted and its rows are embedded again; by default Ray Data does not limit the number of restarts.
    """
    min_actors, max_actors = (actors, actors) if isinstance(actors, int) else actors
    model = os.path.abspath(model) if os.path.exists(model) else model  # actors run in another folder
    return dataset.repartition(target_num_rows_per_block=BATCH_ROWS).map_batches(
        UnpaddedEmbedder,
        batch_size=BATCH_ROWS,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=min_actors, max_size=max_actors),
        fn_constructor_args=[model],
        fn_constructor_kwargs=settings,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
