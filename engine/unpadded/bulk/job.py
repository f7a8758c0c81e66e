"""Bulk jobs: embed the rows of files into a file or a dataset."""

from __future__ import annotations

import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from unpadded.bulk.atomic_files import write_error
from unpadded.bulk.dataset_output import PART_ROWS, DatasetOutput, open_dataset_output
from unpadded.bulk.file_output import (
    DESCRIPTION_ENDING,
    OUTPUT_EXTENSIONS,
    REJECTS_ENDING,
    FileOutput,
    import_pyarrow,
    open_file_output,
    output_extension,
)
from unpadded.bulk.formats import STDIN, TABLE_EXTENSIONS, compression, expand_inputs, extension
from unpadded.bulk.manifest import describe_input, describe_run, describe_vectors
from unpadded.bulk.progress import EstimatedTexts, ReadProgress, periodic_reports
from unpadded.bulk.readers import column_types, read_rows
from unpadded.bulk.results import RESULT_COLUMNS, stream_results
from unpadded.bulk.rows import DEFAULT_COLUMN, ReadPosition, Row, check_columns, text_file_columns
from unpadded.bulk.writers import Block, OutputColumns
from unpadded.errors import InputError, OptionError

if TYPE_CHECKING:
    from unpadded.engine import Engine

Output: TypeAlias = DatasetOutput | FileOutput
PADDED_BATCH_TEXTS = 32  # per batch of the padding engine that Totals.padding_factor compares with


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
    overwrite: bool

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

    @property
    def writes_npy(self) -> bool:
        return self.output is not None and not self.writes_dataset and output_extension(self.output) == ".npy"


@dataclass(frozen=True, kw_only=True)
class Totals:
    """The counts of one run."""

    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    skipped: int = 0  # rows that were rejected
    blank_lines: int = 0  # of the inputs; they are no rows
    resumed: int = 0  # texts embedded by earlier runs of the job
    padding_factor: float = 1.0  # tokens of padded batches in input order, per token
    seconds: float = 0.0  # without loading the model
    tokens_per_second: float | None = None  # after the first block, whose time includes warm-up; None for one block


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
    overwrite: bool = False,
    result: str = "vectors",
) -> Job:
    """Return a job whose options are consistent with each other and with its inputs. The output - is stdout.

    result: "vectors", or with a Parquet output "spans", "sparse" or "tokens".
    Raises OptionError or InputError, before a model is loaded.
    """
    job = Job(
        inputs=tuple(expand_inputs(inputs)),
        output=None if output == STDIN else output,
        column=column or DEFAULT_COLUMN,
        columns=OutputColumns(id_column, tuple(carried_columns), result=result),
        on_error=on_error,
        part_rows=PART_ROWS if part_rows is None else part_rows,
        resume=resume,
        overwrite=overwrite,
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
    _check_existing_output(job, output)
    sources = [name for name in (*inputs, *job.inputs) if name != STDIN and os.path.exists(name)]
    if os.path.exists(output) and any(os.path.samefile(name, output) for name in sources):
        raise OptionError(f"the output would replace an input: {output!r}; pass another name")
    for folder in filter(os.path.isdir, inputs):
        if os.path.realpath(output).startswith(os.path.join(os.path.realpath(folder), "")):
            raise OptionError(f"the output is inside an input folder: {output!r} in {folder!r}; pass another folder")


def _check_existing_output(job: Job, output: str) -> None:
    """Raise unless the output is new, a folder, or a file that may be overwritten. A link to itself raises too."""
    names = [output]
    if not job.writes_dataset:
        names += [output + REJECTS_ENDING] * (job.on_error == "skip") + [output + DESCRIPTION_ENDING] * job.writes_npy
    for name in names:
        try:
            mode = os.stat(name).st_mode
        except FileNotFoundError:
            continue
        except OSError as error:
            raise write_error(name, error) from error
        if not job.writes_dataset and not stat.S_ISDIR(mode):
            if not stat.S_ISREG(mode):
                raise OptionError(f"the output is not a regular file: {name!r}; pass -o - and redirect stdout to it")
            if not job.overwrite:
                raise OptionError(f"the output exists: {name!r}; pass --overwrite, or another name")


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
            job.overwrite and (job.writes_dataset or job.output is None),
            f"--overwrite needs a single file as output: {job.output_name!r}; omit it, or delete the folder first",
        ),
        (
            job.on_error == "skip" and job.output is None,
            f"--on-error skip cannot write rejected rows to {job.output_name!r}; pass an output with -o",
        ),
        (
            job.columns.result != "vectors" and not job.writes_parquet,
            f"--{job.columns.result} needs a Parquet output: {job.output_name!r}; pass -o vectors/ or vectors.parquet",
        ),
        (
            column not in (None, DEFAULT_COLUMN) and not tables,
            f"--column {column!r} applies to {', '.join(TABLE_EXTENSIONS)}, and no input is one of these; omit it",
        ),
    )
    for is_broken, message in rules:
        if is_broken:
            raise OptionError(message)


