"""The HTTP API: its routes, its errors in OpenAI's shape, and what happens at start and stop."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware

from llmquant import DriftReport
from llmquant_serve.api.chat_completions import ChatWriter
from llmquant_serve.api.completions import CompletionWriter
from llmquant_serve.api.error_handlers import add_error_handlers, engine_error
from llmquant_serve.api.plan import plan_chat, plan_completion
from llmquant_serve.api.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from llmquant_serve.api.responses import (
    ChatChunk,
    ChatCompletion,
    Completion,
    ErrorAnswer,
    HealthAnswer,
    ModelCard,
    ModelList,
    Text,
    Tokens,
)
from llmquant_serve.api.transport.addresses import THIS_MACHINE, Addresses
from llmquant_serve.api.transport.guards import Guard
from llmquant_serve.api.transport.streaming import EventStream, while_connected
from llmquant_serve.drift.recorder import Recorder
from llmquant_serve.engines.base import Engine, EngineError
from llmquant_serve.engines.isolation import isolated
from llmquant_serve.errors import ApiError, bad_request
from llmquant_serve.service import Service

UI_PATH = "/ui"
_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorAnswer, "description": why}
    for code, why in {
        400: "The request is wrong; the error names the parameter.",
        401: "The API key is missing or wrong.",
        403: "A page of another origin sent the request.",
        404: "No such model.",
        413: "The body is too large.",
        429: "Too many requests; see Retry-After.",
        500: "The request failed in the engine.",
        503: "The engine is not ready, or the server is shutting down.",
    }.items()
}


def create_app(
    service: Service,
    *,
    keys: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    ui: bool = False,
    reference: Service | None = None,
    root_path: str = "",
    trusted_proxies: Sequence[str] = THIS_MACHINE,
) -> FastAPI:
    """The application; its lifespan starts and closes the engine.

    Args:
        keys: accepted API keys; without any, requests need none.
        cors_origins: web origins whose pages may call the API; none by default.
        ui: leave ``/ui`` to a page that has a login of its own.
        reference: a second model that starts and stops with the first.
        root_path: the prefix under which a reverse proxy serves all paths.
        trusted_proxies: whose X-Forwarded headers are believed.
    """
    app = FastAPI(
        title="llmquant",
        version="1",
        lifespan=_lifespan(
            [s.engine for s in (service, reference) if s is not None], service.drift
        ),
        docs_url=None,
        redoc_url=None,
        responses=_ERRORS,
    )
    _add_generation(app, service)
    _add_models(app, service)
    _add_text(app, service)
    _add_monitoring(app, service)
    add_error_handlers(app)
    paths = frozenset(str(getattr(r, "path", "")) for r in app.routes)
    app.add_middleware(
        Guard,
        addresses=Addresses(root_path, trusted_proxies, cors_origins, UI_PATH if ui else None),
        keys=keys,
        max_body=service.limits.max_body,
        metrics=service.metrics,
        paths=paths,
        stopping=lambda: service.stopping,
    )
    if cors_origins:  # around the guard: a page may read why it was refused
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    return app


def _lifespan(
    engines: Sequence[Engine], drift: Recorder | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """What starts the engines with the application, and closes them with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for engine in engines:
            await engine.start()
        try:
            yield
        finally:
            for engine in engines:
                await engine.close()
            if drift is not None:  # after answers that the engines cut off
                await drift.close()

    return lifespan


def _add_generation(app: FastAPI, service: Service) -> None:
    # Without a schema: validators hold one against each event, not against the text of all.
    streamed: dict[str, Any] = {"content": {"text/event-stream": {}}}

    @app.post("/v1/completions", response_model=Completion, responses={200: streamed})
    async def completions(body: CompletionRequest, request: Request) -> Response:
        _check_ready(service)
        service.check_model(body.model)
        plan = await plan_completion(service, body)
        return await _answer(
            service, request, CompletionWriter(service, plan), len(plan.choices), stream=plan.stream
        )

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses={200: streamed})
    async def chat(body: ChatRequest, request: Request) -> Response:
        _check_ready(service)
        service.check_model(body.model)
        plan = await plan_chat(service, body)
        return await _answer(
            service, request, ChatWriter(service, plan), len(plan.choices), stream=plan.stream
        )


