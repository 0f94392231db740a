"""Every error that a route can raise, as an answer in OpenAI's shape."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from llmquant_serve.api.refusals import refusal
from llmquant_serve.api.requests import BODIES
from llmquant_serve.api.transport.streaming import DisconnectedError
from llmquant_serve.engines.base import EngineError, RefusedError, StoppedError
from llmquant_serve.errors import ApiError, bad_request
from llmquant_serve.generation.errors import TextError


def add_error_handlers(app: FastAPI) -> None:
    """Register what turns each kind of error into an answer."""

    async def api(_: Request, e: Exception) -> Response:
        assert isinstance(e, ApiError)
        return e.response()

    async def invalid(request: Request, e: Exception) -> Response:
        assert isinstance(e, RequestValidationError)
        model = BODIES.get(request.scope["route"].path, BaseModel)
        return refusal(e.errors(), e.body, model).response()

    async def http(request: Request, e: Exception) -> Response:
        assert isinstance(e, HTTPException)
        return _http_error(request, e).response()

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


def _http_error(request: Request, e: HTTPException) -> ApiError:
    """An error of the framework, in words that say what it was about."""
    message, code, path = str(e.detail), None, request.scope["path"]
    if e.status_code == 400:  # FastAPI's only one: the body, for another reason than its syntax
        message, code = (
            f"the body cannot be read as JSON: {e.__cause__ or e.detail}",
            "invalid_json",
        )
    elif e.status_code == 404:
        message, code = f"this server has no {path}; /openapi.json lists what it has", "not_found"
    elif e.status_code == 405:
        allowed = (e.headers or {}).get("Allow", "")
        message = f"{path} takes {allowed}, not {request.method}"
    return ApiError(e.status_code, message, code=code, headers=e.headers)


def engine_error(e: EngineError) -> ApiError:
    """A 400 where the engine refuses the request, a 503 where it has stopped, else a 500."""
    if isinstance(e, RefusedError):
        return bad_request(str(e))
    if isinstance(e, StoppedError):
        return ApiError(503, str(e), code="engine_unavailable", headers={"Retry-After": "5"})
    return ApiError(500, str(e), code="engine_error")
