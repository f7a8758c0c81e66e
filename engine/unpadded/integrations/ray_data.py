"""Ray Data: an engine an actor, over the blocks of a dataset."""

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

# Rows that an actor takes at once, and loses when it dies: as many texts as an engine looks at together.
BATCH_ROWS = 4096


class UnpaddedEmbedder:
    """For `Dataset.map_batches`, in the formats "pyarrow" and "numpy": adds columns to every batch.

    column: the texts. output: the name of the vectors, fixed-size lists in the dtype of `precision`; tokens and
    truncated: the names of what `Engine.embed` says beside them, None to leave one out. settings: the options
    of `unpadded.load` and of `Engine.encode`. int8 and uint8 require `ranges`, because a vector would otherwise depend
    on its batch.
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
        self._names = (output, tokens, truncated)
        self._options = {name: settings.pop(name) for name in EncodeKeywords.__annotations__ if name in settings}
        self._engine = unpadded.load(model, **settings)
        self._engine.stream((), **self._options)  # checks them

    def __call__(self, batch: pa.Table | Mapping[str, Any]) -> pa.Table | dict[str, Any]:
        if not isinstance(batch, pa.Table | Mapping):
            raise OptionError(f"the batches are of a wrong format: {type(batch).__name__}; use batch_format='pyarrow'")
        columns = dict(zip(batch.column_names, batch.columns, strict=True)) if isinstance(batch, pa.Table) else batch
        given = ", ".join(map(repr, columns))
        if self._column not in columns:
            raise InputError(f"no column {self._column!r}: the dataset has {given}; name one of them with column=")
        texts = columns[self._column]
        found = self._engine.embed(
            texts.to_pylist() if isinstance(batch, pa.Table) else texts.tolist(), show_progress=False, **self._options
        )
        values = (_fixed_size_lists(found.vectors), found.token_counts.astype(np.int32), found.truncated)
        added = {name: pa.array(value) for name, value in zip(self._names, values, strict=True) if name is not None}
        for name in added.keys() & columns.keys():
            raise OptionError(f"a column would be there twice: {name!r} beside {given}; name the new ones otherwise")
        return pa.table({**columns, **added}) if isinstance(batch, pa.Table) else {**columns, **added}


def embed(
    dataset: Dataset,
    model: str | os.PathLike[str],
    *,
    actors: int | tuple[int, int | None] = (1, None),
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    **settings: Any,
) -> Dataset:
    """The dataset with the columns of an `UnpaddedEmbedder`, whose settings these are.

    actors: their number, or the least and the most; num_cpus and num_gpus: what each holds. An actor that dies is
    started again and its rows are embedded again: Ray Data does so without a limit unless it is told otherwise.
    """
    least, most = (actors, actors) if isinstance(actors, int) else actors
    model = os.path.abspath(model) if os.path.exists(model) else model  # actors run in another folder
    return dataset.repartition(target_num_rows_per_block=BATCH_ROWS).map_batches(
        UnpaddedEmbedder,
        batch_size=BATCH_ROWS,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=least, max_size=most),
        fn_constructor_args=[model],
        fn_constructor_kwargs=settings,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )


def _fixed_size_lists(vectors: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
