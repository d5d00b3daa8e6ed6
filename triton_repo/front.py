"""The doors that ssv-serve itself keeps: HTTP, before tritonserver's, and the metrics.

They are there from the first moment to the last, whatever becomes of tritonserver: readiness is false while it starts,
starts again, or drains, and liveness is true. What tritonserver's HTTP cannot say is said here: a refusal is 503 with
Retry-After (Triton 2.51 answers `generate` with 400 whatever went wrong, with 500 what it cannot read, and with 200 and
an error whoever asks it for a stream, when all has been decoded; it keeps 32 bits of a larger number), and metrics are
the server's own before Triton's.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import socket
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Literal

import aiohttp
from aiohttp import web
from yarl import URL

from ssv.runtime.methods import METHODS
from ssv.runtime.serving.intake import declared_inputs, input_type
from ssv.runtime.serving.log import log_event
from ssv.runtime.serving.metrics import DRAINING, Metrics, Reader

log = logging.getLogger("ssv.serve")

State = Literal["starting", "serving", "draining"]

RETRY_AFTER = {"Retry-After": "1"}
STARTING = "the server is starting: try again later"

_INFERENCE = re.compile(r"^/v2/models/[^/]+(/versions/[^/]+)?/(generate|generate_stream|infer)$")
_MODEL_READY = re.compile(r"^/v2/models/[^/]+(/versions/[^/]+)?/ready$")

# Of messages of ours (`ssv.runtime.serving.pieces.error_text`) and of Triton.
_STATUS = re.compile(r"\b(UNAVAILABLE|INVALID_ARGUMENT|INTERNAL|DEADLINE_EXCEEDED): ")
_CODES = {"UNAVAILABLE": 503, "INVALID_ARGUMENT": 400, "INTERNAL": 500, "DEADLINE_EXCEEDED": 504}
_UNREADABLE = re.compile(r"[Uu]nable to parse|failed to parse the request JSON|non-object")
_ERROR = b'{"error":'
"""How an answer of Triton's begins that is none; it may have the status 200."""

_RESET = re.compile(r"^/v2/ssv/tiers/([a-z-]+)/reset$")
_RESET_SECONDS = 5.0
"""For the engines' process to hear of a reset."""

_PROMPTS = ("text_input", "input_ids", "ssv_messages")

_INPUTS = frozenset(declared_inputs())
_WHOLE_INPUTS = tuple(name for name in declared_inputs() if input_type(name) == "INT32")
_INT32 = range(-(2**31), 2**31)

# Of one connection, not of what is said over it (RFC 9110, 7.6.1).
_HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect")
)
_LONGEST_ERROR = 1 << 16
_LONGEST_REQUEST = 1 << 20
_CLOSE_SECONDS = 0.5


