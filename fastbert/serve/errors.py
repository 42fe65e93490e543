"""What can go wrong with a request, and how each dialect says it. Every error is JSON.

`tei` is text-embeddings-inference's native body, `tei-flat` what it sends on its OpenAI routes, `openai` the envelope
of OpenAI's own API, `cohere` that of Cohere's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import orjson


class ServeError(Exception):
    """An answer other than 200.

    Attributes:
        message: for the person who reads it: what was given, what is possible.
        status: HTTP status of TEI's dialects.
        error_type: `error_type` of TEI's dialects.
        failure: the `err` label of `te_request_failure`.
        openai: (status, type, code) of OpenAI's dialect.
        param: the field that is at fault, where there is one.
        headers: sent with the answer.
    """

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "Internal"
    failure: str = "inference"
    openai: ClassVar[tuple[int, str, str | None]] = (500, "server_error", None)

    def __init__(self, message: str, param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers = dict(headers or {})


class InternalError(ServeError):
    """A defect of ours; the log has the traceback."""


class EmptyInput(ServeError):
    """Nothing to compute."""

    status, error_type, failure = 400, "Empty", "validation"
    openai = (400, "invalid_request_error", None)


class BadJSON(ServeError):
    """The body is not JSON."""

    status, error_type, failure = 400, "Validation", "validation"
    openai = (400, "invalid_request_error", None)


class BadIds(ServeError):
    """Token ids that the model does not have."""

    status, error_type, failure = 400, "Validation", "validation"
    openai = (400, "invalid_request_error", "invalid_token_ids")


class Invalid(ServeError):
    """JSON of another shape, or a value that does not fit."""

    status, error_type, failure = 422, "Validation", "validation"
    openai = (400, "invalid_request_error", None)


class TooManyInputs(Invalid):
    """More inputs than one request may have."""

    failure = "batch_size"


class TokenizerError(ServeError):
    """The text cannot be tokenised."""

    status, error_type, failure = 422, "Tokenizer", "tokenization"
    openai = (400, "invalid_request_error", None)


class Unauthorized(ServeError):
    """No key, or none that is known."""

    status, error_type, failure = 401, "Unauthorized", "unauthorized"
    openai = (401, "invalid_request_error", "invalid_api_key")


class NotFound(ServeError):
    """No such route."""

    status, error_type, failure = 404, "NotFound", "validation"
    openai: ClassVar[tuple[int, str, str | None]] = (404, "invalid_request_error", None)


class ModelNotFound(NotFound):
    """No such model."""

    openai = (404, "invalid_request_error", "model_not_found")


class MethodNotAllowed(ServeError):
    """The route has other methods."""

    status, error_type, failure = 405, "MethodNotAllowed", "validation"
    openai = (405, "invalid_request_error", None)


class SlowBody(ServeError):
    """The body did not arrive in time."""

    status, error_type, failure = 408, "Timeout", "validation"
    openai = (408, "timeout_error", None)


class BodyTooLarge(ServeError):
    """The body is longer than the limit."""

    status, error_type, failure = 413, "Validation", "validation"
    openai = (413, "invalid_request_error", None)


class WrongContentType(ServeError):
    """The body is not declared as JSON."""

    status, error_type, failure = 415, "Validation", "validation"
    openai = (415, "invalid_request_error", None)


class WrongModel(ServeError):
    """The route asks for what this kind of model does not compute."""

    status, error_type, failure = 424, "Backend", "model_type"
    openai = (400, "invalid_request_error", None)


class NonFiniteOutput(ServeError):
    """The model answered NaN or an infinity: never sent."""

    status, error_type, failure = 424, "Backend", "missing_values"
    openai = (500, "server_error", None)


class BackendError(ServeError):
    """The computation failed."""

    status, error_type, failure = 424, "Backend", "inference"
    openai = (500, "server_error", None)


class Overload(ServeError):
    """No room in the queue: come back after `Retry-After` seconds."""

    status, error_type, failure = 429, "Overloaded", "overloaded"
    openai = (429, "rate_limit_exceeded", "rate_limit_exceeded")


class NotReady(ServeError):
    """Starting or draining."""

    status, error_type, failure = 503, "Unhealthy", "overloaded"
    openai = (503, "server_error", None)


class TooLate(ServeError):
    """The request's own deadline passed."""

    status, error_type, failure = 504, "Timeout", "dropped"
    openai = (504, "timeout_error", None)


DIALECTS = ("tei", "tei-flat", "openai", "cohere")


@dataclass(frozen=True)
class ErrorAnswer:
    """An error as it goes over the wire."""

    status: int
    body: bytes
    headers: dict[str, str]


def dialect_of(path: str, compat: str) -> str:
    """Which dialect a path's errors speak; `compat` is the server's setting, `openai` or `tei`."""
    if path.startswith("/v2/"):
        return "cohere"
    if path.startswith("/v1/") or path in ("/embeddings", "/classify", "/models"):
        return "tei-flat" if compat == "tei" else "openai"
    return "tei"


def render(error: ServeError, dialect: str) -> ErrorAnswer:
    """The status, body and headers of an error in a dialect."""
    status, kind, code = error.openai
    body: dict[str, Any]
    if dialect == "openai":
        body = {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}
    else:
        status = error.status
        if dialect == "tei":
            body = {"error": error.message, "error_type": error.error_type}
        elif dialect == "tei-flat":
            body = {"message": error.message, "code": status, "type": error.error_type}
        else:
            body = {"message": error.message}
    return ErrorAnswer(status, orjson.dumps(body), {"content-type": "application/json", **error.headers})
