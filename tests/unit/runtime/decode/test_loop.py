"""Requests that join and leave in the middle of others' rounds: nothing changes but when outputs come."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from drive import text_of
from lane import FakeLane
from tiny import random_draft, tiny_decoder, tiny_ids

from fakes import EOS, VOCAB_SIZE, FakeDraft, FakeHeads, FakeTarget, FakeTokenizer
from ssv.bundle.policy import MAX_PENDING, Policy
from ssv.runtime.counters import Counters
from ssv.runtime.decode import loop as module
from ssv.runtime.decode.loop import DecodeLoop
from ssv.runtime.decode.membership import PromptBlock
from ssv.runtime.decode.pace import Pace
from ssv.runtime.decode.prompt_cache import PromptCache
from ssv.runtime.decode.round import DecodeBatch
from ssv.runtime.decode.scheduler import QueueFull
from ssv.runtime.engines.torch_engine import draft_engine, target_engine
from ssv.runtime.llm import LLM
from ssv.runtime.methods import policy_for
from ssv.runtime.request import Chunk, Output, Request, RequestError, SamplingParams
from ssv.runtime.text import TextStream
from ssv.runtime.tokenizer import BundleTokenizer
from ssv.support.precisions import TorchPrecision

TIERS = {
    "premium": Policy(accept_below=0.0, verify_above=0.3, risk_budget=0.6, max_pending=6),
    "balanced": Policy(accept_below=0.05, verify_above=0.4, risk_budget=0.7, max_pending=8),
    "turbo": Policy(accept_below=0.45, verify_above=0.8, risk_budget=1.0, max_pending=12),
}
MODEL_FREE = ("prompt-lookup", "suffix", "lookahead")
KEEP_NOTHING = ("autoregressive", *MODEL_FREE, "medusa")
"""Methods for which the target alone keeps something of a prompt."""
METHODS = (*KEEP_NOTHING, "speculative", *TIERS)
KINDS = ("standalone", "conditioned")
MAX_LENGTH = 64
CHUNK = 3


def make_llm(kind: str | None, max_batch: int, prefill_chunk: int, patience: int | None = None, **lane: int) -> LLM:
    """Without a draft if there is no kind; with a lane of such sizes if there is a patience (`FakeLane`)."""
    sizes = {"max_batch": max_batch, "max_length": MAX_LENGTH + MAX_PENDING}
    target = FakeTarget(tap=kind == "conditioned", eos_bias=-0.5, **sizes)
    draft = FakeDraft(target, conditioned=kind == "conditioned", agreement=0.8, noise=0.3) if kind else None
    llm = LLM(
        target,
        draft,
        BundleTokenizer(FakeTokenizer()),
        eos_token_ids=[EOS],
        tiers=TIERS,
        max_length=MAX_LENGTH,
        prefill_chunk=prefill_chunk,
        heads=FakeHeads(target, noise=0.5),
        lane=None if patience is None else FakeLane(target, draft, patience=patience, **lane),
    )
    llm._pace = Pace(None)  # what is drafted does not follow the clock
    return llm


@functools.cache
def alone(kind: str | None, request: Request) -> Output:
    """What a request gives over fresh engines of one row, its prompt in one piece."""
    return make_llm(kind, 1, MAX_LENGTH).generate([replace(request, deadline=None)])[0]


def costs(output: Output) -> Counters:
    return replace(output.counters, cached_tokens=0, first_token_s=0.0, total_s=0.0)


class Play:
    """A loop that is driven a round at a time, and what its requests have gained.

    Attributes:
        leaving: whose caller has gone.
        ended: the last chunk of each request.
    """

    def __init__(
        self,
        kind: str | None,
        *,
        max_batch: int = 3,
        chunk: int = CHUNK,
        patience: int | None = None,
        lane: dict[str, int] | None = None,
        **options: Any,
    ) -> None:
        self.kind, self.llm = kind, make_llm(kind, max_batch, chunk, patience, **(lane or {}))
        self.loop = self.llm.loop(**options)
        self.requests: list[Request] = []
        self.leaving: set[int] = set()
        self.tokens: list[list[int]] = []
        self.texts: list[str] = []
        self.ended: dict[int, Chunk] = {}

    @property
    def lane(self) -> FakeLane:
        assert isinstance(self.llm.lane, FakeLane)
        return self.llm.lane

    @property
    def target(self) -> FakeTarget:
        assert isinstance(self.llm.target, FakeTarget)
        return self.llm.target

    def submit(self, request: Request) -> int:
        index = len(self.requests)
        policy = policy_for(request.method, TIERS, request.num_draft_tokens)
        text = TextStream(self.llm.tokenizer.decode, request.params.stop)
        self.loop.submit(index, request, policy, text)
        self.requests.append(request)
        self.tokens.append([])
        self.texts.append("")
        return index

    def step(self) -> list[Chunk]:
        for index in self.leaving:
            self.loop.cancel(index)
        chunks = list(self.loop.step())
        for chunk in chunks:
            assert chunk.index not in self.ended
            self.tokens[chunk.index] += chunk.token_ids
            self.texts[chunk.index] += chunk.text
            if chunk.finish_reason is not None:
                self.ended[chunk.index] = chunk
        scheduler, batch = self.loop.scheduler, self.loop.batch
        assert [running.row for running in scheduler.rows] == batch.rows
        is_taken = scheduler.joining is not None and not batch.members.is_beside
        assert len(batch.rows) + is_taken <= self.target.max_batch
        return chunks

    def finish(self) -> None:
        for _ in range(1000):
            if not self.loop.has_work:
                break
            self.step()
        assert self.ended.keys() == set(range(len(self.requests)))
        if isinstance(self.llm.draft, FakeDraft):
            assert self.llm.draft.wrong_features == 0

    def output(self, index: int) -> Output:
        last = self.ended[index]
        assert last.finish_reason is not None
        return Output(self.texts[index], tuple(self.tokens[index]), last.finish_reason, last.counters)

    def assert_as_alone(self, *indices: int) -> None:
        """The same output at the same cost; of all requests unless told otherwise."""
        for index in indices or range(len(self.requests)):
            output, expected = self.output(index), alone(self.kind, self.requests[index])
            assert text_of(output) == text_of(expected), self.requests[index]
            assert costs(output) == costs(expected)

    def assert_cut_short(self, index: int, reason: str) -> None:
        """The beginning of the output that it would have had, in tokens and in text."""
        output, expected = self.output(index), alone(self.kind, self.requests[index])
        assert output.finish_reason == reason
        assert output.token_ids == expected.token_ids[: len(output.token_ids)]
        assert len(output.token_ids) < len(expected.token_ids)
        assert output.text == self.llm.tokenizer.decode(output.token_ids)
        assert output.counters.emitted == len(output.token_ids)

    def held(self) -> tuple[list[int], int | None, list[int]]:
        """Indices of those that decode, join and wait."""
        scheduler = self.loop.scheduler
        joining = None if scheduler.joining is None else scheduler.joining.index
        return [running.index for running in scheduler.rows], joining, [running.index for running in scheduler.waiting]


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(VOCAB_SIZE) for _ in range(length))


def request(prompt_ids: Sequence[int], method: str = "speculative", max_tokens: int = 12, **settings: Any) -> Request:
    return Request(tuple(prompt_ids), method, SamplingParams(max_tokens=max_tokens, ignore_eos=True, **settings))


def plain(target: FakeTarget, given: Request) -> tuple[int, ...]:
    """Greedy decoding without a cache."""
    tokens: list[int] = []
    while len(tokens) < given.params.max_tokens and (given.params.ignore_eos or EOS not in tokens):
        tokens.append(int(target.next_logits([*given.prompt_ids, *tokens]).argmax()))
    return tuple(tokens)


# --- joining --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [None, 2], ids=["between rounds", "beside them"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_joining_in_the_middle_of_others_rounds(
    kind: str, method: str, temperature: float, patience: int | None
) -> None:
    """A request comes in every round, some before those before it have joined."""
    play = Play(kind, patience=patience)
    for i, length in enumerate((2, 7, 1, 12, 3, 4, 9, 6)):
        params = SamplingParams(temperature=temperature, seed=i, max_tokens=5 + i)
        play.submit(Request(prompt(length, i), method, params))
        play.step()
    play.finish()
    play.assert_as_alone()
    if temperature == 0.0 and policy_for(method, TIERS).lossless:
        assert [play.output(i).token_ids for i in range(8)] == [plain(play.target, each) for each in play.requests]


def any_request(rng: random.Random, kind: str | None, beginnings: Sequence[tuple[int, ...]]) -> Request:
    max_tokens = rng.randint(1, 14)
    params = SamplingParams(
        temperature=rng.choice((0.0, 0.0, 0.6, 1.2)),
        top_k=rng.choice((0, 4)),
        seed=rng.randrange(1000),
        max_tokens=max_tokens,
        min_tokens=rng.randint(0, max_tokens),
        stop=rng.choice(((), (), ("END",), ("ab c", "E"))),
        ignore_eos=rng.random() < 0.5,
    )
    prompt_ids = (*rng.choice(beginnings), *prompt(rng.randint(1, 6), rng.randrange(1000)))
    method = rng.choice(METHODS) if kind else "autoregressive"
    return Request(prompt_ids, method, params, rng.randint(1, 7))


@pytest.mark.parametrize("is_beside", [False, True], ids=["between rounds", "beside them"])
@pytest.mark.parametrize("seed", range(40))
def test_any_order_of_arrivals_and_departures(seed: int, is_beside: bool) -> None:
    rng = random.Random(seed)
    kind = (*KINDS, *KINDS, None)[seed % 5]
    cache_bytes = rng.choice((0, 300, 10**6))
    sizes = {"max_batch": rng.randint(1, 4), "chunk": rng.randint(1, 5), "prompt_cache_bytes": cache_bytes}
    lane = {
        "least": rng.randint(0, 12),
        "most_rows": rng.randint(1, sizes["max_batch"]),
        "most_tokens": rng.randint(1, 40),
    }
    play = Play(kind, patience=rng.randint(0, 5) if is_beside else None, lane=lane, **sizes)
    beginnings = [(), prompt(7, seed), prompt(12, seed)]
    for _ in range(25):
        for _ in range(rng.choice((0, 0, 1, 2))):
            play.submit(any_request(rng, kind, beginnings))
        if play.requests and rng.random() < 0.15:
            play.leaving.add(rng.randrange(len(play.requests)))
        play.step()
        assert not play.leaving - play.ended.keys()
        if play.loop.prompt_cache is not None:
            assert play.loop.prompt_cache.stats.num_bytes <= cache_bytes
    play.finish()
    for index in range(len(play.requests)):
        if play.ended[index].finish_reason == "cancelled":
            play.assert_cut_short(index, "cancelled")
        else:
            play.assert_as_alone(index)
        assert cache_bytes or not play.ended[index].counters.cached_tokens


@pytest.mark.parametrize("busy", [1, 8], ids=["rows are free", "none is"])
def test_short_prompts_that_wait_are_run_in_one_step(busy: int) -> None:
    """Of the target alone, in the batch's rows or in the lane's; those of who left meanwhile are nobody's."""
    lane = {"least": 9, "most_rows": 4, "most_tokens": 20}
    play = Play("conditioned", max_batch=8, patience=0, lane=lane)
    for i in range(busy):
        play.submit(request(prompt(4, 10 + i), "autoregressive", 6))
    while len(play.loop.scheduler.rows) < busy:
        play.step()
    steps: list[int] = []
    for engine in (play.target, play.lane.target):
        take_step = engine.step

        def step(*args: Any, take_step: Any = take_step, **options: Any) -> Any:
            if args[0].shape[1] > 1:
                steps.append(int(options["count_B"].sum()) if options.get("count_B") is not None else args[0].numel())
            return take_step(*args, **options)

        engine.step = step  # type: ignore[method-assign]
    lengths = (5, 6, 4, 5, 3, 20)
    for i, length in enumerate(lengths):
        play.submit(request(prompt(length, i), "autoregressive", 6))
    play.step()
    assert steps[0] == 5 + 6 + 4 + 5
    if busy > 1:
        play.leaving.add(busy + 3)
    play.finish()
    # The last one is too long for company, and for one step.
    assert steps == [20, 3, 18, 2]
    gone = {i for i, last in play.ended.items() if last.finish_reason == "cancelled"}
    assert gone == play.leaving
    play.assert_as_alone(*(i for i in range(len(play.requests)) if i not in gone))