class Front:
    """Serves the two doors from a thread of its own.

    Attributes:
        state: of the server behind; whoever supervises it says so.
    """

    def __init__(
        self,
        http: socket.socket,
        metrics: socket.socket,
        counted: Metrics,
        reader: Reader,
        reset_tier: Callable[[str], bool],
        admin_key: str | None = None,
    ) -> None:
        """Takes the doors over.

        Args:
            http, metrics: that listen already; they are closed in the end.
            counted: for refusals that never get to the models.
            reader: of all that the server counts.
            reset_tier: puts a withdrawn tier into use again; whether anybody heard.
            admin_key: NAME=VALUE of a header that administrative requests need; None shuts them to all.
        """
        self._reset_tier, self._admin_key = reset_tier, admin_key
        self._sockets = {"http": http, "metrics": metrics}
        self._counted, self._reader = counted, reader
        self._http_url = self._metrics_url = ""
        self._num_running = 0
        self.state: State = "starting"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ssv front", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    @property
    def num_running(self) -> int:
        """Requests that are being answered."""
        return self._num_running

    def lead_to(self, http_port: int, metrics_port: int) -> None:
        """Says where tritonserver's own doors are, on this machine."""
        self._http_url, self._metrics_url = f"http://127.0.0.1:{http_port}", f"http://127.0.0.1:{metrics_port}/metrics"

    def close(self) -> None:
        """Closes the doors and ends the thread behind them."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> None:
        # Connections are not kept: tritonserver may close one at the moment when it is used again.
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(),
        )
        self._runners = []
        for kind, handler in (("http", self._http), ("metrics", self._metrics)):
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", handler)
            runner = web.AppRunner(
                app, handler_cancellation=True, access_log=None, shutdown_timeout=_CLOSE_SECONDS, auto_decompress=False
            )
            await runner.setup()
            await web.SockSite(runner, self._sockets[kind]).start()
            self._runners.append(runner)

    async def _close(self) -> None:
        for runner in self._runners:
            await runner.cleanup()
        await self._client.close()

    async def _metrics(self, request: web.Request) -> web.Response:
        if request.path != "/metrics":
            raise web.HTTPNotFound
        tritons = ""
        if self._metrics_url:
            try:
                async with self._client.get(self._metrics_url, timeout=aiohttp.ClientTimeout(2.0)) as found:
                    tritons = await found.text()
            except (aiohttp.ClientError, TimeoutError):
                pass  # it is not there now: what was counted is
        return web.Response(
            body=(self._reader.text() + tritons).encode(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def _http(self, request: web.Request) -> web.StreamResponse:
        path, is_serving = request.path, self.state == "serving"
        if (match := _RESET.match(path)) is not None:
            return await self._reset(request, match[1])
        is_readiness = path == "/v2/health/ready" or _MODEL_READY.match(path) is not None
        is_liveness = path == "/v2/health/live"
        if is_liveness and not is_serving:
            return web.Response()
        if is_readiness and not is_serving:
            return self._unavailable()
        is_inference = _INFERENCE.match(path) is not None
        if self.state == "starting" and is_inference:
            return self._refuse()
        self._num_running += is_inference
        try:
            return await self._pass_on(request, is_inference, is_readiness)
        except aiohttp.ClientError as error:  # it has died, and will be started again
            if is_liveness:
                return web.Response()
            if not is_inference:
                return self._unavailable()
            if isinstance(error, aiohttp.ClientConnectorError):
                return self._refuse()
            return _error(500, f"the server failed while the request ran: {error}")
        finally:
            self._num_running -= is_inference

    async def _pass_on(self, request: web.Request, is_inference: bool, is_readiness: bool) -> web.StreamResponse:
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP]
        is_single = is_inference and request.path.endswith("/generate")
        data: bytes | AsyncIterable[bytes] | None = request.content.iter_any() if request.body_exists else None
        if is_inference and not request.path.endswith("/infer") and data is not None:
            begun = await _begun(request.content)
            if (problem := problem_of(begun, request.path)) is not None:
                return self._invalid(problem)
            data = begun if request.content.at_eof() else _joined(begun, request.content)
        url = URL(f"{self._http_url}{request.raw_path}", encoded=True)
        async with self._client.request(
            request.method, url, headers=headers, data=data, allow_redirects=False, skip_auto_headers=("User-Agent",)
        ) as found:
            if is_readiness and found.status != 200:
                return self._unavailable()
            kept = [(name, value) for name, value in found.headers.items() if name.lower() not in _HOP_BY_HOP]
            answer = await found.read() if is_single and found.status == 200 else b""
            has_failed = found.status >= 400 or answer.startswith(_ERROR)
            if is_inference and has_failed:
                body = answer or await found.content.read(_LONGEST_ERROR)
                status = _meant(max(found.status, 400), body.decode(errors="replace"))
                response = web.Response(body=body, status=status, headers=_without_length(kept))
                response.headers.update(RETRY_AFTER if status == 503 else {})
                return response
            stream = web.StreamResponse(status=found.status)
            stream.headers.extend(kept)
            await stream.prepare(request)
            if answer:
                await stream.write(answer)
            try:
                async for piece in found.content.iter_any():
                    await stream.write(piece)
            except aiohttp.ClientError:
                # What has begun cannot become an error: it ends before its end, which clients notice.
                if request.transport is not None:
                    request.transport.abort()
            return stream

    async def _reset(self, request: web.Request, tier: str) -> web.Response:
        """Puts a tier that was withdrawn into use again, for whoever has the key."""
        name, _, value = (self._admin_key or "").partition("=")
        if not value or not hmac.compare_digest(request.headers.get(name, "").encode(), value.encode()):
            return _error(403, "to reset a tier takes the header of ssv-serve's --admin-key")
        if request.method != "POST":
            return _error(405, "reset a tier with POST")
        if not self._reader.get("ssv_audit_evidence", tier=tier) if tier in METHODS else True:
            return _error(404, f"there is no tier {tier!r} that promises a bound on divergence")
        if self.state != "serving" or not self._reset_tier(tier):
            return self._unavailable()
        deadline = time.monotonic() + _RESET_SECONDS
        while self._reader.get("ssv_tier_withdrawn", tier=tier):
            if time.monotonic() > deadline:
                return _error(500, f"the engines' process has not reset {tier} within {_RESET_SECONDS:g} s")
            await asyncio.sleep(0.01)
        return web.json_response({"tier": tier, "withdrawn": False})

    def _refuse(self) -> web.Response:
        self._counted.refused("draining" if self.state == "draining" else "starting")
        log_event(log, "request", level=logging.WARNING, reason="refused", error=self._why_unavailable())
        return self._unavailable()

    def _invalid(self, message: str) -> web.Response:
        self._counted.invalid()
        log_event(log, "request", level=logging.WARNING, reason="invalid", error=message)
        return _error(400, message)

    def _why_unavailable(self) -> str:
        return DRAINING if self.state == "draining" else STARTING

    def _unavailable(self) -> web.Response:
        return _error(503, self._why_unavailable())


def problem_of(body: bytes, path: str) -> str | None:
    """What is wrong with a body for `generate` or `generate_stream` that Triton would misread or decode in vain.

    Args:
        path: where it is sent.

    Returns:
        A message; None for what Triton and the models judge by themselves, as what is no JSON.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict):
        return "the body must be a JSON object"
    parameters = given.get("parameters", {})
    if not isinstance(parameters, dict):
        return "parameters must be a JSON object"
    places = {**parameters, **given}
    if _INPUTS.isdisjoint(places):  # without inputs Triton asks no model
        return "text_input is missing: give a prompt there, or in input_ids, or a conversation in ssv_messages"
    for name in _WHOLE_INPUTS:
        if (number := _beyond_32_bits(places.get(name))) is not None:
            bound = f"large: give at most {_INT32.stop - 1}" if number > 0 else f"small: give at least {_INT32.start}"
            return f"{name} {number} is too {bound}"
    wants_stream = any(place.get("stream") in (True, [True]) for place in (given, parameters))
    if path.endswith("/generate") and wants_stream and any(name in given for name in _PROMPTS):
        return f"stream is true, and generate gives one answer: ask {path}_stream, or leave stream out"
    return None


def _beyond_32_bits(value: object) -> int | None:
    """A whole number that has no 32 bits, in a value or in a list of any depth."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list):
            waiting += each
        elif isinstance(each, int) and each not in _INT32:
            return each
    return None


async def _begun(content: aiohttp.StreamReader) -> bytes:
    """The beginning of a body: all of it, unless it is longer than the models take."""
    begun = bytearray()
    while len(begun) < _LONGEST_REQUEST and (piece := await content.readany()):
        begun += piece
    return bytes(begun)


async def _joined(begun: bytes, rest: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    yield begun
    async for piece in rest.iter_any():
        yield piece


def _error(status: int, message: str) -> web.Response:
    body = json.dumps({"error": message}).encode()
    headers = RETRY_AFTER if status == 503 else {}
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


def _meant(status: int, body: str) -> int:
    """The status that an error of Triton should have had."""
    match = _STATUS.search(body)
    if match is not None:
        return _CODES[match[1]]
    if _UNREADABLE.search(body) is not None:
        return 400
    return status


def _without_length(headers: list[tuple[str, str]]) -> dict[str, str]:
    return {name: value for name, value in headers if name.lower() != "content-length"}
