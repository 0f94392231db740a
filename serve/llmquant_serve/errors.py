"""Errors of the OpenAI API: a status and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.responses import JSONResponse

from llmquant.errors import LlmquantError


class ApiError(LlmquantError):
    """An answer other than 200.

    Args:
        parameter: the request's parameter that is at fault.
        code: names the error for programs: ``context_length_exceeded``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        parameter: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message = _encodable(message)
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.parameter = None if parameter is None else _encodable(parameter)
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        error = {
            "message": self.message,
            "type": _error_type(self.status),
            "param": self.parameter,
            "code": self.code,
        }
        return JSONResponse({"error": error}, self.status, self.headers)


def bad_request(message: str, parameter: str | None = None, code: str | None = None) -> ApiError:
    """A 400: the request cannot be right as it is."""
    return ApiError(400, message, parameter=parameter, code=code)


def _encodable(text: str) -> str:
    """A text that an answer can hold: half of a surrogate pair, which a request may have, is
    escaped."""
    return text.encode(errors="backslashreplace").decode()


def _error_type(status: int) -> str:
    names = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    return names.get(status, "invalid_request_error" if status < 500 else "server_error")
