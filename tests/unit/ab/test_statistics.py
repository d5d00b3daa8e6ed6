"""Intervals hold the truth as often as they say, and verdicts are as rarely wrong; simulated with fixed seeds, or
computed exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binomtest, multinomial, norm, t, ttest_1samp
from scipy.stats import bootstrap as scipys

from ssv.ab.statistics import (
    Interval,
    Quality,
    Statistic,
    bootstrap,
    judge,
    mcnemar,
    mean_ratio_interval,
    paired_proportions,
    paired_scores,
    prompts_needed_pairs,
    prompts_needed_scores,
    ratio_interval,
    relative_quantile,
    simultaneous_level,
)
from ssv.support.errors import UserError

Array = npt.NDArray[np.float64]


def error(rate: float, num_runs: int) -> float:
    """Three standard errors of a simulated rate."""
    return 3 * math.sqrt(rate * (1 - rate) / num_runs)


# --- bootstrap --------------------------------------------------------------------------------------------------------


class Trace:
    """Lognormal times of requests in two arms: those for a prompt are alike, in both arms."""

    def __init__(self, seed: int, num_prompts: int = 60, slower: float = 1.0) -> None:
        rng = np.random.default_rng(seed)
        self.num_prompts = num_prompts
        own_C, b_C = rng.normal(0, 0.6, num_prompts), rng.normal(0, 0.3, num_prompts)
        self.cluster_a = np.repeat(np.arange(num_prompts), 1 + rng.poisson(3, num_prompts))
        self.cluster_b = np.repeat(np.arange(num_prompts), 1 + rng.poisson(3, num_prompts))
        self.a = np.exp(own_C[self.cluster_a] + rng.normal(0, 0.4, len(self.cluster_a)))
        # Were b's own spread not made up for, its mean would be greater.
        self.b = slower * np.exp((own_C + b_C)[self.cluster_b] + rng.normal(0, 0.4, len(self.cluster_b)) - 0.3**2 / 2)

    def sums(self) -> tuple[Array, Array, Array, Array]:
        of = [(self.cluster_a, self.a), (self.cluster_b, self.b)]
        both = [(np.bincount(c, v, self.num_prompts), np.bincount(c, minlength=self.num_prompts)) for c, v in of]
        return both[0][0], both[0][1].astype(float), both[1][0], both[1][1].astype(float)

    def quantile(self, q: float) -> Statistic:
        return relative_quantile(self.a, self.cluster_a, self.b, self.cluster_b, q)


def held(interval_of: Callable[[Trace, int], Interval], truth: float, num_runs: int, num_prompts: int) -> float:
    """Share of 95 % intervals that hold the truth."""
    hits = 0
    for seed in range(num_runs):
        hits += not interval_of(Trace(seed, num_prompts, slower=1.3), num_runs + seed).excludes(truth)
    return hits / num_runs


@pytest.mark.parametrize("num_prompts", [8, 20, 60, 100])
def test_intervals_of_a_ratio_hold_the_truth_as_often_as_they_say(num_prompts: int) -> None:
    rate = held(lambda trace, _: ratio_interval(*trace.sums(), level=0.95), 0.3, 1500, num_prompts)
    assert abs(rate - 0.95) < error(0.95, 1500)


def test_intervals_of_the_95th_percentile_hold_the_truth_at_least_as_often_as_they_say() -> None:
    # The truth: both logarithms are normal, of variances 0.52 and 0.61, and 1.645 is the normal quantile.
    truth = 1.3 * math.exp(-0.045 + 1.645 * (math.sqrt(0.61) - math.sqrt(0.52))) - 1
    rate = held(
        lambda trace, seed: bootstrap(trace.quantile(0.95), 80, level=0.95, num_draws=600, seed=seed), truth, 400, 80
    )
    assert rate > 0.95 - error(0.95, 400)


def test_a_ratio_is_of_sums() -> None:
    found = ratio_interval([1.0, 4.0], [1, 2], [3.0, 15.0], [1, 3], level=0.95)
    assert found.estimate == pytest.approx((18 / 4) / (5 / 3) - 1)
    # By hand: without the first cluster 5 / 2, without the second 3; their standard error, and t of one degree of
    # freedom.
    reach = 12.7062 * math.log(3 / 2.5) / 2
    assert found.high == pytest.approx(2.7 * math.exp(reach) - 1, rel=1e-4)
    assert found.low == pytest.approx(2.7 * math.exp(-reach) - 1, rel=1e-4)


def test_a_mean_ratio_is_of_the_clusters_own_ratios() -> None:
    found = mean_ratio_interval([1.0, 4.0], [1, 2], [3.0, 16.0], [1, 1], level=0.95)
    # By hand: 3 times and 8 times as great; half the distance of the logarithms is their standard error.
    reach = 12.7062 * math.log(8 / 3) / 2
    assert found.estimate == pytest.approx(math.sqrt(24) - 1)
    assert found.high == pytest.approx(math.sqrt(24) * math.exp(reach) - 1, rel=1e-4)
    assert found.low == pytest.approx(math.sqrt(24) * math.exp(-reach) - 1, rel=1e-4)


def test_a_mean_ratio_has_scipys_interval() -> None:
    num_a, den_a, num_b, den_b = np.random.default_rng(3).uniform(1, 9, (4, 12))
    found = mean_ratio_interval(num_a, den_a, num_b, den_b, level=0.9)
    logs = np.log((num_b / den_b) / (num_a / den_a))
    expected = ttest_1samp(logs, 0.0).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((math.expm1(expected.low), math.expm1(expected.high)))


def test_a_hiccup_counts_once_in_a_mean_ratio() -> None:
    tokens, seconds = np.full(10, 100.0), np.full(10, 2.0)
    hiccup = seconds / 2
    hiccup[3] = 30.0
    sums, each = (
        interval(tokens, seconds, tokens, hiccup, level=0.95) for interval in (ratio_interval, mean_ratio_interval)
    )
    assert 1 + sums.estimate == pytest.approx(20 / 39)
    assert 1 + each.estimate == pytest.approx(2 * (1 / 30) ** 0.1)


@pytest.mark.parametrize("wrong", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan]])
def test_what_has_no_mean_ratio_is_an_error(wrong: list[float]) -> None:
    with pytest.raises((ValueError, UserError), match=r"give more prompts|leave out"):
        mean_ratio_interval(*[wrong] * 4, level=0.95)


def test_a_quantile_weighs_requests_by_the_draws_of_their_cluster() -> None:
    a, b = np.arange(1.0, 11.0), 3 * np.arange(10.0, 0.0, -1.0)
    cluster = np.array([0] * 5 + [1] * 5)
    statistic = relative_quantile(a, cluster, b, cluster, 0.7)
    # Of a: 7 of 1..10, then 4 of 1..5 (3.5 of them); of b the halves lie the other way round.
    np.testing.assert_allclose(statistic(np.array([[1, 1], [1, 0], [0, 3]])), [21 / 7 - 1, 27 / 4 - 1, 12 / 9 - 1])
    assert np.isnan(relative_quantile([], [], b, cluster, 0.7)(np.array([[1, 1]])))[0]


# Of fewer or wilder prompts intervals have an end so near -1 that no digits are left of it.
PROMPTS = st.lists(st.tuples(*[st.floats(1.0, 10.0)] * 4), min_size=4, max_size=12)


@pytest.mark.parametrize("interval_of", [ratio_interval, mean_ratio_interval])
@given(PROMPTS, st.floats(0.5, 0.95), st.randoms(use_true_random=False))
def test_a_ratio_is_the_same_seen_from_either_arm_and_in_any_order(
    interval_of: Callable[..., Interval], prompts: list[tuple[float, ...]], level: float, random: Random
) -> None:
    num_a, den_a, num_b, den_b = zip(*prompts, strict=True)
    found = interval_of(num_a, den_a, num_b, den_b, level=level)
    assert found.low <= found.estimate <= found.high
    back = interval_of(num_b, den_b, num_a, den_a, level=level)
    for there, home in ((found.estimate, back.estimate), (found.low, back.high), (found.high, back.low)):
        assert math.log1p(there) == pytest.approx(-math.log1p(home), rel=1e-6, abs=1e-9)
    shuffled = random.sample(prompts, len(prompts))
    again = interval_of(*zip(*shuffled, strict=True), level=level)
    assert (again.low, again.high) == pytest.approx((found.low, found.high), rel=1e-6, abs=1e-9)


@given(PROMPTS, st.floats(0.5, 0.9), st.floats(0.1, 0.999))
def test_a_higher_level_has_a_wider_interval(prompts: list[tuple[float, ...]], level: float, further: float) -> None:
    higher = level + further * (0.95 - level)
    columns = list(zip(*prompts, strict=True))
    narrow, wide = (ratio_interval(*columns, level=each) for each in (level, higher))
    assert wide.low <= narrow.low and narrow.high <= wide.high


def test_requests_of_a_prompt_are_not_taken_for_independent() -> None:
    trace = Trace(0)
    alike = ratio_interval(*trace.sums(), level=0.95)
    num = min(trace.a.size, trace.b.size)
    apart = ratio_interval(trace.a[:num], np.ones(num), trace.b[:num], np.ones(num), level=0.95)
    assert alike.high - alike.low > 1.2 * (apart.high - apart.low)
    tail = bootstrap(trace.quantile(0.9), 60, level=0.95)
    each = np.arange(num)
    loose = bootstrap(relative_quantile(trace.a[:num], each, trace.b[:num], each, 0.9), num, level=0.95)
    assert tail.high - tail.low > 1.2 * (loose.high - loose.low)


def test_arms_are_drawn_together() -> None:
    trace = Trace(0)
    sum_a, count_a, *_ = trace.sums()
    same = ratio_interval(sum_a, count_a, 2 * sum_a, count_a, level=0.95)
    assert (same.low, same.high) == pytest.approx((1.0, 1.0))
    tail = bootstrap(relative_quantile(trace.a, trace.cluster_a, 2 * trace.a, trace.cluster_a, 0.95), 60, level=0.95)
    assert (tail.low, tail.high) == pytest.approx((1.0, 1.0))


def test_a_prompt_counts_once_however_many_requests_it_has() -> None:
    sums = Trace(1).sums()
    once = ratio_interval(*sums, level=0.95)
    tenfold = ratio_interval(*(10 * column for column in sums), level=0.95)
    assert (once.low, once.high) == pytest.approx((tenfold.low, tenfold.high))


@pytest.mark.parametrize("num_prompts", [8, 40])
def test_intervals_are_those_of_the_literature(num_prompts: int) -> None:
    """scipy's, of the mean of a skewed sample, at the level that the extra reach for few clusters amounts to."""
    sample = np.random.default_rng(3).lognormal(0, 1, num_prompts)
    level = 1 - 2 * norm.sf(t.ppf(0.95, num_prompts - 1) * math.sqrt(num_prompts / (num_prompts - 1)))
    theirs = scipys(
        (sample,),
        np.mean,
        confidence_level=level,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval
    ours = bootstrap(lambda weights: weights @ sample / num_prompts, num_prompts, level=0.9, num_draws=20_000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0.02)


def test_the_same_seed_gives_the_same_interval() -> None:
    statistic = Trace(2).quantile(0.5)
    assert bootstrap(statistic, 60, level=0.9, seed=1) == bootstrap(statistic, 60, level=0.9, seed=1)
    assert bootstrap(statistic, 60, level=0.9, seed=1) != bootstrap(statistic, 60, level=0.9, seed=2)


def test_too_few_prompts_are_an_error() -> None:
    with pytest.raises(UserError, match=r"^1 clusters cannot be resampled: give more prompts$"):
        bootstrap(lambda weights: weights[:, 0], 1, level=0.95)
    with pytest.raises(UserError, match=r"^1 clusters cannot be resampled: give more prompts$"):
        ratio_interval([1.0], [1], [1.0], [1], level=0.95)
    with pytest.raises(UserError, match=r"the data is nan: give more prompts$"):
        bootstrap(relative_quantile([], [], [1.0, 1.0], [0, 1], 0.5), 2, level=0.95)
    with pytest.raises(UserError, match=r"without one of the clusters: give more prompts$"):
        ratio_interval([1.0, 0.0], [1, 0], [1.0, 1.0], [1, 1], level=0.95)
    # 36 % of draws do without the first prompt, as many without the second, and 60 % without one of them.
    with pytest.raises(UserError, match=r"of 4000 draws have no finite value: give more prompts$"):
        bootstrap(relative_quantile([1.0], [0], [1.0], [1], 0.5), 40, level=0.95)


def test_what_cannot_be_a_sample_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"give one number for each prompt"):
        ratio_interval([1.0], [1.0, 2.0], [1.0], [1.0], level=0.95)
    with pytest.raises(ValueError, match=r"not finite: leave out"):
        ratio_interval([math.nan], [1], [1.0], [1], level=0.95)
    with pytest.raises(ValueError, match=r"give one cluster for each request"):
        relative_quantile([1.0], [0, 1], [1.0], [0], 0.5)
    with pytest.raises(ValueError, match=r"cluster -1: number them from 0"):
        relative_quantile([1.0], [-1], [1.0], [0], 0.5)
    with pytest.raises(ValueError, match=r"cluster 2 of 2: number them from 0"):
        bootstrap(relative_quantile([1.0], [2], [1.0], [0], 0.5), 2, level=0.95)
    with pytest.raises(ValueError, match=r"quantile is 95: give a number between 0 and 1"):
        relative_quantile([1.0], [0], [1.0], [0], 95)
    with pytest.raises(ValueError, match=r"level is 95: give a number between 0 and 1"):
        bootstrap(lambda weights: weights[:, 0], 2, level=95)


