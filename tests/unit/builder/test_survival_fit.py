"""What a draft's shares are worth, fitted to what was seen."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import product

import pytest

from fakes import EOS, FakeDraft, FakeTarget
from ssv.builder.survival_fit import PROBE, RANKS, Seen, fit_survival, reliability_by_depth, watch_guesses
from ssv.bundle.survival import Survival
from ssv.runtime.decode.round import DecodeBatch
from ssv.runtime.request import SamplingParams


def simulated(offset: float, slope: float, seed: int, count: int = 4000) -> list[Seen]:
    rng = random.Random(seed)
    seen = []
    for i in range(count):
        share = rng.uniform(0.02, 0.98)
        true = 1 / (1 + math.exp(-(offset + slope * math.log(share / (1 - share)))))
        seen.append(Seen(i % RANKS, 1 + i // RANKS % 3, share, rng.random() < true))
    return seen


def test_finds_what_the_shares_were_made_of() -> None:
    fitted = fit_survival(lambda greedy: simulated(0.8, 0.6, 1) if greedy else simulated(-0.5, 1.3, 2))
    for table, expected in ((fitted.survival.greedy, (0.8, 0.6)), (fitted.survival.sampled, (-0.5, 1.3))):
        assert len(table) == RANKS
        for found in table:
            assert found == pytest.approx(expected, abs=0.25)
    for row in fitted.reliability:
        assert row["corrected"] == pytest.approx(row["chosen"], abs=0.15)
    assert sum(row["guesses"] for row in fitted.reliability) == 8000
    assert sum(row.guesses for row in fitted.reliability_by_depth) == 8000
    assert {(row.rank, row.depth) for row in fitted.reliability_by_depth} == set(product(range(RANKS), (1, 2, 3)))


def test_a_depth_at_which_shares_are_wrong_is_seen_in_the_table() -> None:
    """All guesses are given even odds: of depth 1 three of four come true, of depth 2 one of four."""
    guesses = [Seen(0, depth, 0.5, (i % 4 > 0) == (depth == 1)) for depth in (1, 2) for i in range(400)]
    near, far = reliability_by_depth("greedy", guesses, Survival(greedy=((0.0, 1.0),)))
    assert (near.depth, near.guesses, near.said, near.corrected, near.chosen) == (1, 400, 0.5, 0.5, 0.75)
    assert (far.depth, far.guesses, far.said, far.corrected, far.chosen) == (2, 400, 0.5, 0.5, 0.25)


@pytest.mark.parametrize("hit", [True, False])
def test_a_rank_that_is_always_or_never_right_stays_finite(hit: bool) -> None:
    fitted = fit_survival(lambda greedy: [Seen(0, 1, 0.5 + 0.01 * i, hit) for i in range(20)])
    offset, slope = fitted.survival.greedy[0]
    assert math.isfinite(offset) and 0 < slope < 50
    assert fitted.survival.greedy[3] == (0.0, 1.0)  # of a rank that was never seen nothing is known


def test_nothing_seen_is_an_error() -> None:
    with pytest.raises(ValueError, match="no guess of the draft was judged"):
        fit_survival(lambda greedy: [])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_are_those_whose_parents_were_right(temperature: float) -> None:
    """Of a draft that has the target's logits the first guess is always right, and no other one."""
    target = FakeTarget(max_length=200, eos_bias=-2.0)
    draft = FakeDraft(target, conditioned=True, agreement=1.0)
    batch = DecodeBatch(target, draft, [EOS], 60)
    params = SamplingParams(temperature=temperature, max_tokens=30)
    seen = watch_guesses(batch, [(1, 2, 3), (4, 5), (6,)], params, 2)
    assert len(seen) > 60
    assert all(guess.hit == (guess.rank == 0) for guess in seen)
    assert {guess.rank for guess in seen} == set(range(RANKS))
    assert {guess.depth for guess in seen} == set(range(1, 1 + PROBE.max_depth))
    # No place is seen whose parent was not.
    by_depth = Counter(guess.depth for guess in seen if guess.rank == 0)
    assert all(by_depth[depth] >= by_depth[depth + 1] for depth in by_depth)
    assert draft.wrong_features == 0 and not batch.rows
