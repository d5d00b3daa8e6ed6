"""Zones, passes and what is judged, on tables made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ssv.bundle.policy import Policy
from ssv.runtime.decode.tree import ROOT, Tree
from ssv.runtime.decode.verify import asks_for_pass, judged_rows, walk


def chain(tokens: Sequence[int], risks: Sequence[float] | None = None) -> Tree:
    tree = Tree()
    for token, risk in zip(tokens, risks or [0.0] * len(tokens), strict=True):
        tree.add(token, risk)
    return tree


def judged(risks: Sequence[float], accept_below: float) -> list[bool]:
    return judged_rows(chain([1] * len(risks), risks), accept_below)


def asks(reject_prob: Sequence[float], **settings: float) -> bool:
    numbers = {"accept_below": 0.0, "verify_above": 1.0, "risk_budget": 1.0, "max_pending": 9} | settings
    policy = Policy.model_validate(numbers)
    return asks_for_pass(reject_prob, policy, policy.max_pending)


# --- zones and passes -----------------------------------------------------------------------------------------------


def test_zones_have_open_borders() -> None:
    assert judged([0.0, 0.125, 0.25, 0.5, 1.0], 0.25) == [False, False, True, True, True, True]


def test_nothing_is_trusted_below_zero() -> None:
    assert judged([0.0, 0.0, 0.0], 0.0) == [True] * 4


def test_everything_is_trusted_below_one_but_a_certain_rejection() -> None:
    assert judged([0.0, 0.999, 1.0], 1.0) == [False, False, True, True]


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
    assert judged([0.1, 0.1], 0.5) == [False, False, True]
    assert judged([], 0.5) == judged([], 0.0) == [True]


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
    verdict = walk(chain(pending), [*map(bool, judged), True], choices)
    assert (len(verdict.path), verdict.next_token) == expected
    assert verdict.num_judged == sum(judged[: expected[0]])


#        root
#      5      6
#    7   8   7  9
#    1       2
TREE = ([5, 6, 7, 8, 7, 9, 1, 2], [ROOT, ROOT, 0, 0, 1, 1, 2, 4])


@pytest.mark.parametrize(
    ("choices", "path", "next_token"),
    [
        # The target's choice after the root, then after each of the nodes.
        ([4, 0, 0, 0, 0, 0, 0, 0, 0], [], 4),
        ([5, 4, 0, 0, 0, 0, 0, 0, 0], [0], 4),
        ([5, 8, 7, 0, 3, 0, 0, 0, 0], [0, 3], 3),
        ([5, 7, 0, 1, 0, 0, 0, 3, 0], [0, 2, 6], 3),
        ([6, 8, 7, 1, 0, 2, 0, 0, 3], [1, 4, 7], 3),
        ([6, 7, 9, 1, 0, 2, 3, 0, 0], [1, 5], 3),
        # A token that is a child of another node is none here.
        ([6, 7, 8, 0, 0, 0, 0, 0, 0], [1], 8),
        ([7, 0, 0, 0, 0, 0, 0, 0, 0], [], 7),
    ],
)
def test_walk_over_a_tree(choices: list[int], path: list[int], next_token: int) -> None:
    tree = Tree()
    for token, parent in zip(*TREE, strict=True):
        tree.add(token, 0.1, parent)
    verdict = walk(tree, judged_rows(tree, 0.0), choices)
    assert (list(verdict.path), verdict.next_token) == (path, next_token)
    assert verdict.num_judged == len(path)


def test_only_the_first_path_is_trusted() -> None:
    tree = Tree()
    for token, parent in zip(*TREE, strict=True):
        tree.add(token, 0.1, parent)
    assert tree.first_path == [0, 2, 6]
    judged_J = judged_rows(tree, 0.2)
    #                   root   0      1     2      3 ...
    assert judged_J == [False, False, True, False, True, True, True, True, True]
    verdict = walk(tree, judged_J, [4, 4, 4, 4, 3, 4])
    assert (verdict.path, verdict.num_judged, verdict.next_token) == ((0, 2, 6), 0, 3)
    # Where the first path is in doubt, its siblings count again.
    tree.risks[2] = 0.5
    judged_J = judged_rows(tree, 0.2)
    assert judged_J == [False, True, True, False, True, True, True, True, True]
    verdict = walk(tree, judged_J, [8, 4, 3, 4, 4, 4, 4])
    assert (verdict.path, verdict.num_judged, verdict.next_token) == ((0, 3), 1, 3)


def test_a_tree_knows_its_paths() -> None:
    tree = Tree()
    for token, parent in zip(*TREE, strict=True):
        tree.add(token, 0.1, parent)
    assert [tree.path(node) for node in (ROOT, 0, 6, 7)] == [[], [0], [0, 2, 6], [1, 4, 7]]
    assert tree.depths == [1, 1, 2, 2, 2, 2, 3, 3]
    assert (tree.child(ROOT, 6), tree.child(0, 7), tree.child(1, 7), tree.child(3, 7)) == (1, 2, 4, None)
    assert not tree.is_chain and chain([3, 4]).is_chain and Tree().is_chain
