"""Reading a JSON configuration by key and type; every refusal names the key, the value and the remedy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from unpadded.errors import CheckpointError, ConfigError

T = TypeVar("T")


def read_json(path: Path) -> Any:
    """The JSON in a file; CheckpointError when it cannot be read, ConfigError when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check the folder") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}; correct it or download it again") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object: it holds {value!r:.80}; correct it or download it again")
    return value


def integer(config: Mapping[str, Any], key: str, *, least: int = 1) -> int:
    """A whole number, 3072.0 included."""
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0 or value < least:
        raise ConfigError(f"{key} = {value!r} is not a whole number of at least {least}; correct the configuration")
    return int(value)


def positive(config: Mapping[str, Any], key: str) -> float:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{key} = {value!r} is not a positive number; correct the configuration")
    return float(value)


def flag(config: Mapping[str, Any], key: str) -> bool:
    value = config[key]
    if not isinstance(value, bool):
        raise ConfigError(f"{key} = {value!r} is neither true nor false; correct the configuration")
    return value


def text(config: Mapping[str, Any], key: str) -> str:
    value = config[key]
    if not isinstance(value, str):
        raise ConfigError(f"{key} = {value!r} is not a string; correct the configuration")
    return value


def consistent(
    config: Mapping[str, Any], keys: tuple[str, ...], read: Callable[[Mapping[str, Any], str], T]
) -> T | None:
    """What the keys that are present, and not null, say together; None when none is."""
    found = {key: read(config, key) for key in keys if config.get(key) is not None}
    if len(set(found.values())) > 1:
        raise contradiction(found)
    return next(iter(found.values()), None)


def required(config: Mapping[str, Any], keys: tuple[str, ...], read: Callable[[Mapping[str, Any], str], T]) -> T:
    value = consistent(config, keys, read)
    if value is None:
        raise ConfigError(f"config.json lacks {' or '.join(keys)} (found: {', '.join(sorted(config))[:200]}); add it")
    return value


def contradiction(found: Mapping[str, object]) -> ConfigError:
    values = " but ".join(f"{key} = {value!r}" for key, value in found.items())
    return ConfigError(f"config.json contradicts itself: {values}; keep the one the checkpoint was trained with")


def not_implemented(key: str, value: object, offered: object) -> ConfigError:
    return ConfigError(f"{key} = {value!r} is not implemented, only {offered!r}; run this checkpoint with its own code")


def require_defaults(config: Mapping[str, Any], offered: Mapping[str, Any]) -> None:
    """ConfigError when a key is present with anything but null and the one value that is implemented."""
    for key, only in offered.items():
        value = config.get(key)
        if value is not None and value != only:
            raise not_implemented(key, value, only)


def rope_theta(config: Mapping[str, Any], *keys: str) -> float:
    """The base of a rotary embedding, by one of these keys or in rope_parameters; refuses one that is scaled."""
    rope = {f"rope_parameters.{key}": value for key, value in (config.get("rope_parameters") or {}).items()}
    theta, kind = "rope_parameters.rope_theta", "rope_parameters.rope_type"
    require_defaults(rope, {key: "default" if key == kind else None for key in rope if key != theta})
    return required({**config, **rope}, (*keys, theta), positive)


def one_of(config: Mapping[str, Any], key: str, offered: Collection[str]) -> str:
    value = text(config, key)
    if value not in offered:
        raise not_implemented(key, value, ", ".join(offered))
    return value