# --- right and wrong --------------------------------------------------------------------------------------------------


class Exact:
    """Every outcome of so many prompts, with its interval: rates are sums over them, without an error of simulation."""

    def __init__(self, num_prompts: int, level: float = 0.95) -> None:
        counts = [(a, b) for a, b in itertools.product(range(num_prompts + 1), repeat=2) if a + b <= num_prompts]
        self.intervals = [paired_proportions(0, a, b, num_prompts - a - b, level=level) for a, b in counts]
        self.low, self.high = (np.array([getattr(i, end) for i in self.intervals]) for end in ("low", "high"))
        self.counts, self.num_prompts = np.array(counts), num_prompts

    def chance(self, where: npt.NDArray[np.bool_], only_a: float, only_b: float) -> float:
        rest = self.num_prompts - self.counts.sum(axis=1, keepdims=True)
        shares = [only_a, only_b, 1 - only_a - only_b]
        return float(multinomial.pmf(np.hstack([self.counts, rest]), self.num_prompts, shares)[where].sum())

    def held(self, only_a: float, only_b: float) -> float:
        truth = only_b - only_a
        return self.chance((self.low <= truth + 1e-12) & (truth - 1e-12 <= self.high), only_a, only_b)


RARE = [0.0, 0.01, 0.03]
SHARES = [*RARE, 0.1, 0.2, 0.3]