@pytest.mark.parametrize("method", ["speculative", "balanced"])
def test_prompts_that_a_draft_reads_are_run_by_themselves(method: str) -> None:
    play = Play("conditioned", max_batch=4, patience=0, lane={"least": 9, "most_rows": 4, "most_tokens": 40})
    for i in range(3):
        play.submit(request(prompt(4, i), method, 6))
    play.step()
    assert all(call.tokens == 4 for call in play.target.calls[:3])
    play.finish()
    play.assert_as_alone()


@pytest.mark.parametrize("method", [*KEEP_NOTHING, "speculative"])
@pytest.mark.parametrize("kind", KINDS)
def test_who_decodes_gains_tokens_in_every_round_while_a_long_prompt_joins(kind: str, method: str) -> None:
    """And who joins needs no more rounds than its prompt has chunks."""
    play = Play(kind)
    for i in range(2):
        play.submit(request(prompt(2, i), method, 30 if method == "autoregressive" else 60))
        play.step()
    play.submit(request(prompt(31, 9), method))
    for chunk in range(1, 12):
        calls = len(play.target.calls)
        gained = {each.index for each in play.step()}
        assert gained == ({0, 1} if chunk < 11 else {0, 1, 2})
        joins, *rounds = play.target.calls[calls:]
        assert (joins.first_row, joins.position, joins.tokens) == (2, (3 * chunk - 3,), 3 if chunk < 11 else 1)
        assert len(rounds) == 1 and rounds[0].first_row == 0
    play.finish()
    play.assert_as_alone()


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_waits_for_a_prompt_that_runs_beside_the_rounds(kind: str) -> None:
    """Each step is a round, however long the prompt's chunks take; and its tokens are not in the others' way."""
    play = Play(kind, patience=7)
    for i in range(2):
        play.submit(request(prompt(2, i), "autoregressive", max_tokens=60))
    while len(play.loop.batch.rows) < 2:
        play.step()
    play.submit(request(prompt(11, 9)))
    gained, calls, waits = [], len(play.target.calls), play.lane.num_waits
    while len(play.loop.batch.rows) == 2:
        gained.append({each.index for each in play.step()})
    assert len(gained) > 7 and gained == [{0, 1}] * (len(gained) - 1) + [{0, 1, 2}]
    assert all(call.first_row == 0 for call in play.target.calls[calls:])
    assert len(play.target.calls) - calls == len(gained)
    assert play.lane.num_waits == waits
    play.finish()
    play.assert_as_alone()


