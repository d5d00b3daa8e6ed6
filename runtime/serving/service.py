"""A decoding loop in a thread of its own, for callers in any thread."""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

from ssv.runtime.decode.audit import Audit, RunningAudit
from ssv.runtime.decode.prompt_cache import CacheStats
from ssv.runtime.decode.scheduler import QueueFull
from ssv.runtime.llm import LLM
from ssv.runtime.methods import policy_of
from ssv.runtime.request import Chunk, Request, RequestError
from ssv.support.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_AUDITS_WAITING = 16


class ServiceError(UserError):
    """The service takes no requests; the message says why."""


class Sink(Protocol):
    """Where a request's output goes. Called by the service's thread: none of these may block."""

    def send(self, chunk: Chunk) -> None:
        """Takes a chunk; the last one has a finish reason."""
        ...

    def fail(self, error: Exception) -> None:
        """Takes the error that ends the request, instead of a last chunk."""
        ...

    def is_cancelled(self) -> bool:
        """Whether nobody waits for the output any more."""
        ...


@dataclass(frozen=True, slots=True)
class Load:
    """What the service is busy with.

    Attributes:
        decoding, joining, waiting: requests that are.
        prompts: of the prompt cache.
    """

    decoding: int
    joining: int
    waiting: int
    prompts: CacheStats


@dataclass(slots=True)
class _Client:
    sink: Sink
    request: Request
    is_audited: bool
    output_ids: list[int] = field(default_factory=list)
    is_lost: bool = False

    def is_cancelled(self) -> bool:
        return self.is_lost or bool(self.call(self.sink.is_cancelled))

    def call(self, method: Callable[..., T], *args: object) -> T | None:
        """Calls the sink, whose errors are its client's and nobody else's: it counts as gone."""
        try:
            return method(*args)
        except Exception:
            log.exception("a client cannot be reached")
            self.is_lost = True
            return None


