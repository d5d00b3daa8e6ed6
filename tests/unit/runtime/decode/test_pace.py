"""Rows draft as long as that is faster than plain decoding, by the clock."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from ssv.runtime.decode.pace import MOST_COMPANIES, RETRY, SETTLING, TRIALS, Mean, Pace, _Company

PREMIUM = frozenset([1])


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Rounds:
    """Rounds of rows: their seconds and tokens where they may draft, and where they may not."""

    def __init__(self, drafted: tuple[float, int], plain: tuple[float, int], num_rows: int = 1) -> None:
        self.clock = Clock()
        self.pace = Pace(self.clock)
        self.drafted, self.plain, self.num_rows, self.tokens = drafted, plain, num_rows, 10

    def run(self, num: int, plain_s: float | None = None, policies: frozenset[int] = PREMIUM) -> list[bool]:
        """Of each whether rows might draft."""
        found = []
        for _ in range(num):
            found.append(self.pace.begin(self.num_rows, policies, self.tokens, plain_s))
            seconds, tokens = self.drafted if found[-1] else self.plain
            self.clock.now += seconds
            self.tokens += tokens
        return found


def test_what_wins_goes_on() -> None:
    assert all(Rounds((1.2, 3), (1.0, 1)).run(300, plain_s=1.0))


def test_what_loses_is_left_and_tried_again() -> None:
    """Two tokens a round, in three times the time: the host's, which nobody had measured."""
    found = Rounds((3.0, 2), (1.0, 1)).run(2000, plain_s=1.0)
    first = found.index(False)
    assert first == TRIALS
    assert found.index(True, first) - first == RETRY + 1  # in one of them plain decoding was compared
    assert sum(found) < 5 * (TRIALS + SETTLING + 1)  # less and less often


def test_what_has_come_to_pay_is_taken_up_again() -> None:
    rounds = Rounds((3.0, 2), (1.0, 1))
    rounds.run(100, plain_s=1.0)
    rounds.drafted = (1.1, 3)
    assert all(rounds.run(4 * RETRY, plain_s=1.0)[-RETRY:])


def test_costs_that_promise_too_much_of_plain_decoding_are_found_out() -> None:
    """They say a round takes half of what it takes: drafting loses against that, but not against what is so."""
    rounds = Rounds((1.2, 2), (1.0, 1))
    found = rounds.run(300, plain_s=0.5)
    assert found.count(False) == TRIALS + SETTLING and all(found[-200:])


def changes(rounds: Rounds, num: int, seed: int) -> int:
    """How often rows go from one to the other, on a machine whose rounds take 0.6 to 1.4 times their mean."""
    rng, found = random.Random(seed), []
    for _ in range(num):
        rounds.drafted = rounds.plain = (rng.uniform(0.6, 1.4), 1)
        found += rounds.run(1, plain_s=0.5)
    return sum(a != b for a, b in pairwise(found))


def test_what_is_about_as_fast_as_plain_decoding_is_not_compared_all_the_time() -> None:
    """Each change costs some rounds."""
    assert sum(changes(Rounds((1.0, 1), (1.0, 1)), 1000, seed) for seed in range(20)) / 20 < 12


def test_a_machine_that_has_become_slow_is_not_the_drafts_fault() -> None:
    """Plain decoding was measured while it was fast: it is measured again before it is preferred."""
    rounds = Rounds((1.2, 3), (1.0, 1))
    rounds.run(100, plain_s=0.3)
    rounds.drafted, rounds.plain = (4.0, 3), (3.3, 1)
    found = rounds.run(300)
    assert found.count(False) == TRIALS + SETTLING and all(found[-200:])


def test_nothing_is_held_against_what_nobody_knows() -> None:
    assert all(Rounds((9.0, 1), (1.0, 1)).run(100, plain_s=None))


def test_a_pace_without_a_clock_leaves_it_to_costs() -> None:
    pace = Pace(None)
    assert all(pace.begin(1, PREMIUM, tokens, 1e-9) for tokens in range(100))


