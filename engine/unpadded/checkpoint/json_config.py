"""Read values of a JSON configuration by key and type."""

import json
import math
import os
import stat
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar

from unpadded.checkpoint.spec import Rotary
from unpadded.errors import CheckpointError, ConfigError

T = TypeVar("T", bool, int, float, str)
Config: TypeAlias = Mapping[str, Any]

ROPE_OBJECTS = ("rope_parameters", "rope_scaling")
JSON_BYTES = 2**24  # far above any published configuration
# Names are made for every layer before they are compared with the weights.
LAYER_KEYS, MAX_LAYERS = ("num_hidden_layers", "n_layer", "n_layers"), 1000


def open_file(path: Path, limit: float = math.inf) -> BinaryIO:
    """Open a regular file of at most `limit` bytes; CheckpointError for any other, since reading a FIFO would block."""
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size <= limit:
            return path.open("rb")
        size, kind = status.st_size, stat.filemode(status.st_mode)
        reason = f"{size} bytes with mode {kind} are not a regular file of at most {limit:.0f} bytes"
    except (OSError, ValueError) as error:  # ValueError: the name contains a null character
        reason = error.strerror or "" if isinstance(error, OSError) else str(error)
    raise CheckpointError(f"{path} cannot be read: {reason}; check the folder")


def read_json(path: Path) -> Any:
    """Return the JSON value in a file; CheckpointError if it cannot be read, ConfigError if it is not JSON.

    NaN, infinite numbers and lone surrogates are rejected, too.
    """
    with open_file(path, JSON_BYTES) as file:
        content = file.read()
    try:
        value = json.loads(content.decode())
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}; correct it or download it again") from error
    return value


def read_object(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Return the JSON object in a file; optional: {} if there is none."""
    value = {} if optional and not os.path.lexists(path) else read_json(path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object but {value!r:.80}; correct it or download it again")
    return value


def read_value(config: Config, key: str, kind: type[T], *, minimum: int = 1) -> T:
    """Return a bool, a string, a positive float, or a whole number from `minimum` on; 3072.0 is one."""
    value, maximum = config[key], MAX_LAYERS if key in LAYER_KEYS else 2**31 - 1
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        valid = is_number and value % 1 == 0 and minimum <= value <= maximum
        problem = f"not a whole number from {minimum} to {maximum}"
    elif kind is float:
        valid, problem = is_number and 0 < value <= sys.float_info.max, "not a positive number"
    else:
        valid, problem = isinstance(value, kind), "neither true nor false" if kind is bool else "not a string"
    if not valid:
        raise ConfigError(f"{key} = {value!r} is {problem}; correct the configuration")
    return kind(value)


def optional(config: Config, key: str, default: T, *, minimum: int = 1) -> T:
    """Return the value of a key, of the default's type; the default if it is absent or null."""
    return default if config.get(key) is None else read_value(config, key, type(default), minimum=minimum)


def section(config: Config, key: str) -> dict[str, Any]:
    """Return an object, {} if it is absent or null."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise not_implemented(key, value, "an object")
    return value


def consistent(config: Config, keys: tuple[str, ...], kind: type[T]) -> T | None:
    """Return the value on which the keys agree; absent and null keys are skipped, None if all of them are."""
    found = {key: read_value(config, key, kind) for key in keys if config.get(key) is not None}
    if len(set(found.values())) > 1:
        raise contradiction(found)
    return next(iter(found.values()), None)


def required(config: Config, keys: tuple[str, ...], kind: type[T], file: object = "config.json") -> T:
    """Return the value on which the keys agree; ConfigError, which names the file, if all are absent or null."""
    value = consistent(config, keys, kind)
    if value is None:
        raise ConfigError(f"{file} lacks {' or '.join(keys)} (found: {', '.join(sorted(config))[:200]}); add it")
    return value


def contradiction(found: Mapping[str, object]) -> ConfigError:
    values = " but ".join(f"{key} = {value!r}" for key, value in found.items())
    return ConfigError(f"config.json contradicts itself: {values}; keep the one the checkpoint was trained with")


def not_implemented(key: str, value: object, supported: object) -> ConfigError:
    return ConfigError(
        f"{key} = {value!r} is not implemented, only {supported!r}; run this checkpoint with its own code"
    )


def allow_only(config: Config, implemented: Config, file: object = None) -> None:
    """Raise ConfigError, which names the file, unless each key is absent, null, or has the only implemented value."""
    for key, supported in implemented.items():
        value = config.get(key)
        if value is not None and value != supported:
            raise not_implemented(f"{key} in {file}" if file else key, value, supported)


def rope_keys(*names: str) -> tuple[str, ...]:
    """Return the keys under which `flatten_rope` adds these names."""
    return tuple(f"{source}.{name}" for source in ROPE_OBJECTS for name in names)


def flatten_rope(config: Config, supported: Collection[str]) -> dict[str, Any]:
    """Add the values inside rope_parameters and rope_scaling to config, under "rope_parameters.factor" and so on."""
    flat = dict(config)
    for source in ROPE_OBJECTS:
        inside = {f"{source}.{key}": value for key, value in section(config, source).items()}
        allow_only(inside, dict.fromkeys(inside.keys() - set(rope_keys(*supported))))
        flat |= inside
    return flat


def rope_factor(flat: Config, scaled: str, *keys: str) -> float | None:
    """Return the factor of rope type `scaled`, the only scaling that the family implements; None without scaling.

    flat: from `flatten_rope`. keys: other keys of the factor, which imply the type.
    """
    factors = {key: flat[key] for key in (*keys, *rope_keys("factor")) if flat.get(key) is not None}
    implied = "default" if factors.keys().isdisjoint(keys) else scaled
    rope_type = consistent(flat, rope_keys("type", "rope_type"), str) or implied
    if rope_type not in ("default", scaled):
        raise not_implemented("rope_type", rope_type, f"default, {scaled}")
    if rope_type == scaled and not factors:
        raise ConfigError(f"rope_type = {scaled!r} without a factor; add rope_parameters.factor")
    if rope_type == "default" and factors:
        raise contradiction({"rope_type": rope_type} | factors)
    return consistent(factors, tuple(factors), float)


def unscaled_rotary(config: Config, *keys: str) -> Rotary:
    """Return a rotary embedding whose base is stated by one of `keys` or in rope_parameters."""
    flat = flatten_rope(config, ("rope_theta", "rope_type"))
    allow_only(flat, dict.fromkeys(rope_keys("rope_type"), "default"))
    base = required(flat, (*keys, *rope_keys("rope_theta")), float)
    return Rotary(base=base, trained_length=optional(config, "max_position_embeddings", 8192))
