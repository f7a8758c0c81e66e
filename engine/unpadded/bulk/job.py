"""A job: rows of files through the engine into a file or a dataset, and what came of it."""

from __future__ import annotations

import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from unpadded.bulk.dataset_output import PART_ROWS, Dataset, open_dataset
from unpadded.bulk.file_output import OUTPUT_ENDINGS, Single, import_pyarrow, open_single, output_ending
from unpadded.bulk.manifest import describe_run
from unpadded.bulk.progress import Meter, Metered
from unpadded.bulk.readers import (
    DEFAULT_COLUMN,
    STDIN,
    TABLES,
    Place,
    Row,
    column_types,
    ending,
    expand_inputs,
    is_gzip,
    read_rows,
)
from unpadded.bulk.writers import OWN_COLUMNS, Block, Columns
from unpadded.errors import InputError, OptionError

if TYPE_CHECKING:
    from unpadded.engine import Engine

NO_COLUMNS = Columns()
PROCESS = Path("/proc/self/status")
PADDED_BATCH = 32  # texts that a padding engine takes together, in the order of the input


@dataclass(frozen=True, kw_only=True)
class Job:
    """Files in, files out. `make_job` checks it."""

    inputs: tuple[str, ...]  # files, and - for standard input
    output: str | None = None  # a file, a folder of Parquet parts, or None for JSON lines on stdout
    column: str = DEFAULT_COLUMN
    columns: Columns = NO_COLUMNS
    on_error: Literal["raise", "skip"] = "raise"
    part_rows: int = PART_ROWS
    resume: bool = False


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What one run did; `seconds` leaves the loading of the model out, `resumed` is what earlier runs had done."""

    texts: int
    tokens: int
    truncated: int
    skipped: int
    resumed: int
    padding_avoided: float  # share of the tokens of padded batches in the order of the input
    seconds: float


def make_job(
    inputs: Sequence[str],
    *,
    output: str | None = None,
    column: str | None = None,
    id_column: str | None = None,
    carry: Sequence[str] = (),
    on_error: Literal["raise", "skip"] = "raise",
    part_rows: int | None = None,
    resume: bool = False,
) -> Job:
    """Raise for what would only fail after the model is loaded."""
    files = expand_inputs(inputs)
    dataset = is_dataset(output)
    columns = Columns(id_column, tuple(carry))
    if output is not None and not dataset and output_ending(output) not in OUTPUT_ENDINGS:
        raise OptionError(
            f"the output has an unknown ending: {output!r}; use one of {', '.join(OUTPUT_ENDINGS)}, or a folder as "
            f"{output + '/'!r}"
        )
    if not dataset and (resume or part_rows is not None):
        flag = "--resume" if resume else "--part-rows"
        raise OptionError(f"{flag} is for a dataset, not for {output or 'stdout'!r}; give a folder as -o vectors/")
    if part_rows is not None and part_rows < 1:
        raise OptionError(f"--part-rows is not positive: {part_rows}; pass the rows of a part, such as {PART_ROWS}")
    if output is None and on_error == "skip":
        raise OptionError("--on-error skip has no place for what it skips on 'stdout'; give an output with -o")
    if output is not None:
        _check_apart(inputs, files, output)
    if resume and STDIN in files:
        raise OptionError("--resume cannot read standard input again: '-'; give a file")
    if column is not None and not any(ending(name) in TABLES for name in files):
        raise OptionError(f"--column {column!r} was given, but no input is .jsonl, .csv or .parquet; leave it out")
    if dataset or (output is not None and output_ending(output) == ".parquet"):
        import_pyarrow(f"writing {output!r}")
    for name in files:
        if ending(name) == ".parquet":
            if is_gzip(name):
                raise InputError(f"a gzipped Parquet file cannot be read in pieces: {name!r}; unzip it")
            import_pyarrow(f"reading {name!r}")
    if columns.beside:
        _check_columns(files, columns, output, dataset)
        columns = columns._replace(types=tuple(column_types(files, columns.beside)))
    return Job(
        inputs=tuple(files),
        output=output,
        column=column or DEFAULT_COLUMN,
        columns=columns,
        on_error=on_error,
        part_rows=part_rows or PART_ROWS,
        resume=resume,
    )


def is_dataset(output: str | None) -> bool:
    """A folder: one that exists, or a name that ends in /. A folder named like a file is a mistake."""
    if output is None:
        return False
    return output.endswith(("/", os.sep)) or (os.path.isdir(output) and output_ending(output) not in OUTPUT_ENDINGS)


def run_job(job: Job, load: Callable[[], Engine], **options: Any) -> Totals:
    """Load the engine and run the job; `options` are those of `Engine.stream`."""
    columns = job.columns._replace(precision=options.get("precision", "float32"))
    with _open(job, columns) as sink:
        engine = load()
        start, resumed = Place(), 0
        if isinstance(sink, Dataset):
            run = describe_run(engine, job.inputs, job.column, job.columns, job.part_rows, options)
            start, resumed = sink.begin(run), sink.rows
            if sink.finished:
                return Totals(
                    texts=0, tokens=0, truncated=0, skipped=0, resumed=resumed, padding_avoided=0.0, seconds=0.0
                )
        totals = _embed(engine, job, sink, start, resumed, options)
        sink.finish()
    return totals


def peak_memory() -> int | None:
    """Bytes of host memory that this process held at most, where the system says."""
    if PROCESS.exists():  # where ru_maxrss begins with what the parent held
        found = re.search(r"VmHWM:\s+(\d+) kB", PROCESS.read_text())
        return int(found[1]) * 1024 if found else None
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _check_apart(inputs: Sequence[str], files: Sequence[str], output: str) -> None:
    for name in files:
        if name != STDIN and os.path.exists(output) and os.path.samefile(name, output):
            raise OptionError(f"the output would replace an input: {output!r}; give another name")
    for name in inputs:
        if os.path.isdir(name) and os.path.realpath(output).startswith(os.path.join(os.path.realpath(name), "")):
            raise OptionError(f"the output lies in an input folder: {output!r} in {name!r}; give another place")
        if is_dataset(output) and os.path.realpath(output) == os.path.realpath(name):
            raise OptionError(f"the output would replace an input: {output!r}; give another name")


def _check_columns(files: Sequence[str], columns: Columns, output: str | None, dataset: bool) -> None:
    names = ", ".join(map(repr, columns.beside))
    if not dataset and (output is None or output_ending(output) != ".parquet"):
        raise OptionError(f"columns are carried into Parquet only: {names}; give -o vectors/ or vectors.parquet")
    for name in files:
        if ending(name) not in TABLES:
            raise OptionError(f"columns are asked for, and a text file has none: {names} of {name!r}; leave it out")
    for name in columns.carry:
        if name in OWN_COLUMNS or columns.carry.count(name) > 1:
            raise OptionError(f"a carried column would be there twice: {name!r}; carry others")


def _open(job: Job, columns: Columns) -> AbstractContextManager[Dataset | Single]:
    if job.output is not None and is_dataset(job.output):
        return open_dataset(job.output, columns, part_rows=job.part_rows, resume=job.resume)
    return open_single(job.output, columns, rejects=job.on_error == "skip")


def _embed(
    engine: Engine, job: Job, sink: Dataset | Single, start: Place, resumed: int, options: dict[str, Any]
) -> Totals:
    waiting: deque[Row] = deque()  # read, and not yet embedded
    count = tokens = truncated = skipped = 0
    padded = _PaddedBatches()
    started = time.perf_counter()

    meter = Meter(job.inputs)

    def texts() -> Iterator[str]:
        nonlocal skipped
        for row in read_rows(job.inputs, job.column, job.columns.beside, start, meter):
            if isinstance(row, Row):
                # Without its text, or a row group would hold the texts of all its rows.
                waiting.append(row._replace(text="", reject_bytes=sink.reject_bytes))
                yield row.text
            elif job.on_error == "raise":
                raise InputError(row.error)
            else:
                sink.reject(row)
                skipped += 1

    for block in engine.stream(Metered(texts(), meter), show_progress=None, **options):
        rows = [waiting.popleft() for _ in block.vectors]
        sink.write(Block(rows, block.vectors, block.token_counts, block.truncated))
        padded.add(block.token_counts)
        count += len(rows)
        tokens += int(block.token_counts.sum())
        truncated += int(block.truncated.sum())
    assert not waiting, len(waiting)
    if count == 0:
        none = engine.embed([], show_progress=False, **options)
        sink.write_none(Block([], none.vectors, none.token_counts, none.truncated))
    return Totals(
        texts=count,
        tokens=tokens,
        truncated=truncated,
        skipped=skipped,
        resumed=resumed,
        padding_avoided=padded.share(tokens),
        seconds=time.perf_counter() - started,
    )


class _PaddedBatches:
    """Tokens of the same texts in batches padded to their longest."""

    def __init__(self) -> None:
        self._tokens = 0
        self._open = np.zeros(0, np.int64)  # texts of the batch that is not full

    def add(self, token_counts: np.ndarray) -> None:
        counts = np.concatenate([self._open, token_counts])
        full = len(counts) // PADDED_BATCH * PADDED_BATCH
        self._tokens += PADDED_BATCH * int(counts[:full].reshape(-1, PADDED_BATCH).max(axis=1).sum())
        self._open = counts[full:]

    def share(self, tokens: int) -> float:
        """Of padding among all tokens."""
        padded = self._tokens + len(self._open) * int(self._open.max(initial=0))
        return 1 - tokens / padded if padded else 0.0
