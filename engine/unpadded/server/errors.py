"""What can be wrong with an exchange, its HTTP status, and how each interface puts it in a body."""

from __future__ import annotations

from typing import Any, Literal

from unpadded.errors import DeadlineError, OutputError, OverloadedError, UnpaddedError, WorkerError

Interface = Literal["openai", "tei", "nomic"]

STATUS = {
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
    "overloaded": 429,
    "internal": 500,
    "no_device": 503,
    "draining": 503,
    "deadline": 504,
}
# OpenAI's API answers everything that is wrong with a request's values with 400.
OPENAI_STATUS = STATUS | {"invalid": 400, "too_many_inputs": 400, "too_long": 400}
OPENAI_TYPE = {
    401: "authentication_error",
    424: "server_error",
    429: "rate_limit_error",
    503: "server_error",
    504: "server_error",
}
OPENAI_CODE = {
    "unauthorized": "invalid_api_key",
    "unknown_model": "model_not_found",
    "too_long": "context_length_exceeded",
    "overloaded": "rate_limit_exceeded",
}
TEI_TYPE = {413: "Validation", 422: "Validation", 424: "Backend", 429: "Overloaded", 503: "Unhealthy"}


class Problem(Exception):
    """An exchange that ends in an error; `kind` is a key of STATUS."""

    def __init__(self, kind: str, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after  # seconds


def as_problem(error: BaseException) -> Problem:
    """The problem that an exception stands for; "internal" for what nobody raised on purpose."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, OverloadedError):
        return Problem("overloaded", str(error))
    if isinstance(error, DeadlineError | TimeoutError):
        return Problem("deadline", str(error))
    if isinstance(error, OutputError | WorkerError):
        return Problem("model_failed", str(error))
    if isinstance(error, UnpaddedError):
        return Problem("invalid", str(error))
    return Problem("internal", "the server failed on this request; its log says why")


def status(problem: Problem, interface: Interface) -> int:
    return (OPENAI_STATUS if interface == "openai" else STATUS)[problem.kind]


def body(problem: Problem, interface: Interface) -> dict[str, Any]:
    """The error body of OpenAI, of text-embeddings-inference, or of nomic."""
    code, message = status(problem, interface), str(problem)
    if interface == "openai":
        kind = OPENAI_TYPE.get(code, "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": None, "code": OPENAI_CODE.get(problem.kind)}}
    if interface == "tei":
        return {"error": message, "error_type": TEI_TYPE.get(code, "Backend" if code >= 500 else "Validation")}
    return {"detail": message}
