"""The options of a server, and the flags of `unpadded serve` made from them. Imports nothing heavy."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from unpadded.errors import OptionError

API_KEYS_VARIABLE = "UNPADDED_API_KEYS"
API_KEY_FLAGS = ("api_key", "api_key_file")

DESCRIPTION = """\
Serve a model's embeddings over HTTP, with the APIs of OpenAI, nomic and text-embeddings-inference (TEI).
All requests share batches within the model's token budget, so a short request never waits for a long one to finish."""

EPILOG = """\
APIs:
  OpenAI    POST /v1/embeddings, GET /v1/models        base_url="http://HOST:PORT/v1"
  nomic     POST /v1/embedding/text, GET /v1/user      ATLAS_API_PATH=http://HOST:PORT
  TEI       POST /embed /embed_all /similarity /tokenize /decode, GET /info /health /metrics
  all       GET /openapi.json. Request bodies may be compressed with gzip. With "Accept: application/octet-stream",
            vectors are returned as raw little-endian float32 rows, and the header x-shape has their shape.

status codes of errors:
  400, 413, 422  the request is malformed, too large, or asks for something that the model does not support
  401, 404       the API key is missing or wrong; there is no such model or path
  424            the model failed on these texts; other requests in the same batch are not affected
  429            too many requests or queued tokens; try again after the seconds in Retry-After
  503            the server is draining after SIGTERM, or no device is available
  504            the deadline passed and the work was dropped

several devices:
  --device all, or cuda:0,cuda:1, starts one process per device; they share the queue. If a process exits, it is
  restarted and its batches run on another device: no request is lost. unpadded_devices in /metrics counts the devices
  that accept batches, and /health answers 503 while there are none.

examples:
  unpadded serve nomic-ai/nomic-embed-text-v1.5 --alias text-embedding-3-small --default-task search_document
  unpadded serve ./model --host 0.0.0.0 --port 80 --api-key-file keys.txt --long-input reject
"""

# Groups of flags in --help, with their descriptions.
GROUPS = {
    "network": None,
    "names and defaults": None,
    "limits": None,
    "logging": "The log is JSON lines on stderr and contains no texts by default. GET /metrics is for Prometheus.",
    "API keys": (
        f"Also read from {API_KEYS_VARIABLE}, separated by commas. Without keys, every request is accepted.\n"
        "/health and /metrics never need one."
    ),
}

LongInput = Literal["truncate", "reject"]


