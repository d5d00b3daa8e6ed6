"""An answer on its way to the client: whole, or as server-sent events; one that nobody waits for is given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ssv.client.triton import Reply, ServerError
from ssv.triton_repo.openai.access_log import Access
from ssv.triton_repo.openai.errors import ApiError, json_bytes

T = TypeVar("T")

Replies = AsyncGenerator[tuple[int, Reply], None]
"""Of a request's choices, each with the choice's index."""


class Telling(Protocol):
    """An answer in the making, in the shape of what was asked.

    Attributes:
        access: what the log will say.
        end: what a stream ends with, after its last event.
    """

    access: Access
    end: bytes

    def take(self, index: int, reply: Reply) -> list[dict[str, Any]]:
        """Takes the next reply for a choice; returns the events of a stream that it makes."""

    def closing(self) -> list[dict[str, Any]]:
        """The events after those of the last reply."""

    def failed(self, error: ApiError) -> dict[str, Any]:
        """The event of an error in a stream that has begun."""

    def encoded(self, event: dict[str, Any]) -> bytes:
        """An event as it is sent."""

    def whole(self) -> dict[str, Any]:
        """The response that is no stream."""


async def while_connected(request: Request, replies: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Replies as they come, closed at once when the client leaves.

    Raises:
        ClientDisconnect: it has left.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def next_reply() -> T | None:
        return await anext(replies, None)

    gone = asyncio.create_task(disconnected())
    async with AsyncExitStack() as stack:
        stack.push_async_callback(replies.aclose)
        stack.push_async_callback(_cancel, gone)
        while True:
            step = asyncio.create_task(next_reply())
            try:
                await asyncio.wait({step, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not step.done():
                    raise ClientDisconnect
            finally:
                await _cancel(step)
            if (reply := step.result()) is None:
                return
            yield reply


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def merged(streams: Sequence[AsyncGenerator[Reply, None]]) -> AsyncGenerator[tuple[int, Reply], None]:
    """Replies of several streams as they come, each with the number of its stream; the first that fails ends all.

    Raises:
        ServerError: one has failed.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for each in only:
                yield 0, each
        return
    held: asyncio.Queue[tuple[int, Reply | Exception | None]] = asyncio.Queue(len(streams))

    async def take(number: int, replies: AsyncGenerator[Reply, None]) -> None:
        try:
            async with aclosing(replies):
                async for reply in replies:
                    await held.put((number, reply))
        except Exception as error:
            await held.put((number, error))
        else:
            await held.put((number, None))

    takers = [asyncio.create_task(take(number, replies)) for number, replies in enumerate(streams)]
    try:
        num_open = len(streams)
        while num_open:
            number, reply = await held.get()
            if isinstance(reply, Exception):
                raise reply
            if reply is None:
                num_open -= 1
            else:
                yield number, reply
    finally:
        for taker in takers:
            taker.cancel()
        await asyncio.gather(*takers, return_exceptions=True)


async def whole(answer: Telling, replies: Replies) -> Response:
    """The response that is no stream, once all of it has come.

    Raises:
        ClientDisconnect, ServerError: as the replies do.
    """
    async with aclosing(replies):
        async for index, reply in replies:
            answer.take(index, reply)
    return Response(json_bytes(answer.whole()), media_type="application/json")


async def events(
    answer: Telling, replies: Replies, meant: Callable[[ServerError], ApiError], num_choices: int = 1
) -> AsyncGenerator[bytes, None]:
    """A stream's events; an error before the first is raised, a later one is an event.

    Of several choices, the first event waits until each has begun: one of many prompts may be refused when others have
    been answered already, and a request is refused as a whole, with a status of its own.

    Args:
        meant: what the server's error is to who asked.
        num_choices: that the replies are for.
    """
    has_begun, silent, held = False, set(range(num_choices)), list[bytes]()
    try:
        async with aclosing(replies):
            async for index, reply in replies:
                silent.discard(index)
                held += map(answer.encoded, answer.take(index, reply))
                while held and not silent:
                    has_begun = True
                    yield held.pop(0)
        for chunk in answer.closing():
            yield answer.encoded(chunk)
        yield answer.end
    except ServerError as error:
        if not has_begun:
            raise
        meant_error = meant(error)
        answer.access.fail(meant_error)
        yield answer.encoded(answer.failed(meant_error))
    except ClientDisconnect:
        answer.access.reason = "cancelled"
        if not has_begun:
            raise


class EventStream(Response):
    """Server-sent events, whose generator is closed when nobody listens any more.

    sse-starlette's response would break streams off as soon as uvicorn is told to stop, where they have
    `ssv.triton_repo.openai.process.GRACE_SECONDS` here, unless a switch for the whole process is set; and it reads the
    connection's messages, as `while_connected` does.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._rest = first, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            async for event in self._rest:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