def test_rows_of_other_policies_are_judged_by_themselves_and_of_another_number_in_time() -> None:
    rounds = Rounds((3.0, 2), (1.0, 1))
    assert not all(rounds.run(30, plain_s=1.0))
    assert all(rounds.run(TRIALS, plain_s=1.0, policies=frozenset([2])))
    rounds.num_rows = 2
    found = rounds.run(4 * RETRY, plain_s=1.0)
    assert found.index(True) == 2 * RETRY - 1  # like one row, until it is tried


def test_rows_of_a_number_that_was_not_seen_do_as_the_nearest_did() -> None:
    """Rows join one after the other: each number of them is there for a round or two."""
    rounds = Rounds((1.2, 3), (1.0, 1))
    rounds.run(TRIALS + 1, plain_s=1.0)  # a single row gains by its draft
    rounds.num_rows, rounds.drafted, rounds.plain = 32, (9.0, 60), (2.0, 32)
    assert not all(rounds.run(TRIALS + 1, plain_s=2.0))
    found = []
    for rounds.num_rows in range(2, 32):
        found += rounds.run(1, plain_s=1.0)
    assert found == [True] * 4 + [False] * 26  # 5 is nearer to 1 than to 32, 6 is not


def test_whether_a_row_that_joins_would_draft_is_told_beforehand() -> None:
    rounds = Rounds((3.0, 2), (1.0, 1), num_rows=8)
    assert rounds.pace.would_draft(8, PREMIUM)
    rounds.run(2 * TRIALS, plain_s=1.0)
    assert not rounds.pace.would_draft(8, PREMIUM) and not rounds.pace.would_draft(7, PREMIUM)
    assert rounds.pace.would_draft(8, frozenset([2]))
    assert len(rounds.pace._companies) == 1


def test_companies_are_forgotten_where_there_are_too_many() -> None:
    rounds = Rounds((1.2, 3), (1.0, 1))
    for number in range(2 * MOST_COMPANIES):
        rounds.run(1, policies=frozenset([number]))
    assert len(rounds.pace._companies) == MOST_COMPANIES


def test_rounds_in_which_rows_come_or_go_do_not_count() -> None:
    rounds = Rounds((3.0, 2), (1.0, 1))
    for _ in range(3 * TRIALS):
        assert rounds.run(1, plain_s=1.0) == [True]
        rounds.pace.forget()


def test_interruptions_are_left_out_wherever_they_come() -> None:
    mean = Mean()
    assert mean.note(50.0)  # a graph was captured
    for _ in range(5):
        assert mean.note(1.0)
    assert not mean.note(9.0)
    assert mean.seconds == 1.0 and mean.count == 5


def test_nothing_is_tried_in_a_company_that_is_about_to_grow() -> None:
    """A few rounds of one row, of two, of three: no trial of any."""
    rounds = Rounds((3.0, 2), (1.0, 1))
    assert not any(
        rounds.pace.begin(num, PREMIUM, 10 * num, 1.0, is_filling=True) for num in range(1, 8) for _ in range(4)
    )
    rounds.num_rows = 8
    assert rounds.run(TRIALS, plain_s=1.0) == [True] * TRIALS


def test_what_is_known_of_some_rows_holds_for_those_about_to_become_more() -> None:
    for drafted, pays in (((1.2, 24), True), ((9.0, 24), False)):
        rounds = Rounds(drafted, (1.0, 8), num_rows=8)
        rounds.run(40, plain_s=1.0)
        assert rounds.pace.begin(5, PREMIUM, 50, 1.0, is_filling=True) == pays
        assert rounds.pace.begin(8, PREMIUM, 50, 1.0, is_filling=True) == pays


