"""What a comparison of two arms on the same prompts may claim: intervals, a verdict of non-inferiority, and how many
prompts it takes.

Arm `a` is what is in use and arm `b` the candidate; differences are b - a, or relative to a. Requests of one cluster (a
prompt, or prompts that ran together) are alike, so that clusters are what is independent: they are what is resampled,
with all their requests in both arms.

Shapes: C clusters, D draws of the bootstrap, N requests.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq  # type: ignore[import-untyped]
from scipy.stats import binomtest, exponnorm, norm  # type: ignore[import-untyped]
from scipy.stats import t as student_t

from ssv.support.errors import UserError

Weights = npt.NDArray[np.int64]  # [draws, clusters]: how often each cluster was drawn
Values = npt.NDArray[np.float64]
Statistic = Callable[[Weights], Values]

_BLOCK_DRAWS = 256  # so many draws are weighed at once: memory is bounded by it and the number of requests


ROUNDING = 1e-9
"""A difference below it is none: no share, ratio or time in seconds that anybody measures is that exact, and sums are
not.
"""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        estimate, low, high: in the unit of what is estimated; the estimate need not be in the middle.
        level: share of such intervals that hold the truth, both sides together: each side misses it with (1 - level) /
            2.
    """

    estimate: float
    low: float
    high: float
    level: float

    def excludes(self, value: float) -> bool:
        """Whether the data speak against this value; the ends are still within, and so is what is beyond them by
        rounding.
        """
        return not self.low - ROUNDING <= value <= self.high + ROUNDING


# --- what is resampled ----------------------------------------------------------------------------------------------


def ratio_interval(
    num_a_C: npt.ArrayLike, den_a_C: npt.ArrayLike, num_b_C: npt.ArrayLike, den_b_C: npt.ArrayLike, *, level: float
) -> Interval:
    """Estimates how much greater a ratio of sums is in b than in a, relative to a (0.1: by 10 %).

    Clusters are independent of each other.

    The jackknife's standard error of the logarithm (Efron 1982, "The jackknife, the bootstrap and other resampling
    plans") and Student's t. Simulated with 8 to 100 clusters of skewed times, 94 to 95 % of its 95 % intervals hold the
    truth; of the percentile bootstrap's 92 to 94 %, of BCa's 91 to 92 %.

    Args:
        num_a_C, den_a_C, num_b_C, den_b_C: sums over a cluster's requests in an arm, as of seconds and of tokens.

    Raises:
        ValueError: lengths that differ, or numbers that are not finite.
        UserError: fewer than 2 clusters, or a sum that is 0 without one of them.
    """
    _check_share("level", level)
    columns = _columns(num_a_C, den_a_C, num_b_C, den_b_C)
    num_clusters = len(columns)
    if num_clusters < 2:
        raise UserError(f"{num_clusters} clusters cannot be resampled", "give more prompts")
    total = columns.sum(axis=0)
    rest_C4 = total - columns
    if np.any(rest_C4 <= 0):
        raise UserError("a sum is 0 without one of the clusters", "give more prompts")
    estimate, without_C = _log_of_ratios(total[None])[0], _log_of_ratios(rest_C4)
    error = math.sqrt((num_clusters - 1) / num_clusters * float(np.sum((without_C - without_C.mean()) ** 2)))
    reach = float(student_t.ppf((1 + level) / 2, num_clusters - 1)) * error
    low, middle, high = (math.expm1(estimate + step) for step in (-reach, 0.0, reach))
    return Interval(middle, low, high, level)


