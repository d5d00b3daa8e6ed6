"""One log line for each request to the OpenAI API, refused ones too, and the ids by which requests are found again.

A line is the event "access": id, method, path, status; of one that was answered its tier, tokens, seconds to the first
token and to the end, and how it ended; of one that was not the error's code and field. It has no texts: neither the
client's nor a message that may repeat them.

An `X-Request-Id` is taken, goes to the server's own log lines, and is in the response; a request without one is given
one.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ssv.client.triton import Reply
from ssv.runtime.serving.log import log_event
from ssv.triton_repo.openai.errors import ApiError, error_bytes

log = logging.getLogger("ssv.openai")

HEADER = "X-Request-Id"
_VALID_ID = re.compile(r"[A-Za-z0-9._~:/+=@-]{1,128}")
_LONGEST_PATH = 200
_KEY = "ssv.access"


@dataclass
class Access:
    """What is known of a request.

    Attributes:
        id: the client's own if `has_own_id`.
        answer: id in the body of the response.
        tier: asked for, then the one used.
        reason: how the answer ended; "cancelled" if the client left.
        code, param: of the error.
    """

    id: str
    has_own_id: bool
    started: float = field(default_factory=time.monotonic)
    status: int | None = None
    answer: str | None = None
    tier: str | None = None
    stream: bool | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    first_token_s: float | None = None
    reason: str | None = None
    code: str | None = None
    param: str | None = None

    @classmethod
    def of(cls, scope: Scope) -> Access:
        """That of a request that came through `AccessLog`."""
        access: Access = scope[_KEY]
        return access

    def begin(self, answer: str, tier: str | None, stream: bool) -> None:
        """Notes what an answer will be."""
        self.answer, self.tier, self.stream = answer, tier, stream
        if not self.has_own_id:
            self.id = answer

    def take(self, reply: Reply) -> None:
        """Notes what has come of an answer."""
        self.tier, self.prompt_tokens = reply.tier, reply.num_input_tokens
        self.output_tokens = (self.output_tokens or 0) + reply.num_output_tokens
        if self.first_token_s is None and reply.num_output_tokens:
            self.first_token_s = round(time.monotonic() - self.started, 4)
        self.reason = reply.finish_reason or None

    def fail(self, error: Exception) -> None:
        """Notes why there is no answer, or no whole one."""
        self.reason = "error"
        if isinstance(error, ApiError):
            self.code, self.param = error.code, error.param


class AccessLog:
    """ASGI middleware around all others: it also answers what nobody foresaw, and refuses connections too many."""

    def __init__(
        self,
        app: ASGIApp,
        num_connections: Callable[[], int] | None = None,
        max_connections: int | None = None,
        on_refusal: Callable[[], None] | None = None,
    ) -> None:
        """Wraps an application.

        Args:
            num_connections: open now; None where they are not counted.
            max_connections: with more, a request is refused.
            on_refusal: called for each that is.
        """
        self._on_refusal = on_refusal
        self._app, self._num_connections, self._max_connections = app, num_connections, max_connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get(HEADER)
        is_valid = given is not None and _VALID_ID.fullmatch(given) is not None
        access = scope[_KEY] = Access(given if given and is_valid else f"req-{secrets.token_hex(16)}", is_valid)

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                access.status = message["status"]
                MutableHeaders(scope=message)[HEADER] = access.id
            await send(message)

        try:
            if given is not None and not is_valid:
                what = (
                    f"{HEADER} must be 1 to 128 letters, digits or characters of ._~:/+=@-: "
                    "give another, or leave it out"
                )
                await _respond(ApiError(400, what, HEADER, "invalid_value"), access, scope, receive, noting)
            elif self._is_full():
                if self._on_refusal is not None:
                    self._on_refusal()
                error = ApiError(503, "there are too many connections: try again later", code="too_many_connections")
                await _respond(error, access, scope, receive, noting)
            else:
                await self._app(scope, receive, noting)
        except Exception:
            log.exception("request failed", extra={"ssv": {"id": access.id}})
            if access.status is not None:  # begun, it can only be broken off
                access.reason = "error"
                raise
            error = ApiError(500, "internal error: the server's log says more")
            await _respond(error, access, scope, receive, noting)
        finally:
            _write(scope, access)

    def _is_full(self) -> bool:
        if self._num_connections is None or self._max_connections is None:
            return False
        return self._num_connections() > self._max_connections


async def _respond(error: ApiError, access: Access, scope: Scope, receive: Receive, send: Send) -> None:
    access.fail(error)
    await Response(error_bytes(error), error.status_code, error.headers, "application/json")(scope, receive, send)


def _write(scope: Scope, access: Access) -> None:
    status = access.status
    if status is None:  # cancelled before anything was sent
        status, access.reason = 499, access.reason or "cancelled"
    # A refusal (full, draining, starting) is no fault of the server's.
    level = logging.INFO if status < 400 else logging.WARNING if status < 500 or status == 503 else logging.ERROR
    shown = ("answer", "tier", "stream", "prompt_tokens", "output_tokens", "first_token_s", "reason", "code", "param")
    fields = {name: value for name in shown if (value := getattr(access, name)) is not None}
    if fields.get("answer") == access.id:
        del fields["answer"]
    log_event(
        log,
        "access",
        level=level,
        id=access.id,
        method=scope["method"],
        path=scope["path"][:_LONGEST_PATH],
        status=status,
        **fields,
        total_s=round(time.monotonic() - access.started, 4),
    )
