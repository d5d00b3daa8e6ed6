"""Finds the tiers' thresholds by decoding real prompts under a grid of policies.

The divergence of a run is the share of emitted tokens that the target, given the same prefix, would not have chosen. A
lossy tier gets the cheapest policy that is shown to diverge less than its limit. Policies of one family are tested in
rising order of the threshold, from the safest on, and only until the first fails, which keeps the chance of any wrong
acceptance at the stated level however many are tried (fixed-sequence testing, as in Learn then Test, Angelopoulos et
al. 2021, arXiv:2110.01052); it is shared out evenly among the families.

Each test is a wager over the prompts (`ssv.support.intervals`), which holds for any number of them, however they
differ. Prompts weigh by the tokens that they emit, as divergence does wherever it is shown: the promise is of all
tokens that are emitted, not of the average prompt, of which a short answer with one divergent token would be a large
part.

How to decode is the caller's: `run` is given a policy and returns what each prompt came to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from ssv.builder.config import CalibrationConfig
from ssv.builder.survival_fit import SurvivalFit
from ssv.bundle.policy import Policy
from ssv.bundle.profile import Costs
from ssv.runtime.methods import PREMIUM
from ssv.support.errors import UserError
from ssv.support.intervals import MOST_UNITS, units_needed, upper_bound
from ssv.support.progress import Report

BOUND_KIND: Literal["finite-sample"] = "finite-sample"
BOUND_METHOD = "learn then test, each test by betting; prompts as units, weighed by their tokens"

_ORDER_SEED = 0


def check_num_prompts(num_prompts: int, config: CalibrationConfig) -> None:
    """Refuses prompts that are too few to show anything of the tightest limit.

    Raises:
        UserError: it could not be shown to be kept even if nothing diverged; with the number that it takes.
    """
    if not config.limits:
        return
    tier, limit = min(config.limits.items(), key=lambda item: item[1])
    needed = prompts_needed(limit, config)
    if needed is not None and num_prompts >= needed:
        return
    usual = prompts_needed(limit, config, divergence=limit / 2)
    raise UserError(
        f"{config.prompts_file}: {num_prompts} prompts are too few to show, with confidence {config.confidence:g}, "
        f"that {tier} diverges in at most {limit:.2g} of its tokens",
        f"raise the limit: more than {MOST_UNITS} would be needed"
        if needed is None or usual is None
        else f"give at least {needed}, which suffice if none diverges; where half of the limit does, it takes about "
        f"{usual}",
    )


def prompts_needed(limit: float, config: CalibrationConfig, *, divergence: float = 0.0) -> int | None:
    """How many prompts it takes to show a limit to be kept.

    Args:
        divergence: of prompts that all emit as many tokens as they may.

    Returns:
        None for more than `MOST_UNITS`.
    """
    most = config.max_tokens
    # As evenly as can be with whole tokens.
    events_N = np.diff(np.floor(np.arange(1001) * divergence * most + 1e-9).astype(np.int64))
    return units_needed(limit, most=most, alpha=_alpha(config), events_N=events_N)


def _alpha(config: CalibrationConfig) -> float:
    """The chance of a wrong choice that each family has."""
    return (1 - config.confidence) / len(config.families)


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
        divergence_bound: upper confidence bound of `divergence`.
        by_category: of the prompts' categories: prompts, emitted and divergent tokens.
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
    by_category: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The attributes by name, as JSON can hold them."""
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
    run: Callable[[Policy], Sequence[PromptResult]],
    config: CalibrationConfig,
    costs: Costs,
    report: Report,
    categories: Sequence[str] = (),
) -> Calibration:
    """Tries the grid and chooses.

    Args:
        categories: of the prompts, in their order, for a report by category; none for no such report.
        costs: of steps where the trials run: they decide which of the admissible policies is the cheapest, nothing
            else.

    Raises:
        UserError: a lossy tier's limit is not shown to be kept even by the smallest threshold, or there are too few
            prompts (`check_num_prompts`).
    """
    families = [PREMIUM if family == "tree" else _chain(*family) for family in config.families]
    num_runs = 1 + len(families) * len(config.accept_below)
    trials: list[Trial] = []
    safest: Sequence[PromptResult] = ()

    def tried(policy: Policy) -> tuple[Trial, Sequence[PromptResult]]:
        results = run(policy)
        check_num_prompts(len(results), config)
        trial = _trial(policy, results, costs, config, categories)
        trials.append(trial)
        report("calibrate", len(trials), num_runs, f"divergence {trial.divergence:.4f}, cost {trial.cost:.3f}")
        return trial, results

    premium, _ = tried(PREMIUM)
    limits: dict[str, float] = dict(config.limits.items())
    passed: dict[str, list[Trial]] = {tier: [] for tier in limits}
    for family in families:
        open_tiers = set(limits)
        for threshold in sorted(config.accept_below):
            if not open_tiers:
                break
            trial, results = tried(family.model_copy(update={"accept_below": threshold}))
            safest = min((each for each in (safest, results) if each), key=_divergence)
            open_tiers = {tier for tier in open_tiers if trial.divergence_bound <= limits[tier]}
            for tier in open_tiers:
                passed[tier].append(trial)
    report("calibrate", num_runs, num_runs, "done")
    tiers = {"premium": premium}
    for tier, candidates in passed.items():
        if not candidates:
            raise _nothing_shown(tier, limits[tier], config, safest)
        tiers[tier] = min(candidates, key=lambda t: t.cost)
    return Calibration(trials, tiers, costs)


