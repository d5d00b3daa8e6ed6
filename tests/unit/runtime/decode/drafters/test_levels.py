"""How deep trees are grown at once: by what levels brought, and by what rounds really gave."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ssv.bundle.profile import Costs, Curve
from ssv.runtime.decode.costs import Prices
from ssv.runtime.decode.drafters.levels import Levels
from ssv.runtime.decode.growth import likely_groups
from ssv.runtime.decode.pace import RETRY
from ssv.runtime.engines.contract import GAIN_SIZES, Grown, TreeShape


def prices(level: float, begin: float = 0.1, further: float = 0.01, num_rows: int = 1) -> Prices:
    """A pass of one token costs 1."""
    target = Curve(tokens=(1, 101), seconds=(1.0, 1.0 + 100 * further))
    costs = Costs(target=target, draft=Curve(tokens=(1, 2), seconds=(level, level)), begin=begin)
    return Prices(costs, num_rows)


def test_cheap_levels_are_many_and_dear_ones_few() -> None:
    assert Levels(8).worth(prices(0.001), 8, 4) == 8
    assert Levels(8).worth(prices(0.001), 3, 4) == 3
    # By hand: 1.8 / 1.47, 2.44 / 1.84, 2.95 / 2.21, 3.36 / 2.58 tokens a second.
    assert Levels(8).worth(prices(0.35), 8, 4) == 3
    assert Levels(8).worth(prices(1.0), 8, 4) == 0


def test_levels_follow_what_the_last_ones_brought() -> None:
    levels = Levels(8)
    assert levels.worth(prices(0.05), 8, 4) >= 6
    for _ in range(40):
        levels.note(6, [[(2, 0.3), (1, 0.05), (1, 0.01)]])
    assert levels.worth(prices(0.05), 8, 4) == 1
    for _ in range(60):  # deeper ones are taken to follow
        levels.note(1, [[(2, 0.9)]])
    assert levels.worth(prices(0.05), 8, 4) >= 5


def seconds(level: float, node: float, most: int = 8, most_nodes: int = 63) -> NDArray[np.float64]:
    """Of a round over trees, in passes of one token."""
    levels_L1, nodes_N = np.arange(1, most + 1)[:, None], np.array(GAIN_SIZES)
    return np.where((levels_L1 <= nodes_N) & (nodes_N <= most_nodes), 1 + level * levels_L1 + node * nodes_N, np.inf)


def test_trees_whose_further_nodes_bring_much_grow_wider_and_deeper() -> None:
    """Told by rounds that verify few of them."""
    levels = Levels(8)
    gains = np.cumsum(np.cumsum([[0.4, 0.3, 0.3, 0.3, 0.0, 0.0]] * 3, axis=1) * [[1.0], [0.6], [0.3]], axis=0)
    for _ in range(60):
        levels.note_gains(3, [gains.astype(np.float32)] * 2)
    chosen = levels.worth_nodes(1, seconds(0.05, 0.005), 1.0)
    assert chosen[1] == 15 and chosen[0] > 3
    assert levels.worth_nodes(1, seconds(0.05, 0.005, 2, 7), 1.0) == (2, 7)  # as much as there is room for
    assert levels.worth_nodes(1, seconds(0.05, 0.2), 1.0)[1] == 3
    assert levels.worth_nodes(1, seconds(5.0, 0.2), 1.0) == (0, 0)
    assert levels.worth_nodes(1, seconds(0.05, 0.005), 0.1) == (0, 0)  # plain decoding is ten times as fast
    assert levels.worth_nodes(1, seconds(0.05, 0.005, 16), 1.0) == chosen  # more levels than it knows of


def test_what_is_nearly_as_good_as_the_best_stays() -> None:
    levels, costs = Levels(8), seconds(0.05, 0.005)
    best = levels.worth_nodes(1, costs, 1.0)
    near, far = (best[0] + 1, 31), (1, 1)
    assert levels.worth_nodes(1, costs, 1.0, near) == near
    assert levels.worth_nodes(1, costs, 1.0, far) == best
    # There is no room for these now.
    assert [levels.worth_nodes(1, costs, 1.0, current) for current in ((9, 31), (4, 127), (4, 3))] == [best] * 3


def test_where_there_is_no_room_for_any_tree_there_is_plain_decoding() -> None:
    levels = Levels(8)
    for costs in (seconds(0.05, 0.005, most_nodes=0), seconds(0.05, 0.005, most=0)):
        assert {levels.worth_nodes(1, costs, 1.0) for _ in range(2 * RETRY)} == {(0, 0)}


def test_levels_that_were_not_seen_add_what_the_last_one_did_faded() -> None:
    levels = Levels(4)
    for _ in range(200):
        levels.note_gains(2, [np.array([[0.5] * 6, [0.75] * 6], dtype=np.float32)])
    # 0.2 and 0.16 more, of 1.75: 1.95 / 1.15 and 2.11 / 1.2.
    assert levels.worth_nodes(1, seconds(0.05, 0.0, most=4), 1.0)[0] == 4
    assert levels.worth_nodes(1, seconds(0.25, 0.0, most=4), 1.0)[0] == 1


def test_what_costs_say_does_not_pay_is_tried_again_now_and_then() -> None:
    levels = Levels(8)
    found = [levels.worth(prices(1.0), 8, 4) for _ in range(4 * RETRY)]
    assert [n for n, level in enumerate(found, start=1) if level] == [RETRY, 3 * RETRY]  # half as often each time
    assert set(found) == {0, 1}


def test_the_candidates_that_survive_most_probably_are_told_apart() -> None:
    shape = TreeShape(levels=2, beam=2, children=2)
    grown = Grown(
        tokens=np.array([5, 6, 7, 8, 9, 3], dtype=np.int32),
        parents=np.array([-1, -1, 0, 0, 1, 1], dtype=np.int32),
        shares=np.array([0.6, 0.3, 0.5, 0.4, 0.9, 0.01], dtype=np.float32),
        risks=np.array([0.4, 0.7, 0.5, 0.6, 0.1, 0.99], dtype=np.float32),
    )

    def numbers(ends: tuple[int, ...] = (), most: int = 6, max_depth: int = 9) -> list[list[tuple[int, list[int]]]]:
        found = likely_groups(grown, shape, ends, most, max_depth)
        return [[(parent, [number for number, _ in group]) for parent, group in level] for level in found]

    assert numbers() == [[(-1, [0, 1])], [(0, [2, 3]), (1, [4, 5])]]
    assert numbers(most=4) == [[(-1, [0, 1])], [(0, [2]), (1, [4])]]  # 0.3, 0.27; not 0.24
    assert numbers(most=1) == [[(-1, [0, 1])], []]
    assert numbers(ends=(5,)) == [[(-1, [0, 1])], [(1, [4, 5])]]
    assert numbers(max_depth=1) == [[(-1, [0, 1])]]
    (_, ((parent, ((number, guess), *_)), *_)) = likely_groups(grown, shape, (), 6, 9)
    assert (parent, number, guess.token) == (0, 2, 7)
    assert guess.share == pytest.approx(0.5) and guess.risk == pytest.approx(0.5)