def test_who_runs_beside_the_rounds_is_ready_when_a_row_is_free() -> None:
    """No round goes by without it."""
    play = Play("conditioned", max_batch=1, patience=1)
    for i in range(4):
        play.submit(request(prompt(7, i), "autoregressive", max_tokens=8))
    while not play.loop.batch.rows:
        play.step()
    assert play.held() == ([0], None, [1, 2, 3])
    waits, steps = play.lane.num_waits, 1
    while play.loop.has_work:
        play.step()
        steps += 1
    assert play.lane.num_waits == waits
    assert steps == len(play.target.calls) == 4 * 7  # the first token of each is the prompt's
    play.assert_as_alone()


def test_who_leaves_while_its_prompt_runs_beside_the_rounds() -> None:
    """The next prompt takes its place, behind what is under way."""
    play = Play("conditioned", max_batch=2, patience=4)
    for i, length in enumerate((3, 20, 9)):
        play.submit(request(prompt(length, i), max_tokens=25))
    play.step()
    assert play.held() == ([0], 1, [2])
    play.leaving.add(1)
    play.step()
    assert play.held() == ([0], 2, [])
    play.finish()
    play.assert_as_alone(0, 2)
    assert play.output(1).finish_reason == "cancelled" and not play.output(1).token_ids


