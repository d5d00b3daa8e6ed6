"""What the server's `ssv` model runs, on CUDA: requests from many threads, batched and cached, give what each gives
alone.

make test-gpu
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from tiny_bundle import build, write_recipe

from ssv.runtime.engines.contract import EngineError
from ssv.runtime.engines.gpu_memory import GpuShare
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


@pytest.mark.parametrize("at", [1, 5])
@pytest.mark.parametrize("method", ["autoregressive", "speculative", "premium"])
def test_memory_that_runs_out_ends_what_runs_and_nothing_else(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, method: str, at: int
) -> None:
    llm = LLM.load(bundle, device="cuda", max_batch=2, max_length=256)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    asked = [Request((5, 6, 7 + n), method, params) for n in range(5)]
    expected = [llm.generate([request])[0].token_ids for request in asked]
    assert llm.rounds is not None
    llm.know_costs()  # which runs rounds too
    run, num_runs = llm.rounds.run, 0

    def run_out(shape: object) -> None:
        nonlocal num_runs
        num_runs += 1
        if num_runs == at:  # with a round in flight, from the second one on
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        run(shape)  # type: ignore[arg-type]

    monkeypatch.setattr(llm.rounds, "run", run_out)
    deaths: list[Exception] = []
    service = Service(llm, max_waiting=8, prompt_cache_bytes=1 << 20, on_death=deaths.append)
    sinks = [Sink() for _ in asked]
    for request, sink in zip(asked, sinks, strict=True):
        service.submit(request, sink)
    assert all(sink.over.wait(SECONDS) for sink in sinks)
    failed = [sink for sink in sinks if sink.error is not None]
    assert 1 <= len(failed) <= 3 and all("memory ran out" in str(sink.error) for sink in failed)
    for sink, tokens in zip(sinks, expected, strict=True):
        assert sink.error is not None or tuple(sink.token_ids) == tokens
    assert service.drain(SECONDS) and not deaths


def test_a_share_is_refused_before_it_is_taken_and_held_to(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []
    take = GpuShare.take

    def noted(self: GpuShare, needed: object, max_batch: int, max_length: int) -> None:
        said.append(needed(max_batch, max_length))  # type: ignore[operator]
        take(self, needed, max_batch, max_length)  # type: ignore[arg-type]

    monkeypatch.setattr(GpuShare, "take", noted)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with pytest.raises(EngineError, match=r"rows of 256 tokens need .* the share 0.5 of its .* at most"):
        LLM.load(bundle, device="cuda", max_batch=10**7, max_length=256, gpu_memory_share=0.5)
    assert torch.cuda.memory_allocated() == before
    torch.cuda.reset_peak_memory_stats()
    try:
        llm = LLM.load(bundle, device="cuda", max_batch=64, max_length=256, gpu_memory_share=0.5)
        assert torch.cuda.max_memory_allocated() - before < said[-1] + (32 << 20)
        total = torch.cuda.mem_get_info()[1]
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(0.5 * total), dtype=torch.uint8, device="cuda")
        use = llm.gpu_use()
        assert use is not None and use.peak >= use.reserved > 0 and use.in_use > 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
