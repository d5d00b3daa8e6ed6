"""Requests from many threads, one that decodes, and every way in which it may end."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from growing import GrowingFakeDraft
from lane import FakeLane
from rounds import FakeRounds

from fakes import EOS, FakeDraft, FakeTarget, FakeTokenizer
from ssv.bundle.policy import MAX_PENDING, Policy
from ssv.runtime.decode.audit import audit
from ssv.runtime.decode.generator import Load
from ssv.runtime.decode.scheduler import QueueFull
from ssv.runtime.engines.contract import EngineError
from ssv.runtime.llm import LLM
from ssv.runtime.request import Audit, Chunk, Output, Request, RequestError, SamplingParams
from ssv.runtime.serving.service import Service, ServiceError
from ssv.runtime.tokenizer import BundleTokenizer

TIERS = {
    "premium": Policy(accept_below=0.0, verify_above=0.3, risk_budget=0.6, max_pending=6),
    "turbo": Policy(accept_below=0.45, verify_above=0.8, risk_budget=1.0, max_pending=12),
}
MAX_LENGTH = 96
CHUNK = 4
SECONDS = 30.0


class Gate:
    """Lets as many target steps through as it is told; any number at first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left: float = float("inf")
        self.error: Exception | None = None
        self.is_once = False
        self.waits = threading.Event()

    def shut(self) -> None:
        with self._changed:
            self._left = 0
            self.waits.clear()

    def open(self) -> None:
        with self._changed:
            self._left = float("inf")
            self._changed.notify_all()

    def let_one(self) -> None:
        """Lets one step through, and waits until the next one comes."""
        with self._changed:
            self.waits.clear()
            self._left = 1
            self._changed.notify_all()
        assert self.waits.wait(SECONDS)

    def fail(self, error: Exception, *, once: bool = False) -> None:
        self.error, self.is_once = error, once
        self.open()

    def pass_(self) -> None:
        with self._changed:
            while self._left <= 0:
                self.waits.set()
                self._changed.wait(SECONDS)
            self._left -= 1
        if (error := self.error) is not None:
            if self.is_once:
                self.error = None
            raise error


class GatedTarget(FakeTarget):
    def __init__(self, gate: Gate, **options: Any) -> None:
        super().__init__(**options)
        self.gate = gate

    def step(self, *args: Any, **options: Any) -> Any:
        self.gate.pass_()
        return super().step(*args, **options)


class Sink:
    """Keeps what comes.

    Attributes:
        ended: set by the last chunk, or the error.
    """

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.error: Exception | None = None
        self.cancelled = False
        self.ended = threading.Event()

    def send(self, chunk: Chunk) -> None:
        assert not self.ended.is_set()
        self.chunks.append(chunk)
        if chunk.finish_reason is not None:
            self.ended.set()

    def fail(self, error: Exception) -> None:
        assert not self.ended.is_set()
        self.error = error
        self.ended.set()

    def is_cancelled(self) -> bool:
        return self.cancelled

    def wait(self) -> Sink:
        assert self.ended.wait(SECONDS), "nothing came"
        return self

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for chunk in self.wait().chunks for token in chunk.token_ids)

    @property
    def reason(self) -> str | None:
        assert self.wait().error is None, self.error
        return self.chunks[-1].finish_reason


class Bench:
    """A service over fakes.

    Attributes:
        finished, audits, loads, deaths: what it called back with.
    """

    def __init__(
        self, *, max_batch: int = 2, max_waiting: int = 3, by_themselves: bool = False, **options: Any
    ) -> None:
        self.gate = Gate()
        self.llm = make_llm(max_batch, self.gate, by_themselves=by_themselves)
        self.finished: list[tuple[Chunk, str]] = []
        self.audits: queue.Queue[tuple[Audit, str, int]] = queue.Queue()
        self.loads: list[Load] = []
        self.deaths: queue.Queue[Exception] = queue.Queue()
        self.service = Service(
            self.llm,
            max_waiting=max_waiting,
            on_finish=lambda chunk, method: self.finished.append((chunk, method)),
            on_audit=lambda found, method, tokens: self.audits.put((found, method, tokens)),
            on_round=self.loads.append,
            on_death=self.deaths.put,
            **options,
        )

    def submit(self, asked: Request) -> Sink:
        sink = Sink()
        self.service.submit(asked, sink)
        return sink

    def hold(self, *asked: Request) -> list[Sink]:
        """Submits requests, none of which can go on until the gate is opened."""
        self.gate.shut()
        sinks = [self.submit(asked[0])]
        assert self.gate.waits.wait(SECONDS)
        return sinks + [self.submit(each) for each in asked[1:]]

    def end(self) -> None:
        self.gate.open()
        self.service.drain(SECONDS)


