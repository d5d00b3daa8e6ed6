"""What every way to decode answers to the requests of a task, asked in turns, and how long it took them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ssv.ab.bench import Tally
from ssv.ab.bench_ways import Way
from ssv.runtime.request import Output, Request, SamplingParams
from ssv.support.progress import Report

Asked = tuple[tuple[int, ...], SamplingParams]
"""Token ids of a prompt, and how it is to be continued."""


class Answers:
    """Answers of all ways, each request asked once of each.

    The ways take turns on each group of requests, in a rotating order, so that a machine whose speed drifts slows all
    of them alike. Whoever asks first for the answers of one way has all ways answer; the others find theirs here.

    Attributes:
        tallies: outputs and times by way, of one round.
    """

    def __init__(self, ways: Sequence[Way], *, batch: int, num_draft_tokens: int, report: Report) -> None:
        """Begins with nothing asked.

        Args:
            batch: requests that are decoded side by side.
            num_draft_tokens: of `speculative`.
        """
        self._ways, self._batch, self._num_draft_tokens, self._report = ways, batch, num_draft_tokens, report
        self._known: dict[tuple[Asked, ...], dict[str, list[Output]]] = {}
        self._num_groups = 0
        self.tallies = {way.name: Tally(outputs=[[]], seconds=[[]], tokens=[[]]) for way in ways}

    def of(self, way: str, asked: Sequence[Asked]) -> list[Output]:
        """The answers of a way.

        Raises:
            RequestError: a request cannot be served.
        """
        key = tuple(asked)
        if key not in self._known:
            self._known[key] = self._ask(key)
        return self._known[key][way]

    def _ask(self, asked: Sequence[Asked]) -> dict[str, list[Output]]:
        groups = [asked[start : start + self._batch] for start in range(0, len(asked), self._batch)]
        if not self._num_groups:
            for way in self._ways:  # the first steps of each shape are slower
                self._decode(way, groups[0])
        found: dict[str, list[Output]] = {way.name: [] for way in self._ways}
        for number, group in enumerate(groups):
            for turn in range(len(self._ways)):
                way = self._ways[(self._num_groups + turn) % len(self._ways)]
                start = time.perf_counter()
                outputs = self._decode(way, group)
                seconds, tokens = time.perf_counter() - start, sum(len(output.token_ids) for output in outputs)
                found[way.name] += outputs
                tally = self.tallies[way.name]
                tally.outputs[0] += outputs
                tally.seconds[0].append(seconds)
                tally.tokens[0].append(tokens)
            self._num_groups += 1
            self._report("answers", number + 1, len(groups), "")
        return found

    def _decode(self, way: Way, group: Sequence[Asked]) -> list[Output]:
        requests = [Request(ids, way.method, params, self._num_draft_tokens) for ids, params in group]
        return way.llm.generate(requests, prompt_cache=way.cache)