def _chain(verify_above: float, risk_budget: float, max_pending: int) -> Policy:
    return Policy(accept_below=0.0, verify_above=verify_above, risk_budget=risk_budget, max_pending=max_pending)


def _nothing_shown(tier: str, limit: float, config: CalibrationConfig, safest: Sequence[PromptResult]) -> UserError:
    """What to say of a tier for which no policy is shown to keep its limit.

    Args:
        safest: what prompts came to under the policy that diverged least.
    """
    ordered = _ordered(safest)
    needed = units_needed(
        limit,
        most=config.max_tokens,
        alpha=_alpha(config),
        events_N=[r.divergent for r in ordered],
        parts_N=[r.emitted for r in ordered],
    )
    more = f"about {needed} prompts like these" if needed is not None else "more prompts than one has"
    return UserError(
        f"tier {tier}: no threshold is shown, with confidence {config.confidence:g}, to keep divergence below "
        f"{limit:g}; the least measured is {_divergence(safest):.4f} on {len(safest)} prompts, and to show that takes "
        f"{more}",
        "add prompts or smaller thresholds, or raise the limit",
    )


def _ordered(results: Sequence[PromptResult]) -> list[PromptResult]:
    """In an order that the file of prompts has no part in: bets go by the prompts before, and where these are sorted
    they would learn of one kind and be put on another."""
    return [results[i] for i in np.random.default_rng(_ORDER_SEED).permutation(len(results))]


def _divergence(results: Sequence[PromptResult]) -> float:
    return sum(r.divergent for r in results) / sum(r.emitted for r in results)


def _trial(
    policy: Policy, results: Sequence[PromptResult], costs: Costs, config: CalibrationConfig, categories: Sequence[str]
) -> Trial:
    emitted = sum(r.emitted for r in results)
    passes = sum(r.target_passes for r in results)
    drafted = sum(r.drafted for r in results)
    seconds = passes * costs.target.at(
        sum(r.target_tokens for r in results) / max(passes, 1)
    ) + drafted * costs.draft.at(1)
    ordered = _ordered(results)
    return Trial(
        policy=policy,
        divergence=_divergence(results),
        divergence_margin=sum(r.divergent_margin for r in results) / emitted,
        divergence_bound=upper_bound(
            [r.divergent for r in ordered], [r.emitted for r in ordered], most=config.max_tokens, alpha=_alpha(config)
        ),
        target_passes_per_token=passes / emitted,
        target_tokens_per_token=sum(r.target_tokens for r in results) / emitted,
        drafted_per_token=drafted / emitted,
        cost=seconds / costs.target.at(1) / emitted,
        by_category=_by_category(results, categories),
    )


def _by_category(results: Sequence[PromptResult], categories: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    found: dict[str, list[PromptResult]] = {}
    for category, result in zip(categories, results, strict=bool(categories)):
        found.setdefault(category, []).append(result)
    return {
        category: (len(each), sum(r.emitted for r in each), sum(r.divergent for r in each))
        for category, each in sorted(found.items())
    }