def make_llm(max_batch: int, gate: Gate | None = None, *, by_themselves: bool = False) -> LLM:
    """An LLM of fakes.

    Args:
        by_themselves: whether its engines run rounds, and prompts beside them.
    """
    sizes = {"max_batch": max_batch, "max_length": MAX_LENGTH + MAX_PENDING, "eos_bias": -1.0}
    target = GatedTarget(gate or Gate(), **sizes)
    draft = FakeDraft(target, conditioned=True, agreement=0.7, noise=0.2)
    tokenizer = BundleTokenizer(FakeTokenizer())
    given: dict[str, Any] = {"eos_token_ids": [EOS], "tiers": TIERS, "max_length": MAX_LENGTH, "prefill_chunk": CHUNK}
    if by_themselves:
        draft = GrowingFakeDraft(target, conditioned=True, agreement=0.7, noise=0.2)
        given |= {"rounds": FakeRounds(target, draft, lambda num, shape: 1e-3 * (1 + shape.nodes / 8))}
        given |= {"lane": FakeLane(target, draft, least=8)}
    return LLM(target, draft, tokenizer, **given)


def request(
    seed: int = 0, method: str = "premium", length: int = 9, deadline: float | None = None, **given: Any
) -> Request:
    prompt = tuple((seed * 5 + i * (seed + 3)) % 11 + 1 for i in range(length))
    return Request(prompt, method, SamplingParams(**{"max_tokens": 12, "seed": seed, **given}), deadline=deadline)


def alone(asked: Request) -> Output:
    return make_llm(1).generate([asked])[0]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def bench(**options: Any) -> Bench:
        made.append(Bench(**options))
        return made[-1]

    yield bench
    for each in made:
        each.end()


# --- decoding -------------------------------------------------------------------------------------------------------


def test_requests_from_many_threads_have_their_own_outputs(make: Callable[..., Bench]) -> None:
    bench = make(max_batch=3, max_waiting=40)
    methods = ("premium", "turbo", "autoregressive", "speculative")
    asked = [
        request(i, methods[i % 4], 5 + i % 9, temperature=0.0 if i % 3 else 0.9, stop=("ND",) if i % 5 == 0 else ())
        for i in range(32)
    ]
    sinks: dict[int, Sink] = {}

    def submit(start: int) -> None:
        for i in range(start, len(asked), 4):
            sinks[i] = bench.submit(asked[i])

    threads = [threading.Thread(target=submit, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    for i, each in enumerate(asked):
        expected = alone(each)
        assert (sinks[i].token_ids, sinks[i].reason) == (expected.token_ids, expected.finish_reason)
    assert sorted(method for _, method in bench.finished) == sorted(each.method for each in asked)
    assert sum(chunk.counters.emitted for chunk, _ in bench.finished) == sum(len(s.token_ids) for s in sinks.values())


def test_it_goes_on_after_a_pause(make: Callable[..., Bench]) -> None:
    bench = make()
    for i in range(3):
        assert bench.submit(request(i)).token_ids == alone(request(i)).token_ids


def test_prompts_are_kept(make: Callable[..., Bench]) -> None:
    bench = make(prompt_cache_bytes=1 << 20)
    first = bench.submit(request(length=20)).wait()
    second = bench.submit(request(length=20))
    assert second.token_ids == first.token_ids
    assert first.chunks[-1].counters.cached_tokens == 0
    assert second.chunks[-1].counters.cached_tokens == 16
    wait_until(lambda: bench.service.load.prompts.blocks == 5)
    assert bench.service.load.prompts.hits > 0


def test_without_stop_strings_no_text_is_made(make: Callable[..., Bench]) -> None:
    assert all(chunk.text == "" for chunk in make().submit(request()).wait().chunks)


def test_deadline(make: Callable[..., Bench]) -> None:
    sink = make().submit(request(deadline=time.monotonic() - 1.0))
    assert (sink.reason, sink.token_ids) == ("deadline", ())


# --- refusal --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (request(length=0), "the prompt is empty"),
        (Request((99,), "premium"), "outside the target's vocabulary"),
        (request(length=90), "exceed the cache"),
        (request(method="gold"), "unknown method 'gold'"),
        (request(method="balanced"), "balanced"),
    ],
)
def test_what_cannot_be_served_fails_alone(make: Callable[..., Bench], wrong: Request, says: str) -> None:
    bench = make()
    good, bad, other = bench.submit(request(1)), bench.submit(wrong), bench.submit(request(2))
    assert isinstance(bad.wait().error, RequestError)
    assert says in str(bad.error)
    assert good.reason and other.reason
    assert len(bench.finished) == 2