def test_rows_that_were_hardly_seen_follow_what_was_found_since() -> None:
    """Three rounds of six rows are no trial; then eight rows are found to be better off without a draft."""
    rounds = Rounds((9.0, 16), (1.0, 8), num_rows=6)
    assert rounds.run(3, plain_s=1.0) == [True] * 3
    rounds.num_rows = 8
    rounds.run(40, plain_s=1.0)
    assert not rounds.pace.would_draft(6, PREMIUM)
    rounds.num_rows = 6
    assert not any(rounds.run(20, plain_s=1.0))


class Watched(Pace):
    """Counts how often all companies are looked through."""

    looks = 0

    def _look_for_nearest(self, num_rows: int, policies: frozenset[int]) -> _Company | None:
        self.looks += 1
        return super()._look_for_nearest(num_rows, policies)


def test_companies_are_looked_through_once_for_one_that_stays_hardly_known() -> None:
    """Each of its rounds is one in which rows come or go."""
    rounds = Rounds((1.2, 3), (1.0, 1))
    rounds.pace = pace = Watched(rounds.clock)
    for rounds.num_rows in range(1, 33):
        rounds.run(TRIALS + 1)
    rounds.num_rows, looks = 40, pace.looks
    for _ in range(100):
        assert rounds.run(1) == [True] and pace.would_draft(48, PREMIUM)
        pace.forget()
    assert pace.looks == looks + 2
    assert looks <= 2 * 32  # and twice for each number that came to be known


class Forgetful(Pace):
    """Looks each time anew."""

    def _nearest_drafts(self, num_rows: int, policies: frozenset[int]) -> bool | None:
        nearest = self._look_for_nearest(num_rows, policies)
        return nearest.drafts if nearest is not None else None


@pytest.mark.parametrize("most", [6, MOST_COMPANIES])
def test_what_was_found_is_as_good_as_looking_anew(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssv.runtime.decode.pace.MOST_COMPANIES", most)
    found = set()
    for seed in range(10):
        rng = random.Random(seed)
        both = [Rounds((1.0, 2), (1.0, 1)), Rounds((1.0, 2), (1.0, 1))]
        both[1].pace = Forgetful(both[1].clock)
        seconds = 3.0
        for _ in range(300):
            num_rows, policies = rng.choice((1, 2, 3, 5, 8, 13, 16, 24)), frozenset([rng.randrange(2)])
            num, asked, leaves = rng.choice((1, 1, 2, 3, 12, 150)), rng.randrange(1, 30), rng.random() < 0.5
            seconds = rng.choice((0.5, 1.5, 3.0, 5.0)) if rng.random() < 0.1 else seconds
            decisions = list[list[bool]]()
            for rounds in both:
                rounds.num_rows, rounds.drafted, rounds.plain = num_rows, (seconds, 2 * num_rows), (1.0, num_rows)
                decisions.append([])
                for _ in range(num):
                    decisions[-1] += [*rounds.run(1, 1.0, policies), rounds.pace.would_draft(asked, policies)]
                if leaves:
                    rounds.pace.forget()
            assert decisions[0] == decisions[1]
            found |= set(decisions[0])
            assert len(both[0].pace._nearest) <= most
    assert found == {True, False}


@pytest.mark.parametrize(("gain", "least", "most"), [(1.3, 0.95, 1.0), (1.15, 0.8, 1.0), (0.9, 0.0, 0.05)])
def test_a_draft_is_not_left_for_a_bad_time(gain: float, least: float, most: float) -> None:
    """Tokens of a round differ as those of trees do, and seconds by a tenth: of 3,000 rounds, how many draft."""
    for seed in range(8):
        rng = random.Random(seed)
        rounds = Rounds((0.0, 0), (1.0, 8), num_rows=8)
        drafts = 0
        for _ in range(3000):
            tokens = sum(min(1 + int(rng.expovariate(0.52)), 6) for _ in range(8))  # 2.45 of each row in the mean
            rounds.drafted = (2.45 / gain * (1 + 0.1 * rng.random()), tokens)
            rounds.plain = (1 + 0.1 * rng.random(), 8)
            drafts += rounds.run(1, plain_s=1.0)[0]
        assert least <= drafts / 3000 <= most, seed
