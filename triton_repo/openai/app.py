"""The OpenAI API over a server's `ensemble`: `ssv-serve --openai-port` starts it.

POST /v1/chat/completions, /v1/completions and /v1/responses, streamed or not; GET /v1/models and /v1/models/{id};
POST /tokenize and /detokenize, as vLLM has them; GET /version; GET /metrics: what the server's processes count; GET /:
a page to look at answers token by token, unless it is left out (`ssv.triton_repo.openai.page`); GET /health: 200 when
the server is ready, else 503; GET /live: 200. Where there is GET there is HEAD. With keys (`--api-key-file`) all but
the last three ask for one.

A model is a bundle's name, and after a colon how it is decoded: NAME (as NAME:premium), NAME:balanced, NAME:turbo, and
for comparison NAME:METHOD with any other method of `ssv.runtime.methods`; NAME:medusa where the bundle has heads.

What is left out, or null wherever it stands but in a JSON schema, is as OpenAI has it: temperature 1.0, top_p 1.0, a
seed that nobody knows, and 16 tokens for /v1/completions; /v1/chat/completions takes as many as prompt and limits
leave. A negative seed counts modulo 2**64. The texts of a message's parts are joined by line feeds, and the role
"developer" is "system".

A completion's prompt may be token ids, or several of either; each has `n` choices, one after the other. Choice k of a
prompt has the seed plus k, if there is one. Log-probabilities are the target's, before everything that the request
changes, and of every token that it says, the last one included.

/v1/responses keeps nothing: what would need that is refused (`ssv.triton_repo.openai.responses_schema`). What it has in
common with the other two is `ssv.triton_repo.openai.fields.AnsweredRequest`.

Beyond OpenAI: top_k, min_p, min_tokens, ignore_eos, repetition_penalty, stop_token_ids and bad_words, named as in vLLM;
ssv_tier, which says the same as a model's suffix; ssv_max_divergence for the fastest tier within it; ssv_policy, an
object of what is otherwise in the tier's policy (`ssv.runtime.methods.OPTIONS`); ssv_timeout, seconds after which an
answer ends with what there is ("length"); latency_bound_ms, milliseconds since the last pass after which pending tokens
are verified; and ssv_fates, with which each choice, or each of its chunks with text, says under `ssv_fates` how its
tokens came about (`ssv.runtime.fates`). Responses disclose under `ssv` what was done: the whole of it, or each choice's
last chunk. `divergence_bound` there is what the tier was calibrated to.

With `stream_options` {"continuous_usage_stats": true} every chunk has the usage so far, as with vLLM.

`user`, `safety_identifier`, `prompt_cache_key`, `prompt_cache_retention`, `metadata`, a message's `name`, `store`
false, `service_tier` "auto" or "default", a schema's or a function's `strict`, and vLLM's `skip_special_tokens` and
others of its at the values that they have by themselves are taken and change nothing.
What is not supported is refused, whether it is a field or a value: nothing is ignored in silence.

Errors are OpenAI's objects, with its codes (`ssv.triton_repo.openai.errors`); every request has a line in the log and
an `X-Request-Id` (`ssv.triton_repo.openai.access_log`).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ssv.client.triton import Prompt, Reply, ServerError, Settings
from ssv.runtime.serving.log import log_event
from ssv.runtime.serving.metrics import Reader
from ssv.triton_repo.openai import page
from ssv.triton_repo.openai.access_key import AccessKey
from ssv.triton_repo.openai.access_log import HEADER, Access, AccessLog
from ssv.triton_repo.openai.errors import (
    ApiError,
    error_object,
    invalid_body,
    json_bytes,
    nothing_there,
    translated,
    unreadable_body,
)
from ssv.triton_repo.openai.responses import ResponsesAnswer
from ssv.triton_repo.openai.responses_schema import ResponsesRequest
from ssv.triton_repo.openai.schema import ChatRequest, CompletionRequest
from ssv.triton_repo.openai.stream import EventStream, events, merged, while_connected, whole
from ssv.triton_repo.openai.tokens import DetokenizeRequest, TokenizeRequest, Tokens
from ssv.triton_repo.openai.translation import Answer, Models

log = logging.getLogger("ssv.openai")

DEFAULT_MAX_BODY_BYTES = 1 << 20


class Backend(Protocol):
    """What answers requests."""

    def stream(
        self, prompt: Prompt, settings: Settings, *, request_id: str, stream: bool
    ) -> AsyncGenerator[Reply, None]:
        """Replies to a prompt, the last with a finish reason; closing the generator cancels the request.

        Raises:
            ServerError: the server refused, failed, or is not there.
        """

    async def is_ready(self) -> bool:
        """Whether requests would be answered."""

    async def aclose(self) -> None:
        """Ends what runs."""


class _BodyLimit:
    """Refuses bodies that are too large while they are read, whatever length their headers say."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise ApiError(413, f"the body has more than {self._max_bytes} bytes: shorten it")
            return message

        await self._app(scope, limited, send)


