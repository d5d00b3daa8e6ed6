"""Rounds that the engines run by themselves, one ahead of the host, give what the host's own rounds give, whoever comes
and goes meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from growing import GrowingFakeDraft
from lane import FakeLane
from rounds import FakeRounds

from fakes import EOS, FakeTarget
from ssv.bundle.policy import MAX_PENDING, Policy, verify_all
from ssv.bundle.profile import Costs
from ssv.runtime.counters import Counters
from ssv.runtime.decode import ahead
from ssv.runtime.decode.drafters.levels import Levels
from ssv.runtime.decode.loop import DecodeLoop
from ssv.runtime.decode.membership import Membership
from ssv.runtime.decode.pace import Pace
from ssv.runtime.decode.round import DecodeBatch
from ssv.runtime.engines.contract import EngineError, RoundShape
from ssv.runtime.methods import AUTOREGRESSIVE, PREMIUM, PROMPT_LOOKUP, SUFFIX
from ssv.runtime.request import Request, SamplingParams

LENGTH = 160

CHAINS = {
    "plain": AUTOREGRESSIVE,
    "chain of 5": verify_all(5),
    "lossy": Policy(accept_below=0.2, verify_above=0.6, risk_budget=0.8, max_pending=6),
    "hasty": Policy(accept_below=0.0, verify_above=0.5, risk_budget=0.7, max_pending=8),
}
TREES = {
    "bushy": verify_all(12, children=(4,), beam=3, max_depth=3),
    "deep": verify_all(15, children=(2,), beam=2, max_depth=9),
}
TRUSTING = {
    name: policy.model_copy(update={"accept_below": 0.3, "verify_above": 1.0, "risk_budget": 1.0})
    for name, policy in TREES.items()
}


class Moody(Pace):
    """Lets rows draft for some rounds, and then not for as many."""

    def __init__(self, rounds: int) -> None:
        super().__init__(None)
        self._rounds, self._num = rounds, 0

    def begin(self, *_: Any, **__: Any) -> bool:
        self._num += 1
        return self._num // self._rounds % 2 == 0


class Late(Pace):
    """Lets no row draft in the first rounds."""

    def __init__(self, rounds: int) -> None:
        super().__init__(None)
        self._left = rounds

    def begin(self, *_: Any, **__: Any) -> bool:
        self._left -= 1
        return self._left < 0


def cheap(num_rows: int, shape: RoundShape) -> float:
    """Trees pay."""
    return 1.0 + 0.02 * shape.depth


def dear(num_rows: int, shape: RoundShape) -> float:
    """They never do."""
    return 1.0 + 10.0 * shape.depth


class Setup:
    """Engines, and what runs rounds of them."""

    def __init__(self, rows: int = 3, seconds: Any = cheap, **draft: Any) -> None:
        self.target = FakeTarget(max_batch=rows, max_length=LENGTH + 2 * MAX_PENDING, eos_bias=-1.0)
        self.draft = GrowingFakeDraft(self.target, conditioned=True, **draft)
        self.rounds = FakeRounds(self.target, self.draft, seconds)

    def decoded(
        self,
        requests: Sequence[Request],
        policies: Sequence[Policy],
        *,
        by_engines: bool,
        max_steps: int | None = None,
        are_audited: bool = False,
        pace: Pace | None = None,
        patience: int | None = None,
        **lane: int,
    ) -> tuple[list[tuple[int, ...]], list[Counters]]:
        """The outputs' tokens, and what was counted.

        Args:
            patience, lane: of the lane that prompts run in, see `FakeLane`; None for none.
        """
        costs = Costs.model_validate(
            {
                "target": {"tokens": [1, 64], "seconds": [1.0, 1.2]},
                "draft": {"tokens": [1, 64], "seconds": [0.02, 0.02]},
            }
        )
        batch = DecodeBatch(
            self.target,
            self.draft,
            [EOS],
            LENGTH,
            prefill_chunk=16,
            costs=costs,
            rounds=self.rounds if by_engines else None,
            lane=None if patience is None else FakeLane(self.target, self.draft, patience=patience, **lane),
            pace=pace,
        )
        loop = DecodeLoop(batch, frozenset([EOS]))
        for index, (request, policy) in enumerate(zip(requests, policies, strict=True)):
            loop.submit(index, request, policy, None, is_audited=are_audited)
        tokens: dict[int, tuple[int, ...]] = {}
        counters: dict[int, Counters] = {}
        steps = 0
        while loop.has_work and (max_steps is None or steps < max_steps):
            steps += 1
            for chunk in loop.step():
                tokens[chunk.index] = tokens.get(chunk.index, ()) + chunk.token_ids
                counters[chunk.index] = chunk.counters
        assert self.draft.wrong_features == 0
        return [tokens[i] for i in sorted(tokens)], [counters[i] for i in sorted(counters)]


def requests(count: int, **params: Any) -> list[Request]:
    """Prompts and outputs of many lengths; every third ends where it ends."""
    return [
        Request(
            tuple(1 + (7 * b + 3 * i) % 8 for i in range(3 + 13 * b % 40)),
            "premium",
            SamplingParams(max_tokens=30 + 17 * b % 40, ignore_eos=b % 3 != 2, **params),
        )
        for b in range(count)
    ]


def facts(counters: Counters) -> list[Any]:
    c = counters
    return [c.drafted, c.accepted, c.trusted, c.judged, c.rolled_back, c.target_passes, dict(c.passes_by_kept)]


def counted_as_by_the_host(setup: Setup, policies: Sequence[Policy]) -> list[Counters]:
    """What was counted, once rounds of the engines have given what the host's give."""
    many = requests(len(policies))
    expected, counted = setup.decoded(many, policies, by_engines=False)
    found, counted_here = setup.decoded(many, policies, by_engines=True)
    assert found == expected
    assert [facts(c) for c in counted_here] == [facts(c) for c in counted]
    assert len(setup.rounds.shapes) > 5
    return counted


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_the_hosts(name: str, count: int) -> None:
    counted = counted_as_by_the_host(Setup(), [CHAINS[name]] * count)
    if name == "lossy":
        assert sum(c.trusted for c in counted) > 0