def _flag(group: str, help: str, *, metavar: str | None = None, choices: tuple[str, ...] | None = None) -> Any:
    return {"group": group, "help": help, "metavar": metavar, "choices": choices}


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How to serve, whatever the model. Raises OptionError for a value that is not valid."""

    host: str = field(default="127.0.0.1", metadata=_flag("network", "address to listen on"))
    port: int = field(default=8080, metadata=_flag("network", "port to listen on; 0 selects a free one"))
    tls_cert: str | None = field(
        default=None, metadata=_flag("network", "serve HTTPS with this certificate chain", metavar="PEM")
    )
    tls_key: str | None = field(
        default=None, metadata=_flag("network", "private key of the certificate", metavar="PEM")
    )
    cors_origin: tuple[str, ...] = field(
        default=(),
        metadata=_flag("network", "allow requests from web pages of this origin, * for all; repeatable", metavar="URL"),
    )
    alias: tuple[str, ...] = field(
        default=(), metadata=_flag("names and defaults", "additional name of the model; repeatable", metavar="NAME")
    )
    default_task: str | None = field(
        default=None, metadata=_flag("names and defaults", "task of requests that do not name one", metavar="TASK")
    )
    long_input: LongInput = field(
        default="truncate",
        metadata=_flag(
            "names and defaults",
            "texts longer than the model's maximum: truncate and count them, or reject the request",
            choices=get_args(LongInput),
        ),
    )
    max_concurrent_requests: int = field(
        default=512, metadata=_flag("limits", "requests in progress; further ones get 429", metavar="N")
    )
    max_queued_tokens: int = field(
        default=1_000_000, metadata=_flag("limits", "tokens waiting for a batch; further ones get 429", metavar="N")
    )
    max_inputs: int = field(default=2048, metadata=_flag("limits", "texts per request; more get 413", metavar="N"))
    max_body: int = field(
        default=16 << 20,
        metadata=_flag("limits", "size of a request body after decompression; larger ones get 413", metavar="BYTES"),
    )
    read_timeout: float = field(
        default=30.0,
        metadata=_flag(
            "limits",
            "time to receive the head of a request, then the connection is closed; and its body, then 408",
            metavar="SECONDS",
        ),
    )
    deadline: float = field(
        default=60.0, metadata=_flag("limits", "time to process a request, then 504; 0 for no limit", metavar="SECONDS")
    )
    grace: float = field(
        default=30.0,
        metadata=_flag(
            "limits",
            "time to finish requests after SIGTERM; a second SIGTERM exits immediately",
            metavar="SECONDS",
        ),
    )
    log_requests: bool = field(
        default=False, metadata=_flag("logging", "log the first 4096 bytes of each request body")
    )
    api_keys: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for option in _flag_fields():
            value, minimum = getattr(self, option.name), 1 if option.name.startswith("max_") else 0
            if _type(option) in (int, float) and not minimum <= value < math.inf:
                raise OptionError(f"{option.name} is out of range: {value}; pass a number from {minimum}")
        if self.long_input not in get_args(LongInput):
            raise OptionError(f"long_input is unknown: {self.long_input!r}; use truncate or reject")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise OptionError(
                f"HTTPS needs a certificate and its key: --tls-cert {self.tls_cert}, --tls-key {self.tls_key}; pass "
                "both or neither"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ServerOptions:
        """Return the options for flags by name: {"max_inputs": "64", "alias": ["a", "b"], "api_key_file": "keys"}.

        A value is a string or already converted. API keys also come from the environment.
        """
        values = dict(values)
        keys = _read_api_keys(values.pop("api_key", ()), values.pop("api_key_file", None))
        options = {option.name: option for option in _flag_fields()}
        unknown = values.keys() - options.keys()
        if unknown:
            raise OptionError(f"options are unknown: {', '.join(sorted(unknown))}; use {', '.join(flag_names())}")
        return cls(**{name: _convert(options[name], value) for name, value in values.items()}, api_keys=keys)


def flag_names() -> list[str]:
    """Return the names that `ServerOptions.from_mapping` accepts: those of the flags, with underscores."""
    return [*(option.name for option in _flag_fields()), *API_KEY_FLAGS]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of all options to a parser."""
    groups = {title: parser.add_argument_group(title, description) for title, description in GROUPS.items()}
    for option in _flag_fields():
        flag, group = "--" + option.name.replace("_", "-"), groups[option.metadata["group"]]
        help, type_, repeatable = option.metadata["help"], _type(option), option.default == ()
        if type_ is bool:
            group.add_argument(flag, action="store_true", help=help)
            continue
        group.add_argument(
            flag,
            action="append" if repeatable else "store",
            type=type_,
            default=None if repeatable else option.default,
            metavar=option.metadata["metavar"],
            choices=option.metadata["choices"],
            help=help + " (default: %(default)s)" * (option.default not in (None, ())),
        )
    keys = groups["API keys"]
    keys.add_argument("--api-key", action="append", metavar="KEY", help="accept this key; repeatable")
    keys.add_argument("--api-key-file", metavar="FILE", help="accept the keys in this file, one per line")


def read_flags(args: argparse.Namespace) -> ServerOptions:
    """Return the options of parsed flags."""
    values = {name: getattr(args, name) for name in flag_names()}
    return ServerOptions.from_mapping({name: value for name, value in values.items() if value is not None})


def _flag_fields() -> list[Field[Any]]:
    return [option for option in fields(ServerOptions) if option.metadata]


def _type(option: Field[Any]) -> type:
    """Return the type of one value on the command line."""
    return type(option.default) if isinstance(option.default, int | float) else str


def _convert(option: Field[Any], value: Any) -> Any:
    if option.default == ():
        return (value,) if isinstance(value, str) else tuple(value)
    if not isinstance(value, str):
        return value
    type_ = _type(option)
    try:
        return value.lower() == "true" if type_ is bool else type_(value)
    except ValueError:
        raise OptionError(f"{option.name} is not a number: {value!r}; pass one such as {option.default}") from None


def _read_api_keys(keys: str | list[str], file: str | Path | None) -> frozenset[str]:
    found = [keys] if isinstance(keys, str) else list(keys)
    found += os.environ.get(API_KEYS_VARIABLE, "").split(",")
    if file is not None:
        try:
            lines = Path(file).read_text().splitlines()
        except OSError as error:
            raise OptionError(f"the API key file cannot be read: {file}, {error}; correct the path") from error
        in_file = [line.strip() for line in lines if line.strip()]
        if not in_file:
            raise OptionError(f"the API key file is empty: {file}; write one key per line, or omit --api-key-file")
        found += in_file
    return frozenset(key for key in found if key)