@pytest.mark.parametrize("num_prompts", [8, 20, 60])
def test_tangos_intervals_hold_the_truth_as_often_as_they_say(num_prompts: int) -> None:
    exact = Exact(num_prompts)
    rates = {(a, b): exact.held(a, b) for a, b in itertools.product(SHARES, SHARES)}
    assert min(rates.values()) > 0.925
    assert np.mean(list(rates.values())) > 0.95
    assert rates[0.2, 0.2] < 0.99  # they are not too wide either
    if num_prompts < 60:
        assert min(rate for (a, b), rate in rates.items() if a in RARE and b in RARE) > 0.95


def test_a_rare_loss_of_quality_is_seldom_overlooked_exactly() -> None:
    """Non-inferiority is claimed wrongly with a chance of at most 3 % (of 2.5 %) where the truth is just the margin."""
    exact = Exact(60)
    verdicts = {}
    for only_a, only_b in [(0.05, 0.0), (0.06, 0.01), (0.1, 0.05), (0.25, 0.2)]:
        verdicts[only_a] = np.array([judge(interval, 0.05) for interval in exact.intervals])
        assert exact.chance(verdicts[only_a] == Quality.NON_INFERIOR, only_a, only_b) < 0.03
        assert exact.chance(verdicts[only_a] == Quality.INFERIOR, only_a, only_b) < 0.05
    assert exact.chance(np.array([judge(i, 0.2) for i in exact.intervals]) == Quality.NON_INFERIOR, 0.05, 0.05) > 0.9


