"""Calibrations of prompts that differ much in how often they diverge, simulated: is their promise kept?

Shapes: R calibrations, N prompts, K thresholds, D draws of a bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ssv.support.intervals import is_below

Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

MOST = 48
"""Tokens of an output, at most."""

Show = Callable[[Counts, Counts, float, float, np.random.Generator], Flags]
"""Called with divergent and emitted tokens of prompts [R, N], a limit, a chance of error, and random numbers: whether
each calibration takes the divergence to be below the limit."""


@dataclass(frozen=True, slots=True)
class Population:
    """Prompts to draw from.

    Attributes:
        weights_P, rates_P: of each sort of prompts how many there are, and how often they diverge, up to a factor.
        spread: of prompts of a sort: the variance of their rate over what it can be at the most (Beta).
        short: share of prompts whose output is shorter than it may be; those diverge twice as often.
    """

    weights_P: tuple[float, ...]
    rates_P: tuple[float, ...]
    spread: float
    short: float = 0.3

    def draw(self, divergence: float, shape: tuple[int, int], rng: np.random.Generator) -> tuple[Counts, Counts]:
        """Divergent and emitted tokens [R, N] of which a share `divergence` is divergent, in the whole population."""
        sort_RN = rng.choice(len(self.weights_P), p=np.array(self.weights_P) / sum(self.weights_P), size=shape)
        is_short_RN = rng.random(shape) < self.short
        emitted_RN = np.where(is_short_RN, rng.integers(1, MOST, shape), MOST)
        relative_RN = np.array(self.rates_P)[sort_RN] * np.where(is_short_RN, 2.0, 1.0)
        rate_RN = relative_RN * divergence / self._mean_relative()
        assert rate_RN.max() < 1
        concentration, diverges_RN = 1 / self.spread - 1, rate_RN > 0
        safe_RN = np.where(diverges_RN, rate_RN, 0.5)  # Beta has no mean of 0
        own_RN = rng.beta(safe_RN * concentration, (1 - safe_RN) * concentration)
        return rng.binomial(emitted_RN, np.where(diverges_RN, own_RN, 0.0)), emitted_RN

    def _mean_relative(self) -> float:
        """Of all tokens of the population, the mean of the rates, up to the same factor."""
        of_sorts = float(np.average(self.rates_P, weights=self.weights_P))
        tokens_short, tokens_long = self.short * MOST / 2, (1 - self.short) * MOST
        return of_sorts * (2 * tokens_short + tokens_long) / (tokens_short + tokens_long)


POPULATIONS = {
    "overdispersed": Population((1.0,), (1.0,), 0.05),
    "half never": Population((0.5, 0.5), (0.0, 1.0), 0.1),
    "2 % carry most": Population((0.98, 0.02), (0.3, 6.0), 0.05),
}
"""In the last, prompts of the second sort diverge in three or five tenths of their tokens, at a limit of 2 %."""


def by_betting(events_RN: Counts, parts_RN: Counts, limit: float, alpha: float, rng: np.random.Generator) -> Flags:
    """The calibration's own test."""
    return is_below(events_RN, parts_RN, limit, most=MOST, alpha=alpha)


def by_bootstrap(
    events_RN: Counts, parts_RN: Counts, limit: float, alpha: float, rng: np.random.Generator, draws: int = 400
) -> Flags:
    """A percentile bootstrap over prompts, and at least the exact bound of a Poisson count: what was used before."""
    from scipy.special import gammaincinv  # type: ignore[import-untyped]

    num_prompts = events_RN.shape[1]
    drawn_DN = rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), draws).astype(np.float64)
    # The same draws for all calibrations, whose prompts are independent of each other.
    shares_RD = (events_RN @ drawn_DN.T) / (parts_RN @ drawn_DN.T)
    poisson_R = gammaincinv(events_RN.sum(axis=1) + 1, 1 - alpha) / parts_RN.sum(axis=1)
    shown: Flags = np.maximum(np.quantile(shares_RD, 1 - alpha, axis=1), poisson_R) <= limit
    return shown


def broken(
    show: Show,
    population: Population,
    num_prompts: int,
    num_calibrations: int,
    *,
    divergences: Sequence[float],
    limit: float = 0.02,
    alpha: float = 0.05,
    seed: int = 0,
) -> tuple[float, float]:
    """Shares of calibrations that break their promise, and that find a threshold at all.

    Each tests thresholds in rising order until the first that is not shown to be below the limit, and takes the last
    one that is.

    Args:
        divergences: true ones, of the thresholds, ascending.
    """
    rng = np.random.default_rng(seed)
    open_R = np.ones(num_calibrations, bool)
    chosen_R = np.zeros(num_calibrations)
    for divergence in divergences:
        events_RN, parts_RN = population.draw(divergence, (num_calibrations, num_prompts), rng)
        open_R &= show(events_RN, parts_RN, limit, alpha, rng)
        chosen_R[open_R] = divergence
    return float((chosen_R >= limit).mean()), float((chosen_R > 0).mean())


def at_most(alpha: float, num_calibrations: int, errors: float = 3.0) -> float:
    """`alpha` and so many standard errors of a share of that many calibrations."""
    return alpha + errors * math.sqrt(alpha * (1 - alpha) / num_calibrations)