def test_a_cancel_is_heard_while_a_prompt_runs_for_which_an_empty_batch_waits() -> None:
    play = Play("conditioned", max_batch=2, patience=1)
    play.submit(request(prompt(40, 1), max_tokens=5))
    play.step()
    assert play.held() == ([], 0, []) and 0 < play.loop.batch.members.num_prefilled < 40
    play.leaving.add(0)
    play.submit(request(prompt(9, 2), max_tokens=5))
    play.finish()
    play.assert_as_alone(1)
    assert play.output(0).finish_reason == "cancelled" and not play.output(0).token_ids


def test_a_prompt_too_short_to_run_beside_the_rounds_is_run_between_two_of_them() -> None:
    """All of it at once, where a row is free; where none is, it runs beside them like any other."""
    play = Play("conditioned", max_batch=2, patience=1, lane={"least": 9})
    for i, length in enumerate((2, 8, 8, 9)):
        play.submit(request(prompt(length, i), "autoregressive", max_tokens=6 + 10 * i))
    play.step()
    assert play.held() == ([0, 1], None, [2, 3])
    assert not play.lane.num_works
    play.step()
    assert play.held() == ([0, 1], 2, [3])
    while 0 not in play.ended:
        play.step()
    assert play.lane.num_works == 3
    play.step()
    assert play.held() == ([1, 2], None, [3])
    play.finish()
    assert play.lane.num_works == 6
    play.assert_as_alone()