@pytest.mark.parametrize("level", [0.8, 0.95, 0.999])
@pytest.mark.parametrize("num_prompts", [1, 10, 1000])
def test_without_a_differing_prompt_there_still_is_a_width(num_prompts: int, level: float) -> None:
    interval = paired_proportions(num_prompts, 0, 0, 0, level=level)
    z = norm.ppf((1 + level) / 2)
    width = z**2 / (num_prompts + z**2)
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((0, -width, width), rel=1e-6)


@pytest.mark.parametrize(("a", "b"), [(0, 9), (3, 9), (12, 1)])
def test_the_ends_of_tangos_interval_solve_his_equation(a: int, b: int) -> None:
    interval = paired_proportions(30, a, b, 44 - 30 - a - b, level=0.95)
    for end, z in ((interval.low, 1.959964), (interval.high, -1.959964)):
        # Where the data are likeliest, under a difference of just this, is found by trying all chances.
        chance = np.linspace(max(0, -end), (1 - end) / 2, 200_001)[1:-1]
        likelihood = a * np.log(chance) + b * np.log(chance + end) + (44 - a - b) * np.log(1 - 2 * chance - end)
        best = chance[np.argmax(likelihood)]
        error_of_sum = math.sqrt(44 * (2 * best + end * (1 - end)))
        assert (b - a - 44 * end) / error_of_sum == pytest.approx(z, abs=1e-3)