def test_more_than_can_wait_are_refused(make: Callable[..., Bench]) -> None:
    """Some at once, some when it is their turn to queue; those that are taken are all answered."""
    bench = make(max_batch=2, max_waiting=3)
    held = bench.hold(request(0))
    refused = 0
    for i in range(1, 12):
        try:
            held.append(bench.submit(request(i)))
        except QueueFull as error:
            assert "are waiting already: try again later" in str(error)
            refused += 1
    assert refused == 11 - 5
    bench.gate.open()
    outcomes = [sink.wait().error for sink in held]
    assert all(isinstance(error, QueueFull) for error in outcomes if error is not None)
    assert sum(error is None for error in outcomes) == 5  # two rows, and three that wait
    bench.submit(request(3)).wait()


def test_refuse_leaves_those_that_run(make: Callable[..., Bench]) -> None:
    bench = make()
    held = bench.hold(request(0), request(1))
    bench.service.refuse("closed for today")
    bench.service.refuse("another reason")
    with pytest.raises(ServiceError, match="closed for today"):
        bench.submit(request(2))
    bench.gate.open()
    assert all(sink.reason in ("stop", "length") for sink in held)


# --- cancellation ---------------------------------------------------------------------------------------------------


def test_cancelling_one_that_runs_and_one_that_waits(make: Callable[..., Bench]) -> None:
    bench = make(max_batch=1)
    running, waiting, other = bench.hold(request(0, ignore_eos=True), request(1), request(2))
    running.cancelled = waiting.cancelled = True
    bench.gate.open()
    assert (running.reason, waiting.reason) == ("cancelled", "cancelled")
    assert waiting.token_ids == ()
    assert other.token_ids == alone(request(2)).token_ids
    assert sorted(str(chunk.finish_reason) for chunk, _ in bench.finished)[:2] == ["cancelled", "cancelled"]


# --- draining -------------------------------------------------------------------------------------------------------


def test_drain_finishes_what_was_taken(make: Callable[..., Bench]) -> None:
    bench = make(max_batch=1)
    held = bench.hold(request(0), request(1), request(2))
    threading.Timer(0.05, bench.gate.open).start()
    assert bench.service.drain(SECONDS)
    assert [sink.token_ids for sink in held] == [alone(request(i)).token_ids for i in range(3)]
    with pytest.raises(ServiceError, match="shutting down: try another one"):
        bench.submit(request(3))


def test_drain_of_an_idle_service(make: Callable[..., Bench]) -> None:
    bench = make()
    assert bench.service.drain(SECONDS)
    assert bench.service.drain(SECONDS)


def test_drain_aborts_what_takes_too_long(make: Callable[..., Bench]) -> None:
    bench = make(max_batch=1)
    held = bench.hold(request(0, ignore_eos=True, max_tokens=60), request(1), request(2))
    # It waits for the step that runs, which is let through once all others are to be given up.
    threading.Timer(0.1, bench.gate.open).start()
    assert not bench.service.drain(0.01)
    assert all(sink.ended.is_set() for sink in held)
    errors = [sink.error for sink in held]
    assert all(isinstance(error, ServiceError) and "was shut down before" in str(error) for error in errors)
    assert bench.deaths.empty()


