"""Read values of a JSON configuration by key and type.

Every ConfigError names the key, the value found and what to do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from unpadded.errors import CheckpointError, ConfigError

T = TypeVar("T")
Config: TypeAlias = Mapping[str, Any]

ROPE_OBJECTS = ("rope_parameters", "rope_scaling")


def read_json(path: Path) -> Any:
    """Return the JSON value in a file; CheckpointError if it cannot be read, ConfigError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check the folder") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}; correct it or download it again") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object but {value!r:.80}; correct it or download it again")
    return value


def integer(config: Config, key: str, *, minimum: int = 1) -> int:
    """Return a whole number; 3072.0 is one."""
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0 or value < minimum:
        raise ConfigError(f"{key} = {value!r} is not a whole number of at least {minimum}; correct the configuration")
    return int(value)


def number(config: Config, key: str) -> float:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key} = {value!r} is not a number; correct the configuration")
    return float(value)


def positive(config: Config, key: str) -> float:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{key} = {value!r} is not a positive number; correct the configuration")
    return float(value)


def flag(config: Config, key: str) -> bool:
    value = config[key]
    if not isinstance(value, bool):
        raise ConfigError(f"{key} = {value!r} is neither true nor false; correct the configuration")
    return value


def text(config: Config, key: str) -> str:
    value = config[key]
    if not isinstance(value, str):
        raise ConfigError(f"{key} = {value!r} is not a string; correct the configuration")
    return value


def one_of(config: Config, key: str, supported: Collection[str]) -> str:
    value = text(config, key)
    if value not in supported:
        raise not_implemented(key, value, ", ".join(supported))
    return value


def consistent(config: Config, keys: tuple[str, ...], read: Callable[[Config, str], T]) -> T | None:
    """Return the value on which the keys agree; absent and null keys are skipped, None if all of them are."""
    found = {key: read(config, key) for key in keys if config.get(key) is not None}
    if len(set(found.values())) > 1:
        raise contradiction(found)
    return next(iter(found.values()), None)


def required(config: Config, keys: tuple[str, ...], read: Callable[[Config, str], T]) -> T:
    """Return the value on which the keys agree; ConfigError if all are absent or null."""
    value = consistent(config, keys, read)
    if value is None:
        raise ConfigError(f"config.json lacks {' or '.join(keys)} (found: {', '.join(sorted(config))[:200]}); add it")
    return value


def contradiction(found: Mapping[str, object]) -> ConfigError:
    values = " but ".join(f"{key} = {value!r}" for key, value in found.items())
    return ConfigError(f"config.json contradicts itself: {values}; keep the one the checkpoint was trained with")


def not_implemented(key: str, value: object, supported: object) -> ConfigError:
    return ConfigError(
        f"{key} = {value!r} is not implemented, only {supported!r}; run this checkpoint with its own code"
    )


def require_defaults(config: Config, defaults: Config, source: str = "") -> None:
    """Raise ConfigError if a key has a value other than null and the only one that is implemented.

    source: the key of config.json that contains `config`, for the message.
    """
    for key, default in defaults.items():
        value = config.get(key)
        if value is not None and value != default:
            raise not_implemented(f"{source}.{key}" if source else key, value, default)


def hidden_and_heads(
    config: Config,
    hidden_keys: tuple[str, ...] = ("hidden_size",),
    heads_keys: tuple[str, ...] = ("num_attention_heads",),
    *,
    rotary: bool = True,
) -> tuple[int, int]:
    """Return hidden size and number of heads; ConfigError unless heads are of equal width, an even one if rotary."""
    hidden, heads = required(config, hidden_keys, integer), required(config, heads_keys, integer)
    if hidden % heads or (rotary and hidden // heads % 2):
        raise ConfigError(
            f"{hidden_keys[0]} = {hidden} does not divide into {heads_keys[0]} = {heads} heads of "
            f"{'an even' if rotary else 'equal'} width; correct config.json"
        )
    require_defaults(config, {"head_dim": hidden // heads})
    return hidden, heads


def rope_keys(*names: str) -> tuple[str, ...]:
    """Return the keys under which `flatten_rope` adds these names."""
    return tuple(f"{source}.{name}" for source in ROPE_OBJECTS for name in names)


def flatten_rope(config: Config, supported: Collection[str]) -> dict[str, Any]:
    """Add the values inside rope_parameters and rope_scaling to config, under "rope_parameters.factor" and so on."""
    flat = dict(config)
    for source in ROPE_OBJECTS:
        inside = config.get(source) or {}
        if not isinstance(inside, dict):
            raise not_implemented(source, inside, "an object")
        require_defaults(inside, dict.fromkeys(inside.keys() - set(supported)), source)
        flat |= {f"{source}.{key}": value for key, value in inside.items()}
    return flat


def rope_theta(config: Config, *keys: str) -> float:
    """Return the base of an unscaled rotary embedding, from one of `keys` or from rope_parameters."""
    flat = flatten_rope(config, ("rope_theta", "rope_type"))
    require_defaults(flat, dict.fromkeys(rope_keys("rope_type"), "default"))
    return required(flat, (*keys, *rope_keys("rope_theta")), positive)
