"""The manifest of a dataset: its parts, and the model, settings and inputs that a resumed run must share."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import unpadded
from unpadded.bulk.atomic_files import atomic_file
from unpadded.bulk.writers import OutputColumns
from unpadded.errors import InputError, OptionError, OutputError

if TYPE_CHECKING:
    from unpadded.checkpoint.reader import Checkpoint
    from unpadded.engine import Engine

FORMAT = 1
SAMPLES = 64  # of a model file, evenly spaced, including its first and last bytes
SAMPLE_BYTES = 65536
SMALL_MODEL_FILES = (
    "config.json",
    "tokenizer*.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.*",
    "*.model",
)
MANIFEST_TYPES = {"run": dict, "parts": list, "rejects": int, "finished": bool}
PART_TYPES = {"file": str, "bytes": int, "rows": int, "next": list}
FREE_TO_CHANGE = ("token_budget", "defaults")  # entries of Engine.describe that change no vector


def describe_run(
    engine: Engine,
    inputs: Sequence[str],
    column: str,
    columns: OutputColumns,
    part_rows: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Return what must be the same in a run and in the runs that resume it, as JSON values."""
    ranges = options.get("ranges")
    run = {
        "format": FORMAT,
        "unpadded": unpadded.__version__,
        "model": {name: value for name, value in engine.describe().items() if name not in FREE_TO_CHANGE},
        "model_files": _model_files(engine.checkpoint),
        "settings": options | {"ranges": None if ranges is None else np.asarray(ranges).tolist()},
        "layout": {
            "result": columns.result,
            "part_rows": part_rows,
            "column": column,
            "id_column": columns.id_column,
            "carry": list(columns.carried_columns),
            "types": [str(kind) for kind in columns.types],
        },
        "inputs": [describe_input(name) for name in inputs],
    }
    as_json: dict[str, Any] = json.loads(json.dumps(run))
    return as_json


def describe_vectors(engine: Engine, options: dict[str, Any], result: str = "vectors") -> dict[str, Any]:
    """Return what a search must know to embed a question as the texts were embedded, as JSON values."""
    files = json.dumps(_model_files(engine.checkpoint), sort_keys=True)
    settings = {name: value for name, value in options.items() if name != "ranges"}
    if result in ("vectors", "spans"):
        settings["dimensions"] = options.get("dimensions") or engine.dimensions
    return {
        "result": result,
        "model": engine.checkpoint.name,
        "model_sha256_of_samples": hashlib.sha256(files.encode()).hexdigest(),
        "settings": settings,
        "unpadded": unpadded.__version__,
    }


def _model_files(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a fingerprint of each file of a model that determines its vectors."""
    layers = [layer for part in (checkpoint, checkpoint.sparse, checkpoint.tokens) if part for layer in part.dense]
    weights = [*checkpoint.weight_files, *(file for layer in layers for file in layer.weight_files)]
    small = [path for pattern in SMALL_MODEL_FILES for path in checkpoint.folder.glob(pattern)]
    return {os.path.relpath(path, checkpoint.folder): _fingerprint(path) for path in dict.fromkeys([*weights, *small])}


def check_same_run(previous: dict[str, Any], current: dict[str, Any], display_name: str) -> None:
    """Raise OptionError for the first value that differs between two descriptions of a run."""
    for name, old, new in _differences(previous, current, ""):
        raise OptionError(
            f"the dataset was started by a different run: {display_name!r} has {name} {old!r:.200}, this run "
            f"{new!r:.200}; resume it with the same value, or write to another folder"
        )


def read_manifest(path: Path, display_name: str) -> dict[str, Any]:
    """Read the manifest of a dataset."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(
            f"the manifest cannot be read: {display_name!r} ({error}); write to another folder"
        ) from error
    if not _has_types(manifest, MANIFEST_TYPES) or not all(_has_types(part, PART_TYPES) for part in manifest["parts"]):
        raise OutputError(f"the manifest was not written by unpadded: {display_name!r}; write to another folder")
    found: dict[str, Any] = manifest
    return found


def _has_types(values: Any, types: dict[str, type]) -> bool:
    return isinstance(values, dict) and all(type(values.get(name)) is kind for name, kind in types.items())


def write_manifest(path: Path, manifest: dict[str, Any], display_name: str) -> None:
    """Replace the manifest of a dataset atomically."""
    with atomic_file(path, path.with_name(f".{path.name}.tmp"), display_name) as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")


def describe_input(name: str) -> dict[str, Any]:
    found = os.stat(name)
    return {"path": os.path.abspath(name), "bytes": found.st_size, "modified_ns": found.st_mtime_ns}


def _fingerprint(path: Path) -> dict[str, Any]:
    """Return the size and a hash of samples of a file: reading all of a large model takes as long as loading it."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise InputError(f"the model cannot be read: {str(path)!r} ({error.strerror}); check the file") from error
    return {"bytes": size, "sha256_of_samples": digest.hexdigest()}


def _differences(old: Any, new: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the path and both values of each difference between two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from _differences(left, right, f"{name}[{index}]")
    elif old != new:
        yield name, old, new
