"""What prompt lookup proposes, by hand; that its output is plain decoding's is in test_round.py and
test_model_free.py."""

from __future__ import annotations

from typing import Any

import pytest

from ssv.runtime.counters import Counters
from ssv.runtime.decode.drafters.match_rates import PRIOR, PRIOR_WEIGHT
from ssv.runtime.decode.drafters.prompt_lookup import NgramText, PromptLookup
from ssv.runtime.decode.row import Row
from ssv.runtime.decode.tree import Tree
from ssv.runtime.methods import PROMPT_LOOKUP, with_options
from ssv.runtime.request import SamplingParams

PUBLISHED = PROMPT_LOOKUP.lengths_of_match


@pytest.mark.parametrize(
    ("tokens", "count", "expected"),
    [
        ([1, 2, 3, 9, 8, 1, 2, 3], 10, [9, 8, 1, 2, 3]),
        ([1, 2, 3, 9, 8, 1, 2, 3], 2, [9, 8]),
        # Of the last token alone, where it stood first.
        ([5, 7, 6, 5, 8, 5], 10, [7, 6, 5, 8, 5]),
        # Two tokens count more than one that stood earlier, three more than two.
        ([4, 0, 3, 4, 1, 3, 4], 1, [1]),
        ([3, 4, 0, 2, 3, 4, 1, 2, 3, 4], 1, [1]),
        # Four are not looked for: of the three the earliest counts.
        ([2, 3, 4, 7, 1, 2, 3, 4, 8, 1, 2, 3, 4], 1, [7]),
        # What is found may run into what is looked for.
        ([4, 4, 4], 10, [4]),
        ([4, 4, 4, 4, 4], 10, [4, 4]),
        ([1, 2, 1, 2], 10, [1, 2]),
        ([1, 2, 3], 10, []),
        ([1], 10, []),
        ([], 10, []),
        ([1, 1], 0, []),
    ],
)
@pytest.mark.parametrize("piece", [1, 2, 100])
def test_what_followed_before_is_proposed(tokens: list[int], count: int, expected: list[int], piece: int) -> None:
    text = NgramText(0, *PUBLISHED)
    for stop in range(piece, len(tokens) + piece, piece):
        text.extend(tokens[:stop])
    assert text.continuation(count)[0] == expected


@pytest.mark.parametrize(
    ("tokens", "shortest", "longest", "expected"),
    [
        # 2 3 4 stood first before 7, but 1 2 3 4 before 8.
        ([2, 3, 4, 7, 1, 2, 3, 4, 8, 1, 2, 3, 4], 1, 3, [7, 1, 2, 3]),
        ([2, 3, 4, 7, 1, 2, 3, 4, 8, 1, 2, 3, 4], 1, 4, [8, 1, 2, 3]),
        ([2, 3, 4, 7, 1, 2, 3, 4, 8, 1, 2, 3, 4], 4, 16, [8, 1, 2, 3]),
        # Of one token the first, whatever stood before it.
        ([4, 0, 3, 4, 1, 3, 4], 1, 1, [0, 3, 4, 1]),
        # One token alone has stood before, which is too few.
        ([5, 7, 6, 5, 8, 5], 1, 2, [7, 6, 5, 8]),
        ([5, 7, 6, 5, 8, 5], 2, 2, []),
        ([5, 8, 6, 5, 8], 2, 2, [6, 5, 8]),
        ([5, 8, 6, 5, 8], 3, 3, []),
    ],
)
@pytest.mark.parametrize("piece", [1, 100])
def test_n_grams_have_the_lengths_that_were_asked_for(
    tokens: list[int], shortest: int, longest: int, expected: list[int], piece: int
) -> None:
    text = NgramText(0, shortest, longest)
    for stop in range(piece, len(tokens) + piece, piece):
        text.extend(tokens[:stop])
    assert text.continuation(4)[0] == expected


def make_row(tokens: list[int], **options: Any) -> Row:
    policy = with_options("prompt-lookup", PROMPT_LOOKUP, options)
    row = Row(SamplingParams(max_tokens=50), policy, lambda _: False, Counters(emitted=1))
    row.counters.prompt_tokens, row.tokens = 1, tokens
    return row


def test_rows_side_by_side_have_lengths_of_their_own() -> None:
    tokens = [2, 3, 4, 7, 1, 2, 3, 4, 8, 1, 2, 3, 4]
    options: list[dict[str, Any]] = [
        {},
        {"longest_match": 4, "max_pending": 2},
        {"shortest_match": 5, "longest_match": 6},
    ]
    expected = [[7, 1, 2, 3, 4, 8, 1, 2, 3, 4], [8, 1], []]
    drafter, rows = PromptLookup(frozenset()), [make_row(tokens, **each) for each in options]
    for b, row in enumerate(rows):
        drafter.join(b, row)
    drafter.propose(rows, [row.policy.max_pending for row in rows])
    assert [row.tree.tokens for row in rows] == expected
    # The last row takes the place of the first, which has ended.
    for row in rows:
        row.tree = Tree()
    drafter.move(2, 0, rows[2])
    drafter.propose([rows[2], rows[1]], [10, 2])
    assert [row.tree.tokens for row in rows] == [[], [8, 1], []]


def test_published_numbers() -> None:
    """Of the author's code: n-grams of three tokens at most, ten tokens proposed."""
    assert (PROMPT_LOOKUP.lengths_of_match, PROMPT_LOOKUP.max_pending) == ((1, 3), 10)


def test_a_longer_match_is_surer() -> None:
    """Of what is found, how many tokens before it are the text's last ones too, beyond those that were looked up."""
    text = NgramText(100, *PUBLISHED)
    text.extend([7, 1, 2, 3, 4, 9, 8, 5, 1, 2, 3, 4])
    assert text.continuation(10) == ([9, 8, 5, 1, 2, 3, 4], pytest.approx([PRIOR[i] for i in (3, 4, 5, 6, 7, 7, 7)]))


def test_rates_are_learnt_from_the_output_alone() -> None:
    given = [1, 2, 1, 2, 3, 1]
    text = NgramText(len(given), *PUBLISHED)
    text.extend(given)
    assert [text.rates.rate(length) for length in (1, 2, 3)] == pytest.approx(PRIOR[:3])
    # Behind 1 stood 2: right. Behind 1 2 stood 1: wrong. Behind 1 2 3 stood 1: right.
    text.extend([*given, 2, 3, 1])
    for length, num_right in ((1, 1), (2, 0), (3, 1)):
        expected = (PRIOR[length - 1] * PRIOR_WEIGHT + num_right) / (PRIOR_WEIGHT + 1)
        assert text.rates.rate(length) == pytest.approx(expected)