def test_prompts_join_for_a_chunks_worth_of_tokens_a_round() -> None:
    """One chunk of a long prompt, or several short prompts; never two rows on their way."""
    play = Play("conditioned", max_batch=4)
    for i, length in enumerate((7, 2, 1, 4)):
        play.submit(request(prompt(length, i), max_tokens=30))
    states = []
    for _ in range(5):
        play.step()
        states.append(play.held())
    assert states == [
        ([], 0, [1, 2, 3]),
        ([], 0, [1, 2, 3]),
        ([0, 1], None, [2, 3]),
        ([0, 1, 2], 3, []),
        ([0, 1, 2, 3], None, []),
    ]


def test_first_token_that_is_the_last() -> None:
    """Its row is free for the next, in the same round while there is room in it for prompts."""
    play = Play("conditioned", max_batch=1)
    for i in range(3):
        play.submit(request(prompt(2, i), max_tokens=1))
    assert [(chunk.index, chunk.finish_reason) for chunk in play.step()] == [(0, "length"), (1, "length")]
    assert [(chunk.index, chunk.finish_reason) for chunk in play.step()] == [(2, "length")]
    assert not play.loop.has_work
    assert len(play.target.calls) == 3  # the prompts: no round is run for nothing
    play.assert_as_alone()


def test_chunks_bear_the_index_that_was_given() -> None:
    loop = make_llm("conditioned", 2, CHUNK).loop()
    for index in (71, 5):
        loop.submit(index, request(prompt(2)), TIERS["premium"], None)
    tokens: dict[int, tuple[int, ...]] = {71: (), 5: ()}
    while loop.has_work:
        for chunk in loop.step():
            tokens[chunk.index] += chunk.token_ids
    assert tokens[71] == tokens[5] == alone("conditioned", request(prompt(2))).token_ids


def test_without_text() -> None:
    loop = make_llm("conditioned", 2, CHUNK).loop()
    given = request(prompt(5), "turbo")
    loop.submit(0, given, TIERS["turbo"], None)
    chunks = []
    while loop.has_work:
        chunks += loop.step()
    assert {chunk.text for chunk in chunks} == {""}
    assert sum((chunk.token_ids for chunk in chunks), ()) == alone("conditioned", given).token_ids


