"""The flags of `unpadded serve`, and what they say. Imports nothing heavy."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from unpadded.errors import OptionError

KEYS_VARIABLE = "UNPADDED_API_KEYS"

DESCRIPTION = """\
Serve a model's embeddings over HTTP to clients of OpenAI, nomic and text-embeddings-inference.
All requests share batches under the model's token budget; no request waits for another's whole work."""

EPILOG = """\
interfaces:
  OpenAI    POST /v1/embeddings, GET /v1/models        base_url="http://HOST:PORT/v1"
  nomic     POST /v1/embedding/text, GET /v1/user      ATLAS_API_PATH=http://HOST:PORT
  TEI       POST /embed /embed_all /similarity /tokenize /decode, GET /info /health /metrics
  all       GET /openapi.json; requests may come as gzip or zstd; with "Accept: application/octet-stream" vectors
            come as raw little-endian rows, their shape in x-shape; as Parquet with "application/vnd.apache.parquet",
            as an Arrow stream with "application/vnd.apache.arrow.stream"

answers to trouble:
  400, 413, 422  the request is malformed, too large, or asks for what the model does not offer
  401, 404       no valid key; no such model or path
  424            the model failed on these texts (others in the same batch are not harmed)
  429            too many requests or queued tokens; Retry-After says when to come back
  503, 504       the server is draining after SIGTERM, or no device is left; the deadline passed, the work was dropped

several devices:
  --device all, or cuda:0,cuda:1, gives each a process; they share the queue. One that dies is started again and its
  batches run on another: no request is lost. unpadded_devices in /metrics counts those that take batches, and
  /health is 503 while none does.

examples:
  unpadded serve nomic-ai/nomic-embed-text-v1.5 --alias text-embedding-3-small --default-task search_document
  unpadded serve ./model --host 0.0.0.0 --port 80 --api-key-file keys.txt --long-input refuse
"""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How to serve, whatever the model."""

    host: str = "127.0.0.1"
    port: int = 8080
    alias: tuple[str, ...] = ()
    default_task: str | None = None
    long_input: Literal["truncate", "refuse"] = "truncate"
    max_concurrent_requests: int = 512
    max_queued_tokens: int = 1_000_000
    max_inputs: int = 2048
    max_body: int = 16 << 20  # bytes, once decompressed
    read_timeout: float = 30.0  # seconds for a request's head to arrive, and for its body
    deadline: float = 60.0  # seconds for a request's work; 0: none
    grace: float = 30.0  # seconds for what is under way once SIGTERM came
    keys: frozenset[str] = frozenset()  # none: everybody is let in
    cors_origin: tuple[str, ...] = ()
    otlp_endpoint: str | None = None
    log_requests: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags, with the defaults of ServerOptions."""
    default = ServerOptions()
    where = parser.add_argument_group("where")
    where.add_argument("--host", default=default.host, help="address to listen on (default: %(default)s)")
    where.add_argument("--port", type=int, default=default.port, help="0 takes a free one (default: %(default)s)")
    where.add_argument("--tls-cert", type=Path, metavar="PEM", help="serve HTTPS with this certificate chain")
    where.add_argument("--tls-key", type=Path, metavar="PEM", help="the certificate's private key")
    where.add_argument(
        "--cors-origin", action="append", default=[], metavar="URL", help="let pages of this origin call; * for all"
    )

    names = parser.add_argument_group("names and defaults")
    names.add_argument("--alias", action="append", default=[], metavar="NAME", help="a further name of the model")
    names.add_argument("--default-task", metavar="T", help="the task of requests that name none")
    names.add_argument(
        "--long-input",
        choices=["truncate", "refuse"],
        default=default.long_input,
        help="texts beyond the model's length: cut and counted, or 413 (default: %(default)s)",
    )

    watch = parser.add_argument_group(
        "watching",
        "Prometheus metrics are at /metrics; the log is JSON lines on stderr and quotes no request unless asked.",
    )
    watch.add_argument("--log-requests", action="store_true", help="quote the start of each request's body in the log")
    watch.add_argument(
        "--otlp-endpoint", metavar="URL", help="send a span a request to this OpenTelemetry collector (extra: traces)"
    )

    limits = parser.add_argument_group("limits")
    for name, unit, text in (
        ("max_concurrent_requests", "N", "requests under way at once; more get 429"),
        ("max_queued_tokens", "N", "tokens waiting for a batch; more get 429"),
        ("max_inputs", "N", "texts of a request; more get 413"),
        ("max_body", "BYTES", "of a request, decompressed; more gets 413"),
        ("read_timeout", "SECONDS", "for a request's head, then it is cut off; for its body, then 408"),
        ("deadline", "SECONDS", "for a request's work, then 504; 0 for none"),
        ("grace", "SECONDS", "for requests under way after SIGTERM; a second SIGTERM ends at once"),
    ):
        value = getattr(default, name)
        kind = _positive if isinstance(value, int) else _seconds
        flag = "--" + name.replace("_", "-")
        limits.add_argument(flag, type=kind, default=value, metavar=unit, help=f"{text} (default: %(default)s)")

    keys = parser.add_argument_group(
        "keys",
        f"Also from {KEYS_VARIABLE}, comma-separated. Without any, everybody is let in; /health and /metrics always.",
    )
    keys.add_argument("--api-key", action="append", default=[], metavar="KEY", help="may be given several times")
    keys.add_argument("--api-key-file", type=Path, metavar="FILE", help="a key a line")


def read_options(args: argparse.Namespace) -> ServerOptions:
    """ServerOptions of parsed flags and, for keys, a file and the environment. OptionError for what does not fit."""
    if (args.tls_cert is None) != (args.tls_key is None):
        raise OptionError(
            f"a certificate needs its key: --tls-cert {args.tls_cert}, --tls-key {args.tls_key}; give both or neither"
        )
    given = {field.name: getattr(args, field.name) for field in fields(ServerOptions) if field.name != "keys"}
    given |= {"alias": tuple(args.alias), "cors_origin": tuple(args.cors_origin)}
    return ServerOptions(**given, keys=_keys(args))


def _keys(args: argparse.Namespace) -> frozenset[str]:
    keys = [*args.api_key, *os.environ.get(KEYS_VARIABLE, "").split(",")]
    if args.api_key_file is not None:
        try:
            lines = args.api_key_file.read_text().splitlines()
        except OSError as error:
            raise OptionError(f"the key file cannot be read: {args.api_key_file}, {error}; correct the path") from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise OptionError(f"the key file holds no key: {args.api_key_file}; write one a line, or leave it out")
        keys += found
    return frozenset(key for key in keys if key)


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"not a whole number from 1: {value!r}")
    return int(value)


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"not a number of seconds: {value!r}")
    return seconds
