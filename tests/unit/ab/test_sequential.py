"""Intervals that are looked at after every observation miss the truth at any time as rarely as they say; those of a
fixed time do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import pytest
from scipy.stats import norm

from ssv.ab.sequential import RunningDifference, RunningMean, bernoulli_interval, proportion_difference
from ssv.ab.statistics import Interval


def error(rate: float, num_runs: int) -> float:
    """Three standard errors of a simulated rate."""
    return 3 * math.sqrt(rate * (1 - rate) / num_runs)


FIXED = float(norm.isf(0.025))  # for a 95 % interval


# --- proportions ------------------------------------------------------------------------------------------------------


def wilson(successes: int, trials: int, *, alpha: float) -> Interval:
    """95 % interval for a fixed number of trials."""
    z = FIXED
    share, scale = successes / trials, 1 + z**2 / trials
    middle = (share + z**2 / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2)) / scale
    return Interval(share, middle - half, middle + half, 1 - alpha)


def ever_missed(interval: Callable[..., Interval], chance: float, num_trials: int) -> float:
    """Exact chance that after some trial the 95 % interval excludes the truth.

    Carries the chances of each number of successes with no miss so far from trial to trial. An interval is a run of
    numbers of successes, whose ends never go back.
    """
    chances = np.zeros(num_trials + 2)
    chances[0], missed = 1.0, 0.0
    least = most = 0
    for trials in range(1, num_trials + 1):
        chances[1:] = chances[1:] * (1 - chance) + chances[:-1] * chance
        chances[0] *= 1 - chance
        while least < trials * chance and interval(least, trials, alpha=0.05).excludes(chance):
            least += 1
        most = max(most, least)
        while most < trials and not interval(most + 1, trials, alpha=0.05).excludes(chance):
            most += 1
        missed += chances[:least].sum() + chances[most + 1 :].sum()
        chances[:least] = chances[most + 1 :] = 0
    return missed


@pytest.mark.parametrize("chance", [0.01, 0.3])
def test_a_proportion_is_seldom_missed_at_any_time(chance: float) -> None:
    assert 0.005 < ever_missed(bernoulli_interval, chance, 2000) <= 0.05


@pytest.mark.parametrize("chance", [0.01, 0.3])
def test_an_interval_for_a_fixed_time_misses_when_looked_at_all_the_time(chance: float) -> None:
    """The test above can fail."""
    assert ever_missed(wilson, chance, 2000) > 0.25


@pytest.mark.parametrize(("successes", "trials"), [(20, 2000), (600, 2000), (1980, 2000)])
def test_intervals_of_proportions_are_not_much_wider_than_those_of_a_fixed_time(successes: int, trials: int) -> None:
    ours, fixed = (f(successes, trials, alpha=0.05) for f in (bernoulli_interval, wilson))
    assert 1 < (ours.high - ours.low) / (fixed.high - fixed.low) < 2.1
    assert ours.low < successes / trials < ours.high


def test_the_ends_of_a_proportion_are_where_the_wager_has_won() -> None:
    interval = bernoulli_interval(3, 10, alpha=0.1)
    # The mixture's probability of the very sequence: (1/2 3/2 5/2) (1/2 3/2 .. 13/2) / (1 2 .. 10).
    mixture = math.prod([0.5, 1.5, 2.5, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5]) / math.factorial(10)
    for end in (interval.low, interval.high):
        assert mixture / (end**3 * (1 - end) ** 7) == pytest.approx(10, rel=1e-6)


def test_proportions_of_nothing_and_of_all() -> None:
    assert bernoulli_interval(0, 0, alpha=0.05) == Interval(0.5, 0.0, 1.0, 0.95)
    none, every = bernoulli_interval(0, 1000, alpha=0.05), bernoulli_interval(1000, 1000, alpha=0.05)
    assert none.low == 0.0 < none.high < 0.01
    assert (1 - every.high, 1 - every.low) == pytest.approx((none.low, none.high))
    for wrong in ((3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="give counts"):
            bernoulli_interval(*wrong, alpha=0.05)
    with pytest.raises(ValueError, match=r"alpha is 1\.5: give a number between 0 and 1"):
        bernoulli_interval(1, 2, alpha=1.5)


def test_a_difference_of_proportions_is_that_of_two_intervals_of_half_the_alpha() -> None:
    a, b = (bernoulli_interval(s, 1000, alpha=0.025) for s in (100, 300))
    assert proportion_difference(100, 1000, 300, 1000, alpha=0.05) == Interval(
        pytest.approx(0.2), b.low - a.high, b.high - a.low, 0.95
    )
    assert proportion_difference(100, 1000, 300, 1000, alpha=0.05).low > 0
    # Of an arm without trials any proportion may be true.
    assert proportion_difference(0, 0, 3, 10, alpha=0.05).excludes(0.9)
    assert not proportion_difference(0, 0, 3, 10, alpha=0.05).excludes(-0.5)


# --- means ------------------------------------------------------------------------------------------------------------


class Runner(Protocol):
    def interval(self, alpha: float) -> Interval | None: ...


class FixedTime(RunningMean):
    """The normal 95 % interval for a fixed number of values."""

    def interval(self, alpha: float) -> Interval | None:
        if super().interval(alpha) is None:
            return None
        half = FIXED * math.sqrt(self._squares) / self.count
        return Interval(self.mean, self.mean - half, self.mean + half, 1 - alpha)


def simulate(
    start: Callable[[int], tuple[Runner, Callable[[int], None]]], num_values: int, num_runs: int, truth: float
) -> tuple[float, float]:
    """Share of runs in which the 95 % interval excludes the truth after any value, and the mean width at the end of the
    others.
    """
    missed, widths = 0, []
    for run in range(num_runs):
        runner, push = start(run)
        width = math.nan
        for step in range(num_values):
            push(step)
            interval = runner.interval(0.05)
            if interval is not None:
                if interval.excludes(truth):
                    missed += 1
                    break
                width = interval.high - interval.low
        else:
            widths.append(width)
    return missed / num_runs, float(np.mean(widths))


def lognormal(sigma: float, make: Callable[[], RunningMean], num_runs: int) -> tuple[float, float]:
    """Runs of 1200 values with mean 1."""

    def start(run: int) -> tuple[Runner, Callable[[int], None]]:
        values = np.random.default_rng(run).lognormal(-(sigma**2) / 2, sigma, 1200).tolist()
        runner = make()
        return runner, lambda step: runner.push(values[step])

    return simulate(start, 1200, num_runs, 1.0)


@pytest.mark.parametrize(("sigma", "burn_in", "width"), [(0.5, 50, 0.1), (1.0, 200, 0.25)])
def test_a_mean_of_skewed_values_is_seldom_missed_at_any_time(sigma: float, burn_in: int, width: float) -> None:
    rate, found = lognormal(sigma, lambda: RunningMean(burn_in=burn_in), 500)
    assert rate < 0.05 + error(0.05, 500)
    assert found < width


def test_a_short_burn_in_costs_what_its_docstring_says() -> None:
    rate, _ = lognormal(1.0, RunningMean, 500)
    assert abs(rate - 0.08) < error(0.08, 500)


def test_a_mean_for_a_fixed_time_misses_when_looked_at_all_the_time() -> None:
    """The tests above can fail."""
    rate, _ = lognormal(0.5, FixedTime, 150)
    assert rate > 0.25


@pytest.mark.parametrize(("share", "width"), [(0.5, 0.5), (0.1, 0.9)])
def test_a_difference_of_arms_is_seldom_missed_at_any_time(share: float, width: float) -> None:
    """Times have the mean 1 in a and 1.2 in b, of which b may be rare."""

    def start(run: int) -> tuple[Runner, Callable[[int], None]]:
        rng = np.random.default_rng(run)
        is_b = rng.random(1500) < share
        values = (np.where(is_b, 1.2, 1.0) * rng.lognormal(-0.245, 0.7, 1500)).tolist()
        runner, arms = RunningDifference(), is_b.tolist()
        return runner, lambda step: runner.push(arms[step], share, values[step])

    rate, found = simulate(start, 1500, 300, 0.2)
    assert rate < 0.05 + error(0.05, 300)
    assert found < width


def test_a_share_that_changes_with_the_load_does_not_bias_the_difference() -> None:
    """b gets more of the requests when all are slow: the plain difference of means takes that for b's doing."""
    rng = np.random.default_rng(0)
    runner = RunningDifference()
    values: list[list[float]] = [[], []]
    for step in range(6000):
        slow = step // 100 % 2
        is_b = bool(rng.random() < (0.6 if slow else 0.2))
        value = float(rng.lognormal(0.0, 0.3)) + 3 * slow + 0.5 * is_b
        values[is_b].append(value)
        runner.push(is_b, 0.6 if slow else 0.2, value)
    interval = runner.interval(0.05)
    assert interval is not None
    assert not interval.excludes(0.5)
    assert interval.excludes(0.0)
    assert interval.excludes(float(np.mean(values[1]) - np.mean(values[0])))


