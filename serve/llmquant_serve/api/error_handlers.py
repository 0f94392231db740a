"""Every error that a route can raise, as an answer in OpenAI's shape."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from llmquant_serve.api.streaming import DisconnectedError
from llmquant_serve.engines.base import EngineError, RefusedError
from llmquant_serve.errors import ApiError, bad_request
from llmquant_serve.generation.errors import TextError


def add_error_handlers(app: FastAPI) -> None:
    """Register what turns each kind of error into an answer."""

    async def api(_: Request, e: Exception) -> Response:
        assert isinstance(e, ApiError)
        return e.response()

    async def invalid(_: Request, e: Exception) -> Response:
        assert isinstance(e, RequestValidationError)
        return _invalid_request(e).response()

    async def http(_: Request, e: Exception) -> Response:
        assert isinstance(e, HTTPException)
        return ApiError(e.status_code, str(e.detail), headers=e.headers).response()

    async def text(_: Request, e: Exception) -> Response:
        assert isinstance(e, TextError)
        return bad_request(str(e), e.parameter).response()

    async def engine(_: Request, e: Exception) -> Response:
        assert isinstance(e, EngineError)
        return engine_error(e).response()

    async def disconnected(_: Request, e: Exception) -> Response:
        return JSONResponse({}, 499)  # nobody reads it

    handlers = (
        (ApiError, api),
        (RequestValidationError, invalid),
        (HTTPException, http),
        (TextError, text),
        (EngineError, engine),
        (DisconnectedError, disconnected),
    )
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)


def engine_error(e: EngineError) -> ApiError:
    """A 400 where the engine refuses the request, else a 500."""
    if isinstance(e, RefusedError):
        return bad_request(str(e))
    return ApiError(500, str(e), code="engine_error")


def _invalid_request(e: RequestValidationError) -> ApiError:
    """The first thing that is wrong, by parameter: ``messages.0.content: …``."""
    first = e.errors()[0]
    if first["type"] == "json_invalid":
        return bad_request(
            f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}",
            code="invalid_json",
        )
    where = ".".join(str(part) for part in first["loc"] if part != "body") or None
    if first["type"] == "extra_forbidden":
        return bad_request(f"unrecognized parameter: {where}", where, "unknown_parameter")
    return bad_request(f"{where or 'body'}: {first['msg']}", where, "invalid_value")