async def _answer(
    service: Service,
    request: Request,
    writer: CompletionWriter | ChatWriter,
    count: int,
    *,
    stream: bool,
) -> Response:
    """Enter the gate with ``count`` sequences and answer; a stream stays in it until it ends."""
    with ExitStack() as admission:
        admission.enter_context(service.gate.enter(count))
        aborted = service.metrics.aborted.inc
        if stream:
            return EventStream(
                _events(writer.stream()),
                admission.pop_all(),
                service.limits.stall_seconds,
                service.limits.keep_alive_seconds,
                aborted,
            )
        whole: Completion | ChatCompletion
        whole = await while_connected(request, writer.whole(), aborted)
        return Response(whole.model_dump_json(exclude_unset=True), media_type="application/json")


async def _events(
    parts: AsyncGenerator[Completion, None] | AsyncGenerator[ChatChunk, None],
) -> AsyncGenerator[bytes, None]:
    """Parts as server-sent events. If the request fails midway, the last event is the error, and
    there is no final [DONE]."""
    async with aclosing(parts):
        try:
            with isolated("this request failed while being answered"):
                async for part in parts:
                    yield b"data: " + part.model_dump_json(exclude_unset=True).encode() + b"\n\n"
        except EngineError as e:
            yield b"data: " + bytes(engine_error(e).response().body) + b"\n\n"
            return
    yield b"data: [DONE]\n\n"


def _check_ready(service: Service) -> None:
    """Refuse with a 503 while the engine takes no requests."""
    health = service.engine.health()
    if not health.ok:
        raise ApiError(
            503,
            f"the engine is not ready: {health.detail}",
            code="engine_unavailable",
            headers={"Retry-After": "5"},
        )


def _add_models(app: FastAPI, service: Service) -> None:
    def card() -> ModelCard:
        return ModelCard(
            id=service.model, created=service.created, max_model_len=service.engine.info.context
        )

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[card()])

    @app.get("/v1/models/{model:path}")
    async def model_card(model: str) -> ModelCard:
        service.check_model(model)
        return card()


def _add_text(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", response_model_exclude_unset=True)
    async def tokenize(body: TokenizeRequest) -> Tokens:
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("give exactly one of prompt and messages", "prompt")
        if body.messages is not None:
            ids = await service.text.encode_chat(
                body.messages, generation_prompt=body.add_generation_prompt is not False
            )
        else:
            ids = await service.text.encode(
                body.prompt or "", "prompt", special=body.add_special_tokens is not False
            )
        answer = Tokens(count=len(ids), max_model_len=service.engine.info.context, tokens=ids)
        if body.return_token_strs:
            answer.token_strs = [str(t) for t in service.text.tokenizer.convert_ids_to_tokens(ids)]
        return answer

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Text:
        service.check_model(body.model)
        return Text(
            prompt=service.text.decode(service.text.checked(body.tokens, "tokens"))
            if body.tokens
            else ""
        )


def _add_monitoring(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=HealthAnswer, responses={503: {"model": HealthAnswer}})
    async def health() -> Response:
        state, load = service.engine.health(), service.engine.load()
        answer = HealthAnswer(
            status="ok" if state.ok else "unavailable",
            engine=service.engine.name,
            model=service.model,
            detail=state.detail,
            restarts=state.restarts,
            running=load.running,
            waiting=load.waiting,
        )
        return Response(
            answer.model_dump_json(), 200 if state.ok else 503, media_type="application/json"
        )

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        return Response(
            service.metrics.render(
                service.engine,
                service.gate.open,
                None if service.drift is None else service.drift.report(),
            ),
            media_type=CONTENT_TYPE_LATEST,
        )

    @app.get("/drift")
    async def drift() -> DriftReport:
        if service.drift is None:
            raise ApiError(
                404, "this server does not watch drift; start it with --drift PROFILE",
                code="not_watched",
            )  # fmt: skip
        return service.drift.report()
