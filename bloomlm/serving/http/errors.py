"""Errors as answers, in the form that OpenAI's clients turn into exceptions.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

CLIENT_LEFT = 499
"""Status in the log of a request whose client disconnected, as nginx writes it."""

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that gets an error as its answer.

    Args:
        status: HTTP status.
        message: what was found, what was expected, what to do; a user of OpenAI's client reads it.
        param: the field of the body that is wrong.
        code: a word for programs.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The answer as JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def bad_request(message: str, param: str | None = None) -> ApiError:
    """Status 400: a body that cannot be served."""
    return ApiError(400, message, param=param, code="invalid_value")
