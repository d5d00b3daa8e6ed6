"""Fits how far a draft's shares are to be trusted (`ssv.bundle.survival`), by drafting trees and seeing what the target
chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ssv.bundle.policy import Policy, verify_all
from ssv.bundle.survival import Reliability, Survival, log_odds
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

KINDS: tuple[Literal["greedy"], Literal["sampled"]] = ("greedy", "sampled")
"""Of rows: those that choose the likeliest token, and those that sample."""

BINS = 8
RIDGE = 1.0
"""How many guesses' worth the correction is drawn to none: ranks that are hardly ever right must not run away."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A guess whose parent was right.

    Attributes:
        rank: which guess for its place it was, the first being 0.
        depth: tokens from the text to it: 1 of what follows the text.
        share: what the draft gave it.
        hit: whether the target chose it.
    """

    rank: int
    depth: int
    share: float
    hit: bool


@dataclass(frozen=True, slots=True)
class SurvivalFit:
    """How far the draft's shares are to be trusted, as it was fitted.

    Attributes:
        survival: the corrections.
        reliability: rows of what was said, what is said now and what came true, by sampling, rank and eighth.
        reliability_by_depth: the same by sampling, rank and depth. Corrections know nothing of depths: this is where it
            would be seen if they had to.
    """

    survival: Survival
    reliability: list[dict[str, Any]]
    reliability_by_depth: list[Reliability]

    def to_dict(self) -> dict[str, Any]:
        """The corrections and the tables that they rest on, as JSON can hold them."""
        by_depth = [row.model_dump(mode="json") for row in self.reliability_by_depth]
        tables = {"reliability": self.reliability, "reliability_by_depth": by_depth}
        return {**self.survival.model_dump(mode="json"), **tables}


def watch_guesses(
    batch: DecodeBatch,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    num_texts: int,
    probe: Policy = PROBE,
) -> list[Seen]:
    """Decodes prompts, one at a time, and notes what the target makes of each guess.

    Args:
        batch: over a target and a draft, with nothing corrected yet.
        num_texts: of how many prompts.
        probe: the trees that are drafted.
    """
    drafter = batch.drafters["model"]
    assert isinstance(drafter, ModelDrafter)
    seen: list[Seen] = []
    for index, prompt_ids in enumerate(prompts[:num_texts]):
        row = Row(replace(params, seed=index), probe, lambda _: False, Counters())
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
    seen = {name: probe(name == "greedy") for name in KINDS}
    for name, guesses in seen.items():
        if not guesses:
            raise ValueError("no guess of the draft was judged: calibrate on longer prompts or outputs")
        tables[name] = tuple(_logistic([g for g in guesses if g.rank == rank]) for rank in range(RANKS))
    survival = Survival(**tables)
    return SurvivalFit(
        survival,
        [row for name, guesses in seen.items() for row in _reliability(name, guesses, survival)],
        [row for name, guesses in seen.items() for row in reliability_by_depth(name, guesses, survival)],
    )


def _logistic(guesses: Sequence[Seen]) -> tuple[float, float]:
    """Offset and slope of the likeliest correction of log odds."""
    odds_G = np.array([log_odds(g.share) for g in guesses])
    x_G2: NDArray[np.float64] = np.stack((np.ones(len(guesses)), odds_G), axis=1).reshape(-1, 2)
    found = logistic(x_G2, np.array([g.hit for g in guesses], dtype=float), np.array([0.0, 1.0]))
    # A share that rises must not fall.
    return round(float(found[0]), 4), max(round(float(found[1]), 4), 0.05)


def logistic(
    x_GP: NDArray[np.float64], hit_G: NDArray[np.float64], prior_P: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The P weights under which what was seen is likeliest, drawn to a prior by `RIDGE`, by Newton's method.

    Args:
        x_GP: what is known of each guess.
        hit_G: 1 of those that were right, else 0.
    """
    found = prior_P.copy()
    for _ in range(50):
        p_G = 1 / (1 + np.exp(-(x_GP @ found)))
        gradient = x_GP.T @ (hit_G - p_G) - RIDGE * (found - prior_P)
        curvature = (x_GP * (p_G * (1 - p_G))[:, None]).T @ x_GP + RIDGE * np.eye(len(prior_P))
        step = np.linalg.solve(curvature, gradient)
        found = found + np.clip(step, -1.0, 1.0)
        if np.abs(step).max() < 1e-9:
            break
    return found


def _reliability(name: str, guesses: Sequence[Seen], survival: Survival) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for rank in range(RANKS):
        of_rank = sorted((g for g in guesses if g.rank == rank), key=lambda g: g.share)
        for part in np.array_split(np.arange(len(of_rank)), BINS):
            if len(part):
                means = _means([of_rank[i] for i in part], survival, greedy=name == "greedy")
                rows.append({"rows": name, "rank": rank, **means})
    return rows


def reliability_by_depth(
    rows: Literal["greedy", "sampled"], guesses: Sequence[Seen], survival: Survival
) -> list[Reliability]:
    """What was said of guesses, what is said of them now and what came true, by rank and depth.

    Args:
        rows: what all the guesses are of.
    """
    found: dict[tuple[int, int], list[Seen]] = {}
    for guess in guesses:
        found.setdefault((guess.rank, guess.depth), []).append(guess)
    return [
        Reliability(rows=rows, rank=rank, depth=depth, **_means(of_place, survival, greedy=rows == "greedy"))
        for (rank, depth), of_place in sorted(found.items())
    ]


def _means(guesses: Sequence[Seen], survival: Survival, *, greedy: bool) -> dict[str, Any]:
    corrected = [survival.corrected(g.share, g.rank, greedy=greedy) for g in guesses]
    return {
        "guesses": len(guesses),
        "said": round(float(np.mean([g.share for g in guesses])), 4),
        "corrected": round(float(np.mean(corrected)), 4),
        "chosen": round(float(np.mean([g.hit for g in guesses])), 4),
    }
