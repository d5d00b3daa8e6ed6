"""Zones, passes and what is judged, on tables made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from ssv.builder.tiers import Policy
from ssv.plugins.reference import sparse_gather
from ssv.runtime.verify import asks_for_pass, judged_rows, judged_tensors


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


# --- what is judged, as tensors --------------------------------------------------------------------------------------

# Reject probabilities and drafted tokens of five rows: some trusted below 1/2, all, none, no drafted ones, and all but the last.
REJECT_PROB = [[0.1, 0.9, 0.1], [0.1, 0.2], [0.9, 0.9, 0.9], [], [0.1, 0.9]]
PENDING = [[3, 1, 4], [1, 5], [9, 2, 6], [], [5, 3]]


@pytest.mark.parametrize("width", [3, 4, 32])
def test_judged_tensors(width: int) -> None:
    judged = [judged_rows(row, 0.5) for row in REJECT_PROB]
    found = judged_tensors(judged, PENDING, width)
    columns = [[1, 3], [2], [0, 1, 2, 3], [0], [1, 2]]
    assert found.row_R.tolist() == [b * (width + 1) + j for b, mine in enumerate(columns) for j in mine]
    assert found.start_B1.tolist() == [0, 2, 3, 7, 8, 10]
    assert found.drafted_BK.shape == (5, width)
    for padded, tokens in zip(found.drafted_BK.tolist(), PENDING, strict=True):
        assert padded == tokens + [0] * (width - len(tokens))
    for tensor in (found.row_R, found.start_B1, found.drafted_BK):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()


@pytest.mark.parametrize("width", [0, 2])
def test_judged_tensors_without_a_draft(width: int) -> None:
    found = judged_tensors([[True], [True]], [[], []], width)
    assert found.row_R.tolist() == [0, width + 1]
    assert found.start_B1.tolist() == [0, 1, 2]
    assert found.drafted_BK.tolist() == [[0] * width] * 2 and found.drafted_BK.shape == (2, width)


def test_judged_tensors_are_those_that_the_op_finds() -> None:
    """An engine that gathers by zones judges what the decoding loop asks for."""
    judged = [judged_rows(row, 0.5) for row in REJECT_PROB]
    expected = judged_tensors(judged, PENDING, 3)
    zone_BT = torch.zeros(5, 4, dtype=torch.int32)
    for b, flags in enumerate(judged):
        zone_BT[b, : len(flags)] = torch.tensor(flags)
    length_B = torch.tensor([len(flags) for flags in judged], dtype=torch.int32)
    found = sparse_gather(torch.ones(5, 4, 2), zone_BT, length_B, torch.ones(2), 1e-5)
    assert torch.equal(found.start_B1, expected.start_B1)
    assert torch.equal(found.row_M[: len(expected.row_R)], expected.row_R)


def test_judged_tensors_move_together() -> None:
    found = judged_tensors([[True, True]], [[7]], 1).to(torch.device("meta"))
    for tensor in (found.row_R, found.start_B1, found.drafted_BK):
        assert tensor.device.type == "meta" and tensor.dtype == torch.int32
