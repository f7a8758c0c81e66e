"""`unpadded embed --ray`: embed Parquet into a folder of Parquet on a Ray cluster."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data
from pyarrow import fs
from ray.exceptions import RayError

import unpadded
from unpadded.bulk.atomic_files import write_error
from unpadded.bulk.dataset_output import PART_ROWS
from unpadded.bulk.file_output import OUTPUT_EXTENSIONS, output_extension
from unpadded.bulk.formats import STDIN, TABLE_EXTENSIONS, extension
from unpadded.bulk.job import Totals, check_carried_columns
from unpadded.bulk.results import RESULT_COLUMNS
from unpadded.bulk.rows import DEFAULT_COLUMN
from unpadded.bulk.writers import GROUP_ROWS
from unpadded.errors import InputError, OptionError, OutputError, UnpaddedError
from unpadded.integrations.ray_data import embed

NOT_PARQUET = {".txt", *TABLE_EXTENSIONS} - {".parquet"}


def run_on_ray(
    address: str,
    inputs: Sequence[str],
    output: str | None,
    model: str,
    *,
    column: str | None = None,
    id_column: str | None = None,
    carried_columns: Sequence[str] = (),
    settings: Mapping[str, Any],
) -> Totals:
    """Embed files, folders or buckets of Parquet on the cluster at `address`: "local", "auto", or as for ray.init.

    The output has the columns of a dataset that one machine writes; its files are named by Ray. The seconds include
    loading the models. settings: those of `UnpaddedEmbedder`.
    """
    for name in inputs:
        if name == STDIN or extension(name) in NOT_PARQUET:
            raise OptionError(f"--ray reads only Parquet: {name!r}; pass files, folders or buckets of Parquet")
    if output is None or output_extension(output) in OUTPUT_EXTENSIONS:
        raise OptionError(f"--ray writes only folders, not {output or 'stdout'!r}; pass one as -o vectors/")
    if id_column is None:
        raise OptionError("--ray needs ids, because rows have no number on a cluster; pass --id-column")
    check_carried_columns(carried_columns)
    # Workers run in another folder.
    output, *inputs = (name if "://" in name else os.path.abspath(name) for name in (output, *inputs))
    model = os.path.abspath(model) if os.path.exists(model) else model
    text_column, carried = column or DEFAULT_COLUMN, list(carried_columns)

    def arrange(table: pa.Table) -> pa.Table:
        """Select and name the columns as a dataset has them."""
        names = list(RESULT_COLUMNS["vectors"])
        return table.select([id_column, *names[1:], *carried]).rename_columns([*names, *carried])

    def run() -> tuple[int, int, int]:
        """Write the output; return the numbers of its rows, of their tokens and of truncated texts."""
        _check_is_empty(output)
        rows = _read(inputs, [text_column, id_column, *carried])
        resources = ray.cluster_resources()
        kind = "GPU" if resources.get("GPU") and not str(settings["device"]).startswith("cpu") else "CPU"
        actors = (1, max(1, int(resources[kind])))
        embedded = embed(rows, model, actors=actors, column=text_column, **{f"num_{kind.lower()}s": 1}, **settings)
        embedded.map_batches(arrange, batch_format="pyarrow").write_parquet(
            output,
            min_rows_per_file=PART_ROWS,
            row_group_size=GROUP_ROWS,
            compression="zstd",
            use_dictionary=["id", *carried],
            write_page_checksum=True,
        )
        return _count(output)

    started = time.perf_counter()
    if not ray.is_initialized():
        _connect(address)
    try:
        # Ray Data cannot be driven through Ray Client, so behind ray:// the driver is a task in the cluster.
        is_client = address.startswith("ray://")
        texts, tokens, truncated = ray.get(ray.remote(num_cpus=0)(run).remote()) if is_client else run()
    except RayError as error:
        raise original_error(error) from error
    return Totals(texts=texts, tokens=tokens, truncated=truncated, seconds=time.perf_counter() - started)


def _check_is_empty(output: str) -> None:
    try:
        filesystem, path = fs.FileSystem.from_uri(output)
        found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    except OSError as error:
        raise write_error(output, error) from error
    if found:
        raise OutputError(f"the output folder is not empty: {output!r}; pass a new one")


def _connect(address: str) -> None:
    try:
        ray.init(address, include_dashboard=False if address == "local" else None)
    except (ConnectionError, ValueError) as error:
        raise OptionError(
            f"no Ray cluster answers at {address!r} ({error}); start one with ray start --head, or pass local"
        ) from error


def _read(inputs: Sequence[str], columns: Sequence[str]) -> ray.data.Dataset:
    try:
        rows = ray.data.read_parquet(list(inputs))
    except (OSError, ValueError) as error:
        raise InputError(f"the inputs cannot be read: {list(inputs)!r} ({error}); check the paths") from error
    names = rows.schema().names
    for column in columns:
        if column not in names:
            raise InputError(f"no column {column!r}: the input has {', '.join(map(repr, names))}; pass one of them")
    return rows.select_columns(list(dict.fromkeys(columns)))


def _count(output: str) -> tuple[int, int, int]:
    texts = tokens = truncated = 0
    try:
        written = ray.data.read_parquet(output, columns=["tokens", "truncated"])
    except FileNotFoundError as error:
        raise InputError(f"the inputs have no rows, so {output!r} is empty; pass other inputs") from error
    for batch in written.iter_batches(batch_size=None):
        texts += len(batch["tokens"])
        tokens += int(batch["tokens"].sum())
        truncated += int(batch["truncated"].sum())
    return texts, tokens, truncated


def original_error(error: RayError) -> UnpaddedError:
    """Return the error that stopped an actor, read from the traceback that Ray sends in its place."""
    errors = re.findall(r"^unpadded\.errors\.(\w+): (.+)$", str(error), re.MULTILINE)
    if errors:
        name, message = errors[-1]
        error_class: type[UnpaddedError] = getattr(unpadded, name)
        return error_class(message)
    return OutputError(f"the Ray job failed: {str(error).strip().splitlines()[-1]}; see Ray's log")
