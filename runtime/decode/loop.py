"""Continuous batching, a round at a time: requests join and leave between the rounds of the others.

A round lets a request join, runs one chunk of its prompt, then drafts and verifies in all rows: whoever decodes waits
for a chunk at the most, and whoever joins is never kept waiting by those who decode. Where the engines have a lane for
prompts (`PromptLane`), nobody waits for long ones, nor for those that come while all rows are in use.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from ssv.bundle.policy import Policy
from ssv.runtime.counters import Counters
from ssv.runtime.decode.generator import Load
from ssv.runtime.decode.prompt_cache import CacheStats
from ssv.runtime.decode.round import DecodeBatch
from ssv.runtime.decode.row import Row
from ssv.runtime.decode.scheduler import Scheduler
from ssv.runtime.request import Audit, Chunk, FinishReason, Request
from ssv.runtime.text import TextStream


class Running:
    """A request that waits or runs.

    Attributes:
        is_cancelled: whether it is to end in the next step.
    """

    def __init__(
        self, index: int, request: Request, policy: Policy, text: TextStream | None, *, is_audited: bool = False
    ) -> None:
        self.index, self.request, self.text, self.is_cancelled = index, request, text, False
        if text is not None:
            text.min_tokens = request.params.min_tokens
        would_stop = text.would_stop if text is not None else lambda _: False
        self.row = Row(request.params, policy, would_stop, Counters(), audited=[] if is_audited else None)
        self.finish_reason: FinishReason | None = None
        self.arrived = time.monotonic() if request.arrived is None else request.arrived

    def push(self, tokens: Sequence[int], eos_token_ids: frozenset[int]) -> Chunk | None:
        """Hands tokens to the request until it ends; what comes after its end is dropped."""
        if self.finish_reason is not None or not tokens:
            return None
        params, counters, text = self.request.params, self.row.counters, self.text
        if not counters.emitted:
            counters.first_token_s = time.monotonic() - self.arrived
        rest = params.max_tokens - counters.emitted
        taken = said = tokens[:rest]
        if len(taken) == rest:
            self.finish_reason = "length"
        if not (ends := self.row.ends(eos_token_ids)).isdisjoint(taken):
            at = next(i for i, token in enumerate(taken) if token in ends)
            taken, said = taken[: at + 1], taken[:at]
            has_failed = self.row.processor is not None and self.row.processor.has_failed
            self.finish_reason = "length" if has_failed else "stop"
        piece = ""
        if text is None:
            pass
        elif not params.stop:
            piece = text.push(*said)
        else:
            for i, token in enumerate(said):
                piece += text.push(token)
                if text.stopped:
                    taken, self.finish_reason = taken[: i + 1], "stop"
                    break
        counters.emitted += len(taken)
        return self._chunk(piece, taken) if self.finish_reason is None else self._last(piece, taken)

    def end(self, reason: FinishReason) -> Chunk:
        """Ends the request where it is."""
        self.finish_reason = reason
        return self._last("", ())

    def _last(self, piece: str, taken: Sequence[int]) -> Chunk:
        self.row.ended = True
        if self.text is not None:
            piece += self.text.flush()
            if self.text.stopped:  # a stop string before half a character shows only now
                self.finish_reason = "stop"
        self.row.counters.total_s = time.monotonic() - self.arrived
        return self._chunk(piece, taken)

    def _chunk(self, piece: str, taken: Sequence[int]) -> Chunk:
        row, num = self.row, len(taken)
        chunk = Chunk(self.index, piece, tuple(taken), row.counters, self.finish_reason)
        # Few requests ask for more, and all rows of a batch wait while this is written.
        if row.logprobs or row.prompt_logprobs or row.fates:
            chunk = replace(
                chunk,
                logprobs=tuple(row.logprobs[:num]),
                prompt_logprobs=tuple(row.prompt_logprobs),
                fates=tuple(row.fates[:num]),
            )
            del row.logprobs[:num], row.fates[:num], row.prompt_logprobs[:]
        if row.audited is not None and self.finish_reason is not None:
            end = row.counters.prompt_tokens + row.counters.emitted  # what was verified beyond it is none of the output
            chunk = replace(chunk, audit=Audit.of(gap for place, gap in row.audited if place < end))
        return chunk


class DecodeLoop:
    """Requests over the rows of one batch: a `Generator`.

    Attributes:
        scheduler: who is where.
        prompt_cache: the batch's, or None.
        max_rows: of the batch.
    """

    def __init__(self, batch: DecodeBatch, eos_token_ids: frozenset[int], max_waiting: int | None = None) -> None:
        self.batch, self.eos_token_ids = batch, eos_token_ids
        self.scheduler: Scheduler[Running] = Scheduler(
            batch.target.max_batch, max_waiting, lambda running: batch.members.runs_beside(running.request.prompt_ids)
        )
        self.prompt_cache, self.max_rows = batch.members.prompt_cache, batch.target.max_batch

    @property
    def has_work(self) -> bool:
        """See `Generator.has_work`."""
        return self.scheduler.has_work

    @property
    def load(self) -> Load:
        """See `Generator.load`."""
        scheduler, cache = self.scheduler, self.prompt_cache
        prompts = cache.stats if cache is not None else CacheStats(0, 0, 0, 0, 0)
        return Load(len(scheduler.rows), int(scheduler.joining is not None), len(scheduler.waiting), prompts)

    def check(self, request: Request, policy: Policy) -> None:
        """Raises RequestError if a request cannot run here."""
        self.batch.members.check(request.prompt_ids, request.params, policy)

    def submit(
        self, index: int, request: Request, policy: Policy, text: TextStream | None, *, is_audited: bool = False
    ) -> None:
        """See `Generator.submit`."""
        self.check(request, policy)
        self.scheduler.submit(Running(index, request, policy, text, is_audited=is_audited))

    def cancel(self, index: int) -> None:
        """See `Generator.cancel`."""
        scheduler = self.scheduler
        joining = () if scheduler.joining is None else (scheduler.joining,)
        for running in (*scheduler.rows, *joining, *scheduler.waiting):
            if running.index == index:
                running.is_cancelled = True

    def abandon(self) -> list[int]:
        """See `Generator.abandon`."""
        self.batch.members.abandon_all()
        return [running.index for running in self.scheduler.waiting]

    def step(self) -> Iterator[Chunk]:
        """One round; yields what the requests gain as it comes: trusted tokens before the pass. Has to be exhausted."""
        yield from self._leave()
        yield from self._join()
        if self.scheduler.rows:
            for gained in self.batch.run(is_filling=self.scheduler.is_filling):
                yield from self._push(gained)
            yield from self._drop_finished()

    def _push(self, gained: Sequence[Sequence[int]]) -> Iterator[Chunk]:
        """Hands each row's tokens to its request."""
        for running, tokens in zip(self.scheduler.rows, gained, strict=True):
            if (chunk := running.push(tokens, self.eos_token_ids)) is not None:
                yield chunk

    def _join(self) -> Iterator[Chunk]:
        """Runs prompts for about a chunk's worth of tokens: one chunk of a long prompt, or several short prompts. One
        that runs beside the rounds goes on there, and joins once it has been run; an empty batch waits for a piece of
        it."""
        scheduler, members = self.scheduler, self.batch.members
        budget = members.tokens_between
        while budget > 0:
            self._admit()
            if (running := scheduler.joining) is None:
                return
            before = members.num_prefilled
            if members.is_beside:
                if not members.is_ready(wait=not scheduler.rows) or not scheduler.has_room:
                    return
                yield from self._settle()
                yield from self._joined(members.join())
                if not scheduler.has_room:
                    return  # the next prompt is begun behind the rounds that begin now
            else:
                yield from self._settle()
                if (first := members.prefill()) is None:
                    return
                budget -= len(running.request.prompt_ids) - before
                yield from self._joined(first)

    def _settle(self) -> Iterator[Chunk]:
        """Ends what the engines do by themselves, before somebody joins."""
        yield from self._push(self.batch.settle())
        yield from self._drop_finished()

    def _admit(self) -> None:
        """Lets a request join if one may."""
        if (running := self.scheduler.admit()) is not None:
            running.row.counters.queue_s = time.monotonic() - running.arrived
            members, waiting = self.batch.members, self.scheduler.waiting
            following = [(each.request.prompt_ids, each.row) for each in islice(waiting, members.most_sharing)]
            members.begin(running.request.prompt_ids, running.row, following)

    def _joined(self, first: int) -> Iterator[Chunk]:
        """Whoever joins decodes from its first token on."""
        running = self.scheduler.joining
        assert running is not None
        self.scheduler.joined()
        if (chunk := running.push([first], self.eos_token_ids)) is not None:
            yield chunk
        yield from self._drop_finished()

    def _leave(self) -> Iterator[Chunk]:
        """Ends requests that were cancelled or whose time is over."""
        now = time.monotonic()

        def reason(running: Running) -> FinishReason | None:
            deadline = running.request.deadline
            if running.is_cancelled:
                return "cancelled"
            return "deadline" if deadline is not None and now >= deadline else None

        scheduler = self.scheduler
        ended = [(running, why) for running in scheduler.waiting if (why := reason(running)) is not None]
        if ended:
            leaving = {id(running) for running, _ in ended}
            scheduler.drop(lambda running: id(running) in leaving)
        if scheduler.joining is not None and (why := reason(scheduler.joining)) is not None:
            ended.append((scheduler.joining, why))
            scheduler.abandon()
            self.batch.members.abandon()
        ended += [(running, why) for running in scheduler.rows if (why := reason(running)) is not None]
        for running, why in ended:
            yield running.end(why)
        yield from self._drop_finished()

    def _drop_finished(self) -> Iterator[Chunk]:
        """Takes the rows of requests that have ended out of the batch; the others may gain something first."""
        rows = self.scheduler.rows
        if any(running.finish_reason is not None for running in rows):
            yield from self._push(self.batch.settle())
        for row in range(len(rows) - 1, -1, -1):
            if rows[row].finish_reason is not None:
                self.batch.members.remove(row, self.scheduler.finish(row))
