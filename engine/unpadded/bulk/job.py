"""Bulk jobs: embed the rows of files into a file or a dataset."""

from __future__ import annotations

import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from unpadded.bulk.dataset_output import PART_ROWS, DatasetOutput, open_dataset_output
from unpadded.bulk.file_output import (
    OUTPUT_EXTENSIONS,
    FileOutput,
    import_pyarrow,
    open_file_output,
    output_extension,
)
from unpadded.bulk.manifest import describe_run
from unpadded.bulk.progress import EstimatedTexts, ReadProgress
from unpadded.bulk.readers import (
    DEFAULT_COLUMN,
    STDIN,
    TABLE_EXTENSIONS,
    ReadPosition,
    Row,
    column_types,
    expand_inputs,
    extension,
    is_gzip,
    read_rows,
)
from unpadded.bulk.writers import RESULT_COLUMNS, Block, OutputColumns
from unpadded.errors import InputError, OptionError

if TYPE_CHECKING:
    from unpadded.engine import Engine

Output: TypeAlias = DatasetOutput | FileOutput
PROCESS_STATUS = Path("/proc/self/status")
PADDED_BATCH_TEXTS = 32  # per batch of the padding engine that Totals.padding_avoided compares with


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job whose options have been checked by `make_job`."""

    inputs: tuple[str, ...]  # files, and - for standard input
    output: str | None  # a file, a folder of Parquet parts, or None for JSON lines on stdout
    column: str
    columns: OutputColumns
    on_error: Literal["raise", "skip"]
    part_rows: int
    resume: bool

    @property
    def output_name(self) -> str:
        return self.output or "stdout"

    @property
    def writes_dataset(self) -> bool:
        """True for a folder that exists, and for a name that ends in /, but not for a folder named like a file."""
        if self.output is None:
            return False
        is_folder = os.path.isdir(self.output) and output_extension(self.output) not in OUTPUT_EXTENSIONS
        return is_folder or self.output.endswith(("/", os.sep))

    @property
    def writes_parquet(self) -> bool:
        return self.writes_dataset or (self.output is not None and output_extension(self.output) == ".parquet")


@dataclass(frozen=True, kw_only=True)
class Totals:
    """The counts of one run."""

    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    skipped: int = 0
    resumed: int = 0  # texts embedded by earlier runs of the job
    padding_avoided: float = 0.0  # fraction of the tokens of padded batches in input order
    seconds: float = 0.0  # without loading the model


def make_job(
    inputs: Sequence[str],
    *,
    output: str | None = None,
    column: str | None = None,
    id_column: str | None = None,
    carried_columns: Sequence[str] = (),
    on_error: Literal["raise", "skip"] = "raise",
    part_rows: int | None = None,
    resume: bool = False,
) -> Job:
    """Return a job whose options are consistent with each other and with its inputs.

    Raises OptionError or InputError, before a model is loaded.
    """
    job = Job(
        inputs=tuple(expand_inputs(inputs)),
        output=output,
        column=column or DEFAULT_COLUMN,
        columns=OutputColumns(id_column, tuple(carried_columns)),
        on_error=on_error,
        part_rows=PART_ROWS if part_rows is None else part_rows,
        resume=resume,
    )
    _check_output(job, inputs)
    _check_options(job, column, part_rows)
    _check_parquet(job)
    if not job.columns.extra_columns:
        return job
    _check_columns(job)
    types = tuple(column_types(job.inputs, job.columns.extra_columns))
    return replace(job, columns=job.columns._replace(types=types))


def _check_output(job: Job, inputs: Sequence[str]) -> None:
    output = job.output
    if output is None:
        return
    if not job.writes_dataset and output_extension(output) not in OUTPUT_EXTENSIONS:
        raise OptionError(
            f"the output has an unknown extension: {output!r}; use one of {', '.join(OUTPUT_EXTENSIONS)}, or a folder "
            f"such as {output + '/'!r}"
        )
    sources = [name for name in (*inputs, *job.inputs) if name != STDIN and os.path.exists(name)]
    if os.path.exists(output) and any(os.path.samefile(name, output) for name in sources):
        raise OptionError(f"the output would replace an input: {output!r}; pass another name")
    for folder in filter(os.path.isdir, inputs):
        if os.path.realpath(output).startswith(os.path.join(os.path.realpath(folder), "")):
            raise OptionError(f"the output is inside an input folder: {output!r} in {folder!r}; pass another folder")


def _check_options(job: Job, column: str | None, part_rows: int | None) -> None:
    """Raise for the first rule, a condition and its message, that the options break."""
    tables = [name for name in job.inputs if extension(name) in TABLE_EXTENSIONS]
    rules = (
        (
            job.resume and not job.writes_dataset,
            f"--resume needs a dataset as output: {job.output_name!r}; pass a folder such as -o vectors/",
        ),
        (
            part_rows is not None and not job.writes_dataset,
            f"--part-rows needs a dataset as output: {job.output_name!r}; pass a folder such as -o vectors/",
        ),
        (
            job.part_rows < 1,
            f"--part-rows is not positive: {job.part_rows}; pass the number of rows per part, such as {PART_ROWS}",
        ),
        (
            job.resume and STDIN in job.inputs,
            f"--resume cannot read standard input again: {STDIN!r}; pass files",
        ),
        (
            job.on_error == "skip" and job.output is None,
            f"--on-error skip cannot write rejected rows to {job.output_name!r}; pass an output with -o",
        ),
        (
            column is not None and not tables,
            f"--column {column!r} applies to .jsonl, .csv and .parquet, and no input is one of these; omit it",
        ),
    )
    for is_broken, message in rules:
        if is_broken:
            raise OptionError(message)


def _check_parquet(job: Job) -> None:
    if job.writes_parquet:
        import_pyarrow(f"writing {job.output!r}")
    for name in job.inputs:
        if extension(name) == ".parquet":
            if is_gzip(name):
                raise InputError(f"a gzipped Parquet file cannot be read in parts: {name!r}; decompress it")
            import_pyarrow(f"reading {name!r}")


def _check_columns(job: Job) -> None:
    names = ", ".join(map(repr, job.columns.extra_columns))
    if not job.writes_parquet:
        raise OptionError(
            f"only a Parquet output has columns of the inputs: {names}; pass -o vectors/ or vectors.parquet"
        )
    for name in job.inputs:
        if extension(name) not in TABLE_EXTENSIONS:
            raise OptionError(f"a text file has no columns: {names} of {name!r}; omit --id-column and --carry")
    check_carried_columns(job.columns.carried_columns)


def check_carried_columns(names: Sequence[str]) -> None:
    """Raise OptionError for a column that the output would have twice."""
    for name in names:
        if name in RESULT_COLUMNS or names.count(name) > 1:
            raise OptionError(f"the output would have a column twice: {name!r}; omit it from --carry")


def run_job(job: Job, load: Callable[[], Engine], **options: Any) -> Totals:
    """Load the engine and run the job; `options` are those of `Engine.stream`."""
    columns = job.columns._replace(precision=options.get("precision", "float32"))
    with _open_output(job, columns) as output:
        engine = load()
        start, resumed = ReadPosition(), 0
        if isinstance(output, DatasetOutput):
            run = describe_run(engine, job.inputs, job.column, job.columns, job.part_rows, options)
            start, resumed = output.begin(run), output.rows
            if output.finished:
                return Totals(resumed=resumed)
        totals = _embed(engine, job, output, start, options)
        output.finish()
    return replace(totals, resumed=resumed)


def _open_output(job: Job, columns: OutputColumns) -> AbstractContextManager[Output]:
    if job.output is not None and job.writes_dataset:
        return open_dataset_output(job.output, columns, part_rows=job.part_rows, resume=job.resume)
    return open_file_output(job.output, columns, rejects=job.on_error == "skip")


def _embed(engine: Engine, job: Job, output: Output, start: ReadPosition, options: dict[str, Any]) -> Totals:
    pending: deque[Row] = deque()  # rows that were read and are not embedded yet
    count = tokens = truncated = skipped = 0
    padding = _PaddingCounter()
    progress = ReadProgress(job.inputs)
    started = time.perf_counter()

    def texts() -> Iterator[str]:
        nonlocal skipped
        for row in read_rows(job.inputs, job.column, job.columns.extra_columns, start, progress):
            if isinstance(row, Row):
                # Without its text: a row group would otherwise hold the texts of all its rows in memory.
                pending.append(row._replace(text="", reject_bytes=output.reject_bytes))
                yield row.text
            elif job.on_error == "raise":
                raise InputError(row.error)
            else:
                output.reject(row)
                skipped += 1

    for block in engine.stream(EstimatedTexts(texts(), progress), show_progress=None, **options):
        rows = [pending.popleft() for _ in block.vectors]
        output.write(Block(rows, block.vectors, block.token_counts, block.truncated))
        padding.add(block.token_counts)
        count += len(rows)
        tokens += int(block.token_counts.sum())
        truncated += int(block.truncated.sum())
    assert not pending, len(pending)
    if count == 0:
        empty = engine.embed([], show_progress=False, **options)
        output.write_empty(Block([], empty.vectors, empty.token_counts, empty.truncated))
    return Totals(
        texts=count,
        tokens=tokens,
        truncated=truncated,
        skipped=skipped,
        padding_avoided=padding.fraction(tokens),
        seconds=time.perf_counter() - started,
    )


class _PaddingCounter:
    """Counts the tokens that the same texts would have in batches padded to their longest text."""

    def __init__(self) -> None:
        self._padded_tokens = 0  # of full batches
        self._partial_batch = np.zeros(0, np.int64)  # token counts

    def add(self, token_counts: np.ndarray) -> None:
        counts = np.concatenate([self._partial_batch, token_counts])
        full = len(counts) // PADDED_BATCH_TEXTS * PADDED_BATCH_TEXTS
        longest = counts[:full].reshape(-1, PADDED_BATCH_TEXTS).max(axis=1)
        self._padded_tokens += PADDED_BATCH_TEXTS * int(longest.sum())
        self._partial_batch = counts[full:]

    def fraction(self, tokens: int) -> float:
        """Return the fraction of padding among the padded tokens; `tokens` is the number without padding."""
        padded = self._padded_tokens + len(self._partial_batch) * int(self._partial_batch.max(initial=0))
        return 1 - tokens / padded if padded else 0.0


def peak_memory() -> int | None:
    """Return the peak host memory of this process in bytes, or None if the system does not report it."""
    if PROCESS_STATUS.exists():  # on Linux, ru_maxrss starts at the parent's value
        found = re.search(r"VmHWM:\s+(\d+) kB", PROCESS_STATUS.read_text())
        return int(found[1]) * 1024 if found else None
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
