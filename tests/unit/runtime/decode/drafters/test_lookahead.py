"""Lookahead's window, its n-grams and what it proposes, by hand; that its output is plain decoding's is in
test_round.py and test_model_free.py."""

from __future__ import annotations

import pytest

from ssv.bundle.policy import Policy
from ssv.runtime.decode.drafters.lookahead import Window
from ssv.runtime.decode.tree import ROOT, Tree
from ssv.runtime.engines.contract import EngineError
from ssv.runtime.methods import LOOKAHEAD
from ssv.support.errors import UserError


def tree_of(window: Window, root: int, *, limit: int = 64, max_depth: int = 50, ends: tuple[int, ...] = ()) -> Tree:
    return window.tree(root, limit, max_depth, ends)


def small() -> Window:
    """W 2, N 3, G 2, all first guesses 5."""
    return Window([5], 2, 2, 2)


def filled() -> Window:
    window = small()
    tree_of(window, 1)
    window.advance([10, 11, 12])
    tree_of(window, 10)
    window.advance([11, 20, 21, 22])
    return window


def test_the_window_fills_level_by_level() -> None:
    window = small()
    # The root and two guesses behind it, a chain.
    tree = tree_of(window, 1)
    assert (tree.tokens, tree.parents) == ([5, 5], [ROOT, 0])
    # Behind them the target chooses 10, which is text, 11 and 12.
    window.advance([10, 11, 12])
    # 10 is the root in place of the first guess. 11 was chosen behind that guess, which stood where 10 is: it follows
    # the root now.
    tree = tree_of(window, 10)
    assert (tree.tokens, tree.parents) == ([5, 11, 12], [ROOT, ROOT, 0])
    assert window.ngrams == {}


def test_columns_become_ngrams_and_the_oldest_level_goes() -> None:
    window = filled()
    assert window.ngrams == {10: [(11, 21)], 5: [(12, 22)]}
    assert window.levels == [[11, 12], [21, 22]]
    # 11 was right, and 21 behind it is the root.
    tree = tree_of(window, 21)
    assert (tree.tokens, tree.parents) == ([12, 21, 22], [ROOT, ROOT, 0])


def test_ngrams_of_the_last_token_are_drafted_and_share_nodes_with_the_window() -> None:
    window = filled()
    tree = tree_of(window, 5)
    # 12 22 is drafted; in the window 12 follows the root too, 22 follows 12, and 21 the root.
    assert (tree.tokens, tree.parents) == ([12, 22, 21], [ROOT, 0, ROOT])
    # What the target chooses behind a shared node goes on in the window.
    window.advance([12, 22, 30, 31])
    assert window.levels == [[21, 22], [31, 30]]
    assert window.ngrams == {10: [(11, 21)], 5: [(12, 22), (21, 31)], 12: [(22, 30)]}


def test_the_latest_ngrams_of_a_token_are_kept_and_drafted_first() -> None:
    window = small()
    for ngram in [(1, 1), (2, 2), (3, 3), (2, 2), (4, 4)]:
        window._keep(7, ngram)
    assert window.ngrams == {7: [(2, 2), (4, 4)]}
    assert tree_of(window, 7, limit=10).tokens == [4, 4, 2, 2, 5, 5]


def test_few_nodes_make_a_narrow_window() -> None:
    window = filled()
    tree = tree_of(window, 5, limit=3)
    # A column of two levels is one node beside the root; what is left has room for an n-gram.
    assert (tree.tokens, tree.parents) == ([12, 22, 21], [ROOT, 0, ROOT])
    window.advance([12, 22, 30, 31])
    # The second column was not run: it begins anew.
    assert window.levels == [[21, 22], [31, 5]]
    assert window.ngrams[5] == [(12, 22), (21, 31)] and 12 not in window.ngrams
    assert len(tree_of(filled(), 5, limit=2)) == 1
    window = filled()
    assert len(tree_of(window, 5, limit=1)) == 0
    window.advance([12])
    assert window.levels == [[5, 12], [21, 22]]


@pytest.mark.parametrize("limit", range(1, 65))
def test_there_are_never_more_nodes_than_asked_for(limit: int) -> None:
    window = Window(list(range(50)), 7, 4, 7)
    for step in range(30):
        tree = tree_of(window, step % 3, limit=limit)
        assert len(tree) <= limit
        window.advance([(3 * step + 7 * n) % 50 for n in range(len(tree) + 1)])


def test_nothing_follows_the_end() -> None:
    """Neither an end token nor the last place of the output."""
    window = filled()
    assert tree_of(window, 5, ends=(12,)).tokens == [12, 21]
    window.advance([12, 30, 31])
    assert window.levels == [[21, 22], [31, 5]]
    tree = tree_of(filled(), 5, max_depth=1)
    assert (tree.tokens, tree.parents) == ([12, 21], [ROOT, ROOT])


def test_ngrams_of_two_need_one_level() -> None:
    window = Window([5], 3, 1, 4)
    assert tree_of(window, 1).tokens == [5, 5]
    window.advance([10, 11, 12])
    assert window.ngrams == {1: [(10,)], 5: [(11,), (12,)]}
    tree = tree_of(window, 5)
    assert (tree.tokens, tree.parents) == ([12, 11, 12], [ROOT, ROOT, 1])


def test_logits_that_are_no_distribution_are_noticed() -> None:
    window = small()
    tree_of(window, 1)
    with pytest.raises(EngineError, match="not numbers"):
        window.advance([10, -1, 12])


def test_what_pays_is_no_question_for_it() -> None:
    with pytest.raises(UserError, match="lookahead cannot draft only what pays"):
        Policy(drafter="lookahead", accept_below=0, verify_above=1, risk_budget=1, max_pending=9, pays=True)


def test_published_numbers() -> None:
    """W 7, N 5, G 7: with the window full, its 27 tokens and 7 guesses of 4 beside the root."""
    window, num_levels, num_guesses = LOOKAHEAD.beam, LOOKAHEAD.max_depth, LOOKAHEAD.children_of(0)
    assert (window, num_levels, num_guesses) == (7, 4, 7)
    assert LOOKAHEAD.max_pending == 7 * 4 - 1 + 7 * 4
    assert LOOKAHEAD.lossless and not LOOKAHEAD.is_chain
