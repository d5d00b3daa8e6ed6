"""Requests over an engine of somebody else's that streams their outputs into an event loop: a `Generator`.

What such an engine has no notion of is done here: stop strings, text, deadlines, counters.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn, Protocol

from torch import Tensor

from ssv.bundle.policy import Policy
from ssv.runtime.decode.generator import Load
from ssv.runtime.decode.loop import Running
from ssv.runtime.decode.prompt_cache import CacheStats
from ssv.runtime.decode.scheduler import QueueFull
from ssv.runtime.engines.contract import EngineError
from ssv.runtime.request import Chunk, FinishReason, Request
from ssv.runtime.text import TextStream

STEP_SECONDS = 0.005
"""That a step waits for output, and so that a new request may wait for a step."""


@dataclass(frozen=True, slots=True)
class Gain:
    """What a request has gained.

    Attributes:
        reason: why it ended, in the last one: "length", or else it has chosen to stop.
        passes: of the target after the prompt's, so far as the last one knows.
        judged, accepted: drafted tokens that they judged, and kept.
    """

    token_ids: Sequence[int]
    reason: str | None = None
    passes: int = 0
    judged: int = 0
    accepted: int = 0


class Streamed(Protocol):
    """A request in the engine: what it gains, and how it is ended."""

    def __aiter__(self) -> AsyncIterator[Gain]: ...

    def abort(self) -> None:
        """Ends the request where it is."""
        ...


class StreamingEngine(Protocol):
    """An engine with batches of its own.

    Attributes:
        max_rows: requests that it decodes at a time.
        eos_ids: tokens that end an output.
    """

    max_rows: int
    eos_ids: frozenset[int]

    def check(self, request: Request, policy: Policy) -> None:
        """Raises RequestError if a request cannot run here."""
        ...

    def start(self, request: Request) -> Streamed:
        """Takes a request; called in the event loop."""
        ...


class HostedGenerator:
    """Requests that a streaming engine decodes."""

    def __init__(self, engine: StreamingEngine, loop: asyncio.AbstractEventLoop, max_waiting: int | None) -> None:
        """Hands requests to an engine that runs.

        Args:
            loop: runs in a thread of its own.
            max_waiting: requests beyond those that the engine decodes at a time; None for no bound.
        """
        self.max_rows, self._engine, self._loop, self._max_waiting = engine.max_rows, engine, loop, max_waiting
        self._running: dict[int, Running] = {}
        self._streams: dict[int, Streamed] = {}
        self._news: queue.SimpleQueue[tuple[int, Gain | Exception]] = queue.SimpleQueue()

    @property
    def has_work(self) -> bool:
        """See `Generator.has_work`."""
        return bool(self._running)

    @property
    def load(self) -> Load:
        """Whoever has no token yet waits, as nobody says whether the engine has begun."""
        decoding = sum(running.row.counters.emitted > 0 for running in list(self._running.values()))
        return Load(decoding, 0, len(self._running) - decoding, CacheStats(0, 0, 0, 0, 0))

    def check(self, request: Request, policy: Policy) -> None:
        """See `Generator.check`."""
        self._engine.check(request, policy)

    def submit(
        self, index: int, request: Request, policy: Policy, text: TextStream | None, *, is_audited: bool = False
    ) -> None:
        """See `Generator.submit`."""
        assert not is_audited, "nothing here is lossy"
        self.check(request, policy)
        if self._max_waiting is not None and len(self._running) >= self.max_rows + self._max_waiting:
            raise QueueFull(f"{len(self._running) - self.max_rows} requests are waiting already", "try again later")
        running = Running(index, request, policy, text)
        running.row.counters.prompt_tokens = len(request.prompt_ids)
        self._running[index] = running
        asyncio.run_coroutine_threadsafe(self._follow(index, request), self._loop)

    def cancel(self, index: int) -> None:
        """See `Generator.cancel`."""
        if (running := self._running.get(index)) is not None:
            running.is_cancelled = True

    def abandon(self) -> list[int]:
        """See `Generator.abandon`."""
        for index in list(self._running):
            self._forget(index, has_ended=False)
        return []

    def step(self) -> Iterator[Chunk]:
        """Ends what has been cancelled or is late, and takes what the engine has given meanwhile."""
        now = time.monotonic()
        for index, running in list(self._running.items()):
            deadline = running.request.deadline
            if running.is_cancelled or (deadline is not None and now >= deadline):
                yield self._end(index, "cancelled" if running.is_cancelled else "deadline")
        timeout = STEP_SECONDS
        while self._running:
            try:
                index, found = self._news.get(timeout=timeout)
            except queue.Empty:
                return
            timeout = 0.0
            if index in self._running:  # otherwise it has ended here, and the engine did not know yet
                if isinstance(found, Exception):
                    raise EngineError(f"the engine failed: {found}") from found
                yield from self._take(index, found)

    async def _follow(self, index: int, request: Request) -> None:
        """Hands a request over, and its output on."""
        if index not in self._running:
            return
        try:
            stream = self._streams[index] = self._engine.start(request)
            async for gain in stream:
                self._news.put((index, gain))
        except Exception as error:
            self._news.put((index, error))

    def _take(self, index: int, gain: Gain) -> Iterator[Chunk]:
        running, has_ended = self._running[index], gain.reason is not None
        if has_ended:
            counters = running.row.counters
            counters.target_passes, counters.target_tokens = gain.passes, gain.passes + gain.judged
            counters.drafted = counters.judged = gain.judged
            counters.accepted, counters.rolled_back = gain.accepted, gain.judged - gain.accepted
        if (chunk := running.push(gain.token_ids, self._engine.eos_ids)) is not None:
            yield chunk
        if running.finish_reason is not None:
            self._forget(index, has_ended=has_ended)
        elif has_ended:  # the engine does not give the token that it ended with
            yield self._end(index, "length" if gain.reason == "length" else "stop", has_ended=True)

    def _end(self, index: int, reason: FinishReason, *, has_ended: bool = False) -> Chunk:
        running = self._running[index]
        self._forget(index, has_ended=has_ended)
        return running.end(reason)

    def _forget(self, index: int, *, has_ended: bool) -> None:
        """A request has ended here; the engine is told where it has not."""
        del self._running[index]

        def abort() -> None:
            if (stream := self._streams.pop(index, None)) is not None and not has_ended:
                with suppress(RuntimeError):  # it has ended meanwhile
                    stream.abort()

        self._loop.call_soon_threadsafe(abort)


class HostedTarget:
    """A target that somebody else's engine runs, as far as there is something to say of it: an `Engine` of no steps."""

    num_features = 0
    has_scorer = False
    token_ids_V: Tensor | None = None

    def __init__(self, max_batch: int, max_length: int, vocab_size: int) -> None:
        self.max_batch, self.max_length, self.vocab_size = max_batch, max_length, vocab_size

    def step(self, *args: object, **options: object) -> NoReturn:
        """Raises EngineError."""
        raise EngineError(
            "the engine that the bundle is loaded with runs its target by itself: nobody else can ask it",
            "load the bundle with the engine torch",
        )

    keep = move_row = read_cache = write_cache = step
