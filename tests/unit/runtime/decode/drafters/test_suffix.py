"""What suffix decoding proposes, by hand and counted plainly; that its output is plain decoding's is in test_round.py
and test_model_free.py."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from ssv.bundle.policy import Policy
from ssv.bundle.profile import Costs, Curve
from ssv.runtime.counters import Counters
from ssv.runtime.decode.costs import Prices
from ssv.runtime.decode.drafters.match_rates import PRIOR, PRIOR_WEIGHT
from ssv.runtime.decode.drafters.suffix import Suffix, SuffixText
from ssv.runtime.decode.row import Row
from ssv.runtime.decode.tree import ROOT, Tree
from ssv.runtime.methods import SUFFIX, with_options
from ssv.runtime.request import SamplingParams


def costs(passes: tuple[float, float], drafts: tuple[float, float]) -> Costs:
    """Seconds of steps of 1 and of 64 tokens."""
    return Costs(target=Curve(tokens=(1, 64), seconds=passes), draft=Curve(tokens=(1, 64), seconds=drafts))


LONGEST = SUFFIX.lengths_of_match[1]
FREE_PASSES = Prices(costs((1.0, 1.0001), (1.0, 1.0)), 1)
DEAR_PASSES = Prices(costs((1.0, 64.0), (1.0, 1.0)), 1)
END = 9


def proposed(
    tokens: Sequence[int], *, limit: int = 32, prices: Prices | None = None, num_given: int = 1, **policy: Any
) -> Tree:
    row = Row(SamplingParams(max_tokens=100), SUFFIX.model_copy(update=policy), lambda _: False, Counters(emitted=1))
    row.counters.prompt_tokens = num_given
    drafter = Suffix(frozenset([END]))
    drafter.join(0, row)
    row.tokens = list(tokens)
    drafter.propose([row], [limit], prices)
    return row.tree


@pytest.mark.parametrize(
    ("tokens", "expected", "parents"),
    [
        # As many nodes as the suffix has tokens.
        ([1, 2, 3, 7, 8, 0, 1, 2, 3], [7, 8, 0], [ROOT, 0, 1]),
        ([3, 7, 8, 0, 3], [7], [ROOT]),
        # 2 3 was followed by 7 twice and by 8 once: of its two nodes the likelier one goes on.
        ([2, 3, 7, 5, 2, 3, 8, 6, 2, 3, 7, 5, 4, 2, 3], [7, 5], [ROOT, 0]),
        # Of equal ones both are tried.
        ([2, 3, 7, 2, 3, 8, 2, 3], [7, 8], [ROOT, ROOT]),
        # 4 3 stood once and promises 2 * 1/2; 3 stood twice more, but promises less.
        ([3, 7, 5, 4, 3, 8, 6, 3, 7, 0, 4, 3], [8, 6], [ROOT, 0]),
        # Nothing follows the end of the output.
        ([1, 2, 3, 7, END, 5, 1, 2, 3], [7, END], [ROOT, 0]),
        ([1, 2, 3], [], []),
        ([1], [], []),
    ],
)
def test_what_followed_most_often_is_proposed(tokens: list[int], expected: list[int], parents: list[int]) -> None:
    tree = proposed(tokens)
    assert (tree.tokens, tree.parents) == (expected, parents)


def test_the_shape_is_the_policys() -> None:
    text = [1, 2, 3, 7, 7, 1, 2, 3, 8, 8, 1, 2, 3]
    assert proposed(text).parents == [ROOT, ROOT, 0]
    assert proposed(text, children=(1,)).tokens == [7, 7, 1]
    assert proposed(text, max_depth=1).tokens == [7, 8]
    assert proposed(text, limit=1).tokens == [7]
    assert proposed([*text[:8], 8, 5, 1, 2, 3, 4, 1, 2, 3], beam=1, children=(3,)).parents == [ROOT, ROOT, ROOT]


def test_paths_below_the_published_probability_are_not_proposed() -> None:
    """Each of nine that followed has one of ten occurrences; of ten, one of eleven."""
    text = [each for token in range(10, 20) for each in (1, 2, 3, token)]
    assert len(proposed([*text[:-4], 1, 2, 3])) == 3
    assert len(proposed([*text, 1, 2, 3])) == 0


def test_less_probable_paths_are_proposed_where_that_is_asked_for() -> None:
    text = [each for token in range(10, 20) for each in (1, 2, 3, token)]
    assert proposed([*text, 1, 2, 3], min_probability=0.09).tokens == [10, 11, 12]  # 1 in 11 each
    # Of four times 2 3 there is the text's end, 8 once and 7 twice, with 5 behind it.
    text = [2, 3, 7, 5, 2, 3, 8, 6, 2, 3, 7, 5, 4, 2, 3]
    for least, expected in ((0.0, [7, 5]), (0.5, [7, 5]), (0.51, [])):
        assert proposed(text, min_probability=least).tokens == expected


def test_the_longest_suffix_is_the_policys() -> None:
    """It gives as many nodes as it has tokens, and what stood before 2 3 does not count where 3 alone is looked up."""
    text = [1, 2, 3, 7, 8, 0, 1, 2, 3]
    assert [proposed(text, longest_match=n).tokens for n in (1, 2, 3, 4)] == [[7], [7, 8], [7, 8, 0], [7, 8, 0]]
    text = [6, 3, 8, 2, 3, 7, 6, 3, 8, 2, 3]
    assert [proposed(text, longest_match=n).tokens for n in (1, 2)] == [[8], [7, 6]]
    # 80 tokens that repeat: the longest that can be asked for gives the most that can be pending.
    text = [*range(100, 180)] * 2
    assert proposed(text, longest_match=64, limit=64).tokens == [*range(100, 164)]


def test_rows_side_by_side_have_options_of_their_own() -> None:
    tokens = [1, 2, 3, 7, 8, 0, 1, 2, 3]
    options: list[dict[str, Any]] = [{}, {"longest_match": 2}, {"min_probability": 0.6}]
    drafter, rows = Suffix(frozenset([END])), []
    for b, each in enumerate(options):
        row = Row(
            SamplingParams(max_tokens=50), with_options("suffix", SUFFIX, each), lambda _: False, Counters(emitted=1)
        )
        row.counters.prompt_tokens, row.tokens = 1, list(tokens)
        drafter.join(b, row)
        rows.append(row)
    drafter.propose(rows, [32, 32, 32])
    assert [row.tree.tokens for row in rows] == [[7, 8, 0], [7, 8], []]


def test_it_proposes_what_pays() -> None:
    text = [1, 2, 3, 7, 8, 0, 1, 2, 3]
    assert proposed(text, prices=FREE_PASSES).tokens == [7, 8, 0]
    assert len(proposed(text, prices=DEAR_PASSES)) == 0
    assert proposed(text, prices=DEAR_PASSES, pays=False).tokens == [7, 8, 0]
    # Passes of 1, 1.4, 1.8 give 1, 1.6, 1.6 + 0.6 * 0.7 tokens: most per second is 1.6 / 1.4.
    prices = Prices(costs((1.0, 1.0 + 63 * 0.4), (1.0, 1.0)), 1)
    assert proposed(text, prices=prices).tokens == [7]


def test_rows_that_share_a_pass_keep_the_likeliest_of_their_nodes() -> None:
    """The second row's text has repeated itself so far, and one of a third has its own policy."""
    texts = [[1, 2, 3, 7, 8, 0, 1, 2, 3], [*[4, 5, 6] * 5], [1, 2, 3, 7, 8, 0, 1, 2, 3]]
    drafter, rows = Suffix(frozenset([END])), []
    for b, tokens in enumerate(texts):
        policy = SUFFIX.model_copy(update={"pays": b < 2})
        row = Row(SamplingParams(max_tokens=50), policy, lambda _: False, Counters(emitted=1))
        row.counters.prompt_tokens, row.tokens = 1, list(tokens)
        drafter.join(b, row)
        rows.append(row)
    # Survival is 0.6, 0.42 and 0.315 in the first, 0.68, 0.52 and 0.41 in the second. Tokens of a pass of 6 + n, which
    # takes 1 + 0.16 * (5 + n): 4.335 / 1.8, 5.015 / 1.96, 5.615 / 2.12, 6.132 / 2.28, 6.552 / 2.44.
    drafter.propose(rows, [3, 3, 3], Prices(costs((1.0, 1.0 + 63 * 0.16), (1.0, 1.0)), 3))
    assert [row.tree.tokens for row in rows] == [[7], [4, 5], [7, 8, 0]]
    for row in rows:
        row.tree = Tree()
    drafter.propose(rows, [3, 3, 3], Prices(costs((1.0, 64.0), (1.0, 1.0)), 3))
    assert [len(row.tree) for row in rows] == [0, 0, 3]


