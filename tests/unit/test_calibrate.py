"""Choosing thresholds from what decoding came to."""

import random

import pytest

from ssv.builder.calibrate import PromptResult, calibrate, poisson_upper, upper_bound
from ssv.builder.config import CalibrationConfig
from ssv.builder.progress import silent
from ssv.builder.tiers import Policy


def config(**changes: object) -> CalibrationConfig:
    settings = {"prompts_file": "p", "families": [(0.5, 0.7, 4)], "accept_below": [0.3, 0.1, 0.2], **changes}
    return CalibrationConfig.model_validate(settings)


def results(divergent: int, passes: int) -> list[PromptResult]:
    return [PromptResult(100, divergent, 0, passes, 2 * passes, 100) for _ in range(50)]


def run_with_rising_divergence(policy: Policy) -> list[PromptResult]:
    """One divergent token in a hundred for each tenth of the threshold, and fewer passes."""
    steps = round(policy.accept_below * 10)
    return results(steps, 40 - 5 * steps)


def test_each_tier_gets_the_cheapest_policy_within_its_limit() -> None:
    chosen = calibrate(run_with_rising_divergence, config(limits={"balanced": 0.02, "turbo": 0.05}), silent).tiers
    assert chosen["premium"].policy.lossless
    assert chosen["balanced"].policy.accept_below == 0.1  # at 0.2 two in a hundred diverge: no room for the bound
    assert chosen["turbo"].policy.accept_below == 0.3


def test_testing_stops_at_the_first_failure() -> None:
    """A larger threshold that happens to look good again must not be taken."""

    def run(policy: Policy) -> list[PromptResult]:
        return results(50 if policy.accept_below == 0.2 else 0, 10)

    chosen = calibrate(run, config(), silent)
    assert chosen.tiers["turbo"].policy.accept_below == 0.1
    assert len(chosen.trials) == 3


def test_limit_that_cannot_be_met_is_an_error() -> None:
    with pytest.raises(ValueError, match="tier balanced: no threshold"):
        calibrate(lambda policy: results(50, 10), config(), silent)


@pytest.mark.parametrize(("events", "expected"), [(0, 2.996), (1, 4.744), (10, 16.962)])
def test_poisson_bound(events: int, expected: float) -> None:
    """Against published one-sided 95 % limits."""
    assert poisson_upper(events, 0.95) == pytest.approx(expected, abs=2e-3)


def test_bound_covers_the_true_share() -> None:
    """Prompts differ in how often they diverge; the bound must hold all the same, in about 95 of 100 draws."""
    rng = random.Random(3)
    covered = 0
    for seed in range(100):
        rates = [rng.choice((0.0, 0.0, 0.02, 0.06)) for _ in range(60)]
        counts = [(sum(rng.random() < rate for _ in range(40)), 40) for rate in rates]
        covered += upper_bound(counts, 0.95, num_draws=300, seed=seed) >= 0.02
    assert covered >= 88