class Service:
    """Requests from any thread, decoded by one.

    When an engine fails, everything in it is in doubt: all requests end with the error, no more are taken, and
    `on_death` is called.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        max_waiting: int,
        prompt_cache_bytes: int = 0,
        audit_share: float = 0.0,
        on_finish: Callable[[Chunk, str], None] = lambda chunk, method: None,
        on_audit: Callable[[Audit, str, int], None] = lambda audit, method, tokens: None,
        on_round: Callable[[Load], None] = lambda load: None,
        on_death: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """Starts the thread that decodes.

        Args:
            max_waiting: requests that wait for a row, at most.
            audit_share: share of the greedy requests of lossy tiers whose output is judged afterwards by the target,
                when a row is free.
            on_finish: called with the last chunk and the method of each request, by the service's thread; so are the
                others.
            on_audit: called with each audit, the method of its request, and the number of tokens it is of.
            on_round: called after every round, and once more when there is nothing left to do.
        """
        self._llm, self._audit_share = llm, audit_share
        self._on_finish, self._on_audit, self._on_round, self._on_death = on_finish, on_audit, on_round, on_death
        self._loop = llm.loop(max_waiting=max_waiting, prompt_cache_bytes=prompt_cache_bytes)
        self._changed = threading.Condition()
        self._inbox: deque[tuple[Request, Sink]] = deque()
        self._clients: dict[int, _Client] = {}
        self._next = 0
        self._max_inbox = max_waiting + llm.target.max_batch
        self._refuses: str | None = None
        self._stops = self._aborts = self._has_failed = False
        self._audits: deque[tuple[RunningAudit, str]] = deque()
        self._audit_place: tuple[int, int] | None = None
        self._random = random.Random(0)
        self._thread = threading.Thread(target=self._run, name="ssv decoding", daemon=True)
        self._thread.start()

    def submit(self, request: Request, sink: Sink) -> None:
        """Queues a request; its output, or the reason why it cannot be served, goes to the sink.

        Raises:
            ServiceError: the service is being drained, or its engine has failed.
            QueueFull: too many wait.
        """
        if request.params.grammar is not None and self._llm.grammars is not None:
            try:  # here, as it may take long: in the other thread everybody would wait
                self._llm.grammars.prepare(request.params.grammar)
            except RequestError as error:
                sink.fail(error)
                return
        with self._changed:
            if self._refuses is not None:
                raise ServiceError(self._refuses)
            if len(self._inbox) >= self._max_inbox:
                raise QueueFull(f"{len(self._inbox)} requests are waiting already", "try again later")
            self._inbox.append((request, sink))
            self._changed.notify()

    @property
    def load(self) -> Load:
        """How much there is to do, for gauges: read without a lock."""
        scheduler, cache = self._loop.scheduler, self._loop.prompt_cache
        return Load(
            len(scheduler.rows),
            int(scheduler.joining is not None),
            len(scheduler.waiting) + len(self._inbox),
            cache.stats if cache is not None else CacheStats(0, 0, 0, 0, 0),
        )

    def refuse(self, why: str) -> None:
        """Takes no more requests; those it has go on."""
        with self._changed:
            self._refuses = self._refuses or why

    def drain(self, timeout: float) -> bool:
        """Takes no more requests, and ends once those it has are finished; after `timeout` seconds these end with an
        error.

        Returns:
            Whether all were finished.
        """
        self.refuse("the server is shutting down: try another one")
        with self._changed:
            self._stops = True
            self._changed.notify()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return not self._has_failed
        self._refuses = "the server was shut down before the request was finished: try another one"
        self._aborts = True
        self._thread.join()
        return False

    def _run(self) -> None:
        try:
            while self._wait():
                self._take()
                for chunk in self._loop.step():
                    self._deliver(chunk)
                self._audit()
                self._on_round(self.load)
            if self._aborts:
                self._fail_all(ServiceError(str(self._refuses)))
        except Exception as error:
            log.exception("decoding failed")
            with self._changed:
                self._has_failed = True
                self._refuses = f"the engine has failed and takes no more requests: {error}"
            self._fail_all(ServiceError(f"the engine failed while the request ran: {error}"))
            self._on_death(error)

    def _wait(self) -> bool:
        """Until there is something to do; whether to go on."""
        with self._changed:
            while not (self._inbox or self._loop.has_work or self._audits or self._stops):
                self._changed.wait()
            return not self._aborts and bool(self._inbox or self._loop.has_work or not self._stops)

    def _take(self) -> None:
        while self._inbox:
            request, sink = self._inbox.popleft()
            params = request.params
            try:
                policy = policy_of(request, self._llm.tiers)
                self._loop.batch.check(request.prompt_ids, params, policy)  # what is no token has no text either
                text = self._llm.tokenizer.text_stream(request.prompt_ids, params) if params.stop else None
                is_lossy = not policy.lossless_for(greedy=params.greedy)
                audited = params.greedy and is_lossy and self._random.random() < self._audit_share
                client = _Client(sink, request, audited)
                self._loop.submit(self._next, request, policy, text, client.is_cancelled)
            except (RequestError, QueueFull) as error:
                _Client(sink, request, False).call(sink.fail, error)
                continue
            self._clients[self._next] = client
            self._next += 1

    def _deliver(self, chunk: Chunk) -> None:
        client = self._clients[chunk.index]
        client.output_ids.extend(chunk.token_ids)
        if chunk.finish_reason is not None:
            del self._clients[chunk.index]
            self._on_finish(chunk, client.request.method)
            if client.is_audited and client.output_ids and len(self._audits) < MAX_AUDITS_WAITING:
                audit = RunningAudit(
                    client.request.prompt_ids,
                    client.output_ids,
                    self._llm.prefill_chunk,
                    params=client.request.params,
                    processor=partial(self._loop.batch.processor, client.request.params, client.request.prompt_ids),
                )
                self._audits.append((audit, client.request.method))
        client.call(client.sink.send, chunk)

    def _audit(self) -> None:
        """One chunk of an audit, in the row behind those in use, if that is free."""
        scheduler = self._loop.scheduler
        row = len(scheduler.rows)
        if not self._audits or scheduler.joining is not None or row == scheduler.max_rows:
            return
        place = (row, scheduler.num_admitted)
        audit, method = self._audits[0]
        if place != self._audit_place:  # another row, or another request has written into it
            audit.restart()
            self._audit_place = place
        if (found := audit.step(self._llm.target, row)) is not None:
            self._audits.popleft()
            self._audit_place = None
            self._on_audit(found, method, audit.num_tokens)

    def _fail_all(self, error: ServiceError) -> None:
        with self._changed:
            waiting = [_Client(sink, request, False) for request, sink in self._inbox]
            self._inbox.clear()
        for client in (*self._clients.values(), *waiting):
            client.call(client.sink.fail, error)
        self._clients.clear()
