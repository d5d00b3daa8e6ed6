"""Choosing thresholds from what decoding came to."""

import random

import pytest

from ssv.builder.calibrate import (
    BOUND_KIND,
    MIN_PROMPTS,
    PromptResult,
    calibrate,
    check_num_prompts,
    poisson_upper,
    upper_bound,
)
from ssv.builder.config import CalibrationConfig
from ssv.bundle.policy import Policy
from ssv.bundle.profile import Costs, Curve
from ssv.runtime.methods import PREMIUM
from ssv.support.errors import UserError
from ssv.support.progress import silent


def config(**changes: object) -> CalibrationConfig:
    settings = {"prompts_file": "p", "families": [(0.5, 0.7, 4)], "accept_below": [0.3, 0.1, 0.2], **changes}
    return CalibrationConfig.model_validate(settings)


COSTS = Costs(target=Curve(tokens=(1, 3), seconds=(2.0, 4.0)), draft=Curve(tokens=(1, 2), seconds=(0.2, 0.3)))


def results(divergent: int, passes: int) -> list[PromptResult]:
    return [PromptResult(100, divergent, 0, passes, 2 * passes, 100) for _ in range(MIN_PROMPTS)]


def run_with_rising_divergence(policy: Policy) -> list[PromptResult]:
    """One divergent token in a hundred for each tenth of the threshold, and fewer passes."""
    steps = round(policy.accept_below * 10)
    return results(steps, 40 - 5 * steps)


def test_each_tier_gets_the_cheapest_policy_within_its_limit() -> None:
    chosen = calibrate(
        run_with_rising_divergence, config(limits={"balanced": 0.02, "turbo": 0.05}), COSTS, silent
    ).tiers
    assert chosen["premium"].policy.lossless
    assert chosen["balanced"].policy.accept_below == 0.1  # at 0.2 two in a hundred diverge: no room for the bound
    assert chosen["turbo"].policy.accept_below == 0.3


def test_testing_stops_at_the_first_failure() -> None:
    """A larger threshold that happens to look good again must not be taken."""

    def run(policy: Policy) -> list[PromptResult]:
        return results(50 if policy.accept_below == 0.2 else 0, 10)

    chosen = calibrate(run, config(), COSTS, silent)
    assert chosen.tiers["turbo"].policy.accept_below == 0.1
    assert len(chosen.trials) == 3
    assert chosen.trials[0].policy == PREMIUM


def test_a_trial_costs_what_its_steps_cost() -> None:
    """40 passes of two tokens at 3 seconds and 100 draft steps at 0.2, for 100 tokens, where a pass of one token takes
    2 seconds."""
    trial = calibrate(lambda policy: results(0, 40), config(), COSTS, silent).tiers["premium"]
    assert trial.cost == pytest.approx((40 * 3 + 100 * 0.2) / 100 / 2)


def test_limit_that_cannot_be_met_is_an_error() -> None:
    with pytest.raises(UserError, match="tier balanced: no threshold"):
        calibrate(lambda policy: results(50, 10), config(), COSTS, silent)


@pytest.mark.parametrize(("events", "expected"), [(0, 2.996), (1, 4.744), (10, 16.962)])
def test_poisson_bound(events: int, expected: float) -> None:
    """Against published one-sided 95 % limits."""
    assert poisson_upper(events, 0.95) == pytest.approx(expected, abs=2e-3)


def test_fewer_prompts_than_the_bound_needs_are_refused() -> None:
    with pytest.raises(UserError, match=r"p: 199 prompts are too few .*: give at least 200"):
        calibrate(lambda policy: results(0, 10)[1:], config(), COSTS, silent)
    with pytest.raises(UserError, match="20 prompts are too few"):
        check_num_prompts(20, config())
    check_num_prompts(200, config())
    check_num_prompts(1, config(limits={}))  # no tier whose divergence would be bounded


def coverage(num_prompts: int, runs: int) -> float:
    """Share of simulated calibrations whose bound holds.

    Prompts differ in how often they diverge, in 2 % of tokens on average.
    """
    rng = random.Random(3)
    covered = 0
    for seed in range(runs):
        rates = [rng.choice((0.0,) * 9 + (0.2,)) for _ in range(num_prompts)]
        counts = [(sum(rng.random() < rate for _ in range(20)), 20) for rate in rates]
        covered += upper_bound(counts, 0.95, num_draws=200, seed=seed) >= 0.02
    return covered / runs


def test_the_bound_is_asymptotic_and_says_so() -> None:
    """It holds less often than it says where prompts are few, which is why few are refused.

    (Python's own random numbers: the same anywhere.)
    """
    assert BOUND_KIND == "asymptotic"
    assert coverage(12, 200) < 0.85
    assert coverage(MIN_PROMPTS, 80) > 0.9
