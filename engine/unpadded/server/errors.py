"""HTTP errors: the status code of each kind, and the error body of each API."""

from typing import Any, Literal

import orjson

from unpadded.errors import OutputError, OverloadedError, UnpaddedError

Api = Literal["openai", "tei", "nomic", "cohere"]  # cohere: also the rerankers of Jina and Voyage, and its chunks

STATUS_CODES = {
    "malformed": 400,
    "invalid": 422,
    "unauthorized": 401,
    "unknown_model": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "slow_body": 408,
    "too_many_inputs": 413,
    "too_long": 413,
    "too_large": 413,
    "unsupported_encoding": 415,
    "model_failed": 424,
    "no_scores": 424,  # as TEI
    "overloaded": 429,
    "head_too_large": 431,
    "internal": 500,
    "not_implemented": 501,
    "no_device": 503,
    "draining": 503,
    "deadline": 504,
}
# The APIs of OpenAI and Cohere answer 400 for every invalid value in a request.
BAD_REQUESTS = {"invalid", "too_many_inputs", "too_long", "no_scores"}
OPENAI_TYPES = {401: "authentication_error", 424: "server_error", 429: "rate_limit_error"}
OPENAI_CODES = {
    "unauthorized": "invalid_api_key",
    "unknown_model": "model_not_found",
    "too_long": "context_length_exceeded",
    "overloaded": "rate_limit_exceeded",
}
TEI_TYPES = {413: "Validation", 422: "Validation", 424: "Backend", 429: "Overloaded", 503: "Unhealthy"}


def api_of_path(path: str) -> Api:
    """Return the API whose error bodies a client expects that requests a path without an endpoint."""
    if path in ("/v1/embed", "/v1/rerank") or path.startswith("/v2/"):
        return "cohere"
    return "openai" if path.startswith("/v1/") else "tei"


def check_maximum(kind: str, what: str, count: int, maximum: int, unit: str, advice: str) -> None:
    """Raise HTTPError if a count exceeds its maximum."""
    if count > maximum:
        raise HTTPError(kind, f"{what}: {count}, maximum {maximum} {unit}; {advice}")


class HTTPError(Exception):
    """An error response. `kind` is a key of STATUS_CODES."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def encode(self, api: Api) -> tuple[int, bytes]:
        """Return the status code, and the JSON body as the API defines it."""
        code, message = STATUS_CODES[self.kind], str(self)
        body: dict[str, Any] = {"detail": message}  # as nomic, and Jina, whose embeddings have OpenAI's route
        if api in ("openai", "cohere") and self.kind in BAD_REQUESTS:
            code = 400
        if api == "cohere":
            body["message"] = message
        elif api == "openai":
            type_ = OPENAI_TYPES.get(code, "server_error" if code >= 500 else "invalid_request_error")
            body["error"] = {"message": message, "type": type_, "param": None, "code": OPENAI_CODES.get(self.kind)}
        elif api == "tei":
            body = {"error": message, "error_type": TEI_TYPES.get(code, "Backend" if code >= 500 else "Validation")}
        return code, orjson.dumps(body)


def to_http_error(error: BaseException) -> HTTPError:
    """Return the HTTP error for any exception."""
    if isinstance(error, HTTPError):
        return error
    kinds = {OverloadedError: "overloaded", OutputError: "model_failed", UnpaddedError: "invalid"}
    kind = next((kind for type_, kind in kinds.items() if isinstance(error, type_)), None)
    message = str(error) if kind else "the server failed on this request; see its log"
    return HTTPError(kind or "internal", message)