@pytest.mark.parametrize(("a", "b"), [(0, 5), (5, 0), (1, 4), (0, 1)])
def test_the_arms_are_treated_alike(a: int, b: int) -> None:
    one, other = (paired_proportions(5 - a - b, *pair, 0, level=0.9) for pair in ((a, b), (b, a)))
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert -1 <= one.low < one.high <= 1
    assert one.low <= one.estimate <= one.high


@given(st.tuples(*[st.integers(0, 60)] * 4).filter(any), st.floats(0.5, 0.999))
def test_the_interval_of_proportions_holds_its_estimate_and_is_odd_in_the_arms(
    counts: tuple[int, ...], level: float
) -> None:
    both, only_a, only_b, neither = counts
    found = paired_proportions(both, only_a, only_b, neither, level=level)
    assert -1 <= found.low <= found.estimate <= found.high <= 1
    back = paired_proportions(both, only_b, only_a, neither, level=level)
    assert (back.low, back.estimate, back.high) == pytest.approx((-found.high, -found.estimate, -found.low))


def test_mcnemars_p_value_is_exact() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 5) == mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(3, 3) == 1.0
    with pytest.raises(ValueError, match="give none below 0"):
        mcnemar(-1, 3)


def test_counts_that_cannot_be_are_an_error() -> None:
    for counts in ((0, 0, 0, 0), (3, -1, 0, 0)):
        with pytest.raises(ValueError, match="give at least one prompt"):
            paired_proportions(*counts, level=0.95)


# --- scores -----------------------------------------------------------------------------------------------------------

