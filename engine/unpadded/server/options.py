"""The options of a server. Imports nothing heavy."""
# ruff: noqa: RUF009

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unpadded.errors import OptionError
from unpadded.options import check_choice, convert, describe, option

API_KEYS_VARIABLE = "UNPADDED_API_KEYS"
LongInput = Literal["truncate", "reject"]


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of a server that do not depend on the model. OptionError for an invalid value."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8080, "port to listen on; 0 selects a free one")
    tls_cert: str | None = option(None, "serve HTTPS with this certificate chain", metavar="PEM")
    tls_key: str | None = option(None, "private key of the certificate", metavar="PEM")
    cors_origin: tuple[str, ...] = option((), "allow web pages of this origin, * for all; repeatable", metavar="URL")
    alias: tuple[str, ...] = option((), "additional name of the models; repeatable", metavar="NAME")
    default_task: str | None = option(None, "task of requests that name none, in models that have it", metavar="TASK")
    long_input: LongInput = option("truncate", "truncate and count too long texts, or reject them", literal=LongInput)
    max_concurrent_requests: int = option(512, "requests in progress; further ones get 429", metavar="N")
    max_queued_tokens: int = option(1_000_000, "tokens waiting for a batch; further ones get 429", metavar="N")
    max_inputs: int = option(2048, "texts per request; more get 413, or 400 over OpenAI's API", metavar="N")
    max_body: int = option(16 << 20, "size of a request body after decompression; larger ones get 413", metavar="BYTES")
    read_timeout: float = option(30.0, "time to receive a head, or a body, which otherwise gets 408", metavar="SECONDS")
    send_timeout: float = option(30.0, "time for a client to read 1 MiB, then it is disconnected", metavar="SECONDS")
    deadline: float = option(60.0, "time to process a request, then 504; 0 for no limit", metavar="SECONDS")
    grace: float = option(30.0, "time to finish requests after SIGTERM; a second one exits at once", metavar="SECONDS")
    log_requests: bool = option(False, "log the first 4096 bytes of each request body")
    api_keys: frozenset[str] = frozenset()  # empty: every request is accepted

    def __post_init__(self) -> None:
        for name, described in _OPTIONS.items():
            value, minimum = getattr(self, name), 1 if name.startswith("max_") else 0
            if described.type in ("int", "float") and not minimum <= value < math.inf:
                raise OptionError(f"{name} is out of range: {value}; pass a number from {minimum}")
            if described.choices is not None:
                check_choice(name, value, described.choices)
        if self.port > 65535:
            raise OptionError(f"port is out of range: {self.port}; pass a number from 0 to 65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            given = f"--tls-cert {self.tls_cert}, --tls-key {self.tls_key}"
            raise OptionError(f"HTTPS needs a certificate and its key: {given}; pass both or neither")

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


def _read_api_keys(keys: str | list[str], file: str | Path | None) -> frozenset[str]:
    """Return the keys of all sources. OptionError for a source without one: it would open the server to everybody."""
    sources: list[tuple[str, list[str]]] = [("--api-key", [key]) for key in ([keys] if isinstance(keys, str) else keys)]
    if API_KEYS_VARIABLE in os.environ:
        sources.append((API_KEYS_VARIABLE, os.environ[API_KEYS_VARIABLE].split(",")))
    if file is not None:
        try:
            sources.append((str(file), Path(file).read_text("utf-8").splitlines()))
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"the API key file cannot be read: {file}, {error}; pass a file in UTF-8") from error
    found: set[str] = set()
    for source, values in sources:
        stripped = {value.strip() for value in values} - {""}
        if not stripped:
            raise OptionError(f"{source} has no API key: {values}; add a key or omit it")
        if any(not key.isprintable() for key in stripped):  # undecodable bytes of the environment are surrogates
            raise OptionError(f"an API key of {source} is not printable UTF-8; use another key")
        found |= stripped
    return frozenset(found)
