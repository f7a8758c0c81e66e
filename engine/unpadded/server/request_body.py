"""A request's body: limits of its size and time, decompression, and JSON to the request's type.

A field that clients of other APIs send is mapped to the type's own field of this meaning, ignored if it cannot change
the response, and otherwise rejected like any unknown field.
"""

import asyncio
import codecs
import re
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request as Received

from unpadded.server.api.fields import Request
from unpadded.server.errors import HTTPError, check_maximum
from unpadded.server.service import ServedModel, Service

GZIP_WBITS = 16 + zlib.MAX_WBITS  # selects gzip framing in zlib
# Names of one option in the APIs of OpenAI, TEI, nomic, Cohere, Voyage, Jina and NVIDIA.
SYNONYMS = (
    ("task", "task_type", "prompt_name", "input_type"),
    ("dimensions", "dimensionality", "output_dimension"),
    ("truncate", "truncation"),
    ("normalize", "normalized"),
    ("embedding_type", "output_dtype", "encoding_type"),
    ("top_n", "top_k"),
)
TRUNCATE_WORDS: dict[str, dict[str, Any]] = {
    "NONE": {"truncate": False},
    "END": {"truncate": True},
    "START": {"truncate": True, "truncation_direction": "left"},
}
IGNORED = frozenset({"user", "options", "metadata", "request_id", "priority", "safety_identifier", "modality"})
# Ignored if they ask for what is done anyway.
DEFAULTS: dict[str, object] = {
    "add_special_tokens": True,
    "late_chunking": False,
    "return_embeddings": False,
    "embedding_type": "float",
    "enable_auto_chunking": False,
    "output_dtype": "float",
}
# In an escape or in bytes. JSON decoders say "truncated" or "invalid continuation byte", which does not help.
LONE_SURROGATE = re.compile(rb"(?is)\\ud[89ab]..(?!\\ud[c-f])|(?<!\\ud[89ab]..)\\ud[c-f]..|\xed[\xa0-\xbf].")


async def read_body(request: Received, hold: Callable[[int], None], *, max_bytes: int, seconds: float) -> bytes:
    """Return the body as received; `hold` is called with the size of each part. ClientDisconnect if it is not sent."""
    # httptools has checked that it is a number below 2 ** 64; int() raises for thousands of leading zeros.
    _check_size(int(request.headers.get("content-length", "0").lstrip("0") or "0"), max_bytes)
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                _check_size(size, max_bytes)
                hold(len(part))
                parts.append(part)
    except TimeoutError as error:
        late = f"the body did not arrive: {size} bytes in {seconds:g} s; send it faster"
        raise HTTPError("slow_body", late) from error
    return b"".join(parts)


def decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Decode a body by its Content-Encoding, without ever producing more than max_bytes + 1 bytes."""
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip"):
        raise HTTPError("unsupported_encoding", f"the Content-Encoding is not supported: {encoding!r}; use gzip")
    stream = zlib.decompressobj(GZIP_WBITS)
    try:
        plain = stream.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise HTTPError("malformed", f"the body is not gzip: {error}; compress it again") from error
    _check_size(len(plain), max_bytes)
    if not stream.eof or stream.unused_data:
        raise HTTPError("malformed", f"the gzip body is not one member: {len(body)} bytes; send all of it, as one")
    return plain


def _check_size(size: int, max_bytes: int) -> None:
    check_maximum("too_large", "the body is too large", size, max_bytes, "bytes", "send fewer texts per request")


def decode_request(
    body: bytes, type_: type[Request], service: Service, head: str
) -> tuple[Request, ServedModel, list[str]]:
    """Return the request, its model for a head, and the names of its fields that were ignored."""
    find = partial(service.find, head=head)
    body = body.removeprefix(codecs.BOM_UTF8)
    try:
        try:
            request = msgspec.json.decode(body, type=type_)
            return request, find(request.model), []
        except msgspec.ValidationError:
            if not isinstance(given := msgspec.json.decode(body), dict):
                raise
            model = find(name if isinstance(name := given.get("model"), str) else None)
            fields, ignored = _adapt(given, set(type_.__struct_encode_fields__), model.has_prompts)
            request = msgspec.convert(fields, type_)
            return request, find(request.model), ignored
    except msgspec.ValidationError as error:
        raise HTTPError("invalid", f"the request does not match its schema: {error}; see /openapi.json") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        surrogate = LONE_SURROGATE.search(body)
        what = str(error) if surrogate is None else f"it has a lone surrogate at byte {surrogate.start()}"
        raise HTTPError("malformed", f"the body is not JSON: {what}; send a JSON object in UTF-8") from error


def _adapt(given: dict[str, Any], names: set[str], has_prompts: bool) -> tuple[dict[str, Any], list[str]]:
    """Return the fields with the request type's names, and the names of those that are ignored."""
    parameters: dict[str, Any] = {}
    if "parameters" not in names and isinstance(given.get("parameters"), dict | None):
        parameters = given.pop("parameters", None) or {}
    found: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in [*given.items(), *parameters.items()]:
        own = next((own for group in SYNONYMS if name in group for own in group if own in names), name)
        if name == "input_type" and not has_prompts:
            ignored.append(name)
        elif own in names and (own == name or value is not None):
            words = TRUNCATE_WORDS.get(str(value).upper()) if own == "truncate" else None
            for key, option in (words or {own: value}).items():
                if found.setdefault(key, option) != option:
                    raise HTTPError("invalid", f"{key} has two values: {found[key]!r} and {option!r}; send one")
        elif value is None or name in IGNORED or value == DEFAULTS.get(name, msgspec.UNSET):
            ignored.append(name)
        else:
            found[name] = value  # `msgspec.convert` names it
    return found, ignored