@pytest.mark.parametrize("name", [*CHAINS, *TRUSTING])
def test_prompts_run_beside_rounds_of_the_engines(name: str) -> None:
    """These go on while a prompt is run, and give the same."""
    setup, policies = Setup(noise=0.3), [(CHAINS | TRUSTING)[name]] * 8
    expected, counted = setup.decoded(requests(8), policies, by_engines=False)
    before = len(setup.target.calls)
    assert not setup.rounds.shapes
    found, counted_here = setup.decoded(requests(8), policies, by_engines=True, patience=3)
    assert found == expected
    assert [facts(c) for c in counted_here] == [facts(c) for c in counted]
    # No pass of the host's, and no prompt in the rows of the others.
    assert len(setup.target.calls) - before == len(setup.rounds.shapes)


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("name", TRUSTING)
def test_trees_trust_what_the_hosts_trust(name: str, count: int) -> None:
    assert sum(c.trusted for c in counted_as_by_the_host(Setup(noise=0.3), [TRUSTING[name]] * count)) > 0


def test_a_tier_that_trusts_grows_deeper_trees_than_one_that_does_not() -> None:
    """By what they are worth: the levels of one are none of the other's."""
    setup = Setup(noise=0.3, seconds=lambda num_rows, shape: 1.0 + 0.15 * shape.depth)
    depths = []
    for policy in (PREMIUM, PREMIUM.model_copy(update={"accept_below": 0.6})):
        setup.rounds.shapes.clear()
        _, counted = setup.decoded(requests(8), [policy] * 8, by_engines=True)
        depths.append(sum(shape.depth for shape in setup.rounds.shapes) / len(setup.rounds.shapes))
    assert sum(c.trusted for c in counted) > 0
    assert depths[1] > depths[0]


