"""Fits how far a draft's shares are to be trusted (`ssv.bundle.survival`), by drafting trees and seeing what the target
chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssv.bundle.policy import verify_all
from ssv.bundle.survival import Survival, log_odds
from ssv.runtime.counters import Counters
from ssv.runtime.decode.drafters.model import ModelDrafter
from ssv.runtime.decode.round import DecodeBatch
from ssv.runtime.decode.row import Row
from ssv.runtime.decode.tree import ROOT
from ssv.runtime.request import SamplingParams

RANKS = 4
"""Guesses of a token that are told apart; further ones are taken as the last of these."""

PROBE = verify_all(
    24,
    children=(RANKS,),
    beam=RANKS,
    max_depth=6,
)
"""A tree that shows guesses of all ranks and depths."""

PROBED = 96
"""Prompts that are decoded for it, greedily and sampled."""

BINS = 8
RIDGE = 1.0
"""How many guesses' worth the correction is drawn to none: ranks that are hardly ever right must not run away."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A guess whose parent was right.

    Attributes:
        rank: which guess for its place it was, the first being 0.
        share: what the draft gave it.
        hit: whether the target chose it.
    """

    rank: int
    share: float
    hit: bool


@dataclass(frozen=True, slots=True)
class SurvivalFit:
    """How far the draft's shares are to be trusted, as it was fitted.

    Attributes:
        survival: the corrections.
        reliability: rows of what was said, what is said now and what came true, by sampling, rank and eighth.
    """

    survival: Survival
    reliability: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return {**self.survival.model_dump(mode="json"), "reliability": self.reliability}


def watch_guesses(
    batch: DecodeBatch, prompts: Sequence[Sequence[int]], params: SamplingParams, num_texts: int
) -> list[Seen]:
    """Decodes prompts with `PROBE`, one at a time, and notes what the target makes of each guess.

    Args:
        batch: over a target and a draft, with nothing corrected yet.
        num_texts: of how many prompts.
    """
    drafter = batch.drafters["model"]
    assert isinstance(drafter, ModelDrafter)
    seen: list[Seen] = []
    for index, prompt_ids in enumerate(prompts[:num_texts]):
        row = Row(replace(params, seed=index), PROBE, lambda _: False, Counters())
        batch.members.begin(prompt_ids, row)
        while (token := batch.members.prefill()) is None:
            pass
        row.counters.emitted = 1
        while row.rest >= 0 and token not in batch.eos_ids:
            batch.draft()
            tree = row.tree
            guesses = [drafter.guess_of(0, node) for node in range(len(tree))]
            (gained,) = batch.verify()
            row.counters.emitted += len(gained)
            parent: int | None = ROOT
            for token in gained:
                children = [node for node in range(len(tree)) if tree.parents[node] == parent]
                seen += [Seen(*guesses[node], tree.tokens[node] == token) for node in children]
                parent = None if parent is None else tree.child(parent, token)
        batch.members.remove(0, 0)
    return seen


def fit_survival(probe: Callable[[bool], Sequence[Seen]]) -> SurvivalFit:
    """Fits a logistic correction to each rank, greedy and sampled apart.

    Args:
        probe: decodes, greedily or sampled, and returns what it saw.

    Raises:
        ValueError: nothing was seen.
    """
    tables: dict[str, tuple[tuple[float, float], ...]] = {}
    seen = {name: probe(name == "greedy") for name in ("greedy", "sampled")}
    for name, guesses in seen.items():
        if not guesses:
            raise ValueError("no guess of the draft was judged: calibrate on longer prompts or outputs")
        tables[name] = tuple(_logistic([g for g in guesses if g.rank == rank]) for rank in range(RANKS))
    survival = Survival(**tables)
    return SurvivalFit(
        survival, [row for name, guesses in seen.items() for row in _reliability(name, guesses, survival)]
    )


def _logistic(guesses: Sequence[Seen]) -> tuple[float, float]:
    """Offset and slope of the likeliest correction of log odds, by Newton's method."""
    odds_G = np.array([log_odds(g.share) for g in guesses])
    hit_G = np.array([g.hit for g in guesses], dtype=float)
    x_G2: NDArray[np.float64] = np.stack((np.ones(len(guesses)), odds_G), axis=1).reshape(-1, 2)
    prior = np.array([0.0, 1.0])
    found = prior.copy()
    for _ in range(50):
        p_G = 1 / (1 + np.exp(-(x_G2 @ found)))
        gradient = x_G2.T @ (hit_G - p_G) - RIDGE * (found - prior)
        curvature = (x_G2 * (p_G * (1 - p_G))[:, None]).T @ x_G2 + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        found = found + np.clip(step, -1.0, 1.0)
        if np.abs(step).max() < 1e-9:
            break
    # A share that rises must not fall.
    return round(float(found[0]), 4), max(round(float(found[1]), 4), 0.05)


def _reliability(name: str, guesses: Sequence[Seen], survival: Survival) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for rank in range(RANKS):
        of_rank = sorted((g for g in guesses if g.rank == rank), key=lambda g: g.share)
        for part in np.array_split(np.arange(len(of_rank)), BINS):
            found = [of_rank[i] for i in part]
            if found:
                corrected = [survival.corrected(g.share, rank, greedy=name == "greedy") for g in found]
                rows.append(
                    {
                        "rows": name,
                        "rank": rank,
                        "guesses": len(found),
                        "said": round(float(np.mean([g.share for g in found])), 4),
                        "corrected": round(float(np.mean(corrected)), 4),
                        "chosen": round(float(np.mean([g.hit for g in found])), 4),
                    }
                )
    return rows