def test_risks_are_what_was_learnt() -> None:
    tree = proposed([2, 3, 7, 5, 2, 3, 8, 6, 2, 3, 7, 5, 4, 2, 3], num_given=100, max_depth=1)
    # Of what followed, two in three.
    assert tree.tokens == [7, 8]
    assert [1 - risk for risk in tree.risks] == pytest.approx([PRIOR[1] * 2 / 3, PRIOR[1] / 3])


def test_rates_are_learnt_from_the_output_alone() -> None:
    given = [1, 2, 1, 2, 3, 1]
    text = SuffixText(len(given), LONGEST)
    text.extend(given)
    assert [text.rates.rate(length) for length in (1, 2, 3)] == pytest.approx(PRIOR[:3])
    # Behind 1 stood 2: right. Behind 1 2 stood 1 and 3: right. Behind 1 2 3 stood 1: right. Behind 1 2 3 1 stood 2:
    # wrong.
    text.extend([*given, 2, 3, 1, 1])
    for length, num_right in ((1, 1), (2, 1), (3, 1), (4, 0)):
        expected = (PRIOR[length - 1] * PRIOR_WEIGHT + num_right) / (PRIOR_WEIGHT + 1)
        assert text.rates.rate(length) == pytest.approx(expected)


def texts() -> list[list[int]]:
    rng = random.Random(1)
    found = [[rng.randrange(size) for _ in range(rng.randint(1, 90))] for size in (2, 3, 5) for _ in range(12)]
    return [*found, [4] * 150, [1, 2, 3] * 40, [1] * 70 + [2] + [1] * 70]


