"""A generator in a thread of its own, for callers in any thread."""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

from ssv.runtime.decode.generator import Load
from ssv.runtime.decode.scheduler import QueueFull
from ssv.runtime.llm import LLM
from ssv.runtime.methods import policy_of
from ssv.runtime.request import Audit, Chunk, Request, RequestError
from ssv.runtime.text import TextStream
from ssv.support.errors import UserError, is_out_of_memory

log = logging.getLogger(__name__)

T = TypeVar("T")

_LESS = "try again later, or ask for less"


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


@dataclass(slots=True)
class _Client:
    sink: Sink
    request: Request
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
    `on_death` is called. Where memory ran out, only the requests that ran end with an error, those that wait follow.
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
            audit_share: share of the requests whose output may differ from the target's that the target judges in
                full, which changes nothing of the output. Chance says which, before they are decoded.
            on_finish: called with the last chunk and the method of each request, by the service's thread; so are the
                others.
            on_audit: called with each audit, the method of its request, and the number of tokens it is of, in the
                order in which the requests were taken.
            on_round: called after every round, and once more when there is nothing left to do.
        """
        self._llm, self._audit_share = llm, audit_share
        self._on_finish, self._on_audit, self._on_round, self._on_death = on_finish, on_audit, on_round, on_death
        self._generator_for = partial(llm.generator, max_waiting=max_waiting, prompt_cache_bytes=prompt_cache_bytes)
        self._generator = self._generator_for()
        self._changed = threading.Condition()
        self._inbox: deque[tuple[Request, Sink]] = deque()
        self._clients: dict[int, _Client] = {}
        self._next = 0
        self._max_inbox = max_waiting + self._generator.max_rows
        self._refuses: str | None = None
        self._stops = self._aborts = self._has_failed = False
        self._audited: dict[int, tuple[Audit, str, int] | None] = {}
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
        load = self._generator.load
        return replace(load, waiting=load.waiting + len(self._inbox))

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
                self._cancel()
                self._step()
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
            while not (self._inbox or self._generator.has_work or self._stops):
                self._changed.wait()
            return not self._aborts and bool(self._inbox or self._generator.has_work or not self._stops)

    def _take(self) -> None:
        while self._inbox:
            request, sink = self._inbox.popleft()
            params = request.params
            try:
                policy = policy_of(request, self._llm.tiers)
                self._generator.check(request, policy)  # what is no token has no text either
                text = self._text_stream(request)
                is_lossy = not policy.lossless_for(greedy=params.greedy)
                is_audited = is_lossy and self._random.random() < self._audit_share
                client = _Client(sink, request)
                self._generator.submit(self._next, request, policy, text, is_audited=is_audited)
            except (RequestError, QueueFull) as error:
                _Client(sink, request).call(sink.fail, error)
                continue
            if is_audited:
                self._audited[self._next] = None
            self._clients[self._next] = client
            self._next += 1

    def _step(self) -> None:
        try:
            for chunk in self._generator.step():
                self._deliver(chunk)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.exception("memory ran out")
            # The error goes, with what the step has held: memory is free from here on.
            failed = ServiceError(f"memory ran out while the request ran: {str(error).splitlines()[0]}", _LESS)
        self._begin_anew(failed)

    def _begin_anew(self, error: ServiceError) -> None:
        """Ends the requests that ran; those that wait are decoded by a new generator."""
        waiting = set(self._generator.abandon())
        if len(waiting) == len(self._clients):  # nobody's end makes room
            raise error
        self._generator = self._generator_for()
        self._llm.recover()
        for index, client in list(self._clients.items()):
            if index in waiting:
                policy = policy_of(client.request, self._llm.tiers)
                text, is_audited = self._text_stream(client.request), index in self._audited
                self._generator.submit(index, client.request, policy, text, is_audited=is_audited)
                continue
            del self._clients[index]
            self._audited.pop(index, None)
            client.call(client.sink.fail, error)
        self._report_audits()

    def _text_stream(self, request: Request) -> TextStream | None:
        """What looks for a request's stop strings; without any, nobody here wants its text."""
        return self._llm.tokenizer.text_stream(request.prompt_ids, request.params) if request.params.stop else None

    def _cancel(self) -> None:
        """Ends the requests whose clients do not wait any more."""
        for index, client in self._clients.items():
            if client.is_cancelled():
                self._generator.cancel(index)

    def _deliver(self, chunk: Chunk) -> None:
        client = self._clients[chunk.index]
        if chunk.finish_reason is not None:
            del self._clients[chunk.index]
            self._on_finish(chunk, client.request.method)
            if chunk.audit is not None:
                self._audited[chunk.index] = chunk.audit, client.request.method, chunk.counters.emitted
                self._report_audits()
        client.call(client.sink.send, chunk)

    def _report_audits(self) -> None:
        """Tells what was found of the first ones to be audited, as far as they have ended."""
        for index, found in list(self._audited.items()):
            if found is None:
                return
            del self._audited[index]
            if found[-1]:
                self._on_audit(*found)

    def _fail_all(self, error: ServiceError) -> None:
        with self._changed:
            waiting = [_Client(sink, request) for request, sink in self._inbox]
            self._inbox.clear()
        for client in (*self._clients.values(), *waiting):
            client.call(client.sink.fail, error)
        self._clients.clear()
