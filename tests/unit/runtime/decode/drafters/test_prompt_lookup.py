"""What prompt lookup proposes, by hand; that its output is plain decoding's is in test_round.py and
test_model_free.py."""

from __future__ import annotations

import pytest

from ssv.runtime.decode.drafters.match_rates import PRIOR, PRIOR_WEIGHT
from ssv.runtime.decode.drafters.prompt_lookup import NgramText


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
    text = NgramText(0)
    for stop in range(piece, len(tokens) + piece, piece):
        text.extend(tokens[:stop])
    assert text.continuation(count)[0] == expected


def test_a_longer_match_is_surer() -> None:
    """Of what is found, how many tokens before it are the text's last ones too, beyond those that were looked up."""
    text = NgramText(100)
    text.extend([7, 1, 2, 3, 4, 9, 8, 5, 1, 2, 3, 4])
    assert text.continuation(10) == ([9, 8, 5, 1, 2, 3, 4], pytest.approx([PRIOR[i] for i in (3, 4, 5, 6, 7, 7, 7)]))


def test_rates_are_learnt_from_the_output_alone() -> None:
    given = [1, 2, 1, 2, 3, 1]
    text = NgramText(len(given))
    text.extend(given)
    assert [text.rates.rate(length) for length in (1, 2, 3)] == pytest.approx(PRIOR[:3])
    # Behind 1 stood 2: right. Behind 1 2 stood 1: wrong. Behind 1 2 3 stood 1: right.
    text.extend([*given, 2, 3, 1])
    for length, num_right in ((1, 1), (2, 0), (3, 1)):
        expected = (PRIOR[length - 1] * PRIOR_WEIGHT + num_right) / (PRIOR_WEIGHT + 1)
        assert text.rates.rate(length) == pytest.approx(expected)