def _check_parquet(job: Job) -> None:
    if job.writes_parquet:
        import_pyarrow(f"writing {job.output!r}")
    for name in job.inputs:
        if extension(name) == ".parquet" or compression(name) == ".zst":
            import_pyarrow(f"reading {name!r}")


def _check_columns(job: Job) -> None:
    names = ", ".join(map(repr, job.columns.extra_columns))
    if not job.writes_parquet:
        raise OptionError(
            f"only a Parquet output has columns of the inputs: {names}; pass -o vectors/ or vectors.parquet"
        )
    for name in job.inputs:
        if extension(name) not in TABLE_EXTENSIONS:
            check_columns(name, job.columns.extra_columns, text_file_columns(job.column))
    check_carried_columns(job.columns.carried_columns, job.columns.result)


def check_carried_columns(names: Sequence[str], result: str = "vectors") -> None:
    """Raise OptionError for a column that the output would have twice, and for a name that is not UTF-8."""
    for name in names:
        if name.encode(errors="replace").decode() != name:
            raise OptionError(f"a column's name is not UTF-8: {name!r}; rename it")
        if name in RESULT_COLUMNS[result] or names.count(name) > 1:
            raise OptionError(f"the output would have a column twice: {name!r}; omit it from --carry")


def run_job(job: Job, load: Callable[[], Engine], *, show_progress: bool | None = None, **options: Any) -> Totals:
    """Load the engine and run the job; `options` are those of `Engine.stream`, or of the method for `result`.

    show_progress: draw a bar; None draws it on a terminal and in a notebook, and logs a line every 30 s elsewhere.
    """
    columns = job.columns._replace(precision=options.get("precision", "float32"), description={})
    with _open_output(job, columns) as output:
        engine = load()
        if job.writes_parquet or job.writes_npy:
            columns.description.update(describe_vectors(engine, options, columns.result), column=job.column)
        if job.writes_npy and STDIN not in job.inputs:  # where a search finds the texts
            columns.description["inputs"] = [describe_input(name) for name in job.inputs]
        start, resumed = ReadPosition(), 0
        if isinstance(output, DatasetOutput):
            run = describe_run(engine, job.inputs, job.column, job.columns, job.part_rows, options)
            start, resumed = output.begin(run), output.rows
            if output.finished:
                return Totals(resumed=resumed)
        totals = _embed(engine, job, output, start, show_progress, options)
        output.finish()
    return replace(totals, resumed=resumed)


def _open_output(job: Job, columns: OutputColumns) -> AbstractContextManager[Output]:
    if job.output is not None and job.writes_dataset:
        return open_dataset_output(job.output, columns, part_rows=job.part_rows, resume=job.resume)
    return open_file_output(job.output, columns, rejects=job.on_error == "skip")


def _embed(
    engine: Engine, job: Job, output: Output, start: ReadPosition, show: bool | None, options: dict[str, Any]
) -> Totals:
    pending: deque[Row] = deque()  # rows that were read and are not embedded yet
    count = tokens = truncated = skipped = 0
    padding = _PaddingCounter()
    progress = ReadProgress(job.inputs)
    started = time.perf_counter()
    first_block = (0, 0.0)  # its tokens, and the time at its end

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

    estimated = EstimatedTexts(texts(), progress)
    with periodic_reports(estimated) if show is None else nullcontext(show) as shown:
        for results in stream_results(engine, job.columns.result, estimated, shown, options):
            block = Block([pending.popleft() for _ in results[1]], *results)
            (output.write if block.rows else output.write_empty)(block)
            padding.add(block.token_counts)
            count += len(block.rows)
            tokens += int(block.token_counts.sum())
            truncated += int(block.truncated.sum())
            if not first_block[1]:
                first_block = tokens, time.perf_counter()
    assert not pending, len(pending)
    ended = time.perf_counter()
    later_tokens = tokens - first_block[0]
    return Totals(
        texts=count,
        tokens=tokens,
        truncated=truncated,
        skipped=skipped,
        blank_lines=progress.blank_lines,
        padding_factor=padding.factor(tokens),
        seconds=ended - started,
        tokens_per_second=later_tokens / (ended - first_block[1]) if later_tokens else None,
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

    def factor(self, tokens: int) -> float:
        """Return the padded tokens per token; `tokens` is the number without padding."""
        padded = self._padded_tokens + len(self._partial_batch) * int(self._partial_batch.max(initial=0))
        return padded / tokens if tokens else 1.0
