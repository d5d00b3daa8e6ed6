"""What the server's `ssv` model runs, on CUDA: requests from many threads, batched and cached, give what each gives
alone.

make test-gpu
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tiny_bundle import build, write_recipe

from ssv.runtime.llm import LLM
from ssv.runtime.request import Chunk, Request, SamplingParams
from ssv.runtime.serving.service import Service

ROWS = 4
SECONDS = 120.0


class Sink:
    """Collects a request's output."""

    def __init__(self, leave_after: int | None = None) -> None:
        self.token_ids: list[int] = []
        self.last: Chunk | None = None
        self.error: Exception | None = None
        self.over = threading.Event()
        self._leave_after = leave_after

    def send(self, chunk: Chunk) -> None:
        self.token_ids.extend(chunk.token_ids)
        if chunk.finish_reason is not None:
            self.last = chunk
            self.over.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.over.set()

    def is_cancelled(self) -> bool:
        return self._leave_after is not None and len(self.token_ids) >= self._leave_after


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("pair")
    build(write_recipe(base), base / "bundle")
    return base / "bundle"


def requests_of(num: int) -> list[Request]:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    shared = tuple(8 + i % 90 for i in range(64))
    methods = ("premium", "autoregressive", "turbo", "balanced")
    return [Request((*shared, 9 + n, 30 + n), methods[n % 4], params) for n in range(num)]


def test_many_threads_get_what_each_would_get_alone(bundle: Path) -> None:
    # fp32: sums of other sizes of batches round alike enough for the same tokens.
    llm = LLM.load(bundle, device="cuda", precision="fp32", max_batch=ROWS, max_length=256, prefill_chunk=32)
    requests = requests_of(12)
    alone = [llm.generate([request])[0].token_ids for request in requests]
    service = Service(llm, max_waiting=len(requests), prompt_cache_bytes=64 << 20)
    sinks = [Sink() for _ in requests]
    for request, sink in zip(requests, sinks, strict=True):
        threading.Thread(target=service.submit, args=(request, sink)).start()
    for sink in sinks:
        assert sink.over.wait(SECONDS) and sink.error is None
    assert [tuple(sink.token_ids) for sink in sinks] == alone
    assert sum(sink.last.counters.cached_tokens for sink in sinks if sink.last) > 0
    assert service.drain(SECONDS)


def test_who_leaves_makes_room(bundle: Path) -> None:
    llm = LLM.load(bundle, device="cuda", max_batch=1, max_length=256)
    service = Service(llm, max_waiting=4)
    first, second = Sink(leave_after=3), Sink()
    endless = SamplingParams(max_tokens=180, ignore_eos=True)
    service.submit(Request((5, 6, 7), "premium", endless), first)
    service.submit(Request((5, 6, 7), "premium", SamplingParams(max_tokens=5, ignore_eos=True)), second)
    assert first.over.wait(SECONDS) and first.last is not None and first.last.finish_reason == "cancelled"
    assert second.over.wait(SECONDS) and len(second.token_ids) == 5
    assert service.drain(SECONDS)
