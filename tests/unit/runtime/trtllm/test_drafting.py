"""The draft's cache follows texts that come, go, pause and keep what they like of their drafts."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fakes import EOS, FakeDraft, FakeTarget
from ssv.bundle.policy import RESERVED_LENGTH, Policy
from ssv.bundle.profile import Costs, Curve
from ssv.runtime.trtllm.drafting import Drafting, Text, chain_policy, most_drafted_for

MAX_ROWS, MAX_LENGTH, MOST = 3, 60, 5
TIER = Policy(accept_below=0.0, verify_above=0.8, risk_budget=0.9, max_pending=12, children=(4,), beam=8, pays=True)


def make_engine(max_batch: int = MAX_ROWS) -> FakeDraft:
    target = FakeTarget(max_batch=max_batch, max_length=MAX_LENGTH + RESERVED_LENGTH, eos_bias=-1.0)
    return FakeDraft(target, agreement=0.8)


def make(engine: FakeDraft, costs: Costs | None = None, most: int = MOST) -> Drafting:
    return Drafting(engine, [EOS], chain_policy(TIER, most, pays=costs is not None), costs=costs)


def recomputed(tokens: list[int], room: int, costs: Costs | None = None) -> list[int]:
    """What is drafted for a text that nobody has seen before."""
    return make(make_engine(1), costs).propose({0: Text(tokens, room)})[0]


class Requests(RuleBasedStateMachine):
    """Requests of an engine: some are asked for in each of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = make_engine()
        self.drafting = make(self.engine)
        self.texts: dict[int, list[int]] = {}
        self.number = 0

    @rule(length=st.integers(1, 20), seed=st.integers(0, 99))
    def arrive(self, length: int, seed: int) -> None:
        rng = random.Random(seed)
        self.number += 1
        self.texts[self.number] = [rng.randrange(1, 12) for _ in range(length)]

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), is_reused=st.booleans())
    def depart(self, data: Any, is_reused: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.texts)))
        self.drafting.forget(number)
        if is_reused:
            self.texts[number] = [3, 1, 4]  # another request of the same number
        else:
            del self.texts[number]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def pause(self, data: Any) -> None:
        """Its resources are taken; the text stays."""
        self.drafting.forget(data.draw(st.sampled_from(sorted(self.texts))))

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), share=st.floats(0, 1), end=st.lists(st.integers(1, 11), min_size=1, max_size=6))
    def change(self, data: Any, share: float, end: list[int]) -> None:
        """Another text of the same number, without a word: part of it is as before."""
        number = data.draw(st.sampled_from(sorted(self.texts)))
        self.texts[number] = [*self.texts[number][: int(share * len(self.texts[number]))], *end]

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), seed=st.integers(0, 99))
    def step(self, data: Any, seed: int) -> None:
        rng = random.Random(seed)
        scheduled = data.draw(st.sets(st.sampled_from(sorted(self.texts)), min_size=1))
        rooms = {number: rng.choice((1, 2, 9)) for number in scheduled}
        found = self.drafting.propose({n: Text(list(self.texts[n]), rooms[n]) for n in sorted(scheduled)})
        assert found.keys() == scheduled
        without = 0
        for number, draft in found.items():
            fits = len(self.texts[number]) <= MAX_LENGTH
            expected = recomputed(self.texts[number], rooms[number]) if fits else []
            if number not in self.drafting.held:  # there was no row left
                assert not draft
                without += fits
                continue
            assert draft == expected
            # The target keeps some of it and chooses one more, or goes another way for a while.
            kept = draft[: rng.randrange(len(draft) + 1)]
            self.texts[number] += [*kept, *(rng.randrange(1, 12) for _ in range(rng.choice((1, 1, 1, 4))))]
        assert not without or len(self.drafting.held) == MAX_ROWS

    @invariant()
    def the_cache_holds_what_it_says(self) -> None:
        for row, held in enumerate(self.drafting.held.values()):
            assert tuple(self.engine.cache.tokens_BS[row, : len(held)].tolist()) == held


Requests.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None, derandomize=True)
TestRequests = Requests.TestCase


def test_what_was_kept_is_not_run_again() -> None:
    engine = make_engine()
    drafting, tokens = make(engine), [5, 6, 7, 8]
    draft = drafting.propose({1: Text(tokens, 9)})[1]
    assert len(draft) > 1
    before = len(engine.calls)
    drafting.propose({1: Text([*tokens, *draft, 9], 9)})
    # The last drafted token was not run yet: it is, with the target's own.
    assert engine.calls[before].tokens == 2


def test_a_text_that_was_not_drafted_for_a_long_time_is_caught_up_with() -> None:
    engine = FakeDraft(FakeTarget(max_batch=1, max_length=400))
    drafting = make(engine)
    drafting.propose({1: Text([5, 6, 7], 9)})
    text = [5, 6, 7, *(1 + i % 11 for i in range(200))]
    assert (
        drafting.propose({1: Text(text, 9)})[1]
        == make(FakeDraft(FakeTarget(max_batch=1, max_length=400))).propose({1: Text(text, 9)})[1]
    )
    assert len(drafting.held[1]) == len(text)


def test_a_request_that_does_not_fit_is_left_alone() -> None:
    drafting = make(make_engine())
    assert drafting.propose({1: Text([1] * 200, 9), 2: Text([1, 2], 0), 3: Text([1, 2], 9)}).keys() == {1, 2, 3}
    assert drafting.held.keys() == {3}


def test_rows_go_to_who_is_asked_for() -> None:
    drafting = make(make_engine(2))
    for numbers in ((1,), (2,), (1,), (3,)):  # 2 was asked for the longest time ago
        drafting.propose({number: Text([number, 5, 6], 9) for number in numbers})
    assert drafting.held.keys() == {1, 3}
    found = drafting.propose({number: Text([number, 5, 6], 9) for number in (1, 3, 4)})
    assert found[4] == [] and found[1] == recomputed([1, 5, 6], 9)


def costs_of(a_pass: float, more: float, draft: float) -> Costs:
    return Costs(
        target=Curve(tokens=(1, 65), seconds=(a_pass, a_pass + 64 * more)),
        draft=Curve(tokens=(1, 8), seconds=(draft, draft)),
    )


@pytest.mark.parametrize(("costs", "drafts"), [(costs_of(1.0, 0.01, 0.01), True), (costs_of(1.0, 1.0, 1.0), False)])
def test_with_costs_what_pays_is_drafted(costs: Costs, drafts: bool) -> None:
    assert bool(recomputed([5, 6, 7], 9, costs)) is drafts


def test_where_drafts_pay_no_more() -> None:
    cheap, dear = costs_of(1.0, 0.01, 0.01), costs_of(1.0, 0.5, 0.1)
    assert most_drafted_for(cheap, 4, 8) == 8
    assert most_drafted_for(dear, 4, 8) == 1
    few = [most_drafted_for(costs_of(1.0, more, 0.05), 4, 64) for more in (0.01, 0.02, 0.05, 0.2)]
    assert few == sorted(few, reverse=True) and few[0] > few[-1]


def test_a_tier_becomes_a_chain_that_is_judged() -> None:
    chain = chain_policy(TIER.model_copy(update={"accept_below": 0.3, "pays": False}), 4, pays=False)
    assert chain.lossless and chain.is_chain and not chain.pays
    assert (chain.verify_above, chain.max_pending) == (0.8, 4)