def test_the_guess_of_a_unit_goes_by_the_past_alone() -> None:
    runner = RunningDifference(burn_in=2)
    for is_b, share, value in [(False, 0.5, 1.0), (True, 0.5, 4.0), (True, 0.25, 6.0), (False, 0.2, 3.0)]:
        assert runner.interval(0.05) is None
        runner.push(is_b, share, value)
    interval = runner.interval(0.05)
    assert interval is not None
    # Means of 1 and 4, then 1 and 5: 3 + (6 - 4) / 0.25 and 4 - (3 - 1) / 0.8.
    assert interval.estimate == pytest.approx((11 + 1.5) / 2)


def test_the_width_of_a_mean_is_that_of_the_paper() -> None:
    values = np.random.default_rng(1).normal(1e6, 2.0, 300)
    runner = RunningMean(tuned_for=300)
    for value in values:
        runner.push(float(value))
    interval = runner.interval(0.1)
    assert interval is not None
    rho2 = (-2 * math.log(0.1) + math.log(-2 * math.log(0.1) + 1)) / 300
    margin = math.sqrt(2 * (300 * rho2 + 1) / (300**2 * rho2) * math.log(math.sqrt(300 * rho2 + 1) / 0.1))
    assert interval.estimate == pytest.approx(values.mean())
    assert (interval.high - interval.low) / 2 == pytest.approx(values.std() * margin, rel=1e-5)
    assert interval.level == 0.9