@pytest.mark.parametrize(("piece", "longest"), [(1, LONGEST), (3, LONGEST), (1000, LONGEST), (3, 5)])
def test_occurrences_are_those_counted_plainly(piece: int, longest: int) -> None:
    depth = 2 * longest
    for tokens in texts():
        text = SuffixText(0, longest)
        for stop in range(piece, len(tokens) + piece, piece):
            text.extend(tokens[:stop])
        strings = Counter(
            tuple(tokens[i:j]) for i in range(len(tokens)) for j in range(i + 1, min(i + depth, len(tokens)) + 1)
        )
        states = {(): 0}
        for string in sorted(strings, key=len):
            followers = {token: (occurrences, to) for occurrences, token, to in text.followers(states[string[:-1]], 1)}
            occurrences, states[string] = followers[string[-1]]
            assert occurrences == strings[string] == text.count(states[string])
        # The longest suffix of each number of occurrences.
        suffixes = [tuple(tokens[-length:]) for length in range(1, min(longest, len(tokens)) + 1)]
        expected = {strings[suffix]: (len(suffix), states[suffix]) for suffix in suffixes if strings[suffix] > 1}
        assert list(text.suffixes()) == [expected[occurrences] for occurrences in sorted(expected)]


def test_published_numbers() -> None:
    assert (SUFFIX.max_pending, SUFFIX.lengths_of_match, SUFFIX.least_probability) == (32, (1, 32), 0.1)
    assert isinstance(SUFFIX, Policy) and SUFFIX.lossless and SUFFIX.pays and not SUFFIX.is_chain
