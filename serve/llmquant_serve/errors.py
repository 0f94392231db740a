"""Errors as the OpenAI API words them: ``{"error": {"message", "type", "param", "code"}}`` with a
fitting status."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.responses import JSONResponse


class ApiError(Exception):
    """An answer other than 200.

    Args:
        parameter: the request's parameter that is at fault.
        code: a word for programs.
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
        super().__init__(message)
        self.status, self.message, self.parameter, self.code = status, message, parameter, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        return {
            "error": {
                "message": self.message,
                "type": _kind(self.status),
                "param": self.parameter,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def bad(message: str, parameter: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, parameter=parameter, code=code)


def _kind(status: int) -> str:
    names = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    return names.get(status, "invalid_request_error" if status < 500 else "server_error")