def mean_ratio_interval(
    num_a_C: npt.ArrayLike, den_a_C: npt.ArrayLike, num_b_C: npt.ArrayLike, den_b_C: npt.ArrayLike, *, level: float
) -> Interval:
    """Estimates how much greater the clusters' own ratios are in b than in a: their geometric mean, relative to a.

    All clusters weigh alike, so that a hiccup of the machine is no more than one of many, however long it was; the
    ratio of sums (`ratio_interval`) is what is paid for. The interval is Student's t for the mean of the logarithms, of
    which the jackknife's standard error is the usual one.

    Args:
        num_a_C, den_a_C, num_b_C, den_b_C: sums over a cluster's requests in an arm, as of tokens and of seconds.

    Raises:
        ValueError: lengths that differ, numbers that are not finite or not above 0, or fewer than 2 clusters.
    """
    _check_share("level", level)
    columns = _columns(num_a_C, den_a_C, num_b_C, den_b_C)
    num_clusters = len(columns)
    if num_clusters < 2:
        raise UserError(f"{num_clusters} clusters cannot be resampled", "give more prompts")
    if np.any(columns <= 0):
        raise ValueError("a cluster's sum is not above 0: leave out what has no ratio")
    logs_C = _log_of_ratios(columns)
    reach = float(student_t.ppf((1 + level) / 2, num_clusters - 1) * logs_C.std(ddof=1)) / math.sqrt(num_clusters)
    low, middle, high = (math.expm1(float(logs_C.mean()) + step) for step in (-reach, 0.0, reach))
    return Interval(middle, low, high, level)


def _log_of_ratios(sums_N4: Values) -> Values:
    num_a, den_a, num_b, den_b = sums_N4.T
    logs: Values = np.log(num_b / den_b) - np.log(num_a / den_a)
    return logs


def bootstrap(
    statistic: Statistic, num_clusters: int, *, level: float, num_draws: int = 4000, seed: int = 0
) -> Interval:
    """Percentile interval of a statistic of independent clusters (Efron and Tibshirani 1993, "An introduction to the
    bootstrap").

    The tails are taken further out for few clusters, as t is than normal (Hesterberg 2015, The American Statistician
    69:371-386). BCa was tried, and left: what it corrects by has to be learned from the same few clusters, and both
    arms' skewness cancels without it.

    Args:
        statistic: of counts [draws, clusters], how often each cluster was drawn (ones for the data), to values [draws].
        num_draws: those of which the statistic is not finite are left out. Levels nearer 1 need more: 100 in each tail
            are plenty.

    Raises:
        UserError: fewer than 2 clusters, or no finite statistic of the data or of most draws.
    """
    _check_share("level", level)
    if num_clusters < 2:
        raise UserError(f"{num_clusters} clusters cannot be resampled", "give more prompts")
    estimate = float(statistic(np.ones((1, num_clusters), np.int64))[0])
    if not math.isfinite(estimate):
        raise UserError(f"the statistic of the data is {estimate}", "give more prompts")
    rng = np.random.default_rng(seed)
    chances_C = np.full(num_clusters, 1 / num_clusters)
    blocks = [statistic(rng.multinomial(num_clusters, chances_C, size)) for size in _block_sizes(num_draws)]
    values_D = np.concatenate(blocks)
    values_D = values_D[np.isfinite(values_D)]
    if 2 * len(values_D) < num_draws:
        raise UserError(f"{num_draws - len(values_D)} of {num_draws} draws have no finite value", "give more prompts")
    reach = student_t.ppf((1 + level) / 2, num_clusters - 1) * math.sqrt(num_clusters / (num_clusters - 1))
    low, high = np.quantile(values_D, norm.cdf([-reach, reach]))
    return Interval(estimate, float(low), float(high), level)


