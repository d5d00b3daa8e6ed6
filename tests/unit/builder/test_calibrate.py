"""Choosing thresholds from what decoding came to."""

import pytest

from ssv.builder.calibrate import (
    BOUND_KIND,
    BOUND_METHOD,
    PromptResult,
    calibrate,
    check_num_prompts,
    prompts_needed,
)
from ssv.builder.config import CalibrationConfig
from ssv.bundle.policy import Policy
from ssv.bundle.profile import Costs, Curve
from ssv.runtime.methods import PREMIUM
from ssv.support.errors import UserError
from ssv.support.progress import silent


def config(**changes: object) -> CalibrationConfig:
    settings = {
        "prompts_file": "p",
        "families": [(0.5, 0.7, 4)],
        "max_tokens": 100,
        "accept_below": [0.3, 0.1, 0.2],
        **changes,
    }
    return CalibrationConfig.model_validate(settings)


COSTS = Costs(target=Curve(tokens=(1, 3), seconds=(2.0, 4.0)), draft=Curve(tokens=(1, 2), seconds=(0.2, 0.3)))


def results(divergent: int, passes: int, num_prompts: int = 400) -> list[PromptResult]:
    return [PromptResult(100, divergent, 0, passes, 2 * passes, 100) for _ in range(num_prompts)]


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


def test_a_tree_that_trusts_is_premiums_with_a_threshold() -> None:
    chosen = calibrate(run_with_rising_divergence, config(families=["tree"]), COSTS, silent)
    assert chosen.tiers["turbo"].policy == PREMIUM.model_copy(update={"accept_below": 0.3})
    assert [t.policy.children for t in chosen.trials] == [PREMIUM.children] * 4
    assert not chosen.tiers["turbo"].policy.lossless


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


def test_a_limit_that_is_not_shown_says_what_it_would_take() -> None:
    """Kept by the prompts there are, but too closely for their number."""
    with pytest.raises(
        UserError, match=r"tier balanced: .* measured is 0\.0150 on 300 prompts, .* takes about \d+ prompts"
    ):
        calibrate(lambda policy: results(1, 10, 150) + results(2, 10, 150), config(), COSTS, silent)


def test_fewer_prompts_than_the_tightest_limit_needs_are_refused() -> None:
    needed = prompts_needed(0.02, config())
    assert needed is not None
    with pytest.raises(UserError, match=rf"p: {needed - 1} prompts .* balanced .* 0\.02 .*: give at least {needed}, "):
        calibrate(lambda policy: results(0, 10, needed - 1), config(), COSTS, silent)
    with pytest.raises(UserError, match="20 prompts are too few"):
        check_num_prompts(20, config())
    check_num_prompts(needed, config())
    with pytest.raises(UserError, match="raise the limit: more than 1048576 would be needed"):
        check_num_prompts(10_000, config(limits={"turbo": 1e-7}))
    check_num_prompts(1, config(limits={}))  # no tier whose divergence would be bounded
    calibrate(lambda policy: results(0, 10, needed), config(), COSTS, silent)  # they suffice where nothing diverges


def test_more_families_and_more_confidence_need_more_prompts() -> None:
    families = [(0.5, 0.7, 4), (0.6, 0.7, 4)]
    needed = [
        prompts_needed(0.02, each)
        for each in (config(), config(families=families), config(families=families, confidence=0.99))
    ]
    assert None not in needed and needed[0] < needed[1] < needed[2]  # type: ignore[operator]
    assert prompts_needed(0.02, config(families=families)) == prompts_needed(0.02, config(confidence=0.975))


def test_the_bound_does_not_depend_on_how_the_file_is_sorted() -> None:
    """Not on its prompts' order by what they came to, that is: the order of the wager is drawn."""
    sorted_, mixed = results(0, 10, 300) + results(4, 10, 100), results(0, 10, 400)
    for i in range(0, 400, 4):
        mixed[i] = results(4, 10, 1)[0]
    found = [
        calibrate(lambda policy, r=r: r, config(), COSTS, silent).trials[1].divergence_bound for r in (sorted_, mixed)
    ]
    assert found[0] == pytest.approx(found[1], rel=0.1)
    assert min(found) > 0.01


def test_divergence_is_told_by_category() -> None:
    calibration = calibrate(
        lambda policy: results(1, 10, 200) + results(0, 10, 200),
        config(),
        COSTS,
        silent,
        ["code"] * 200 + ["math"] * 200,
    )
    assert calibration.tiers["turbo"].by_category == {"code": (200, 20_000, 200), "math": (200, 20_000, 0)}
    assert calibration.tiers["turbo"].to_dict()["by_category"]["code"] == (200, 20_000, 200)


def test_the_bound_says_what_it_is() -> None:
    assert BOUND_KIND == "finite-sample" and "betting" in BOUND_METHOD
