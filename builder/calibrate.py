"""Finds the tiers' thresholds by decoding real prompts under a grid of policies.

The divergence of a run is the share of emitted tokens that the target, given the same prefix, would not have chosen. A
lossy tier gets the cheapest policy whose divergence is below its limit with confidence. Policies of one family are
tested in rising order of the threshold and only until the first fails, which keeps the chance of any wrong acceptance
at the stated level however many are tried (fixed-sequence testing, as in Learn then Test, Angelopoulos et al. 2021,
arXiv:2110.01052); it is shared out evenly among the families.

How to decode is the caller's: `run` is given a policy and returns what each prompt came to.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ssv.builder.config import CalibrationConfig
from ssv.builder.survival_fit import SurvivalFit
from ssv.bundle.policy import Policy
from ssv.bundle.profile import Costs
from ssv.runtime.methods import PREMIUM
from ssv.support.errors import UserError
from ssv.support.progress import Report

BOUND_KIND: Literal["asymptotic"] = "asymptotic"
"""What kind of bound `upper_bound` gives: one that holds ever better with more prompts.

In simulations at a limit of 2 %, a bound that is nominally wrong in 5 % of calibrations was wrong in 5 to 9 % with 224
prompts, in 14 % with 48 and in 37 % with 20.
"""

MIN_PROMPTS = 200
"""Fewer are refused: their bound does not mean what it says."""


def check_num_prompts(num_prompts: int, config: CalibrationConfig) -> None:
    """Refuses too few prompts.

    Raises:
        UserError: too few for the bound of a lossy tier to mean what it says.
    """
    if config.limits and num_prompts < MIN_PROMPTS:
        raise UserError(
            f"{config.prompts_file}: {num_prompts} prompts are too few to bound the divergence of "
            f"{' and '.join(config.limits)} (20 would be wrong in 37 % of cases that promise 5 %)",
            f"give at least {MIN_PROMPTS}",
        )


@dataclass(frozen=True, slots=True)
class PromptResult:
    """What decoding one prompt came to, in tokens.

    Attributes:
        divergent: emitted tokens that are not the target's argmax; `divergent_margin`: by more than 1 nat.
    """

    emitted: int
    divergent: int
    divergent_margin: int
    target_passes: int
    target_tokens: int
    drafted: int


@dataclass(frozen=True, slots=True)
class Trial:
    """A policy and what it came to over all prompts.

    Attributes:
        divergence, divergence_margin: shares of the emitted tokens.
        divergence_bound: upper confidence bound of `divergence`, prompts being the unit that is drawn.
        cost: of a token, in target passes of one token, at the costs measured and as if each drafted token took a draft
            step.
    """

    policy: Policy
    divergence: float
    divergence_margin: float
    divergence_bound: float
    target_passes_per_token: float
    target_tokens_per_token: float
    drafted_per_token: float
    cost: float

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "policy": self.policy.model_dump()}


@dataclass(frozen=True, slots=True)
class Calibration:
    """What calibrating found.

    Attributes:
        trials: all of them.
        tiers: the one chosen for each tier.
        costs: by which.
        survival: how far the draft's shares are to be trusted; None if that was not asked.
    """

    trials: list[Trial]
    tiers: dict[str, Trial]
    costs: Costs
    survival: SurvivalFit | None = None


def calibrate(
    run: Callable[[Policy], Sequence[PromptResult]], config: CalibrationConfig, costs: Costs, report: Report
) -> Calibration:
    """Tries the grid and chooses.

    Args:
        costs: of steps where the trials run: they decide which of the admissible policies is the cheapest, nothing
            else.

    Raises:
        UserError: a lossy tier's limit is not met even by the smallest threshold, or there are fewer than `MIN_PROMPTS`
            prompts.
    """
    families = [Policy(accept_below=0.0, verify_above=v, risk_budget=b, max_pending=k) for v, b, k in config.families]
    num_runs = 1 + len(families) * len(config.accept_below)
    trials: list[Trial] = []
    # The chance of a wrong choice is shared out among the families.
    confidence = 1 - (1 - config.confidence) / len(families)

    def tried(policy: Policy) -> Trial:
        results = run(policy)
        check_num_prompts(len(results), config)
        trial = _trial(policy, results, costs, confidence)
        trials.append(trial)
        report("calibrate", len(trials), num_runs, f"divergence {trial.divergence:.4f}, cost {trial.cost:.3f}")
        return trial

    premium = tried(PREMIUM)
    limits: dict[str, float] = dict(config.limits.items())
    passed: dict[str, list[Trial]] = {tier: [] for tier in limits}
    for family in families:
        open_tiers = set(limits)
        for threshold in sorted(config.accept_below):
            if not open_tiers:
                break
            trial = tried(family.model_copy(update={"accept_below": threshold}))
            open_tiers = {tier for tier in open_tiers if trial.divergence_bound <= limits[tier]}
            for tier in open_tiers:
                passed[tier].append(trial)
    report("calibrate", num_runs, num_runs, "done")
    tiers = {"premium": premium}
    for tier, candidates in passed.items():
        if not candidates:
            raise UserError(
                f"tier {tier}: no threshold keeps divergence below {limits[tier]} with confidence {config.confidence}",
                "add smaller thresholds or more prompts, or raise the limit",
            )
        tiers[tier] = min(candidates, key=lambda t: t.cost)
    return Calibration(trials, tiers, costs)


def _trial(policy: Policy, results: Sequence[PromptResult], costs: Costs, confidence: float) -> Trial:
    emitted = sum(r.emitted for r in results)
    passes = sum(r.target_passes for r in results)
    drafted = sum(r.drafted for r in results)
    seconds = passes * costs.target.at(
        sum(r.target_tokens for r in results) / max(passes, 1)
    ) + drafted * costs.draft.at(1)
    return Trial(
        policy=policy,
        divergence=sum(r.divergent for r in results) / emitted,
        divergence_margin=sum(r.divergent_margin for r in results) / emitted,
        divergence_bound=upper_bound([(r.divergent, r.emitted) for r in results], confidence),
        target_passes_per_token=passes / emitted,
        target_tokens_per_token=sum(r.target_tokens for r in results) / emitted,
        drafted_per_token=drafted / emitted,
        cost=seconds / costs.target.at(1) / emitted,
    )


def upper_bound(counts: Sequence[tuple[int, int]], confidence: float, num_draws: int = 4000, seed: int = 0) -> float:
    """Upper bound of sum(events) / sum(total) by the bootstrap over prompts.

    The tokens of a prompt are not independent of each other, prompts are. The bound is asymptotic (`BOUND_KIND`).
    With few events the bootstrap says too little (with none, 0), so the result is never below the exact bound for a
    Poisson count of independent events.

    Args:
        counts: (events, total) of each prompt.
    """
    rng = random.Random(seed)
    num_events, num_tokens = (sum(column) for column in zip(*counts, strict=True))
    shares = []
    for _ in range(num_draws):
        drawn = rng.choices(counts, k=len(counts))
        shares.append(sum(events for events, _ in drawn) / max(1, sum(total for _, total in drawn)))
    shares.sort()
    return max(
        shares[min(num_draws - 1, int(confidence * num_draws))], poisson_upper(num_events, confidence) / num_tokens
    )


def poisson_upper(num_events: int, confidence: float) -> float:
    """Returns the mean under which at most `num_events` have a chance of 1 - confidence: a quantile of the gamma
    distribution."""
    from scipy.special import gammaincinv  # type: ignore[import-untyped]  # other commands do without

    return float(gammaincinv(num_events + 1, confidence))