def relative_quantile(
    values_a_N: npt.ArrayLike,
    cluster_a_N: npt.ArrayLike,
    values_b_N: npt.ArrayLike,
    cluster_b_N: npt.ArrayLike,
    q: float,
) -> Statistic:
    """For `bootstrap`: by how much the quantile over requests is greater in b than in a, relative to a (0.1: by 10 %).

    A quantile is the least value that a share of at least `q` of the requests do not exceed. Simulated, 97 % of
    the 95 % intervals of the 95th percentile hold the truth, with 80 prompts of some 4 requests.

    Args:
        values_a_N, values_b_N: one for each request; the arms may differ in how many.
        cluster_a_N, cluster_b_N: which cluster it belongs to, from 0.

    Raises:
        ValueError: lengths that differ, values that are not finite, clusters below 0 or not of the bootstrap, `q` not
            in (0, 1).
    """
    _check_share("quantile", q)
    arms = [_sorted_requests(values_a_N, cluster_a_N), _sorted_requests(values_b_N, cluster_b_N)]

    def statistic(weights_DC: Weights) -> Values:
        quantile_a, quantile_b = (
            _weighted_quantile(values_N, cluster_N, weights_DC, q) for values_N, cluster_N in arms
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            return quantile_b / quantile_a - 1

    return statistic


def _columns(*vectors_C: npt.ArrayLike) -> Values:
    """[C, vectors]. Raises ValueError."""
    arrays = [np.asarray(vector_C, np.float64) for vector_C in vectors_C]
    if len({array.shape for array in arrays}) != 1 or arrays[0].ndim != 1:
        raise ValueError(f"shapes are {[array.shape for array in arrays]}: give one number for each prompt in each")
    columns = np.stack(arrays, axis=1)
    _check_finite(columns)
    return columns


def _sorted_requests(values_N: npt.ArrayLike, cluster_N: npt.ArrayLike) -> tuple[Values, npt.NDArray[np.intp]]:
    """Values and clusters in the order of the values. Raises ValueError."""
    values, cluster = np.asarray(values_N, np.float64), np.asarray(cluster_N, np.intp)
    if values.shape != cluster.shape or values.ndim != 1:
        raise ValueError(f"{values.shape} values and {cluster.shape} clusters: give one cluster for each request")
    _check_finite(values)
    if np.any(cluster < 0):
        raise ValueError(f"cluster {cluster.min()}: number them from 0")
    order = np.argsort(values, kind="stable")
    return values[order], cluster[order]


def _weighted_quantile(values_N: Values, cluster_N: npt.NDArray[np.intp], weights_DC: Weights, q: float) -> Values:
    """The quantile of sorted values, by draw; NaN where none was drawn. Raises ValueError."""
    if not len(values_N):
        return np.full(len(weights_DC), np.nan)
    if cluster_N.max() >= weights_DC.shape[1]:
        raise ValueError(f"cluster {cluster_N.max()} of {weights_DC.shape[1]}: number them from 0")
    below_DN = np.cumsum(weights_DC[:, cluster_N], axis=1)
    total_D = below_DN[:, -1]
    # Less than one ten-millionth of a request is rounding: 0.07 * 100 is more than 7.
    rank_D = np.maximum(np.ceil(q * total_D - 1e-7), 1)
    first_D = np.argmax(below_DN >= rank_D[:, None], axis=1)
    return np.where(total_D > 0, values_N[first_D], np.nan)


def _block_sizes(num_draws: int) -> list[int]:
    return [min(_BLOCK_DRAWS, num_draws - start) for start in range(0, num_draws, _BLOCK_DRAWS)]


# --- answers and their scores -----------------------------------------------------------------------------------------


def paired_proportions(both: int, only_a: int, only_b: int, neither: int, *, level: float) -> Interval:
    """Share of prompts that b gets right less that of a: Tango's score interval (1998, Statistics in Medicine
    17:891-908).

    It has a width where no prompt is judged differently: z^2 / (n + z^2) to each side. On average it holds the truth as
    often as it says; counts being whole numbers, in single cases of 20 to 120 prompts 93 % of 95 % intervals do,
    computed exactly. Then a side may miss with more than its 2.5 %: the lower, of a b that is worse, with up to 3 %,
    the upper with up to 5 % where b alone is rarely right.

    Args:
        both, only_a, only_b, neither: prompts that both arms get right, a alone, b alone, and none.

    Raises:
        ValueError: no prompts, or counts below 0.
    """
    _check_share("level", level)
    num_prompts = both + only_a + only_b + neither
    if min(both, only_a, only_b, neither) < 0 or num_prompts == 0:
        raise ValueError(f"counts of prompts are {both}, {only_a}, {only_b}, {neither}: give at least one prompt")
    z = float(norm.ppf((1 + level) / 2))
    low = _tango_low(only_a, only_b, num_prompts, z)
    high = -_tango_low(only_b, only_a, num_prompts, z)
    return Interval((only_b - only_a) / num_prompts, low, high, level)


def _tango_low(only_a: int, only_b: int, num_prompts: int, z: float) -> float:
    """The least difference b - a that the data are within `z` standard errors of, as those would be if it were the
    truth.
    """
    share_a, share_b = only_a / num_prompts, only_b / num_prompts

    def beyond(difference: float) -> float:
        error = math.sqrt(_tango_variance(share_a, share_b, difference) / num_prompts)
        return share_b - share_a - difference - z * error

    # At the estimate itself there may be no variance, and a root that is none: the search ends just short of it.
    nearest = share_b - share_a - 1e-12
    return float(brentq(beyond, -1.0, nearest)) if nearest > -1 else -1.0


def _tango_variance(share_a: float, share_b: float, difference: float) -> float:
    """The variance of a prompt's difference b - a, where that is given and otherwise what makes the data likeliest.

    Args:
        share_a, share_b: of prompts that one arm alone gets right, as observed.
    """
    linear = (2 - share_b + share_a) * difference - share_b - share_a
    root = math.sqrt(max(linear**2 + 8 * share_a * difference * (1 - difference), 0.0))
    chance_a = (root - linear) / 4  # of a alone being right; b alone is with as much and the difference
    return max(2 * chance_a + difference * (1 - difference), 0.0)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p-value of both arms being right equally often, exact (McNemar 1947, Psychometrika 12:153-157;
    binomial).

    Args:
        only_a, only_b: prompts that one arm alone gets right.

    Raises:
        ValueError: counts below 0.
    """
    if min(only_a, only_b) < 0:
        raise ValueError(f"counts of prompts are {only_a}, {only_b}: give none below 0")
    return float(binomtest(only_b, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def paired_scores(
    difference_C: npt.ArrayLike, *, level: float, bound: float, num_draws: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of the prompts' differences of score, b - a, of which no more is known than that they are bounded.

    The bootstrap alone would claim to know the truth from a few prompts that do not differ. This is Gaffke's interval
    (2005, "Three test statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative variable";
    Learned-Miller and Thomas 2019, "A new confidence interval for the mean of a bounded random variable",
    arXiv:1905.06208). Its ends are quantiles of the mean under random weights (Rubin's bootstrap) of the prompts and of
    one more, as bad as can be for the lower end and as good for the upper.

    Where prompts differ by nothing or, all one way, by `bound`, the far end is Clopper and Pearson's for the share that
    differs, times `bound`: of n prompts of which none does, bound * (1 - ((1 - level) / 2)^(1 / n)). That it holds the
    truth as often as it says for any bounded score is a conjecture that no case is known against. With many prompts it
    is as short as the bootstrap's.

    Args:
        difference_C: one for each prompt, in the score's unit, within [-bound, bound].
        bound: width of the range of the score.

    Raises:
        ValueError: differences that are not finite or out of bounds.
        UserError: fewer than 2 prompts.
    """
    _check_share("level", level)
    difference = _columns(difference_C)[:, 0]
    if len(difference) < 2:
        raise UserError(f"{len(difference)} prompts show no spread", "give more prompts")
    if not 0 < bound < math.inf:
        raise ValueError(f"bound is {bound}: give the width of the score's range")
    if np.any(np.abs(difference) > bound):
        raise ValueError(f"a difference of {np.abs(difference).max()} is beyond {bound}: give the width of the range")
    rng = np.random.default_rng(seed)
    means, further = [], []
    for size in _block_sizes(num_draws):
        # Exponential variates over their sum are weights that are uniform among those that add up to 1.
        weights_DC = rng.standard_exponential((size, len(difference) + 1))
        weights_DC /= weights_DC.sum(axis=1, keepdims=True)
        means.append(weights_DC[:, :-1] @ difference)
        further.append(bound * weights_DC[:, -1])
    mean_D, further_D = np.concatenate(means), np.concatenate(further)
    low = np.quantile(mean_D - further_D, (1 - level) / 2)
    high = np.quantile(mean_D + further_D, (1 + level) / 2)
    return Interval(float(difference.mean()), float(low), float(high), level)


class Quality(StrEnum):
    """Whether b is as good as a, but for a margin; `the same` where that is not a matter of chance."""

    SAME = "the same"
    NON_INFERIOR = "non-inferior"
    INFERIOR = "inferior"
    UNDECIDED = "undecided"


def judge(interval: Interval, margin: float) -> Quality:
    """Whether b may replace a, from the interval of a difference b - a of which more is better.

    Either verdict is wrong with a chance of (1 - level) / 2 at most, the interval's one side: at 95 %, 2.5 %, as far as
    the interval keeps its level on that side.

    Args:
        margin: the loss that would still be put up with, in the difference's unit; 0 asks for b to be better.

    Raises:
        ValueError: a margin below 0, or not finite.
    """
    if not (math.isfinite(margin) and margin >= 0):
        raise ValueError(f"margin is {margin}: give the loss that would do, 0 or more")
    if not interval.excludes(-margin):
        return Quality.UNDECIDED
    return Quality.NON_INFERIOR if interval.low > -margin else Quality.INFERIOR


# --- how many prompts, and how many comparisons -----------------------------------------------------------------------


def prompts_needed_pairs(margin: float, *, discordant: float, alpha: float, power: float) -> int:
    """Prompts with which `paired_proportions` shows non-inferiority, if both arms are right equally often (Nam 1997,
    Biometrics 53:1422).

    Args:
        margin: in (0, 1).
        discordant: share of prompts that one arm alone gets right, in [0, 1].
        alpha: one-sided, for an interval of level 1 - 2 * alpha.
        power: chance of the verdict.

    Raises:
        ValueError: what is out of range.
    """
    _check_share("margin", margin)
    if not 0 <= discordant <= 1:
        raise ValueError(f"discordant is {discordant}: give a share of prompts")
    z, z_power = _quantiles(alpha, power)
    # Tango's interval takes its standard error as if -margin were the truth: also where no prompt is judged
    # differently.
    assumed = _tango_variance(discordant / 2, discordant / 2, -margin)
    return math.floor(((z * math.sqrt(assumed) + z_power * math.sqrt(discordant)) / margin) ** 2) + 1


def prompts_needed_scores(margin: float, *, sd: float, alpha: float, power: float, bound: float = 1.0) -> int:
    """Prompts with which `paired_scores` shows non-inferiority, if the mean difference is 0.

    Args:
        margin: in the score's unit.
        sd: standard deviation of the prompts' differences, in the score's unit.
        alpha: one-sided, for an interval of level 1 - 2 * alpha.
        power: chance of the verdict.
        bound: width of the score's range, as given to `paired_scores`.

    Raises:
        ValueError: what is out of range.
    """
    if not (0 < margin < bound < math.inf and 0 <= sd < math.inf):
        raise ValueError(f"margin {margin}, sd {sd}, bound {bound}: give a margin within the range of the score")
    z, z_power = _quantiles(alpha, power)
    # With fewer even prompts that do not differ leave -margin in the interval.
    least = math.floor(math.log(alpha) / math.log1p(-margin / bound)) + 1
    if sd == 0:
        return least

    def suffice(num_prompts: int) -> bool:
        # The interval's end is a quantile of a normal variate, the mean, less an exponential one, the weight of the
        # worst prompt.
        error = sd / math.sqrt(num_prompts)
        reach = exponnorm.isf(alpha, bound / num_prompts / error, scale=error)
        return bool(reach + z_power * error <= margin)

    # Enough at any rate: quantiles of the two add up to more than that of their sum.
    spread, exponential = (z + z_power) * sd, -bound * math.log(alpha)
    most = math.ceil((2 * exponential / (math.sqrt(spread**2 + 4 * exponential * margin) - spread)) ** 2)
    return bisect_left(range(most), True, lo=min(least, most), key=suffice)


def _quantiles(alpha: float, power: float) -> tuple[float, float]:
    """Standard normal, of 1 - alpha and power. Raises ValueError."""
    if not (0 < alpha < 0.5 <= power < 1):
        raise ValueError(f"alpha {alpha}, power {power}: give an alpha below 0.5 and a power of 0.5 or more, below 1")
    return float(norm.isf(alpha)), float(norm.ppf(power))


def simultaneous_level(level: float, num_comparisons: int) -> float:
    """Level of each of so many intervals that all together hold the truth with a chance of at least `level`
    (Bonferroni).

    Raises:
        ValueError: a level not in (0, 1), or no comparisons.
    """
    _check_share("level", level)
    if num_comparisons < 1:
        raise ValueError(f"{num_comparisons} comparisons: give at least one")
    return 1 - (1 - level) / num_comparisons


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value}: give a number between 0 and 1")


def _check_finite(values: Values) -> None:
    if not np.all(np.isfinite(values)):
        raise ValueError("a value is not finite: leave out what was not measured")