def test_times_are_counted_from_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that goes by one a round: what waits for a row waits for its first token."""
    now = 70.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    play = Play(None, max_batch=1)
    for i in range(2):
        play.submit(request(prompt(4, i), "autoregressive", 5))
    while play.loop.has_work:
        now += 1.0
        play.step()
    # Two chunks, the second of which gives the first token and is followed by a round; then three more.
    times = [(play.ended[i].counters.first_token_s, play.ended[i].counters.total_s) for i in range(2)]
    assert times == [(2.0, 5.0), (7.0, 10.0)]


# --- leaving --------------------------------------------------------------------------------------------------------

LEAVERS = [(0,), (1,), (2,), (3,), (4,), (0, 1), (0, 2), (1, 2), (1, 3), (0, 1, 2), (0, 3, 4), (0, 1, 2, 3, 4)]


@pytest.mark.parametrize("leavers", LEAVERS, ids=str)
@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
@pytest.mark.parametrize("kind", KINDS)
def test_leaving(monkeypatch: pytest.MonkeyPatch, kind: str, reason: str, leavers: tuple[int, ...]) -> None:
    """Of two that decode, one between two chunks of its prompt and two that wait: gone with the next round."""
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    play = Play(kind)
    for i, length in enumerate((2, 3, 14, 5, 6)):
        deadline = 100.0 if reason == "deadline" and i in leavers else None
        play.submit(replace(request(prompt(length, i), max_tokens=25), deadline=deadline))
    for now in (97.0, 98.0, 99.0, 99.9):  # noqa: B007 - the loop's clock
        play.step()
    assert play.held() == ([0, 1], 2, [3, 4])
    if reason == "cancelled":
        play.leaving.update(leavers)
    now = 100.0
    chunks = [chunk for chunk in play.step() if chunk.finish_reason is not None]
    assert {(chunk.index, chunk.finish_reason, chunk.token_ids) for chunk in chunks} == {
        (i, reason, ()) for i in leavers
    }
    waiting = [i for i in (3, 4) if i not in leavers]
    joining = 2 if 2 not in leavers else waiting.pop(0) if waiting else None
    left = [i for i in (0, 1) if i not in leavers]
    assert play.held() == (left, joining, waiting)
    assert not left or len(play.target.calls[-1].position) == len(left)  # nor is the round run for those that leave
    play.finish()
    for index in range(5):
        if index in leavers:
            play.assert_cut_short(index, reason)
        else:
            play.assert_as_alone(index)
    assert [len(play.tokens[i]) for i in leavers if i > 1] == [0] * sum(i > 1 for i in leavers)


@pytest.mark.parametrize("lengths", [(5, 9), (9, 5), (6, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_end_while_a_prompt_joins(kind: str, lengths: tuple[int, int]) -> None:
    """What joins stays behind the others, with the keys and values of the chunks that have been run."""
    play = Play(kind)
    for i, length in enumerate(lengths):
        play.submit(request(prompt(2, i), "autoregressive", length))
    for length in (28, 4):
        play.submit(request(prompt(length, length)))
    joined_behind = []
    while 3 not in play.ended:
        play.step()
        decoding, joining, _ = play.held()
        if joining == 2:
            joined_behind.append(len(decoding))
    assert joined_behind == sorted(joined_behind, reverse=True) and {0, 2} <= set(joined_behind)
    play.finish()
    play.assert_as_alone()


def test_the_row_of_one_that_left_is_for_the_next_in_the_same_round() -> None:
    play = Play("conditioned", max_batch=1)
    for i in range(2):
        play.submit(request(prompt(4, i)))
    for _ in range(3):
        play.step()
    assert play.held() == ([0], None, [1])
    play.leaving.add(0)
    play.step()
    assert play.held() == ([], 1, [])
    play.finish()
    play.assert_as_alone(1)


def test_leaving_after_the_end_is_nothing() -> None:
    play = Play("standalone")
    play.submit(request(prompt(2), max_tokens=3))
    play.submit(request(prompt(3), max_tokens=20))
    while not play.ended:
        play.step()
    play.leaving.add(0)
    play.finish()
    play.assert_as_alone()


def test_deadline_that_has_passed() -> None:
    """Also of a whole run: no step is wasted on it."""
    llm = make_llm("conditioned", 2, CHUNK)
    given = request(prompt(5))
    late, early = (replace(given, deadline=time.monotonic() + seconds) for seconds in (-1.0, 1e6))
    outputs = llm.generate([late, early])
    assert text_of(outputs[0]) == ((), "", "deadline")
    assert text_of(outputs[1]) == text_of(alone("conditioned", given))
    assert isinstance(llm.target, FakeTarget)
    assert {call.first_row for call in llm.target.calls} == {0}


@pytest.mark.parametrize(
    ("tokens", "said", "held"), [((3, 7), "aba", "E"), ((1, 8), "a", "\ufffd"), ((1, 10), "a", "x\ufffd")]
)
def test_text_that_was_held_back_leaves_with_the_request(tokens: tuple[int, ...], said: str, held: str) -> None:
    """What might have become a stop string, and half a character."""
    play = Play(None)
    for i, token in enumerate(tokens):
        play.target.logits_NV[play.target.state([1, 2, *tokens[:i]]), token] = 50.0
    play.submit(request((1, 2), "autoregressive", stop=("END",)))
    play.step()
    assert (tuple(play.tokens[0]), play.texts[0]) == (tokens, said)
    play.leaving.add(0)
    play.finish()
    assert (tuple(play.tokens[0]), play.ended[0].text, play.ended[0].finish_reason) == (tokens, held, "cancelled")


# --- the queue ------------------------------------------------------------------------------------------------------


def test_bound_of_the_queue() -> None:
    play = Play("conditioned", max_batch=2, max_waiting=1)
    for i in range(3):
        play.submit(request(prompt(4, i), max_tokens=4 + 9 * i))
    with pytest.raises(QueueFull, match="3 requests are waiting"):
        play.submit(request(prompt(4, 3)))
    play.step()
    assert play.held() == ([], 0, [1, 2])
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        play.submit(request(prompt(4, 3)))
    play.leaving.add(2)
    play.step()
    play.submit(request(prompt(4, 3)))
    play.leaving.remove(2)
    play.finish()
    play.assert_cut_short(2, "cancelled")
    play.assert_as_alone(0, 1, 3)


def test_a_request_that_cannot_run_is_not_queued() -> None:
    play = Play("conditioned", max_batch=1, max_waiting=0)
    for given, message in (
        (request(()), "prompt is empty"),
        (request(prompt(60)), "exceed the cache of 64"),
        (request((VOCAB_SIZE,)), "outside the target's vocabulary"),
    ):
        with pytest.raises(RequestError, match=message):
            play.submit(given)
    assert not play.loop.has_work
    assert play.step() == []
    play.submit(request(prompt(5)))
    play.finish()
    play.assert_as_alone()


# --- the cache of prompts -------------------------------------------------------------------------------------------


def cached(play: Play) -> list[int]:
    return [play.ended[i].counters.cached_tokens for i in range(len(play.requests))]


@pytest.mark.parametrize("busy", range(3))
@pytest.mark.parametrize("method", [*KEEP_NOTHING, "speculative", "turbo"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_beginning_that_was_computed_before_is_not_computed_again(kind: str, method: str, busy: int) -> None:
    """In any row of the cache, also while rows before it leave."""
    play = Play(kind, max_batch=4, prompt_cache_bytes=10**6)
    shared = prompt(11)
    play.submit(request(shared, method))
    play.finish()
    for i in range(busy):
        play.submit(request(prompt(2, i + 5), "speculative", 40))
        play.step()
    play.submit(request((*shared, *prompt(7, 1)), method))
    calls = len(play.target.calls)
    play.step()
    joins = play.target.calls[calls]
    assert (joins.first_row, joins.position, joins.tokens) == (busy, (9,), 3)
    play.leaving |= set(range(1, busy))  # and a row moves while the next chunks are run
    play.step()
    play.finish()
    kept = [0, *range(max(busy, 1), busy + 2)]
    play.assert_as_alone(*kept)
    assert cached(play) == [0] * (busy + 1) + [9]


@pytest.mark.parametrize("length", range(1, 14))
@pytest.mark.parametrize("kind", KINDS)
def test_whole_blocks_but_for_the_last_token_come_from_the_cache(kind: str, length: int) -> None:
    """The last token has to be run, for its logits."""
    play = Play(kind, prompt_cache_bytes=10**6)
    whole = prompt(13)
    play.submit(request(whole))
    play.submit(request(whole[:length]))
    play.submit(request((*whole[: length - 1], (whole[length - 1] + 1) % VOCAB_SIZE, *whole)))
    play.finish()
    play.assert_as_alone()
    assert cached(play) == [0, (length - 1) // 3 * 3, (length - 1) // 3 * 3]


@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cached_is_the_longest_beginning_of_those_before(kind: str, chunk: int) -> None:
    """Prompts of few different tokens, with and without draft, side by side; those with a draft find what those with
    one have left."""
    rng = random.Random(chunk)
    play = Play(kind, chunk=chunk, prompt_cache_bytes=10**6)
    expected = []
    for i in range(40):
        prompt_ids = tuple(rng.choice((3, 3, 4)) for _ in range(rng.randint(1, 20)))
        method, temperature = rng.choice(("autoregressive", *METHODS)), rng.choice((0.0, 0.9))
        drafts = method not in KEEP_NOTHING
        before = [each.prompt_ids for each in play.requests if (each.method not in KEEP_NOTHING) == drafts]
        common = [
            next(
                (n for n, (a, b) in enumerate(zip(prompt_ids, other, strict=False)) if a != b),
                min(len(other), len(prompt_ids)),
            )
            for other in before
        ]
        expected.append(min(max(common, default=0), len(prompt_ids) - 1) // chunk * chunk)
        play.submit(request(prompt_ids, method, rng.randint(1, 8), temperature=temperature, seed=i))
        if rng.random() < 0.5:
            play.step()
    play.finish()
    play.assert_as_alone()
    assert cached(play) == expected
    assert sum(count > 0 for count in expected) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_with_and_without_the_draft_are_kept_apart(kind: str) -> None:
    play = Play(kind, prompt_cache_bytes=10**6)
    for method in ("autoregressive", "speculative", "autoregressive", "premium"):
        play.submit(request(prompt(11), method))
    play.finish()
    play.assert_as_alone()
    assert cached(play) == [0, 0, 9, 9]


def test_an_answer_is_kept_when_it_comes_back_in_the_next_prompt() -> None:
    play = Play("conditioned", prompt_cache_bytes=10**6)
    turn = prompt(8)
    for _ in range(3):
        index = play.submit(request(turn, "premium"))
        play.finish()
        turn = (*turn, *play.tokens[index], *prompt(2, index))
    play.assert_as_alone()
    assert cached(play) == [0, 6, 21]


def test_chunks_of_a_request_that_left_are_kept() -> None:
    play = Play("conditioned", prompt_cache_bytes=10**6)
    play.submit(request(prompt(20)))
    for _ in range(2):
        play.step()
    play.leaving.add(0)
    play.submit(request(prompt(20)))
    play.finish()
    play.assert_cut_short(0, "cancelled")
    play.assert_as_alone(1)
    assert cached(play) == [0, 6]


@pytest.mark.parametrize(
    ("kind", "method", "num_bytes"),
    [
        # int64 token ids, of the draft with two features each; a conditioned draft runs one entry behind, and keeps one
        # feature.
        (None, "autoregressive", 6 * 8),
        ("standalone", "autoregressive", 6 * 8),
        ("standalone", "speculative", 6 * 8 + 6 * 24),
        ("conditioned", "speculative", 6 * 8 + 5 * 24 + 2 * 8),
    ],
)
def test_size_of_what_is_kept(kind: str | None, method: str, num_bytes: int) -> None:
    play = Play(kind, prompt_cache_bytes=10**6)
    play.submit(request(prompt(8), method))
    play.finish()
    assert play.loop.prompt_cache is not None
    stats = play.loop.prompt_cache.stats
    assert (stats.blocks, stats.num_bytes, stats.hits, stats.misses) == (2, num_bytes, 0, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_too_small_for_one_prompt_keeps_its_beginning(kind: str) -> None:
    play = Play(kind, prompt_cache_bytes=250)
    for i in (0, 0, 1, 0):
        play.submit(request(prompt(18, i)))
    play.finish()
    play.assert_as_alone()
    assert cached(play) == [0, 6, 0, 0]
    assert play.loop.prompt_cache is not None
    assert play.loop.prompt_cache.stats.num_bytes <= 250


def test_without_a_cache_of_prompts() -> None:
    play = Play("conditioned")
    for _ in range(3):
        play.submit(request(prompt(11)))
    play.finish()
    play.assert_as_alone()
    assert play.loop.prompt_cache is None
    assert cached(play) == [0, 0, 0]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_what_comes_from_the_cache_is_what_was_computed_to_the_last_bit(precision: TorchPrecision) -> None:
    """Of real engines: keys and values of the whole prompt, and the output."""
    decoder = tiny_decoder()
    draft = random_draft(decoder, "conditioned")
    settings: dict[str, Any] = {"precision": precision, "max_batch": 2, "max_length": 40 + 2 * MAX_PENDING}
    target, drafting = target_engine(decoder, draft=draft, **settings), draft_engine(draft, **settings)
    cache: PromptCache[PromptBlock] = PromptCache(4, 10**6)
    batch = DecodeBatch(target, drafting, [], 40, prefill_chunk=4, prompt_cache=cache)
    loop = DecodeLoop(batch, frozenset())
    found = []
    for _ in range(2):
        params = SamplingParams(max_tokens=10, temperature=0.7, seed=3)
        loop.submit(0, Request(tuple(tiny_ids(19).tolist()), "speculative", params), TIERS["premium"], None)
        tokens: tuple[int, ...] = ()
        while loop.has_work:
            for chunk in loop.step():
                tokens += chunk.token_ids
        found.append((tokens, target.read_cache(0, 0, 19), drafting.read_cache(0, 0, 18)))
        for engine in (target, drafting):  # what is not written again would be seen
            engine.write_cache(0, 0, torch.full_like(engine.read_cache(0, 0, 19), 9.0))
    assert chunk.counters.cached_tokens == 16
    assert found[1][0] == found[0][0]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[1][1:], found[0][1:], strict=True))


def test_rounds_are_told_whether_further_rows_are_about_to_join() -> None:
    told: list[tuple[int, bool]] = []

    class Told(Pace):
        def begin(self, num_rows: int, *args: Any, is_filling: bool = False) -> bool:
            told.append((num_rows, is_filling))
            return True

    play = Play("conditioned", max_batch=2)
    play.loop.batch._pace = Told(None)
    for i in range(3):
        play.submit(request(prompt(3, i), "prompt-lookup", max_tokens=12))
    play.finish()
    assert (1, True) in told and (2, False) in told
    assert not {(2, True)} & set(told)
