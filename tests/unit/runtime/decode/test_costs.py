"""What pays, on costs made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from growing import GrowingFakeDraft

from fakes import FakeDraft, FakeTarget
from ssv.bundle.profile import Conditions, Costs, Curve
from ssv.runtime.decode.costs import (
    DRAFT_SIZES,
    FIRST_GUESSES,
    PASS_SIZES,
    SIZES_AT_LOAD,
    Prices,
    measure,
    place,
)
from ssv.runtime.threads import CpuTimes


def prices(further: float, draft: float, num_rows: int = 1) -> Prices:
    """A pass of one token costs 1, each further one `further`, a draft step `draft` and a tenth of that for each
    further node."""
    target = Curve(tokens=(1, 101), seconds=(1.0, 1.0 + 100 * further))
    return Prices(Costs(target=target, draft=Curve(tokens=(1, 11), seconds=(draft, 2 * draft))), num_rows)


def test_nodes_are_verified_while_they_raise_the_rate() -> None:
    # Rates: 1; 1.9 / 1.1 = 1.727; 2.4 / 1.2 = 2; 2.6 / 1.3 = 2; 2.7 / 1.4 = 1.93
    assert prices(0.1, 0.1).worth_verifying([0.9, 0.5, 0.19, 0.1]) == 2
    assert prices(0.1, 0.1).worth_verifying([0.9, 0.5, 0.21, 0.1]) == 3
    assert prices(0.0, 0.1).worth_verifying([0.9, 0.01]) == 2
    assert prices(0.5, 0.1).worth_verifying([0.4, 0.3]) == 0
    assert prices(0.5, 0.1).worth_verifying([]) == 0


def test_rows_that_share_a_pass_share_its_price() -> None:
    # Two rows, rates: 2 / 1.1 = 1.818; 2.9 / 1.2 = 2.417; 3.4 / 1.3 = 2.615; 3.64 / 1.4 = 2.6
    assert prices(0.1, 0.1, 2).worth_together([0.9, 0.5, 0.24]) == 2
    assert prices(0.1, 0.1, 2).worth_together([0.9, 0.5, 0.27]) == 3
    # Beside others: 3.6 / 1.3 = 2.769; 3.87 / 1.4 = 2.764; 3.88 / 1.4 = 2.771
    assert prices(0.1, 0.1, 2).worth_together([0.27], others=[0.9, 0.7]) == 0
    assert prices(0.1, 0.1, 2).worth_together([0.28], others=[0.9, 0.7]) == 1
    assert prices(0.1, 0.1, 2).worth_together([]) == 0


def test_what_fills_a_block_costs_nothing_and_a_larger_one_has_to_be_worth_it() -> None:
    """Blocks of eight tokens take 1.7, and of sixteen 2.5."""
    four = replace(prices(0.1, 0.1, 4), blocks=lambda tokens: [8] if tokens <= 8 else [16] * -(-tokens // 16))
    assert four.worth_together([0.9, 0.5, 0.01, 0.01]) == 4
    assert four.worth_together([0.99] * 5) == 4  # 7.96 / 1.7 = 4.68; 8.95 / 2.5 = 3.58
    assert four.worth_together([0.9] * 4 + [0.8] * 4) == 4  # 7.6 / 1.7 = 4.47; 10.8 / 2.5 = 4.32
    assert four.worth_together([0.9] * 4 + [0.8] * 8) == 12  # 14 / 2.5 = 5.6
    assert four.worth_together([0.9] * 4 + [0.8] * 8, others=[0.9] * 4) == 8  # 14 / 2.5; 17.2 / 5


def hoped(survival: float, further: float) -> float:
    return sum(max(survival * guess - further, 0) for guess in FIRST_GUESSES) / len(FIRST_GUESSES)


def test_a_step_of_the_draft_must_bring_more_than_its_cost() -> None:
    # So far 1.9 tokens in 1.1 + 0.1 seconds: a rate of 1.583. A child takes a tenth of a second of the pass, 0.158
    # tokens; the step of one node takes 0.1 seconds and each further one 0.01: 0.158 and 0.0158 tokens.
    assert hoped(0.9, 0.158) > 0.158 + 0.0158
    assert prices(0.1, 0.1).worth_opening([0.9], [0.9], spent=0.1) == 1
    assert prices(0.1, 0.1).worth_opening([0.9], [0.9, 0.4], spent=0.1) == 2
    assert hoped(0.17, 0.158) < 0.0158
    assert prices(0.1, 0.1).worth_opening([0.9], [0.9, 0.17], spent=0.1) == 1
    assert prices(0.1, 0.1).worth_opening([0.9], [0.2], spent=0.1) == 0
    assert prices(0.1, 0.9).worth_opening([0.9], [0.9], spent=0.1) == 0


def test_rows_begin_together() -> None:
    # One row: a rate of 1 and 0.1 for a place in the pass.
    worth = hoped(1.0, 0.1)
    assert prices(0.1, worth - 0.01).worth_beginning([1], [[]], [1.0])
    assert not prices(0.1, worth + 0.01).worth_beginning([1], [[]], [1.0])
    # What has to be caught up with costs too, but not without end.
    dear = prices(0.1, worth - 0.05)
    dear = replace(dear, costs=dear.costs.model_copy(update={"text": 0.03}))
    assert dear.worth_beginning([2], [[]], [1.0]) and not dear.worth_beginning([3], [[]], [1.0])
    cheap = prices(0.1, worth - 0.1)
    assert replace(cheap, costs=cheap.costs.model_copy(update={"text": 0.03})).worth_beginning([50], [[]], [1.0])
    # Eight rows: a pass over their roots takes 1.7 seconds and one over as many nodes more 2.5.
    rate, further = 8 / 1.7, 0.8 / 8
    gain = 8 * hoped(1.0, rate * further)
    step = 1 + 0.1 * 7  # in units of the draft's first token
    assert prices(0.1, gain / rate / step * 0.99, 8).worth_beginning([2] * 8, [[]] * 8, [1.0] * 8)
    assert not prices(0.1, gain / rate / step * 1.01, 8).worth_beginning([2] * 8, [[]] * 8, [1.0] * 8)


def test_a_step_is_shared_by_those_that_take_part() -> None:
    alone, shared = prices(0.1, 0.2, 8), replace(prices(0.1, 0.2, 8), sharing=8)
    assert alone.of_draft(1) == pytest.approx(0.2)
    assert shared.of_draft(1) == pytest.approx(0.2 * 1.7 / 8)


def test_rows_share_a_pass() -> None:
    """With eight rows a further token costs as much as before and the pass has been shared: it has to bring more."""
    assert prices(0.1, 0.1, 1).worth_verifying([0.5, 0.2]) == 2
    assert prices(0.1, 0.1, 8).worth_verifying([0.5, 0.2]) == 1
    assert prices(0.3, 0.1, 8).worth_verifying([0.5, 0.2]) == 0


def test_costs_are_measured_at_all_sizes() -> None:
    target = FakeTarget(max_length=200, tap=True)
    draft = FakeDraft(target, conditioned=True)
    costs = measure(target, draft, repeats=2)
    assert (costs.target.tokens, costs.draft.tokens) == (PASS_SIZES, DRAFT_SIZES)
    assert sorted({call.tokens for call in target.calls[1:]}) == list(PASS_SIZES)
    assert len(draft.calls) == 1 + 2 * 2 * (len(DRAFT_SIZES) + 2)
    assert costs.text >= 0


def test_nobody_waits_long_for_repeats() -> None:
    """A step takes 2^-10 s by this clock, and is run twice: three of passes, three of the draft, two of texts."""
    runs = []
    for turns in (1, 2, 100):
        target = FakeTarget(max_length=200, tap=True)
        within = 2 * 8 * 2**-10 * turns - 1e-6
        draft = FakeDraft(target, conditioned=True)
        measure(
            target, draft, pass_sizes=SIZES_AT_LOAD, draft_sizes=SIZES_AT_LOAD, within=within, clock=Machine().clock
        )
        runs.append(len(target.calls) - 1)
    assert runs == [6, 12, 18]


class Machine:
    """A clock, and what the cores did: two of them, of which the engines use what others leave."""

    def __init__(self, *, others: float = 0.0, jitter: float = 1.0) -> None:
        """Args:
        others: cores that other processes take.
        jitter: what every second measurement takes, in 2^-10 s; the others take one.
        """
        self._others, self._jitter, self._looks = others, jitter, 0

    def clock(self) -> float:
        """Two looks are a measurement."""
        self._looks += 1
        late = (self._jitter - 1) * (self._looks % 4 == 0)
        return 2**-10 * (self._looks + late)

    def read(self, everybody: bool) -> CpuTimes:
        assert everybody
        at = 10.0 * (1 + self._looks)
        return CpuTimes(cores=2, at=at, busy=2.0 * at, own=(2.0 - self._others) * at)


def conditions(threads: int = 2, read: Any = None, kind: type[FakeDraft] = FakeDraft, **machine: float) -> Conditions:
    """Of seven steps, and of the five of an engine that grows trees itself, each is late every second time: these are
    odd numbers."""
    target, told = FakeTarget(max_length=200, tap=True), Machine(**machine)
    draft, sizes = kind(target, conditioned=True), {"pass_sizes": (1, 4, 16), "draft_sizes": (1, 4)}
    found = measure(
        target, draft, **sizes, repeats=4, threads=threads, clock=told.clock, read=read or told.read
    ).conditions
    assert found is not None
    return found


def test_a_quiet_machine_gives_no_doubts() -> None:
    assert conditions() == Conditions(missing_cores=0.0, spread=1.0)
    assert conditions(others=0.1, jitter=1.3).doubts is None


def test_cores_that_others_took_are_told() -> None:
    """As a pass of 15 ms instead of 5 beside a process that is always busy: its repeats do not differ."""
    found = conditions(others=0.9)
    assert found.spread == 1.0 and found.missing_cores == pytest.approx(0.9)
    assert found.doubts == "other processes took 0.9 of the cores that the engines have threads for"


def test_engines_that_grow_trees_are_watched_as_well() -> None:
    found = conditions(threads=1, others=1.4, jitter=2.0, kind=GrowingFakeDraft)
    assert found.missing_cores == pytest.approx(0.4) and found.spread == pytest.approx(1.5)


def test_cores_that_the_engines_do_not_want_may_be_taken() -> None:
    assert conditions(threads=1, others=0.9).doubts is None
    assert conditions(threads=1, others=1.4).missing_cores == pytest.approx(0.4)


def test_repeats_that_differ_are_told_where_the_system_tells_nothing() -> None:
    found = conditions(jitter=4.0, read=lambda _: None)
    assert found.missing_cores is None and found.spread == pytest.approx(2.5)
    assert found.doubts == "the same step took 2.5 times its least"


def test_a_place_names_what_costs_depend_on() -> None:
    places = {place("torch", "int8", "cpu", 2), place("torch", "int8", "cpu", 1), place("torch", "fp32", "cpu", 2)}
    assert len(places) == 3
    assert all(name.startswith("torch ") and " on " in name for name in places)