# --- failure --------------------------------------------------------------------------------------------------------


def test_failure_of_an_engine_ends_everything(make: Callable[..., Bench]) -> None:
    bench = make(max_batch=1)
    held = bench.hold(request(0), request(1), request(2))
    bench.gate.fail(EngineError("out of order"))
    for sink in held:
        assert isinstance(sink.wait().error, ServiceError)
        assert "the engine failed while the request ran: out of order" in str(sink.error)
    assert str(bench.deaths.get(timeout=SECONDS)) == "out of order"
    with pytest.raises(ServiceError, match="has failed and takes no more requests: out of order"):
        bench.submit(request(3))
    assert bench.deaths.empty()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it"),
        RuntimeError("CUDA error: out of memory\nCompile with"),
        MemoryError("no room"),
    ],
)
@pytest.mark.parametrize("num_steps", [0, 1, 8])
def test_who_runs_ends_where_memory_runs_out_and_nobody_else(
    make: Callable[..., Bench], error: Exception, num_steps: int
) -> None:
    bench = make(max_batch=2, max_waiting=8, prompt_cache_bytes=1 << 20)
    held = bench.hold(*(request(n, length=20) for n in range(5)))
    for _ in range(num_steps):
        bench.gate.let_one()
    bench.gate.fail(error, once=True)
    ended = [sink.wait() for sink in held]
    failed = [sink for sink in ended if sink.error is not None]
    # One that joins, and by the time of the eighth step one that decodes beside it.
    assert len(failed) == (2 if num_steps == 8 else 1)
    for sink in failed:
        assert isinstance(sink.error, ServiceError)
        said = str(error).splitlines()[0]
        assert str(sink.error) == f"memory ran out while the request ran: {said}: try again later, or ask for less"
    for number, sink in enumerate(ended[len(failed) :], len(failed)):
        assert sink.token_ids == alone(request(number, length=20)).token_ids
    assert bench.submit(request(1)).token_ids == alone(request(1)).token_ids
    assert bench.deaths.empty()
    assert bench.service.drain(SECONDS)


def test_where_memory_runs_out_again_and_again_each_is_told(make: Callable[..., Bench]) -> None:
    bench = make(max_batch=1, max_waiting=8)
    held = bench.hold(*(request(n) for n in range(4)))
    bench.gate.fail(torch.OutOfMemoryError("CUDA out of memory"))
    assert all("memory ran out" in str(sink.wait().error) for sink in held)
    bench.gate.error = None
    assert bench.submit(request(1)).token_ids == alone(request(1)).token_ids
    assert bench.deaths.empty()


@pytest.mark.parametrize("num_steps", range(1, 30, 4))
@pytest.mark.parametrize("method", ["autoregressive", "speculative"])
def test_engines_that_run_rounds_and_prompts_by_themselves_begin_anew(
    make: Callable[..., Bench], method: str, num_steps: int
) -> None:
    bench = make(max_batch=2, max_waiting=8, by_themselves=True)
    held = bench.hold(*(request(n, method, length=20) for n in range(6)))
    for _ in range(num_steps):
        bench.gate.let_one()
    bench.gate.fail(torch.OutOfMemoryError("CUDA out of memory"), once=True)
    ended = [sink.wait() for sink in held]
    assert 1 <= sum(sink.error is not None for sink in ended) <= 3  # two that decode, and one that joins
    for number, sink in enumerate(ended):
        if sink.error is None:
            assert sink.token_ids == alone(request(number, method, length=20)).token_ids
    assert bench.submit(request(1, method)).token_ids == alone(request(1, method)).token_ids
    assert bench.deaths.empty()