def test_the_interval_is_narrowest_for_what_it_is_tuned_for() -> None:
    widths = {}
    for tuned_for in (30, 1000, 30_000):
        runner = RunningMean(tuned_for)
        for step in range(1000):
            runner.push(step % 2)
        interval = runner.interval(0.05)
        assert interval is not None
        widths[tuned_for] = interval.high - interval.low
    assert min(widths, key=widths.__getitem__) == 1000


def test_there_is_no_interval_of_few_values_nor_of_equal_ones() -> None:
    runner = RunningMean()
    for _ in range(60):
        assert runner.interval(0.05) is None
        runner.push(7.0)
    runner.push(8.0)
    assert runner.interval(0.05) is not None
    few = RunningMean(burn_in=3)
    few.push(1.0)
    few.push(2.0)
    assert few.interval(0.05) is None
    few.push(3.0)
    assert few.interval(0.05) is not None


def test_a_difference_waits_for_the_rarer_arm() -> None:
    runner = RunningDifference(burn_in=3)
    for step in range(100):
        runner.push(step in (0, 40), 0.02, float(step % 7))
    assert runner.interval(0.05) is None
    runner.push(True, 0.02, 5.0)
    assert runner.interval(0.05) is not None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_an_error_and_leave_no_trace(value: float) -> None:
    mean, difference = RunningMean(), RunningDifference()
    with pytest.raises(ValueError, match="leave out what was not measured"):
        mean.push(value)
    with pytest.raises(ValueError, match="leave out what was not measured"):
        difference.push(True, 0.5, value)
    assert mean.count == 0
    assert difference._counts == [0, 0]


def test_what_cannot_be_is_an_error() -> None:
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="give both arms a chance"):
            RunningDifference().push(True, share, 1.0)
    with pytest.raises(ValueError, match="give numbers of values"):
        RunningMean(tuned_for=0)
    with pytest.raises(ValueError, match="give numbers of values"):
        RunningDifference(burn_in=0)
    with pytest.raises(ValueError, match="alpha is 0: give"):
        RunningMean().interval(0)
