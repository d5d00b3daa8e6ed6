"""Zones, passes and what is judged, on tables made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ssv.bundle.policy import Policy
from ssv.runtime.decode.verify import asks_for_pass, judged_rows, walk


def asks(reject_prob: Sequence[float], **settings: float) -> bool:
    numbers = {"accept_below": 0.0, "verify_above": 1.0, "risk_budget": 1.0, "max_pending": 9} | settings
    policy = Policy.model_validate(numbers)
    return asks_for_pass(reject_prob, policy, policy.max_pending)


# --- zones and passes -----------------------------------------------------------------------------------------------


def test_zones_have_open_borders() -> None:
    assert judged_rows([0.0, 0.125, 0.25, 0.5, 1.0], 0.25) == [False, False, True, True, True, True]


def test_nothing_is_trusted_below_zero() -> None:
    assert judged_rows([0.0, 0.0, 0.0], 0.0) == [True] * 4


def test_everything_is_trusted_below_one_but_a_certain_rejection() -> None:
    assert judged_rows([0.0, 0.999, 1.0], 1.0) == [False, False, True, True]


def test_critical_token_asks() -> None:
    assert asks([0.1, 0.6], verify_above=0.5)
    assert not asks([0.1, 0.5], verify_above=0.5)
    assert asks([0.6, 0.1], verify_above=0.5)


def test_trusted_token_never_asks() -> None:
    """Not by its own risk, nor by adding to the others'."""
    assert not asks([0.4], accept_below=0.5, verify_above=0.1)
    assert not asks([0.4, 0.4, 0.4], accept_below=0.5, risk_budget=0.1)
    assert asks([0.4, 0.6], accept_below=0.5, risk_budget=0.5)


def test_risk_adds_up() -> None:
    assert not asks([0.5, 0.5], risk_budget=0.75)
    assert asks([0.5, 0.5, 0.125], risk_budget=0.75)
    assert asks([0.01], risk_budget=0.0)
    assert not asks([0.0], risk_budget=0.0)
    assert not asks([1.0, 1.0], risk_budget=1.0)


def test_max_pending_asks() -> None:
    assert not asks([0.0, 0.0], max_pending=3)
    assert asks([0.0, 0.0, 0.0], max_pending=3)
    assert asks([], max_pending=0)
    assert asks([0.0], accept_below=1.0, max_pending=1)


def test_an_output_that_ends_before_asks_sooner() -> None:
    policy = Policy(accept_below=0.0, verify_above=1.0, risk_budget=1.0, max_pending=9)
    assert asks_for_pass([0.0, 0.0], policy, 2)
    assert not asks_for_pass([0.0, 0.0], policy, 3)


def test_the_bonus_row_is_always_judged() -> None:
    assert judged_rows([0.1, 0.1], 0.5) == [False, False, True]
    assert judged_rows([], 0.5) == judged_rows([], 0.0) == [True]


# --- the walk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pending", "judged", "choices", "expected"),
    [
        ([1, 2, 3], [1, 1, 1], [1, 2, 3, 4], (3, 4)),
        ([1, 2, 3], [1, 1, 1], [9, 2, 3, 4], (0, 9)),
        ([1, 2, 3], [1, 1, 1], [1, 2, 9, 4], (2, 9)),
        ([1, 2, 3], [1, 1, 1], [1, 9, 9, 4], (1, 9)),
        # Only judged rows have a choice of the target.
        ([1, 2, 3], [0, 0, 0], [4], (3, 4)),
        ([1, 2, 3], [0, 1, 0], [2, 4], (3, 4)),
        ([1, 2, 3], [0, 1, 0], [8, 4], (1, 8)),
        ([1, 2, 3], [1, 0, 0], [7, 4], (0, 7)),
        ([1, 2, 3], [0, 0, 1], [3, 4], (3, 4)),
        ([], [], [5], (0, 5)),
    ],
)
def test_walk(pending: list[int], judged: list[int], choices: list[int], expected: tuple[int, int]) -> None:
    verdict = walk(pending, [*map(bool, judged), True], choices)
    assert (verdict.num_kept, verdict.next_token) == expected
