"""What a row learns of how far its repetitions go."""

from __future__ import annotations

import pytest

from ssv.runtime.decode.drafters.match_rates import LONGEST, PRIOR, PRIOR_WEIGHT, MatchRates


def test_before_anything_is_known_the_prior_stands() -> None:
    rates = MatchRates()
    assert [rates.rate(length) for length in range(1, LONGEST + 1)] == pytest.approx(PRIOR)
    assert list(PRIOR) == sorted(PRIOR)


def test_what_is_noted_counts_against_the_prior() -> None:
    rates = MatchRates()
    for goes_on in (True, True, False):
        rates.note(2, goes_on)
    assert rates.rate(2) == pytest.approx((PRIOR[1] * PRIOR_WEIGHT + 2) / (PRIOR_WEIGHT + 3))
    assert rates.rate(1) == pytest.approx(PRIOR[0])
    assert rates.rate(3) == pytest.approx(PRIOR[2])


def test_all_long_matches_are_one() -> None:
    rates = MatchRates()
    rates.note(40, False)
    assert rates.rate(LONGEST) == rates.rate(9) < PRIOR[-1]
    assert rates.rate(LONGEST - 1) == pytest.approx(PRIOR[-2])
