"""The options of a server, and the flags of `unpadded serve` made from them. Imports nothing heavy."""
# ruff: noqa: RUF009

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unpadded.errors import OptionError
from unpadded.options import check_choice, convert, describe, option

API_KEYS_VARIABLE = "UNPADDED_API_KEYS"

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

# Groups of flags in --help: title, description and names. The flags of API keys are in a group of their own.
GROUPS: list[tuple[str, str | None, list[str]]] = [
    ("network", None, ["host", "port", "tls_cert", "tls_key", "cors_origin"]),
    ("names and defaults", None, ["alias", "default_task", "long_input"]),
    (
        "limits",
        None,
        [
            "max_concurrent_requests",
            "max_queued_tokens",
            "max_inputs",
            "max_body",
            "read_timeout",
            "deadline",
            "grace",
        ],
    ),
    (
        "logging",
        "The log is JSON lines on stderr and contains no texts by default. GET /metrics is for Prometheus.",
        ["log_requests"],
    ),
]

LongInput = Literal["truncate", "reject"]


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of a server that do not depend on the model. OptionError for an invalid value."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8080, "port to listen on; 0 selects a free one")
    tls_cert: str | None = option(None, "serve HTTPS with this certificate chain", metavar="PEM")
    tls_key: str | None = option(None, "private key of the certificate", metavar="PEM")
    cors_origin: tuple[str, ...] = option(
        (), "allow requests from web pages of this origin, * for all; repeatable", metavar="URL"
    )
    alias: tuple[str, ...] = option((), "additional name of the model; repeatable", metavar="NAME")
    default_task: str | None = option(None, "task of requests that do not name one", metavar="TASK")
    long_input: LongInput = option(
        "truncate",
        "texts longer than the model's maximum: truncate and count them, or reject the request",
        literal=LongInput,
    )
    max_concurrent_requests: int = option(512, "requests in progress; further ones get 429", metavar="N")
    max_queued_tokens: int = option(1_000_000, "tokens waiting for a batch; further ones get 429", metavar="N")
    max_inputs: int = option(2048, "texts per request; more get 413", metavar="N")
    max_body: int = option(16 << 20, "size of a request body after decompression; larger ones get 413", metavar="BYTES")
    read_timeout: float = option(
        30.0,
        "time to receive the head of a request, then the connection is closed; and its body, then 408",
        metavar="SECONDS",
    )
    deadline: float = option(60.0, "time to process a request, then 504; 0 for no limit", metavar="SECONDS")
    grace: float = option(
        30.0, "time to finish requests after SIGTERM; a second SIGTERM exits immediately", metavar="SECONDS"
    )
    log_requests: bool = option(False, "log the first 4096 bytes of each request body")
    api_keys: frozenset[str] = frozenset()  # empty: every request is accepted

    def __post_init__(self) -> None:
        for name, described in _OPTIONS.items():
            value, minimum = getattr(self, name), 1 if name.startswith("max_") else 0
            if described.type in ("int", "float") and not minimum <= value < math.inf:
                raise OptionError(f"{name} is out of range: {value}; pass a number from {minimum}")
            if described.choices is not None:
                check_choice(name, value, described.choices)
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
        unknown = sorted(values.keys() - _OPTIONS.keys())
        if unknown:
            raise OptionError(f"options are unknown: {', '.join(unknown)}; use {', '.join(FLAG_NAMES)}")
        return cls(**{name: convert(_OPTIONS[name], value) for name, value in values.items()}, api_keys=keys)


_OPTIONS = {described.name: described for described in describe(ServerOptions)}
FLAG_NAMES = (*_OPTIONS, "api_key", "api_key_file")  # accepted by `ServerOptions.from_mapping`


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of all options to a parser."""
    for title, description, names in GROUPS:
        group = parser.add_argument_group(title, description)
        for described in (_OPTIONS[name] for name in names):
            flag, help = "--" + described.name.replace("_", "-"), described.help
            if described.type == "bool":
                group.add_argument(flag, action="store_true", help=help)
            elif described.default == ():
                group.add_argument(flag, action="append", metavar=described.metavar, help=help)
            else:
                group.add_argument(
                    flag,
                    metavar=described.metavar,
                    choices=described.choices,
                    help=help if described.default is None else f"{help} (default: {described.default})",
                )
    keys = parser.add_argument_group(
        "API keys",
        f"Also read from {API_KEYS_VARIABLE}, separated by commas. Without keys, every request is accepted.\n"
        "/health and /metrics never need one.",
    )
    keys.add_argument("--api-key", action="append", metavar="KEY", help="accept this key; repeatable")
    keys.add_argument("--api-key-file", metavar="FILE", help="accept the keys in this file, one per line")


def read_flags(args: argparse.Namespace) -> ServerOptions:
    """Return the options of parsed flags."""
    values = {name: getattr(args, name) for name in FLAG_NAMES}
    return ServerOptions.from_mapping({name: value for name, value in values.items() if value is not None})


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