SCORES: dict[str, tuple[Callable[[np.random.Generator, int], Array], float]] = {
    "one in 30 lost": (lambda rng, n: -1.0 * (rng.random(n) < 1 / 30), -1 / 30),
    "one in 30 lost, the rest noisy": (
        lambda rng, n: np.where(rng.random(n) < 1 / 30, -1, rng.uniform(-0.02, 0.02, n)),
        -1 / 30,
    ),
    "a fifth won, a fifth lost": (lambda rng, n: rng.choice([-1.0, 0.0, 0.0, 0.0, 1.0], n), 0.0),
    "graded": (lambda rng, n: rng.beta(2, 2, n) - rng.beta(2, 3, n), 0.1),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("num_prompts", [10, 60])
def test_intervals_of_scores_hold_the_truth_at_least_as_often_as_they_say(name: str, num_prompts: int) -> None:
    sample, truth = SCORES[name]
    rng = np.random.default_rng(len(name))
    draws = [sample(rng, num_prompts) for _ in range(400)]
    intervals = [paired_scores(d, level=0.95, bound=1, num_draws=500, seed=i) for i, d in enumerate(draws)]
    assert np.mean([not interval.excludes(truth) for interval in intervals]) > 0.95 - error(0.95, 400)


def test_the_bootstrap_alone_would_miss_rare_losses() -> None:
    """The simulation above can fail."""
    sample, truth = SCORES["one in 30 lost, the rest noisy"]
    rng = np.random.default_rng(0)
    missed = 0
    for seed in range(200):
        d = sample(rng, 60)
        missed += bootstrap(lambda w, d=d: w @ d / 60, 60, level=0.95, num_draws=500, seed=seed).excludes(truth)
    assert missed > 15


@pytest.mark.parametrize(("lost", "num_prompts"), [(0, 5), (0, 300), (1, 50), (7, 50)])
def test_where_prompts_are_lost_or_not_it_is_clopper_and_pearsons(lost: int, num_prompts: int) -> None:
    difference = np.zeros(num_prompts)
    difference[:lost] = -2.0
    interval = paired_scores(difference, level=0.95, bound=2.0, num_draws=20_000)
    share = binomtest(lost, num_prompts).proportion_ci(0.95, "exact").high
    assert interval.low == pytest.approx(-2 * share, rel=0.05)
    assert interval.estimate == -2 * lost / num_prompts


def test_with_many_prompts_scores_have_the_bootstraps_interval() -> None:
    d = np.random.default_rng(5).beta(2, 2, 3000) - 0.5
    wide, narrow = paired_scores(d, level=0.95, bound=1), bootstrap(lambda w: w @ d / 3000, 3000, level=0.95)
    assert 1 < (wide.high - wide.low) / (narrow.high - narrow.low) < 1.1


def test_scores_that_cannot_be_are_an_error() -> None:
    with pytest.raises(UserError, match=r"^1 prompts show no spread: give more prompts$"):
        paired_scores([0.0], level=0.95, bound=1)
    with pytest.raises(ValueError, match=r"a difference of 1.5 is beyond 1: give"):
        paired_scores([0.0, -1.5], level=0.95, bound=1)
    with pytest.raises(ValueError, match=r"bound is nan: give"):
        paired_scores([0.0, 0.0], level=0.95, bound=math.nan)
    with pytest.raises(ValueError, match=r"not finite"):
        paired_scores([0.0, math.inf], level=0.95, bound=1)


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.01, 0.03, Quality.NON_INFERIOR),
        (-0.02, 0.03, Quality.UNDECIDED),
        (-0.06, 0.03, Quality.UNDECIDED),
        (-0.06, -0.02, Quality.UNDECIDED),
        (-0.06, -0.021, Quality.INFERIOR),
        (0.01, 0.03, Quality.NON_INFERIOR),
    ],
)
def test_verdicts(low: float, high: float, verdict: Quality) -> None:
    assert judge(Interval((low + high) / 2, low, high, 0.95), 0.02) == verdict


@pytest.mark.parametrize("margin", [-0.01, math.nan, math.inf])
def test_a_margin_is_a_loss_of_so_much(margin: float) -> None:
    with pytest.raises(ValueError, match=r"margin is .*: give the loss"):
        judge(Interval(0.0, -1.0, 1.0, 0.95), margin)


def test_an_interval_excludes_what_is_beyond_its_ends() -> None:
    interval = Interval(0.0, -1.0, 1.0, 0.95)
    assert [interval.excludes(value) for value in (-1.1, -1.0, 0.0, 1.0, 1.1)] == [True, False, False, False, True]


def claimed(num_prompts: int, only_a: float, only_b: float, margin: float, alpha: float, num_runs: int) -> float:
    """Share of simulated comparisons that say non-inferior."""
    shares = [only_a, only_b, 1 - only_a - only_b]
    counts, times = np.unique(
        np.random.default_rng(0).multinomial(num_prompts, shares, num_runs), axis=0, return_counts=True
    )
    verdicts = [judge(paired_proportions(0, *map(int, c), level=1 - 2 * alpha), margin) for c in counts]
    return float(times[[v == Quality.NON_INFERIOR for v in verdicts]].sum() / num_runs)