def create_app(
    backend: Backend,
    models: Models,
    *,
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    num_connections: Callable[[], int] | None = None,
    max_connections: int | None = None,
    on_refusal: Callable[[], None] | None = None,
    keys: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
    tokens: Tokens | None = None,
    reader: Reader | None = None,
    has_page: bool = True,
) -> FastAPI:
    """The API; it closes the backend when it ends.

    Args:
        keys: one of which every request has to have; none for no such check.
        allowed_origins: whose pages browsers let ask; "*" for all.
        tokens: answers /tokenize and /detokenize; None for neither.
        reader: of the metrics; None for none.
        has_page: whether there is a page at /, which asks for no key: what it asks for then does.
        num_connections, max_connections, on_refusal: see `AccessLog`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await backend.aclose()

    app = FastAPI(title="ssv", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(_BodyLimit, max_bytes=max_body_bytes)
    if keys:
        app.add_middleware(AccessKey, keys=keys, more_open_paths=[page.PATH] if has_page else [])
    if allowed_origins:  # around the keys: a browser asks whether it may ask before it sends one
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[HEADER],
        )
    app.add_middleware(
        AccessLog, num_connections=num_connections, max_connections=max_connections, on_refusal=on_refusal
    )
    _add_error_handlers(app)

    async def respond(request: Request, body: ChatRequest | CompletionRequest | ResponsesRequest) -> Response:
        access, caller = Access.of(request.scope), body.caller()
        answer: Answer | ResponsesAnswer
        if isinstance(body, ResponsesRequest):
            chat = body.chat()
            asked = chat.asked(models.tier_of(chat), models.tool_form)
            answer = ResponsesAnswer(body, chat, asked, access, models)
        else:
            asked = body.asked(models.tier_of(body), models.tool_form)
            answer = Answer(body, asked, access, models)
        stream = bool(body.stream)
        access.begin(answer.id, asked[0][1].tier, stream)

        def meant(error: ServerError) -> ApiError:
            if (found := translated(error, caller)).status_code == 500:
                log_event(log, "request failed", level=logging.ERROR, id=access.id, status=error.status, error=error)
            return found

        if len(asked) > 1:  # one user's choices, so that a router has all of them in one arm
            asked = [(prompt, replace(settings, user=settings.user or access.id)) for prompt, settings in asked]
        ids = (access.id, *(f"{access.id}-{index}" for index in range(1, len(asked))))
        replies = merged(
            [
                backend.stream(prompt, settings, request_id=each, stream=stream)
                for (prompt, settings), each in zip(asked, ids, strict=True)
            ]
        )
        try:
            if not stream:
                return await whole(answer, while_connected(request, replies))
            sent = events(answer, while_connected(request, replies), meant, len(asked))
            # Waited for, so that what the server refuses has a status of its own.
            return EventStream(await anext(sent), sent)
        except ServerError as error:
            raise meant(error) from error

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await respond(request, body)

    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionRequest) -> Response:
        return await respond(request, body)

    @app.post("/v1/responses")
    async def responses(request: Request, body: ResponsesRequest) -> Response:
        return await respond(request, body)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": models.listed()}

    @app.get("/v1/models/{model:path}")
    async def get_model(model: str) -> dict[str, Any]:
        models.method_of(model)
        return models.entry(model)

    @app.get("/version")
    async def get_version() -> dict[str, str]:
        return {"version": version("ssv")}

    if tokens is not None:
        # No coroutines: a long text would hold up all others.
        @app.post("/tokenize")
        def tokenize(body: TokenizeRequest) -> dict[str, Any]:
            return tokens.tokenize(body)

        @app.post("/detokenize")
        def detokenize(body: DetokenizeRequest) -> dict[str, str]:
            return tokens.detokenize(body)

    if reader is not None:

        @app.get("/metrics")
        async def metrics() -> Response:
            return Response(reader.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    if has_page:
        app.get(page.PATH)(page.page)

    @app.get("/live")
    async def live() -> Response:
        return Response(status_code=200)

    @app.get("/health")
    async def health() -> Response:
        if not await backend.is_ready():
            raise ApiError(503, "the model server is not ready: try again")
        return Response(status_code=200)

    for route in app.routes:
        if isinstance(route, APIRoute) and route.methods and "GET" in route.methods:
            route.methods.add("HEAD")
    return app


_BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


def _doors(app: FastAPI) -> list[str]:
    """Addresses of the API that are used as they stand: the page is none, nor is one with a model's name."""
    paths = (route.path for route in app.routes if isinstance(route, APIRoute))
    return [path for path in paths if "{" not in path and path != page.PATH]


def _add_error_handlers(app: FastAPI) -> None:
    fields = {
        path: {field.alias or name for name, field in body.model_fields.items()} for path, body in _BODIES.items()
    }

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> Response:
        headers = error.headers
        if not isinstance(error, ApiError):  # FastAPI's, which says no more than its status
            if error.status_code == 400:
                error = unreadable_body(error.__cause__)
            else:
                allowed = (headers or {}).get("Allow") if error.status_code == 405 else None
                error = nothing_there(request.url.path, request.method, _doors(app), allowed)
        Access.of(request.scope).fail(error)
        return Response(json_bytes(error_object(error)), error.status_code, headers, "application/json")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        known = fields.get(request.url.path, ())
        return await refused(request, invalid_body(error.errors(), error.body, known))

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, _: ClientDisconnect) -> Response:
        Access.of(request.scope).reason = "cancelled"
        return Response(status_code=499)  # nobody reads it