def test_an_audit_whose_request_ran_out_of_memory_keeps_none_of_the_others(make: Callable[..., Bench]) -> None:
    bench = make(max_batch=1, max_waiting=8, audit_share=1.0)
    lossy = [request(n, "turbo") for n in range(3)]
    held = bench.hold(*lossy)
    bench.gate.let_one()
    bench.gate.fail(torch.OutOfMemoryError("CUDA out of memory"), once=True)
    assert [sink.wait().error is None for sink in held] == [False, True, True]
    assert [bench.audits.get(timeout=SECONDS)[1] for _ in range(2)] == ["turbo", "turbo"]


def test_clients_hear_of_a_failure_before_the_process_may_end(make: Callable[..., Bench]) -> None:
    bench = make(max_batch=1)
    held = bench.hold(request(0), request(1))
    told: list[bool] = []
    bench.service._on_death = lambda error: told.extend(sink.ended.is_set() for sink in held)
    bench.gate.fail(EngineError("x"))
    bench.service._thread.join(SECONDS)
    assert told == [True, True]


def test_drain_after_a_failure_does_not_say_that_all_were_finished(make: Callable[..., Bench]) -> None:
    bench = make()
    (sink,) = bench.hold(request(0))
    bench.gate.fail(EngineError("x"))
    assert sink.wait().error is not None
    bench.service._thread.join(SECONDS)
    assert not bench.service.drain(SECONDS)


def test_one_sink_that_raises_does_not_keep_others_from_their_error(make: Callable[..., Bench]) -> None:
    bench = make(max_batch=1)
    bad, good = bench.hold(request(0), request(1))

    def raises(error: Exception) -> None:
        raise OSError("the client has gone")

    bad.fail = raises  # type: ignore[method-assign]
    bench.gate.fail(EngineError("x"))
    bench.service._thread.join(SECONDS)
    assert good.ended.is_set()
    assert not bench.deaths.empty()


# --- load -----------------------------------------------------------------------------------------------------------


def test_load(make: Callable[..., Bench]) -> None:
    bench = make(max_batch=2)
    load = bench.service.load
    assert (load.decoding, load.joining, load.waiting, load.prompts.blocks) == (0, 0, 0, 0)
    bench.hold(*(request(i, "autoregressive", ignore_eos=True, max_tokens=20) for i in range(3)))
    load = bench.service.load
    assert (load.decoding, load.joining, load.waiting) == (0, 1, 2)
    bench.gate.open()
    wait_until(lambda: bool(bench.loads) and bench.loads[-1] == Load(0, 0, 0, load.prompts))
    assert max(each.decoding for each in bench.loads) == 2
    assert all(each.decoding + each.joining <= 2 for each in bench.loads)


def test_gauges_end_at_zero_after_requests_that_were_refused(make: Callable[..., Bench]) -> None:
    bench = make()
    bench.submit(request(length=0)).wait()
    bench.submit(Request((99,), "premium")).wait()
    bench.end()
    assert (bench.loads[-1].decoding, bench.loads[-1].joining, bench.loads[-1].waiting) == (0, 0, 0)


# --- audits ---------------------------------------------------------------------------------------------------------


def test_audits_find_what_the_target_says_of_the_whole_output(make: Callable[..., Bench]) -> None:
    bench = make(max_batch=3, max_waiting=40, audit_share=1.0)
    asked = [request(i, "turbo", 5 + i, max_tokens=10 + i) for i in range(9)]
    sinks = [bench.submit(each) for each in asked]
    found = [bench.audits.get(timeout=SECONDS) for _ in asked]
    target = make_llm(1).target
    expected = [
        (audit(target, each.prompt_ids, sink.token_ids), "turbo", len(sink.token_ids))
        for each, sink in zip(asked, sinks, strict=True)
    ]
    assert sorted(map(repr, found)) == sorted(map(repr, expected))
    assert sum(one.strict for one, _, _ in found) > 0, "the fakes have to disagree somewhere"


