"""What a dataset was made of, beside its parts: a run that goes on must be of the same model, settings and inputs."""

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
from unpadded.bulk.writers import Columns
from unpadded.errors import InputError, OptionError, OutputError

if TYPE_CHECKING:
    from unpadded.engine import Engine

FORMAT = 1
SAMPLES = 64  # of a weight file, evenly spread, with its first and last bytes among them
SAMPLE_BYTES = 65536
SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
NO_BEARING = ("token_budget", "defaults")  # of Engine.describe: they change no vector


def describe_run(
    engine: Engine, inputs: Sequence[str], column: str, columns: Columns, part_rows: int, options: dict[str, Any]
) -> dict[str, Any]:
    """What must not change between a run and the one that goes on with it, in plain values."""
    checkpoint = engine.checkpoint
    weights = [*checkpoint.weight_files, *(dense.weight_file for dense in checkpoint.dense)]
    small = [path for name in SMALL_FILES if (path := checkpoint.folder / name).exists()]
    ranges = options.get("ranges")
    settings = options | {"ranges": None if ranges is None else np.asarray(ranges).tolist()}
    running = {name: value for name, value in engine.describe().items() if name not in NO_BEARING}
    described = {
        "format": FORMAT,
        "unpadded": unpadded.__version__,
        "model": running,
        "model_files": {os.path.relpath(path, checkpoint.folder): _fingerprint(path) for path in [*weights, *small]},
        "settings": settings,
        "layout": {
            "part_rows": part_rows,
            "column": column,
            "id_column": columns.id_column,
            "carry": list(columns.carry),
            "types": [str(kind) for kind in columns.types],
        },
        "inputs": [_input(name) for name in inputs],
    }
    plain: dict[str, Any] = json.loads(json.dumps(described))
    return plain


def check_same(before: dict[str, Any], here: dict[str, Any], shown: str) -> None:
    """Raise OptionError with the first value that differs."""
    for name, old, new in _differences(before, here, ""):
        raise OptionError(
            f"the dataset was begun differently: {shown!r} has {name} {old!r:.200}, this run {new!r:.200}; "
            "resume with the same, or write to another folder"
        )


def read_manifest(path: Path, shown: str) -> dict[str, Any]:
    """The manifest of a dataset."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"the manifest cannot be read: {shown!r} ({error}); write to another folder") from error
    if not isinstance(manifest, dict) or not {"run", "parts", "finished", "rejects"} <= manifest.keys():
        raise OutputError(f"the manifest is not one of ours: {shown!r}; write to another folder")
    return manifest


def write_manifest(path: Path, manifest: dict[str, Any], shown: str) -> None:
    """Replace the manifest of a dataset, whole or not at all."""
    with atomic_file(path, path.with_name(f".{path.name}.tmp"), shown) as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")


def _input(name: str) -> dict[str, Any]:
    found = os.stat(name)
    return {"path": os.path.abspath(name), "bytes": found.st_size, "modified_ns": found.st_mtime_ns}


def _fingerprint(path: Path) -> dict[str, Any]:
    """Size and a hash of evenly spread samples: reading all of a large model would take as long as loading it."""
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
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from _differences(left, right, f"{name}[{index}]")
    elif old != new:
        yield name, old, new
