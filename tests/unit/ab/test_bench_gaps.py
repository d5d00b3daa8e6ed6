"""What a user sees who reads along: times between the pieces of an output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest

from ssv.ab import bench_ways
from ssv.ab.bench import _between
from ssv.ab.bench_ways import Way
from ssv.runtime.counters import Counters
from ssv.runtime.llm import LLM
from ssv.runtime.request import Chunk, Request, SamplingParams


class Streaming(LLM):
    """Gives pieces at times of its own."""

    def __init__(self, pieces: Sequence[tuple[float, int, int]]) -> None:
        self.now, self._pieces = 0.0, pieces

    def stream(self, requests: Sequence[Request], **_: Any) -> Iterator[Chunk]:
        for at, index, tokens in self._pieces:
            self.now = at
            yield Chunk(index, "", (7,) * tokens, Counters())
        for index in range(len(requests)):
            yield Chunk(index, "", (), Counters(), "stop")


def test_gaps_are_between_pieces_of_one_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tokens at once are one piece; one without tokens, such as the end of a text, is none."""
    llm = Streaming([(1.0, 0, 1), (2.0, 1, 1), (4.0, 0, 3), (4.5, 1, 0), (9.0, 1, 2), (10.0, 0, 1)])
    monkeypatch.setattr(bench_ways.time, "perf_counter", lambda: llm.now)
    gaps: list[float] = []
    outputs = Way("premium", "premium", cast(LLM, llm)).decode([(1,), (2,)], SamplingParams(), 5, gaps)
    assert gaps == [3.0, 7.0, 6.0]
    assert [len(output.token_ids) for output in outputs] == [5, 3]


def test_percentiles_and_deviation_are_in_milliseconds() -> None:
    found = _between([k / 1000 for k in range(1, 101)])
    assert found == pytest.approx([51.0, 96.0, 100.0, 28.866], abs=1e-3)
    assert _between([0.25]) == [250.0, 250.0, 250.0, 0.0]
    assert _between([]) == (None, None, None, None)
