"""A job on a Ray cluster: Parquet in, a folder of Parquet out. Ray hands out the blocks and runs lost ones again."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import unpadded
from unpadded.bulk.atomic_files import write_error
from unpadded.bulk.dataset_output import PART_ROWS
from unpadded.bulk.file_output import OUTPUT_EXTENSIONS, output_extension
from unpadded.bulk.job import check_carried_columns
from unpadded.bulk.readers import DEFAULT_COLUMN, STDIN, TABLE_EXTENSIONS, extension
from unpadded.bulk.writers import GROUP_ROWS, RESULT_COLUMNS
from unpadded.errors import InputError, OptionError, OutputError, UnpaddedError

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

NOT_PARQUET = (".txt", *(name for name in TABLE_EXTENSIONS if name != ".parquet"))


class RayTotals(NamedTuple):
    """What a job did; `seconds` has the loading of the models in it."""

    texts: int
    tokens: int
    truncated: int
    seconds: float


def run_on_ray(
    address: str,
    inputs: Sequence[str],
    output: str | None,
    model: str,
    *,
    column: str | None = None,
    id_column: str | None = None,
    carry: Sequence[str] = (),
    settings: Mapping[str, Any],
) -> RayTotals:
    """Embed folders, files or buckets of Parquet on the cluster at `address`: "local", "auto" or as ray.init takes it.

    Columns as those of a dataset that is written here; the files are Ray's. settings: those of `UnpaddedEmbedder`.
    """
    folder, ids = _check(inputs, output, id_column, carry)
    # Workers run in another folder.
    folder, *inputs = (name if "://" in name else os.path.abspath(name) for name in (folder, *inputs))
    model = os.path.abspath(model) if os.path.exists(model) else model
    try:
        import ray
        import ray.data
        from ray.exceptions import RayError
    except ModuleNotFoundError as error:
        raise OptionError(f"--ray needs more packages: {error}; pip install 'unpadded[ray]'") from error
    started = time.perf_counter()
    if not ray.is_initialized():
        _connect(address)
    job = (inputs, folder, model, column or DEFAULT_COLUMN, ids, list(carry), dict(settings))
    try:
        # Ray Data has no client of its own: behind ray:// the job is driven from inside the cluster.
        inside = address.startswith("ray://")
        counts = ray.get(ray.remote(num_cpus=0)(_run).remote(*job)) if inside else _run(*job)
    except RayError as error:
        raise readable(error) from error
    return RayTotals(*counts, time.perf_counter() - started)


def _run(
    inputs: list[str], folder: str, model: str, text: str, ids: str, carry: list[str], settings: dict[str, Any]
) -> tuple[int, int, int]:
    """Rows, tokens, and truncated texts of what was written."""
    import ray

    from unpadded.integrations.ray_data import embed

    _check_new(folder)
    rows = _read(inputs, [text, ids, *carry])
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU") and not str(settings["device"]).startswith("cpu") else "CPU"
    most = max(1, int(resources[kind]))
    embedded = embed(rows, model, actors=(1, most), column=text, **{f"num_{kind.lower()}s": 1}, **settings)
    embedded.map_batches(lambda table: _arranged(table, ids, carry), batch_format="pyarrow").write_parquet(
        folder,
        min_rows_per_file=PART_ROWS,
        row_group_size=GROUP_ROWS,
        compression="zstd",
        use_dictionary=["id", *carry],
    )
    return _count(folder)


def _check(inputs: Sequence[str], output: str | None, id_column: str | None, carry: Sequence[str]) -> tuple[str, str]:
    for name in inputs:
        if name == STDIN or extension(name) in NOT_PARQUET:
            raise OptionError(f"--ray reads Parquet only: {name!r}; give a folder, a bucket or files of it")
    if output is None or output_extension(output) in OUTPUT_EXTENSIONS:
        raise OptionError(f"--ray writes a folder, not {output or 'stdout'!r}; give one as -o vectors/")
    if id_column is None:
        raise OptionError("--ray needs ids: rows read on many machines have no number; name a column with --id-column")
    check_carried_columns(carry)
    return output, id_column


def _check_new(folder: str) -> None:
    from pyarrow import fs

    try:
        filesystem, path = fs.FileSystem.from_uri(folder)
        found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    except OSError as error:
        raise write_error(folder, error) from error
    if found:
        raise OutputError(f"the output folder is not empty: {folder!r}; give a new one")


def _connect(address: str) -> None:
    import ray

    try:
        ray.init(address, include_dashboard=False if address == "local" else None)
    except (ConnectionError, ValueError) as error:
        raise OptionError(
            f"no Ray cluster answers: {address!r} ({error}); start one with ray start --head, or give local"
        ) from error


def _read(inputs: Sequence[str], columns: Sequence[str]) -> Dataset:
    import ray.data

    try:
        rows = ray.data.read_parquet(list(inputs))
    except (OSError, ValueError) as error:
        raise InputError(f"the inputs cannot be read: {list(inputs)!r} ({error}); check the paths") from error
    names = rows.schema().names
    for column in columns:
        if column not in names:
            raise InputError(f"no column {column!r}: the input has {', '.join(map(repr, names))}; name one of them")
    return rows.select_columns(list(dict.fromkeys(columns)))


def _arranged(table: pa.Table, ids: str, carry: list[str]) -> pa.Table:
    """The columns of a dataset in their order, the ids under their name there."""
    own = list(RESULT_COLUMNS)
    return table.select([ids, *own[1:], *carry]).rename_columns([*own, *carry])


def _count(folder: str) -> tuple[int, int, int]:
    import ray.data

    texts = tokens = truncated = 0
    try:
        written = ray.data.read_parquet(folder, columns=["tokens", "truncated"])
    except FileNotFoundError as error:
        raise InputError(f"the inputs hold no row: nothing is in {folder!r}; give others") from error
    for batch in written.iter_batches(batch_size=None):
        texts += len(batch["tokens"])
        tokens += int(batch["tokens"].sum())
        truncated += int(batch["truncated"].sum())
    return texts, tokens, truncated


def readable(error: Exception) -> UnpaddedError:
    """The error of ours that ended an actor, out of the traceback that Ray sends in its place."""
    ours = re.findall(r"^unpadded\.errors\.(\w+): (.+)$", str(error), re.MULTILINE)
    if ours:
        name, message = ours[-1]
        kind: type[UnpaddedError] = getattr(unpadded, name)
        return kind(message)
    return OutputError(f"the Ray job failed: {str(error).strip().splitlines()[-1]}; its log says more")
