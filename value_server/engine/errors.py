"""Everything that the server tells a client it did wrong, or cannot do now.

RequestError 422 ┬ UnknownModelError 404
                 ├ UnknownSessionError 404
                 ├ BlindModelError 409
                 ├ MalformedError 400
                 ├ UnauthorizedError 401
                 ├ TooLargeError 413
                 ├ ClientGoneError 499
                 ├ BusyError 503
                 └ ModelError 500
"""

from collections.abc import Sequence
from typing import Any


class RequestError(Exception):
    """A request that cannot be served. `field`: the part of the request at fault, if one is."""

    status = 422
    type = "invalid_request"

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class UnknownModelError(RequestError):
    """The path names no model that this server has."""

    status = 404
    type = "unknown_model"


class UnknownSessionError(RequestError):
    status = 404
    type = "unknown_session"


class BlindModelError(RequestError):
    """A picture for a model that reads text alone."""

    status = 409
    type = "text_only_model"


class MalformedError(RequestError):
    """A body that cannot be decoded."""

    status = 400
    type = "malformed_request"


class UnauthorizedError(RequestError):
    status = 401
    type = "unauthorized"


class TooLargeError(RequestError):
    status = 413
    type = "body_too_large"


class ClientGoneError(RequestError):
    """Nobody reads the answer; the status is for the metrics."""

    status = 499
    type = "client_gone"


class BusyError(RequestError):
    """No slots, no sessions or no place in the queue: try again."""

    status = 503
    type = "busy"


class ModelError(RequestError):
    """The forward pass failed or gave a number that is none."""

    status = 500
    type = "model_error"


class PassFailedError(Exception):
    """A forward pass of `rows`, with so many tokens and candidates, raised; nobody is told this."""

    def __init__(self, rows: Sequence[Any], queries: int, error: Exception) -> None:
        super().__init__(f"a forward pass of {len(rows)} rows, {queries} tokens, failed: {error}")
        self.rows = rows
        self.queries = queries