@pytest.mark.parametrize(
    ("margin", "discordant", "alpha", "power"),
    [(0.02, 0.06, 0.025, 0.8), (0.05, 0.2, 0.05, 0.9), (0.03, 0.02, 0.025, 0.8)],
)
def test_pairs_have_the_power_that_was_promised_and_no_more_false_claims(
    margin: float, discordant: float, alpha: float, power: float
) -> None:
    needed = prompts_needed_pairs(margin, discordant=discordant, alpha=alpha, power=power)
    # Counts are whole numbers: power goes in steps of some hundredths.
    found = claimed(needed, discordant / 2, discordant / 2, margin, alpha, 4000)
    assert abs(found - power) < error(power, 4000) + 0.02
    only_a = max(discordant, margin) / 2 + margin / 2
    false = claimed(needed, only_a, only_a - margin, margin, alpha, 4000)
    assert false < alpha + error(alpha, 4000)
    assert false > alpha / 3


@pytest.mark.parametrize("margin", [0.005, 0.02, 0.3])
def test_pairs_needed_suffice_where_no_prompt_differs_and_one_fewer_does_not(margin: float) -> None:
    needed = prompts_needed_pairs(margin, discordant=0.0, alpha=0.025, power=0.8)
    assert judge(paired_proportions(needed, 0, 0, 0, level=0.95), margin) == Quality.NON_INFERIOR
    assert judge(paired_proportions(needed - 1, 0, 0, 0, level=0.95), margin) == Quality.UNDECIDED


@pytest.mark.parametrize(("margin", "sd", "alpha", "power"), [(0.05, 0.2, 0.025, 0.8), (0.2, 0.5, 0.05, 0.9)])
def test_scores_have_the_power_that_was_promised_and_no_more_false_claims(
    margin: float, sd: float, alpha: float, power: float
) -> None:
    needed = prompts_needed_scores(margin, sd=sd, alpha=alpha, power=power)
    rng = np.random.default_rng(1)

    def rate(mean: float) -> float:
        """Draws scores on either side of their mean."""
        draws = mean + sd * rng.choice([-1.0, 1.0], (500, needed))
        intervals = [paired_scores(d, level=1 - 2 * alpha, bound=1, num_draws=500, seed=i) for i, d in enumerate(draws)]
        return float(np.mean([judge(interval, margin) == Quality.NON_INFERIOR for interval in intervals]))

    assert abs(rate(0.0) - power) < error(power, 500) + 0.02
    assert rate(-margin) < alpha + error(alpha, 500)


def test_scores_needed_suffice_where_no_prompt_differs() -> None:
    for margin in (0.01, 0.1):
        needed = prompts_needed_scores(margin, sd=0.0, alpha=0.025, power=0.8)
        share = [beta.ppf(0.975, 1, n) for n in (needed - 1, needed)]
        assert share[0] >= margin > share[1]
        assert needed <= prompts_needed_scores(margin, sd=1e-9, alpha=0.025, power=0.8) <= needed + 2
    many = prompts_needed_scores(0.01, sd=0.5, alpha=0.025, power=0.8)
    assert many == pytest.approx((1.960 + 0.842) ** 2 * 0.5**2 / 0.01**2, rel=0.03)
    assert many < prompts_needed_scores(0.01, sd=0.5, alpha=0.025, power=0.8, bound=10.0)


def test_plans_that_cannot_be_are_an_error() -> None:
    with pytest.raises(ValueError, match="margin is 0: give"):
        prompts_needed_pairs(0, discordant=0.1, alpha=0.025, power=0.8)
    with pytest.raises(ValueError, match=r"discordant is 1\.1: give"):
        prompts_needed_pairs(0.1, discordant=1.1, alpha=0.025, power=0.8)
    with pytest.raises(ValueError, match="power 1: give"):
        prompts_needed_pairs(0.1, discordant=0.1, alpha=0.025, power=1)
    with pytest.raises(ValueError, match=r"alpha 0\.975"):
        prompts_needed_scores(0.1, sd=0.1, alpha=0.975, power=0.8)
    with pytest.raises(ValueError, match="give a margin within the range"):
        prompts_needed_scores(2.0, sd=0.1, alpha=0.025, power=0.8)


def test_more_comparisons_take_a_higher_level_of_each() -> None:
    assert simultaneous_level(0.95, 1) == pytest.approx(0.95)
    assert simultaneous_level(0.95, 5) == pytest.approx(0.99)
    with pytest.raises(ValueError, match="0 comparisons: give at least one"):
        simultaneous_level(0.95, 0)
