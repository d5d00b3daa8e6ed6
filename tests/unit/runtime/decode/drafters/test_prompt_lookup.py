"""What prompt lookup proposes, by hand; that its output is plain decoding's is in test_round.py."""

from __future__ import annotations

import pytest

from ssv.runtime.decode.drafters.prompt_lookup import continuation


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
def test_what_followed_before_is_proposed(tokens: list[int], count: int, expected: list[int]) -> None:
    assert continuation(tokens, count) == expected