def test_audits_do_not_change_what_decodes_beside_them(make: Callable[..., Bench]) -> None:
    bench = make(max_batch=2, max_waiting=40, audit_share=1.0)
    asked = [request(i, "turbo" if i % 2 else "premium", 5 + i) for i in range(12)]
    sinks = [bench.submit(each) for each in asked]
    assert [sink.token_ids for sink in sinks] == [alone(each).token_ids for each in asked]
    assert isinstance(bench.llm.draft, FakeDraft)
    for _ in range(6):
        bench.audits.get(timeout=SECONDS)
    assert bench.llm.draft.wrong_features == 0


def test_audits_come_in_the_order_in_which_requests_were_taken(make: Callable[..., Bench]) -> None:
    """However long their outputs are: short ones would be too many among the first."""
    bench = make(max_batch=4, max_waiting=40, audit_share=1.0)
    lengths = [40, 5, 30, 8, 3, 20]
    bench.hold(*(request(i, "turbo", max_tokens=n, ignore_eos=True) for i, n in enumerate(lengths)))
    bench.gate.open()
    assert [bench.audits.get(timeout=SECONDS)[2] for _ in lengths] == lengths


def test_one_that_has_nothing_holds_up_no_other_audit(make: Callable[..., Bench]) -> None:
    bench = make(max_batch=1, max_waiting=40, audit_share=1.0)
    running, waiting, other = bench.hold(*(request(i, "turbo", ignore_eos=True) for i in range(3)))
    running.cancelled = waiting.cancelled = True
    bench.gate.open()
    assert other.reason == "length"
    while (tokens := bench.audits.get(timeout=SECONDS)[2]) != 12:
        assert tokens == len(running.token_ids) > 0


def test_sampled_outputs_are_audited_with_their_noise(make: Callable[..., Bench]) -> None:
    bench = make(max_batch=3, max_waiting=40, audit_share=1.0)
    asked = [request(i, "turbo", 5 + i, max_tokens=20, temperature=1.0) for i in range(9)]
    sinks = [bench.submit(each) for each in asked]
    assert [sink.token_ids for sink in sinks] == [alone(each).token_ids for each in asked]
    found = [bench.audits.get(timeout=SECONDS)[0] for _ in asked]
    target = make_llm(1).target
    assert found == [
        audit(target, each.prompt_ids, sink.token_ids, each.params) for each, sink in zip(asked, sinks, strict=True)
    ]
    assert 0 < sum(one.strict for one in found) < sum(len(sink.token_ids) for sink in sinks) / 2


@pytest.mark.parametrize("asked", [request(method="premium"), request(method="autoregressive", temperature=1.0)])
def test_only_requests_of_lossy_tiers_are_audited(make: Callable[..., Bench], asked: Request) -> None:
    bench = make(audit_share=1.0)
    bench.submit(asked).wait()
    bench.submit(request(1, "turbo")).wait()
    assert bench.audits.get(timeout=SECONDS)[1] == "turbo"
    assert bench.audits.empty()


def test_without_a_share_nothing_is_audited(make: Callable[..., Bench]) -> None:
    bench = make()
    bench.submit(request(method="turbo")).wait()
    bench.end()
    assert bench.audits.empty()


def test_a_share_is_a_share(make: Callable[..., Bench]) -> None:
    bench = make(max_batch=4, max_waiting=100, audit_share=0.5)
    for i in range(40):
        bench.submit(request(i, "turbo", max_tokens=3)).wait()
    bench.end()
    assert 10 <= bench.audits.qsize() <= 30


def test_tokens_that_min_tokens_forces_are_no_mismatches(make: Callable[..., Bench]) -> None:
    """Where the target would have ended and must not, it chooses the next best, and so does its policy."""
    asked = next(
        each
        for each in (request(i, "autoregressive", max_tokens=20, min_tokens=20) for i in range(100))
        if audit(make_llm(1).target, each.prompt_ids, alone(each).token_ids).strict
    )
    exact = {"turbo": Policy(accept_below=1e-9, verify_above=0.0, risk_budget=0.0, max_pending=1)}
    bench = make(audit_share=1.0)
    bench.llm.tiers.update(exact)
    sink = bench.submit(Request(asked.prompt_ids, "turbo", asked.params))
    assert sink.token_ids == alone(asked).token_ids
    found, _, _ = bench.audits.get(timeout=SECONDS)
    assert found.strict == 0
