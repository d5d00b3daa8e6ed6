"""Evidence that a promise is broken: how seldom it is wrong, and how soon it comes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from overdispersed import MOST, POPULATIONS, Population, at_most

from ssv.support.evidence import BETS, Evidence

LIMIT, ALPHA = 0.02, 0.01


def alarms(
    population: Population, divergences: tuple[tuple[float, int], ...], num_wagers: int, most: int = MOST
) -> np.ndarray:
    """After how many units each wager has 1 / ALPHA, infinity for never.

    Args:
        divergences: true ones, and how many units each is of, one after the other.
    """
    rng, evidence = np.random.default_rng(0), Evidence(LIMIT, most, (num_wagers,))
    found = np.full(num_wagers, math.inf)
    for divergence, num_units in divergences:
        events_RN, parts_RN = population.draw(divergence, (num_wagers, num_units), rng)
        for events_R, parts_R in zip(events_RN.T, parts_RN.T, strict=True):
            evidence.add(events_R, parts_R)
            found = np.minimum(found, np.where(evidence.value_R >= 1 / ALPHA, evidence.units, math.inf))
    return found


@pytest.mark.parametrize("name", POPULATIONS)
def test_a_promise_that_is_just_kept_is_seldom_called_broken(name: str) -> None:
    found = alarms(POPULATIONS[name], ((LIMIT, 1500),), 1000)
    assert np.isfinite(found).mean() <= at_most(ALPHA, 1000)


@pytest.mark.parametrize("name", POPULATIONS)
def test_a_promise_that_is_kept_by_far_is_hardly_ever_called_broken(name: str) -> None:
    assert np.isfinite(alarms(POPULATIONS[name], ((LIMIT / 2, 1500),), 500)).mean() <= ALPHA / 2


@pytest.mark.parametrize(("before", "units"), [(1, 40), (1500, 90)])
def test_a_promise_that_is_broken_is_noticed_soon_however_long_it_was_kept(before: int, units: int) -> None:
    """At three times the limit, in nine of ten cases."""
    found = alarms(POPULATIONS["overdispersed"], ((0.01, before), (3 * LIMIT, units)), 300)
    assert (found > before).all() and np.isfinite(found).mean() > 0.9


def test_without_a_prior_over_where_to_begin_what_was_kept_for_long_would_be_noticed_late() -> None:
    """What the mixture is for: one wager from the first unit on has lost too much."""
    rng = np.random.default_rng(0)
    events, parts = POPULATIONS["overdispersed"].draw(0.01, (1, 1500), rng)
    x = (events[0] / LIMIT - parts[0]) / MOST
    single = np.log1p(np.array(BETS)[:, None] * x).sum(axis=1)
    mixture = Evidence(LIMIT, MOST)
    for d, t in zip(events[0], parts[0], strict=True):
        mixture.add(d, t)
    assert single.max() < -10 < math.log(mixture.value_R)


def test_at_the_beginning_it_is_1_and_no_unit_of_good_tokens_raises_it() -> None:
    evidence = Evidence(LIMIT, MOST)
    values = [float(evidence.value_R)]
    for _ in range(50):
        evidence.add(0, MOST)
        values.append(float(evidence.value_R))
    assert values[0] == 1 and values == sorted(values, reverse=True) and values[-1] > 0
    evidence = Evidence(LIMIT, MOST)
    evidence.add(0, 0)  # which says nothing
    assert evidence.value_R == pytest.approx(1)


def test_it_is_a_mean_of_1_at_the_limit() -> None:
    """Of units that diverge wholly or not at all, which differ most."""
    one, other = Evidence(LIMIT, 10), Evidence(LIMIT, 10)
    for evidence in (one, other):
        evidence.add(0, 10)
        evidence.add(3, 7)
    before = float(one.value_R)
    one.add(10, 10)
    other.add(0, 10)
    assert LIMIT * one.value_R + (1 - LIMIT) * other.value_R == pytest.approx(before)


def test_a_long_unit_weighs_as_much_as_the_most() -> None:
    long, most = Evidence(LIMIT, 50), Evidence(LIMIT, 50)
    long.add(100, 1000)
    most.add(5, 50)
    assert long.value_R == pytest.approx(most.value_R) and most.value_R > 1


def test_the_value_stays_finite() -> None:
    evidence = Evidence(LIMIT, MOST)
    for _ in range(500):
        evidence.add(MOST, MOST)
    assert np.isfinite(evidence.value_R) and evidence.value_R > 1e50
    for _ in range(500):
        evidence.add(0, MOST)
    assert np.isfinite(evidence.value_R) and evidence.value_R > 0


@pytest.mark.parametrize(("events", "parts"), [(2, 1), (-1, 3), ([1, 1], [2, 2])])
def test_counts_that_cannot_be(events: object, parts: object) -> None:
    with pytest.raises(ValueError, match=r"a unit has|give one of each"):
        Evidence(LIMIT, MOST).add(events, parts)  # type: ignore[arg-type]


@pytest.mark.parametrize(("limit", "most"), [(0.0, 5), (1.0, 5), (math.nan, 5), (0.1, 0)])
def test_limits_that_cannot_be(limit: float, most: int) -> None:
    with pytest.raises(ValueError, match="give a share between 0 and 1"):
        Evidence(limit, most)