@pytest.mark.parametrize("rounds", [1, 5])
@pytest.mark.parametrize(
    "policies", [[PREMIUM], [PROMPT_LOOKUP], [SUFFIX], [PREMIUM, SUFFIX, AUTOREGRESSIVE]], ids=lambda p: f"{len(p)}"
)
def test_rows_that_may_not_draft_are_decoded_by_the_engines_and_may_draft_again(
    policies: list[Policy], rounds: int
) -> None:
    setup, many = Setup(noise=0.3), requests(9)
    expected, _ = setup.decoded(many, [AUTOREGRESSIVE] * 9, by_engines=False)
    found, counted = setup.decoded(many, [*policies] * (9 // len(policies)), by_engines=True, pace=Moody(rounds))
    assert found == expected
    assert sum(shape.tree is None for shape in setup.rounds.shapes) > 5  # rows of several policies too
    assert sum(c.drafted for c in counted) > 0


@pytest.mark.parametrize("by_engines", [True, False])
@pytest.mark.parametrize(
    "policy",
    [
        verify_all(MAX_PENDING, children=(4,), beam=8),
        verify_all(MAX_PENDING, children=(4,), beam=8, pays=True),
        verify_all(32, children=(16,), beam=16, pays=True),
        verify_all(32, children=(16,), beam=64, max_depth=3),
        verify_all(32, children=(40,), beam=8, max_depth=3),
        verify_all(32, children=(40,), beam=8, pays=True),
    ],
    ids=["64 nodes", "64 that pay", "16 of 16 that pay", "beam of 64", "40 children", "40 that pay"],
)
def test_trees_that_the_engines_have_no_room_for_are_drafted_in_another_way(policy: Policy, by_engines: bool) -> None:
    """Any policy may be asked for: one that an engine refuses would end the requests of all."""
    setup = Setup(1, noise=0.3)
    setup.rounds.most_tokens = 256
    expected, _ = setup.decoded(requests(1), [AUTOREGRESSIVE], by_engines=False)
    found, _ = setup.decoded(requests(1), [policy], by_engines=by_engines)
    assert found == expected


@pytest.mark.parametrize("temperatures", [(0.0, 0.0), (0.0, 0.8), (0.8, 0.8)], ids=str)
def test_drafts_are_held_against_plain_rounds_of_rows_that_choose_alike(temperatures: tuple[float, ...]) -> None:
    """Rounds that may sample take longer."""
    told: list[float] = []

    class Told(Pace):
        def begin(self, num_rows: int, policies: frozenset[int], num_tokens: int, plain_s: Any, **_: Any) -> bool:
            told.append(plain_s)
            return True

    setup = Setup(2, seconds=lambda num, shape: 1000.0 + shape.depth + 500.0 * shape.samples)
    many = [
        Request((1, 2, 3), "premium", SamplingParams(max_tokens=num, ignore_eos=True, temperature=t, seed=1))
        for num, t in zip((10, 40), temperatures, strict=True)  # one that samples is there to the end
    ]
    setup.decoded(many, [PREMIUM] * 2, by_engines=True, pace=Told(None))
    assert {shape.samples for shape in setup.rounds.shapes} == {any(temperatures)}
    assert set(told) == {1500.0 if any(temperatures) else 1000.0}


@pytest.mark.parametrize("policy", [PROMPT_LOOKUP, SUFFIX], ids=["prompt-lookup", "suffix"])
def test_rows_without_a_draft_model_draft_again_where_those_beside_them_have_lost_theirs(policy: Policy) -> None:
    setup = Setup(2)
    params = SamplingParams(max_tokens=148, ignore_eos=True)
    many, policies = [Request((1, 2, 3, 4) * 3, "premium", params)] * 2, [PREMIUM, policy]
    expected, _ = setup.decoded(many, [AUTOREGRESSIVE] * 2, by_engines=False)
    pace = Late(setup.rounds.most_pending + 2)
    found, (by_model, by_text) = setup.decoded(many, policies, by_engines=True, pace=pace)
    assert found == expected
    assert not by_model.drafted
    assert by_text.drafted > 0


@pytest.mark.parametrize("seconds", [cheap, dear])
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("name", ["premium", *TREES])
def test_trees_give_plain_text(name: str, count: int, seconds: Any) -> None:
    setup, policy = Setup(seconds=seconds, noise=0.3), TREES.get(name, PREMIUM)
    expected, _ = setup.decoded(requests(count), [AUTOREGRESSIVE] * count, by_engines=False)
    found, counted = setup.decoded(requests(count), [policy] * count, by_engines=True)
    assert found == expected
    shapes = setup.rounds.shapes[-20:]
    drafts = policy != PREMIUM or seconds is cheap
    others = sum((shape.tree is not None) != drafts for shape in shapes)
    assert others <= (0 if drafts else 2)  # what does not pay is tried now and then
    assert not drafts or sum(c.accepted for c in counted) > 0


def test_a_draft_that_engines_run_while_the_host_is_busy_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rounds that are as long as what the host does beside them, those with a draft give more."""
    now = 0.0

    def slow() -> float:
        nonlocal now
        now += 10.0
        return now

    clock = SimpleNamespace(perf_counter=slow, monotonic=time.monotonic)
    many = [Request((1, 2, 3), "premium", SamplingParams(max_tokens=100, ignore_eos=True))]

    def drafted() -> list[bool]:
        setup = Setup(1, seconds=lambda num, shape: 1.0 + (8.0 if shape.tree is not None else 0.0))
        setup.decoded(many, [PREMIUM], by_engines=True)
        return [shape.tree is not None for shape in setup.rounds.shapes[-20:]]

    assert not any(drafted())
    monkeypatch.setattr(ahead, "time", clock)
    assert all(drafted())


def test_what_never_pays_is_tried_now_and_then_and_the_draft_has_kept_up() -> None:
    setup = Setup(1, seconds=dear)
    many = [Request((1, 2, 3), "premium", SamplingParams(max_tokens=150, ignore_eos=True))]
    expected, _ = setup.decoded(many, [AUTOREGRESSIVE], by_engines=False)
    found, (counters,) = setup.decoded(many, [PREMIUM], by_engines=True)
    assert found == expected
    kinds = [shape.tree is not None for shape in setup.rounds.shapes]
    assert kinds[(first := kinds.index(True)) : first + 2] == [True, True] and sum(kinds) == 2 and first >= 63
    assert counters.accepted > 0


def test_trees_go_on_behind_a_phase_without_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is longer than what may wait for a draft, which catches up."""
    turns = iter([(0, 0)] * 100)
    monkeypatch.setattr(Levels, "worth_nodes", lambda *args: next(turns, (3, 7)))
    setup = Setup(1)
    many = [Request((1, 2, 3), "premium", SamplingParams(max_tokens=150, ignore_eos=True))]
    expected, _ = setup.decoded(many, [AUTOREGRESSIVE], by_engines=False)
    found, (counters,) = setup.decoded(many, [PREMIUM], by_engines=True)
    assert found == expected
    kinds = [shape.tree is not None for shape in setup.rounds.shapes]
    assert (first := kinds.index(True)) > 90 and all(kinds[first:]) and len(kinds) > first + 5
    assert counters.accepted > 20


SAMPLED = ({"temperature": 0.8}, {"temperature": 0.7, "top_p": 0.6}, {"temperature": 1.3, "top_k": 3, "top_p": 0.9})


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("name", ["premium", "plain", "chain of 5", *TREES])
def test_sampled_rows_give_plain_text(name: str, count: int) -> None:
    """Beside greedy ones, each with its own seed and settings."""
    setup, policy = Setup(noise=0.3), {**CHAINS, **TREES}.get(name, PREMIUM)
    many = [
        replace(request, params=replace(request.params, seed=2**63 + 7 * b, **SAMPLED[b % 3]))
        if b % 4 != 3
        else request
        for b, request in enumerate(requests(count))
    ]
    expected, _ = setup.decoded(many, [AUTOREGRESSIVE] * count, by_engines=False)
    found, counted = setup.decoded(many, [policy] * count, by_engines=True)
    assert found == expected
    assert expected != setup.decoded(requests(count), [AUTOREGRESSIVE] * count, by_engines=False)[0]
    assert len(setup.rounds.shapes) > 5
    assert name == "plain" or sum(c.accepted for c in counted) > 0


def test_sampled_rows_of_a_lossy_tier_are_the_hosts() -> None:
    """What they trust depends on the last bits of the draft."""
    setup, many = Setup(), requests(3, temperature=0.8, seed=3)
    expected, _ = setup.decoded(many, [CHAINS["lossy"]] * 3, by_engines=False)
    assert setup.decoded(many, [CHAINS["lossy"]] * 3, by_engines=True)[0] == expected
    assert not setup.rounds.shapes


def test_rows_that_come_and_go_and_change_hands() -> None:
    """Sampled rows, logprobs and other policies between them: the host's rounds and the engines' own take turns."""
    setup = Setup(3)
    many = requests(12)
    many[4] = Request(many[4].prompt_ids, "premium", SamplingParams(max_tokens=30, temperature=0.8, seed=5))
    many[7] = Request(many[7].prompt_ids, "premium", SamplingParams(max_tokens=20, logprobs=1))
    many[8] = Request(many[8].prompt_ids, "premium", SamplingParams(max_tokens=20, repetition_penalty=1.3))
    policies = [CHAINS["chain of 5"], TREES["bushy"], AUTOREGRESSIVE] * 4
    expected, _ = setup.decoded(many, [AUTOREGRESSIVE] * 12, by_engines=False)
    assert setup.decoded(many, policies, by_engines=True)[0] == expected
    before = len(setup.rounds.shapes)
    assert setup.decoded(many, [CHAINS["chain of 5"]] * 12, by_engines=True)[0] == expected
    assert len(setup.rounds.shapes) > before and setup.rounds.num_begun > 3


def test_rows_that_are_audited_are_the_hosts() -> None:
    setup, policies = Setup(), [CHAINS["lossy"]] * 3
    expected, _ = setup.decoded(requests(3), policies, by_engines=True)
    before = len(setup.rounds.shapes)
    assert setup.decoded(requests(3), policies, by_engines=True, are_audited=True)[0] == expected
    assert len(setup.rounds.shapes) == before > 0


def test_rounds_in_vain_are_not_counted() -> None:
    """The round that was under way when an output ended gave it nothing."""
    setup = Setup(1)
    (request,) = [Request((1, 2, 3), "premium", SamplingParams(max_tokens=40, stop_token_ids=(5,), ignore_eos=True))]
    _, (by_host,) = setup.decoded([request], [AUTOREGRESSIVE], by_engines=False)
    _, (by_engines,) = setup.decoded([request], [AUTOREGRESSIVE], by_engines=True)
    assert by_host.emitted < 40, "the stop token has to come"
    assert by_engines.target_passes == by_host.target_passes
    assert len(setup.rounds.shapes) == by_host.target_passes + 1


def test_fixed_chains_are_cut_where_many_rows_share_a_pass() -> None:
    setup = Setup(16)
    many = [Request((1, 2, 3 + b % 4), "premium", SamplingParams(max_tokens=30, ignore_eos=True)) for b in range(16)]
    expected, _ = setup.decoded(many, [AUTOREGRESSIVE] * 16, by_engines=False)
    assert setup.decoded(many, [verify_all(8)] * 16, by_engines=True)[0] == expected
    assert min(shape.nodes for shape in setup.rounds.shapes) == 3


@pytest.mark.parametrize("num_later", [0, 3])
def test_fixed_chains_that_many_rows_had_no_room_for_are_plain_once_there_is_room(num_later: int) -> None:
    """What their draft would have to catch up with is gone, whoever has joined meanwhile."""
    setup = Setup(16, seconds=dear)
    many = [
        Request((1, 2, 3 + b % 4), "premium", SamplingParams(max_tokens=135 if b < 12 else 155, ignore_eos=True))
        for b in range(16)
    ]
    many += [Request((1, 2, 3), "premium", SamplingParams(max_tokens=30, ignore_eos=True))] * num_later
    expected, _ = setup.decoded(many, [AUTOREGRESSIVE] * len(many), by_engines=False)
    found, counted = setup.decoded(many, [verify_all(8)] * len(many), by_engines=True)
    assert found == expected
    assert sum(c.drafted for c in counted[:6]) > 0  # while the first ones were few


def test_logits_that_are_no_numbers_are_told() -> None:
    setup = Setup(1)
    real = setup.rounds.take

    def spoilt() -> Any:
        (result,) = real()
        return [result._replace(tokens=(*result.tokens[:-1], -1))]

    setup.rounds.take = spoilt  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="not numbers"):
        setup.decoded(requests(1), [AUTOREGRESSIVE], by_engines=True)
    assert torch.is_inference_mode_enabled() is False


@pytest.mark.parametrize("accept_below", [0.0, 0.3], ids=["lossless", "lossy"])
def test_prompts_among_many_rows_share_a_step(accept_below: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """No draft is made ready there, whoever asks for one."""
    setup = Setup(20, seconds=dear)
    many = [
        Request((1, 2, 3 + b % 5), "premium", SamplingParams(max_tokens=60 + b, ignore_eos=True)) for b in range(32)
    ]
    expected, _ = setup.decoded(many, [AUTOREGRESSIVE] * 32, by_engines=False)
    shared: list[int] = []
    run_together = Membership._run_together

    def counted(self: Membership, joining: Any) -> None:
        shared.append(len(self.rows))
        run_together(self, joining)

    monkeypatch.setattr(Membership, "_run_together", counted)
    policy = PREMIUM.model_copy(update={"accept_below": accept_below})
    lane = {"least": 9, "most_rows": 4, "most_tokens": 16}
    found, _ = setup.decoded(many, [policy] * 32, by_engines=True, patience=1, **lane)
    assert len(shared) >= 4 and min(shared) >= 16
    if not accept_below:
        assert found == expected


@pytest.mark.parametrize("seconds", [cheap, dear])
def test_many_rows_share_rounds(seconds: Any) -> None:
    """Among many, those that come last have no draft made ready, those that have waited too long lose theirs, and the
    others theirs beside them: nobody could draft, and passes are shorter without features."""
    setup = Setup(20, seconds=seconds)
    many = [Request((1, 2, 3 + b % 5), "premium", SamplingParams(max_tokens=150, ignore_eos=True)) for b in range(24)]
    expected, _ = setup.decoded(many, [AUTOREGRESSIVE] * 24, by_engines=False)
    assert setup.decoded(many, [PREMIUM] * 24, by_engines=True)[0] == expected
    assert sum(shape.tree is None for shape in setup.rounds.shapes) > 100
    assert {has_features for rows, has_features in setup.rounds.begun_with if rows > 16} == {False}
    assert setup.rounds.begun_with[0][1]  # of the first few
