"""The definition of the ops: against formulas in fp64, loops in plain Python, and the distribution of what is emitted."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from chi_square import p_value
from torch import Tensor

from ssv.plugins import reference
from ssv.plugins.contract import FLOATS, MAX_HIDDEN, MAX_VOCAB, OpError, Score, Verdicts
from ssv.plugins.reference import (
    CRITICAL,
    GRAY,
    TRUSTED,
    confidence,
    draw,
    gather_norm,
    greedy_verdicts,
    most_likely,
    score,
    sparse_gather,
    verify_greedy,
    verify_sampled,
)

INT32 = torch.iinfo(torch.int32)
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
"""Relative, of a result that is given in such a dtype."""

FLOAT_FIELDS = ("prob_R", "entropy_R", "margin_R", "reject_prob_R")

any_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def ints(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# --- score ----------------------------------------------------------------------------------------------------------


def score_by_hand(hidden_RH: Tensor, logits_RV: Tensor, weight_F: Tensor, bias_1: Tensor) -> Score:
    """The formulas of `ssv.builder.scorer` in fp64."""
    log_p_RV = logits_RV.double().log_softmax(dim=1)
    p_RV, vocab = log_p_RV.exp(), logits_RV.shape[1]
    top_R2 = log_p_RV.topk(min(2, vocab), dim=1).values
    margin_R = (top_R2[:, 0] - top_R2[:, -1]).clamp(max=1e4) if vocab > 1 else torch.full_like(top_R2[:, 0], 1e4)
    entropy_R = -(p_RV * log_p_RV.clamp(min=-1e300)).sum(dim=1)
    log_rest_R = (-torch.expm1(top_R2[:, 0])).clamp(min=1e-7).log()
    features = torch.stack((log_rest_R, entropy_R, margin_R), dim=1)
    if len(weight_F) > 3:
        hidden = hidden_RH.double()
        features = torch.cat((hidden / (hidden.square().mean(dim=1, keepdim=True) + 1e-6).sqrt(), features), dim=1)
    reject_prob_R = torch.sigmoid(features @ weight_F.double() + bias_1.double())
    token_R = ints([row.index(max(row)) for row in logits_RV.tolist()])
    return Score(token_R, top_R2[:, 0].exp(), entropy_R, margin_R, reject_prob_R)


def random_score(
    rows: int, vocab: int, hidden: int, uses_hidden: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of `score`: rows from nearly uniform to peaked, states of any scale."""
    generator = torch.Generator().manual_seed(rows * 1000 + vocab)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    spread_R1 = torch.logspace(-2, 1, rows)[:, None]
    hidden_RH, logits_RV = randn(rows, hidden) / spread_R1, randn(rows, vocab) * spread_R1 + 3
    return hidden_RH.to(dtype), logits_RV.to(dtype), randn(3 + hidden * uses_hidden) / 8, randn(1)


def assert_scores(found: Score, expected: Score) -> None:
    assert found.token_R.dtype == torch.int32 and found.token_R.tolist() == expected.token_R.tolist()
    for name in FLOAT_FIELDS:
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)


@any_dtype
@pytest.mark.parametrize("uses_hidden", [True, False])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 2), (9, 7), (5, 1000), (3, 50_000)])
def test_score_equals_its_formulas(rows: int, vocab: int, uses_hidden: bool, dtype: torch.dtype) -> None:
    arguments = random_score(rows, vocab, 33, uses_hidden, dtype)
    assert_scores(score(*arguments), score_by_hand(*arguments))


@any_dtype
def test_score_takes_the_first_of_equals(dtype: torch.dtype) -> None:
    logits_RV = torch.tensor([[1.0, 1, 1, 1], [0, 2, -1e4, 2], [-5, -6, -5, -5]]).to(dtype)
    found = score(torch.zeros(3, 2, dtype=dtype), logits_RV, torch.zeros(3), torch.zeros(1))
    assert found.token_R.tolist() == [0, 1, 0]
    assert found.margin_R.tolist() == [0.0, 0.0, 0.0]
    rare, even = torch.exp(torch.tensor([-2.0, -1.0])).tolist()
    torch.testing.assert_close(found.prob_R, torch.tensor([1 / 4, 1 / (2 + rare), 1 / (3 + even)]))


@pytest.mark.parametrize("uses_hidden", [True, False])
def test_tokens_of_minus_infinity_are_as_if_they_were_not_there(uses_hidden: bool) -> None:
    hidden_RH, logits_RV, weight_F, bias_1 = random_score(6, 20, 8, uses_hidden)
    expected = score(hidden_RH, logits_RV, weight_F, bias_1)
    at_V = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:20].sort().values
    wide_RV = torch.full((6, 50), -torch.inf)
    wide_RV[:, at_V] = logits_RV
    found = score(hidden_RH, wide_RV, weight_F, bias_1)
    assert found.token_R.tolist() == at_V[expected.token_R].tolist()
    assert_scores(found, score_by_hand(hidden_RH, wide_RV, weight_F, bias_1))
    for name in FLOAT_FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@any_dtype
@pytest.mark.parametrize("vocab", [1, 2, 9])
def test_a_row_with_one_token_is_sure_of_it(vocab: int, dtype: torch.dtype) -> None:
    """A vocabulary of one, or one logit above -inf: the second largest logit counts as 1e4 below."""
    logits_RV = torch.full((3, vocab), -torch.inf, dtype=dtype)
    logits_RV[:, vocab // 2] = torch.tensor([-7.0, 0.0, 500.0], dtype=dtype)
    for weight in torch.tensor([[0.1, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1e-4]]):
        found = score(torch.ones(3, 4, dtype=dtype), logits_RV, weight, torch.tensor([-0.25]))
        assert found.token_R.tolist() == [vocab // 2] * 3
        assert found.prob_R.tolist() == [1.0] * 3
        assert found.entropy_R.tolist() == [0.0] * 3
        assert found.margin_R.tolist() == [1e4] * 3
        features = torch.tensor([math.log(1e-7), 0.0, 1e4])
        torch.testing.assert_close(found.reject_prob_R, torch.sigmoid(features @ weight - 0.25).expand(3))


def test_margin_is_bounded() -> None:
    logits_RV = torch.tensor([[0.0, 9_999.0], [10_001.0, 0.0], [-1e30, 1e30], [-1e38, -torch.inf]])
    assert confidence(logits_RV)[2][:, 2].tolist() == [9_999.0, 1e4, 1e4, 1e4]


WITHOUT_DISTRIBUTION = {
    "all -inf": [-torch.inf] * 4,
    "nan": [1.0, torch.nan, 0.0, 2.0],
    "nan first": [torch.nan, 1.0, 0.0, 2.0],
    "nan last": [1.0, 0.0, 2.0, torch.nan],
    "all nan": [torch.nan] * 4,
    "inf": [0.0, 1.0, torch.inf, 2.0],
    "all inf": [torch.inf] * 4,
    "inf and -inf": [-torch.inf, torch.inf, 0.0, -torch.inf],
    "nan and -inf": [-torch.inf, -torch.inf, torch.nan, -torch.inf],
    "nan and inf": [torch.inf, torch.nan, 0.0, 0.0],
    "too large": [0.0, 1.0, 3e38, 2.0],
    "too far below": [-3e38, -3e38, -torch.inf, -2.5e38],
}


@any_dtype
@pytest.mark.parametrize("uses_hidden", [True, False])
@pytest.mark.parametrize("bad", WITHOUT_DISTRIBUTION.values(), ids=WITHOUT_DISTRIBUTION)
def test_a_row_without_a_distribution_is_nan(bad: list[float], uses_hidden: bool, dtype: torch.dtype) -> None:
    """All but its token, which lies in the vocabulary; the rows beside it are as they were."""
    hidden_RH, logits_RV, weight_F, bias_1 = random_score(3, 4, 5, uses_hidden, dtype)
    bad_RV = logits_RV.clone()
    bad_RV[1] = torch.tensor(bad)
    for weight in (weight_F, torch.zeros_like(weight_F)):  # no weight hides it
        found, expected = (score(hidden_RH, x, weight, bias_1) for x in (bad_RV, logits_RV))
        assert 0 <= int(found.token_R[1]) < 4
        assert found.token_R[[0, 2]].tolist() == expected.token_R[[0, 2]].tolist()
        for name in FLOAT_FIELDS:
            assert getattr(found, name).isnan().tolist() == [False, True, False]
            assert torch.equal(getattr(found, name)[[0, 2]], getattr(expected, name)[[0, 2]])


@pytest.mark.parametrize("largest", [1.9e38, -1.9e38])
def test_a_row_of_very_large_logits_has_a_distribution(largest: float) -> None:
    logits_RV = torch.tensor([[-3e38, largest, -3e38, largest]])
    token_R, prob_R, feature_R3 = confidence(logits_RV)
    assert (token_R.tolist(), prob_R.tolist()) == ([1], [0.5])
    torch.testing.assert_close(feature_R3, torch.tensor([[math.log(0.5), math.log(2), 0.0]]))


@pytest.mark.parametrize("others", [1, 5, 1000, 40_000])
@pytest.mark.parametrize("offset", [0.0, 700.0, -700.0])
def test_what_is_left_beside_a_peak_is_accurate(others: int, offset: float) -> None:
    """log(1 - p1), which 1 - p1 itself would lose: near 1 an fp32 has steps of 6e-8."""
    rest_R = torch.logspace(0, -6, 25, dtype=torch.float64) * 0.999
    # With p of the top 1 - rest, each of the others has rest / others.
    below_R = (rest_R / others / (1 - rest_R)).log()
    logits_RV = torch.zeros(25, others + 1, dtype=torch.float64) + below_R[:, None]
    logits_RV[:, others // 2] = 0.0
    logits_RV = (logits_RV + offset).float()
    wide_RV = logits_RV.double()
    exact_RV = (wide_RV - wide_RV.amax(dim=1, keepdim=True)).exp()
    exact_R = 1 - exact_RV.amax(dim=1) / exact_RV.sum(dim=1)
    found_R3 = confidence(logits_RV)[2]
    # An error of a logarithm is a relative one of its argument.
    assert (found_R3[:, 0].double() - exact_R.log()).abs().max() < 1e-5


def test_what_is_left_beside_a_peak_is_bounded() -> None:
    margins = [16.2, 18.0, 30.0, 88.0, 104.0, 9e3, 1e30]
    found_R3 = confidence(torch.tensor([[m, 0.0] for m in margins]))[2]
    torch.testing.assert_close(found_R3[:, 0], torch.tensor(1e-7).log().expand(7), rtol=1e-6, atol=0)
    assert found_R3[:, 1].isfinite().all() and (found_R3[:, 1] >= 0).all()


def test_scorer_over_confidence_alone_does_not_read_the_state() -> None:
    hidden_RH, logits_RV, weight_F, bias_1 = random_score(4, 9, 6, uses_hidden=False)
    found = score(torch.full_like(hidden_RH, torch.nan), logits_RV, weight_F, bias_1)
    assert torch.equal(found.reject_prob_R, score(hidden_RH, logits_RV, weight_F, bias_1).reject_prob_R)


def test_scorer_over_the_state_does_not_read_its_scale() -> None:
    hidden_RH, logits_RV, weight_F, bias_1 = random_score(4, 9, 6, uses_hidden=True)
    hidden_RH, state_weight_F = hidden_RH + 1, weight_F.clone()
    state_weight_F[-3:] = 0
    found, scaled, other = (
        score(x, logits_RV, state_weight_F, bias_1).reject_prob_R for x in (hidden_RH, hidden_RH * 1000, -hidden_RH)
    )
    torch.testing.assert_close(scaled, found, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(other, found, rtol=0.1)
    # A state of zeros has no direction, and no infinity either.
    nothing = score(torch.zeros_like(hidden_RH), logits_RV, state_weight_F, bias_1)
    torch.testing.assert_close(nothing.reject_prob_R, torch.sigmoid(bias_1).expand(4))


def test_score_of_no_rows() -> None:
    found = score(torch.empty(0, 4), torch.empty(0, 5), torch.zeros(7), torch.zeros(1))
    for name in Score.__slots__:
        assert getattr(found, name).shape == (0,)


@any_dtype
def test_most_likely_token_is_the_first_of_equals(dtype: torch.dtype) -> None:
    logits_RV = torch.tensor([[0.0, 2.0, 2.0], [-torch.inf, -torch.inf, -3.0], [5.0, 5.0, 5.0]]).to(dtype)
    assert most_likely(logits_RV).tolist() == [1, 2, 0]
    assert most_likely(logits_RV).dtype == torch.int32
    assert most_likely(logits_RV[:0]).shape == (0,)


# --- gather_norm ----------------------------------------------------------------------------------------------------


def normed_by_hand(x_RH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    wide = x_RH.double()
    return wide / (wide.square().mean(dim=1, keepdim=True) + eps).sqrt() * weight_H.double()


def random_states(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of scales from one to far below an epsilon of 1e-2."""
    generator = torch.Generator().manual_seed(sum(shape))
    scale = torch.tensor([1.0, 100.0, 0.01, 0.3])[torch.randint(0, 4, (*shape[:-1], 1), generator=generator)]
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
@any_dtype
def test_gathered_rows_are_normed(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    hidden_MH = random_states(12, 40, dtype=dtype)
    weight_H = (torch.rand(40, generator=torch.Generator().manual_seed(1)) + 0.5).to(weight_dtype)
    rows = [11, 0, 3, 3, 7, 1, 2, 4, 5, 6]
    gathered_RH, normed_RH = gather_norm(hidden_MH, ints(rows), weight_H, 1e-2)
    assert gathered_RH.dtype == dtype and torch.equal(gathered_RH, hidden_MH[rows])
    assert normed_RH.dtype == weight_dtype
    tolerance = ROUNDING[weight_dtype]
    torch.testing.assert_close(
        normed_RH.double(), normed_by_hand(hidden_MH[rows], weight_H, 1e-2), rtol=tolerance, atol=1e-7
    )


@any_dtype
def test_rows_that_are_not_there_give_zeros(dtype: torch.dtype) -> None:
    """Whatever the rows at either end hold."""
    hidden_MH = random_states(5, 8, dtype=dtype)
    hidden_MH[0], hidden_MH[4] = torch.nan, torch.inf
    row_R = ints([-1, 2, 5, INT32.min, INT32.max, 3])
    gathered_RH, normed_RH = gather_norm(hidden_MH, row_R, torch.ones(8), 1e-5)
    assert not gathered_RH[[0, 2, 3, 4]].any() and not normed_RH[[0, 2, 3, 4]].any()
    assert torch.equal(gathered_RH[[1, 5]], hidden_MH[[2, 3]])
    assert gathered_RH.dtype == dtype and normed_RH[[1, 5]].isfinite().all()


def test_gathering_from_no_rows_and_no_rows_of_some() -> None:
    gathered_RH, normed_RH = gather_norm(torch.empty(0, 8), ints([0, -1, 3]), torch.ones(8).half(), 1e-5)
    assert torch.equal(gathered_RH, torch.zeros(3, 8)) and torch.equal(normed_RH, torch.zeros(3, 8).half())
    gathered_RH, normed_RH = gather_norm(torch.ones(4, 8), ints([]), torch.ones(8).half(), 1e-5)
    assert gathered_RH.shape == normed_RH.shape == (0, 8)


# --- sparse_gather --------------------------------------------------------------------------------------------------


def judged_by_hand(zone: list[list[int]], length: list[int]) -> tuple[list[int], list[int]]:
    """Places of the judged rows, and where each sequence's begin."""
    places, starts = [], [0]
    for b, zones in enumerate(zone):
        for t in range(length[b]):
            if t == length[b] - 1 or zones[t] != TRUSTED:
                places.append(b * len(zones) + t)
        starts.append(len(places))
    return places, starts


def random_zones(batch: int, tokens: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.choice((TRUSTED, GRAY, CRITICAL)) for _ in range(tokens)] for _ in range(batch)]


STEPS = {
    "ragged": (random_zones(7, 6, 0), [6, 1, 0, 3, 5, 2, 6]),
    "all judged": ([[GRAY, CRITICAL, GRAY]] * 3, [3, 2, 3]),
    "none but the last": ([[TRUSTED] * 4] * 3, [4, 1, 2]),
    "padding that looks judged": ([[TRUSTED, TRUSTED, CRITICAL, GRAY]] * 2, [2, 1]),
    "a last row that looks trusted or not": ([[GRAY, zone] for zone in (TRUSTED, GRAY, CRITICAL)], [2, 2, 2]),
    "no rows": (random_zones(3, 4, 1), [0, 0, 0]),
    "no rows at either end": (random_zones(4, 4, 2), [0, 4, 3, 0]),
    "one token": ([[TRUSTED], [CRITICAL], [GRAY]], [1, 0, 1]),
    "one sequence": (random_zones(1, 33, 3), [29]),
    "no sequences": ([], []),
}


@pytest.mark.parametrize(("zone", "length"), STEPS.values(), ids=STEPS)
@any_dtype
def test_judged_rows_are_compacted_and_normed(zone: list[list[int]], length: list[int], dtype: torch.dtype) -> None:
    batch, tokens = len(zone), len(zone[0]) if zone else 5
    hidden_BTH = random_states(batch, tokens, 16, dtype=dtype)
    for b, stop in enumerate(length):
        hidden_BTH[b, stop:] = torch.nan  # padding
    weight_H = torch.rand(16, generator=torch.Generator().manual_seed(2)) + 0.5
    found = sparse_gather(hidden_BTH, ints(zone).view(batch, tokens), ints(length), weight_H, 1e-2)
    places, starts = judged_by_hand(zone, length)
    assert found.start_B1.dtype == found.row_M.dtype == torch.int32
    assert found.start_B1.tolist() == starts
    assert found.row_M.shape == (batch * tokens,) and found.row_M[: len(places)].tolist() == places
    assert found.normed_MH.shape == (batch * tokens, 16) and found.normed_MH.dtype == torch.float32
    normed_RH = normed_by_hand(hidden_BTH.flatten(0, 1)[places], weight_H, 1e-2)
    torch.testing.assert_close(found.normed_MH[: len(places)].double(), normed_RH, rtol=1e-5, atol=1e-7)


def test_judged_rows_come_in_the_dtype_of_the_norm() -> None:
    hidden_BTH = random_states(2, 3, 16)
    found = sparse_gather(hidden_BTH, ints([[GRAY] * 3] * 2), ints([3, 3]), torch.ones(16).bfloat16(), 1e-2)
    expected = normed_by_hand(hidden_BTH.flatten(0, 1), torch.ones(16), 1e-2)
    assert found.normed_MH.dtype == torch.bfloat16
    torch.testing.assert_close(found.normed_MH.double(), expected, rtol=ROUNDING[torch.bfloat16], atol=1e-7)


# --- greedy verdicts ------------------------------------------------------------------------------------------------

GREEDY_CASES = [
    # drafted, judged, target's tokens and the bonus -> kept, next token
    ([1, 2, 3], [1, 1, 1], [1, 2, 3, 4], (3, 4)),
    ([1, 2, 3], [1, 1, 1], [9, 2, 3, 4], (0, 9)),
    ([1, 2, 3], [1, 1, 1], [1, 2, 9, 4], (2, 9)),
    ([1, 2, 3], [1, 1, 1], [1, 9, 9, 4], (1, 9)),
    ([1, 2, 3], [0, 0, 0], [9, 9, 9, 4], (3, 4)),
    ([1, 2, 3], [0, 1, 0], [9, 2, 9, 4], (3, 4)),
    ([1, 2, 3], [0, 1, 0], [9, 8, 9, 4], (1, 8)),
    ([1, 2, 3], [1, 0, 0], [7, 2, 3, 4], (0, 7)),
]


def judged(flags: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """`row_R` and `start_B1` of the judged rows among B * J; a sequence's last one is its bonus row."""
    flags_BJ = torch.tensor(flags).bool()
    start_B1 = torch.nn.functional.pad(flags_BJ.sum(dim=1).cumsum(dim=0), (1, 0))
    return flags_BJ.flatten().nonzero()[:, 0].int(), start_B1.int()


def one_hot(tokens: Sequence[int], vocab: int = 10) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), vocab).float()


def decided(verdicts: Verdicts) -> list[tuple[int, int]]:
    assert verdicts.num_kept_B.dtype == verdicts.next_token_B.dtype == torch.int32
    return list(zip(verdicts.num_kept_B.tolist(), verdicts.next_token_B.tolist(), strict=True))


def both_greedy(target: Sequence[int], row_R: Tensor, start_B1: Tensor, drafted_BK: Tensor) -> list[tuple[int, int]]:
    """From logits and from tokens, which must be the same."""
    found = decided(greedy_verdicts(ints(target), row_R, start_B1, drafted_BK))
    for dtype in FLOATS:
        logits_RV = (one_hot(target) - 3).to(dtype)
        assert decided(verify_greedy(logits_RV, row_R, start_B1, drafted_BK)) == found
    return found


@pytest.mark.parametrize(("drafted", "flags", "target", "expected"), GREEDY_CASES)
def test_greedy_verdict(drafted: list[int], flags: list[int], target: list[int], expected: tuple[int, int]) -> None:
    gathered = [token for token, is_judged in zip(target, [*flags, 1], strict=True) if is_judged]
    assert both_greedy(gathered, *judged([[*flags, 1]]), ints([drafted])) == [expected]


def test_greedy_verdict_without_a_draft() -> None:
    assert both_greedy([3], *judged([[1]]), torch.zeros(1, 0).int()) == [(0, 3)]


def test_greedy_verdicts_side_by_side() -> None:
    """Rows of the target are packed: what one sequence judges shifts the rows of those after it."""
    flags = [[*case[1], 1] for case in GREEDY_CASES]
    gathered = [
        token
        for (_, _, target, _), mine in zip(GREEDY_CASES, flags, strict=True)
        for token, is_judged in zip(target, mine, strict=True)
        if is_judged
    ]
    found = both_greedy(gathered, *judged(flags), ints([case[0] for case in GREEDY_CASES]))
    assert found == [case[3] for case in GREEDY_CASES]


# Pending tokens: 2, 0, none at all, 1, 2.
RAGGED_FLAGS = [[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 0, 1]]
RAGGED_DRAFTED = [[1, 2], [0, 0], [7, 7], [4, 0], [5, 6]]
# Of row 0: token 2 and the bonus; of row 1: the bonus; of row 3: token 1 and the bonus; of row 4: token 1 and the bonus.
RAGGED_TARGET = [2, 3, 7, 8, 9, 5, 6]
RAGGED_VERDICTS = [(2, 3), (0, 7), (0, -1), (0, 8), (2, 6)]


def test_ragged_greedy_rows_read_their_own_target_rows() -> None:
    assert both_greedy(RAGGED_TARGET, *judged(RAGGED_FLAGS), ints(RAGGED_DRAFTED)) == RAGGED_VERDICTS


def test_greedy_verdict_takes_the_first_of_equals() -> None:
    logits_RV = torch.tensor([[0.0, 2.0, 2.0, -1.0], [5.0, -torch.inf, 5.0, 5.0]])
    assert decided(verify_greedy(logits_RV, *judged([[1, 1]]), ints([[1]]))) == [(1, 0)]
    assert decided(verify_greedy(logits_RV, *judged([[1, 1]]), ints([[2]]))) == [(0, 1)]


def test_verdicts_on_no_sequences() -> None:
    nothing = ints([]), ints([0]), torch.zeros(0, 2).int()
    assert decided(verify_greedy(torch.empty(0, 4), *nothing)) == []
    uniforms = torch.empty(0, 2), torch.empty(0)
    assert decided(verify_sampled(torch.empty(0, 4), torch.empty(0, 2, 4), *nothing, *uniforms)) == []


# --- sampled verdicts -----------------------------------------------------------------------------------------------

ALMOST_ONE = 1 - 2**-24


@pytest.mark.parametrize(("drafted", "flags", "target", "expected"), GREEDY_CASES)
@pytest.mark.parametrize("uniform", [0.0, 0.5, ALMOST_ONE])
def test_sampled_verdict_of_one_hot_rows_is_the_greedy_one(
    drafted: list[int], flags: list[int], target: list[int], expected: tuple[int, int], uniform: float
) -> None:
    flags = [*flags, 1]
    verdicts = verify_sampled(
        one_hot(target)[torch.tensor(flags).bool()],
        one_hot(drafted)[None],
        *judged([flags]),
        ints([drafted]),
        torch.full((1, 3), uniform),
        torch.tensor([uniform]),
    )
    assert decided(verdicts) == [expected]


def test_sampled_verdict_without_a_draft() -> None:
    """A pass over rows of which none has drafted: plain sampling from the bonus row."""
    p_RV = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    nothing_BK = torch.zeros(2, 0)
    verdicts = verify_sampled(
        p_RV, torch.zeros(2, 0, 2), *judged([[1], [1]]), nothing_BK.int(), nothing_BK, torch.tensor([0.3, 0.3])
    )
    assert decided(verdicts) == [(0, 1), (0, 0)]


def test_trusted_token_is_kept_where_the_target_gives_it_nothing() -> None:
    p_RV = torch.tensor([[0.0, 0.0, 1.0]])
    q_BKV = torch.tensor([[[1.0, 0.0, 0.0]]])
    uniforms = torch.tensor([[0.9]]), torch.tensor([0.5])
    assert decided(verify_sampled(p_RV, q_BKV, *judged([[0, 1]]), ints([[0]]), *uniforms)) == [(1, 2)]


def test_acceptance_has_the_ratio_as_its_border() -> None:
    p_RV = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).repeat(3, 1)
    q_BKV = torch.tensor([[[0.5, 0.5]]]).repeat(3, 1, 1)
    verdicts = verify_sampled(
        p_RV,
        q_BKV,
        *judged([[1, 1]] * 3),
        ints([[0]] * 3),
        torch.tensor([[0.0], [0.4375], [0.5]]),
        torch.tensor([0.75, 0.25, 0.75]),
    )
    assert decided(verdicts) == [(1, 1), (1, 0), (0, 1)]


def test_a_distribution_without_probability_gives_no_token() -> None:
    """That of a rejected token and that of the bonus; NaN counts as none."""
    good, nothing, nan = [0.0, 1.0], [0.0, 0.0], [torch.nan] * 2
    p_RV = torch.tensor([good, nothing, good, nan, nothing, good, nan, good, good, good])
    verdicts = verify_sampled(
        p_RV,
        torch.full((5, 1, 2), 0.5),
        *judged([[1, 1]] * 5),
        ints([[1]] * 5),
        torch.full((5, 1), 0.5),
        torch.full((5,), 0.5),
    )
    assert decided(verdicts) == [(1, -1), (1, -1), (0, -1), (0, -1), (1, 1)]


Rule = Callable[..., Verdicts]


def always_accept(*args: Tensor) -> Verdicts:
    *rest, accept_uniform_BK, next_uniform_B = args
    return verify_sampled(*rest, torch.full_like(accept_uniform_BK, -1.0), next_uniform_B)


def resample_from_target(*args: Tensor) -> Verdicts:
    target_prob_RV, _, _, start_B1, *_, next_uniform_B = args
    kept_B = verify_sampled(*args).num_kept_B
    return Verdicts(kept_B, draw(target_prob_RV[start_B1[:-1] + kept_B], next_uniform_B))


def inverted_ratio(*args: Tensor) -> Verdicts:
    target_prob_RV, draft_prob_BKV, _, _, drafted_BK, accept_uniform_BK, _ = args
    at_BK1 = drafted_BK.long()[:, :, None]
    p_BJV = target_prob_RV.view(len(drafted_BK), -1, target_prob_RV.shape[1])
    p_BK = p_BJV[:, :-1].gather(2, at_BK1)[:, :, 0]
    q_BK = draft_prob_BKV.gather(2, at_BK1)[:, :, 0]
    kept_B = (accept_uniform_BK * p_BK < q_BK).cumprod(dim=1).sum(dim=1)
    return Verdicts(kept_B.int(), verify_sampled(*args).next_token_B)


COUNT = 4_000  # enough to tell the broken rules; the test of the paper's rule is the closer one
# p of drafted tokens 1 and 2 and of the bonus, q of drafted tokens 1 and 2.
DISTRIBUTIONS = {
    "different": (
        [[0.5, 0.2, 0.1, 0.2], [0.1, 0.2, 0.3, 0.4], [0.25] * 4],
        [[0.1, 0.3, 0.4, 0.2], [0.4, 0.3, 0.2, 0.1]],
    ),
    "q_without_mass": (
        [[0.5, 0.2, 0.1, 0.2], [0.1, 0.2, 0.3, 0.4], [0.7, 0.3, 0, 0]],
        [[0.0, 0.5, 0.5, 0.0], [1.0, 0, 0, 0]],
    ),
    "p_without_mass": (
        [[0.5, 0.5, 0.0, 0.0], [0.0, 0.9, 0.0, 0.1], [0, 0, 0.5, 0.5]],
        [[0.25] * 4, [0.7, 0.1, 0.1, 0.1]],
    ),
    "p_one_hot": ([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [1.0, 0, 0, 0]], [[0.25] * 4, [0.1, 0.2, 0.3, 0.4]]),
    "equal": ([[0.5, 0.2, 0.1, 0.2], [0.1, 0.2, 0.3, 0.4], [0.25] * 4], [[0.5, 0.2, 0.1, 0.2], [0.1, 0.2, 0.3, 0.4]]),
    "disjoint": (
        [[0.5, 0.5, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0], [0.25] * 4],
        [[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 0.0, 0.5]],
    ),
}


def all_judged(count: int, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, q, rows and starts of so many sequences of two drafted tokens."""
    p_JV, q_KV = (torch.tensor(rows) for rows in DISTRIBUTIONS[name])
    return p_JV.repeat(count, 1), q_KV.repeat(count, 1, 1), *judged([[1, 1, 1]] * count)


def emitted_p_values(rule: Rule, name: str) -> list[float]:
    """Of the first token emitted, of the second where one was kept, and of the third where two were."""
    p_JV, q_KV = (torch.tensor(rows) for rows in DISTRIBUTIONS[name])
    generator = torch.Generator().manual_seed(7)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    drafted_BK = torch.stack([draw(q_V.repeat(COUNT, 1), uniform(COUNT)) for q_V in q_KV], dim=1)
    verdicts = rule(*all_judged(COUNT, name), drafted_BK, uniform(COUNT, 2), uniform(COUNT))
    kept_B, next_B1 = verdicts.num_kept_B.long(), verdicts.next_token_B[:, None]
    emitted_BJ = torch.cat((drafted_BK, next_B1), dim=1).scatter(1, kept_B[:, None], next_B1)
    results = []
    for j, p_V in enumerate(p_JV):
        counts_V = torch.bincount(emitted_BJ[kept_B >= j, j], minlength=4)
        results.append(p_value(counts_V.tolist(), p_V.tolist()))
    return results


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_emitted_tokens_have_the_target_distribution(name: str) -> None:
    assert min(emitted_p_values(verify_sampled, name)) > 1e-4


@pytest.mark.parametrize("broken", [always_accept, resample_from_target, inverted_ratio])
def test_broken_rule_is_caught(broken: Rule) -> None:
    assert min(emitted_p_values(broken, "different")) < 1e-4


GRID = 40


def judge_one(name: str, k: int, token: int, uniform: float) -> Verdicts:
    """On drafted token k, the one before it being trusted: many times, with a grid of uniform numbers for what takes its place."""
    p_JV, q_KV = (torch.tensor(rows) for rows in DISTRIBUTIONS[name])
    drafted_BK, accept_uniform_BK = torch.zeros(GRID, 2).int(), torch.zeros(GRID, 2)
    drafted_BK[:, k], accept_uniform_BK[:, k] = token, uniform
    return verify_sampled(
        p_JV[k:].repeat(GRID, 1),
        q_KV.repeat(GRID, 1, 1),
        *judged([[0] * k + [1] * (3 - k)] * GRID),
        drafted_BK,
        accept_uniform_BK,
        (torch.arange(GRID) + 0.5) / GRID,
    )


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_acceptance_and_correction_are_those_of_the_paper(name: str) -> None:
    """Closer than samples can tell: what q can draw is accepted below p / q and rejected above, and what takes its place has the
    distribution of the residual."""
    p_JV, q_KV = (torch.tensor(rows, dtype=torch.float64) for rows in DISTRIBUTIONS[name])
    for k, q_V in enumerate(q_KV):
        residual_V = (p_JV[k] - q_V).clamp(min=0)
        border_V = (residual_V / residual_V.sum()).cumsum(dim=0)
        corrections = torch.bucketize((torch.arange(GRID) + 0.5).double() / GRID, border_V, right=True).tolist()
        for token in q_V.nonzero()[:, 0].tolist():
            ratio = float(p_JV[k, token] / q_V[token])
            if ratio > 0:
                below = judge_one(name, k, token, min(ratio * (1 - 1e-4), ALMOST_ONE))
                assert (below.num_kept_B > k).all()
            if ratio < 1:
                above = judge_one(name, k, token, ratio * (1 + 1e-4))
                assert (above.num_kept_B == k).all()
                assert above.next_token_B.tolist() == corrections


@pytest.mark.parametrize("uniform", [0.0, 0.5, ALMOST_ONE])
def test_equal_distributions_reject_nothing(uniform: float) -> None:
    drafted_BK = ints([[token, token] for token in range(4)])
    verdicts = verify_sampled(*all_judged(4, "equal"), drafted_BK, torch.full((4, 2), uniform), torch.full((4,), 0.5))
    assert verdicts.num_kept_B.tolist() == [2] * 4


def test_rejected_by_rounding_alone_is_drawn_from_the_target() -> None:
    """What is uniform as a double may be 1 as a float: p = q is rejected then, and leaves no residual."""
    p_JV, q_KV = torch.tensor([[0.25, 0.75], [1.0, 0.0]]), torch.tensor([[0.25, 0.75]])
    verdicts = verify_sampled(
        p_JV.repeat(2, 1),
        q_KV.repeat(2, 1, 1),
        *judged([[1, 1]] * 2),
        ints([[1], [1]]),
        torch.ones(2, 1),
        torch.tensor([0.2, 0.3]),
    )
    assert decided(verdicts) == [(0, 0), (0, 1)]


def test_ragged_sampled_rows_read_their_own_target_rows() -> None:
    """Rows of the target are packed: what one sequence judges shifts the rows of those after it."""
    verdicts = verify_sampled(
        one_hot(RAGGED_TARGET),
        torch.stack([one_hot(tokens) for tokens in RAGGED_DRAFTED]),
        *judged(RAGGED_FLAGS),
        ints(RAGGED_DRAFTED),
        torch.full((5, 2), 0.5),
        torch.full((5,), 0.5),
    )
    assert decided(verdicts) == RAGGED_VERDICTS


def test_each_decision_reads_its_own_uniform_number() -> None:
    """p / q is 1/2 for all drafted tokens, and the residual and the bonus are even."""
    p_V, q_V = torch.tensor([0.4, 0.3, 0.3]), torch.tensor([0.8, 0.1, 0.1])
    verdicts = verify_sampled(
        p_V.repeat(12, 1),
        q_V.repeat(4, 2, 1),
        *judged([[1, 1, 1]] * 4),
        torch.zeros(4, 2).int(),
        torch.tensor([[0.1, 0.1], [0.9, 0.1], [0.1, 0.9], [0.9, 0.9]]),
        torch.tensor([0.1, 0.9, 0.1, 0.4]),
    )
    assert decided(verdicts) == [(2, 0), (0, 2), (1, 1), (0, 1)]


# --- draw -----------------------------------------------------------------------------------------------------------


def drawn_by_hand(prob_V: Sequence[float], uniform: float) -> int:
    """In integers of any size: u counts in steps of 2^-24, probabilities in steps of 2^-38."""
    sums = list(accumulate(int(p * 2**38) for p in prob_V))
    u = min(int(uniform * 2**24), 2**24 - 1)
    # The first sum with u / 2^24 * total < sum.
    return bisect_right([s << 24 for s in sums], u * sums[-1]) if sums[-1] else -1


def test_draw_by_inversion() -> None:
    prob_RV = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0]) / 4
    uniforms = [0.0, 0.2499, 0.25, 0.7499, 0.75, 0.999999, 1.0]
    assert draw(prob_RV.repeat(7, 1), torch.tensor(uniforms)).tolist() == [1, 1, 3, 3, 4, 4, 4]


@pytest.mark.parametrize("vocab", [1, 2, 17, 3000])
def test_draw_is_exact(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    prob_RV = (torch.randn(300, vocab, generator=generator) * 6).softmax(dim=1)
    prob_RV[::3] *= torch.rand(100, 1, generator=generator)  # as residuals are, which sum to less than 1
    uniform_R = torch.rand(300, generator=generator)
    # Borders: u at which a sum is met, one step below and one above.
    sums_RV = (prob_RV * 2.0**38).long().cumsum(dim=1)
    border_R = (sums_RV[:, vocab // 2] * 2**24 // sums_RV[:, -1]).clamp(max=2**24 - 2)
    for step in (-1, 0, 1):
        uniform_R[100 + step :: 3] = ((border_R + step).clamp(min=0) / 2.0**24)[100 + step :: 3].float()
    found = draw(prob_RV, uniform_R)
    assert found.dtype == torch.int32
    assert found.tolist() == list(map(drawn_by_hand, prob_RV.tolist(), uniform_R.tolist()))


def test_draw_from_a_long_even_row() -> None:
    """Sums that fp32 would round."""
    vocab = 2**17
    index_R = torch.arange(0, vocab, 8191)
    prob_RV = torch.full((1, vocab), 1 / vocab).expand(len(index_R), -1).contiguous()
    assert draw(prob_RV, index_R / vocab).tolist() == index_R.tolist()
    just_below_R = index_R[1:] / vocab - 2.0**-24
    assert draw(prob_RV[1:], just_below_R).tolist() == (index_R[1:] - 1).tolist()


def test_draw_never_gives_what_has_no_weight() -> None:
    generator = torch.Generator().manual_seed(3)
    prob_RV = torch.rand(4000, 50, generator=generator) ** 8
    prob_RV[torch.rand(4000, 50, generator=generator) < 0.6] = 0.0
    prob_RV[:, 17] += 1e-6
    prob_RV /= prob_RV.sum(dim=1, keepdim=True)
    for uniform in (0.0, 0.5, ALMOST_ONE, 1.0):
        index_R = draw(prob_RV, torch.full((4000,), uniform)).long()
        assert bool((prob_RV[torch.arange(4000), index_R] > 0).all())


@pytest.mark.parametrize("uniform", [ALMOST_ONE, 1.0])
def test_draw_next_to_one_gives_the_last_token_with_weight(uniform: float) -> None:
    """What is uniform as a double may be 1 as a float."""
    prob_RV = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.1, 0.0], [0.0, 0.0, 1e-7], [0.0, 2.0**-38, 0.0]])
    assert draw(prob_RV, torch.full((5,), uniform)).tolist() == [1, 0, 1, 2, 1]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0])
def test_draw_without_weight_gives_no_token(uniform: float) -> None:
    """Of what is NaN or too small to be counted, too; the rows beside it draw theirs."""
    prob_RV = torch.tensor([[0.0, 0.0], [0.0, 1.0], [torch.nan, torch.nan], [torch.nan, 0.3], [2.0**-39, 0.0]])
    assert draw(prob_RV, torch.full((5,), uniform)).tolist() == [-1, 1, -1, 1, -1]


def test_draw_of_no_rows() -> None:
    assert draw(torch.empty(0, 5), torch.empty(0)).shape == (0,)


def test_draw_follows_its_weights() -> None:
    count, prob_V = 30_000, torch.tensor([1.0, 0.0, 5.0, 2.0]) / 8
    drawn = draw(prob_V.repeat(count, 1), torch.rand(count, generator=torch.Generator().manual_seed(4)))
    assert p_value(torch.bincount(drawn, minlength=4).tolist(), prob_V.tolist()) > 1e-4


def test_chi_square_itself() -> None:
    assert p_value([50, 50], [0.5, 0.5]) == 1.0
    assert abs(p_value([60, 40], [0.5, 0.5]) - 0.0455) < 1e-4
    assert p_value([99, 1], [1.0, 0.0]) == 0.0
    assert p_value([996, 4], [0.999, 0.001]) == 1.0


# --- what the ops do not take ---------------------------------------------------------------------------------------

# Two sequences of up to two drafted tokens: four judged rows of the six, states of 5 channels, a vocabulary of 7.
JUDGED = {"rows": ints([0, 2, 3, 4]), "starts": ints([0, 2, 4]), "drafted": torch.zeros(2, 2).int()}
ARGUMENTS: dict[str, dict[str, Tensor]] = {
    "score": {
        "hidden": torch.ones(4, 5),
        "logits": torch.ones(4, 7),
        "weight": torch.ones(8),
        "bias": torch.ones(1),
    },
    "gather_norm": {"hidden": torch.ones(6, 5), "rows": ints([0, 2, 3, 4]), "weight": torch.ones(5)},
    "sparse_gather": {
        "hidden": torch.ones(2, 3, 5),
        "zones": torch.ones(2, 3).int(),
        "lengths": ints([3, 3]),
        "weight": torch.ones(5),
    },
    "verify_greedy": {"logits": torch.ones(4, 7), **JUDGED},
    "verify_sampled": {
        "target probabilities": torch.ones(4, 7) / 7,
        "draft probabilities": torch.ones(2, 2, 7) / 7,
        **JUDGED,
        "accept uniforms": torch.zeros(2, 2),
        "next uniforms": torch.zeros(2),
    },
    "draw": {"probabilities": torch.ones(4, 7) / 7, "uniforms": torch.zeros(4)},
}
EPS = {"gather_norm": (1e-5,), "sparse_gather": (1e-5,)}
# What the others' sizes and devices are compared with: one that differs is named there.
GIVES_ROWS = {
    ("score", "logits"),
    ("gather_norm", "hidden"),
    ("gather_norm", "rows"),
    ("sparse_gather", "hidden"),
    ("verify_greedy", "logits"),
    ("verify_greedy", "drafted"),
    ("verify_sampled", "target probabilities"),
    ("verify_sampled", "drafted"),
    ("draw", "probabilities"),
}
GIVES_DEVICE = {(op, name) for op, name in GIVES_ROWS if name not in ("rows", "drafted")}
ONLY_FLOAT32 = {
    ("score", "weight"),
    ("score", "bias"),
    *(("verify_sampled", name) for name, x in ARGUMENTS["verify_sampled"].items() if x.is_floating_point()),
    *(("draw", name) for name in ARGUMENTS["draw"]),
}
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "an axis more": lambda x: x[None],
    "an axis less": lambda x: x[0],
    "a row more": lambda x: torch.cat((x, x[:1])),
    "a row less": lambda x: x[1:],
    "wide": lambda x: x.double() if x.is_floating_point() else x.long(),
    "half": lambda x: x.half(),
    "integer or float": lambda x: x.int() if x.is_floating_point() else x.float(),
    "elsewhere": lambda x: x.to("meta"),
    "strided": lambda x: torch.stack((x, x), dim=-1)[..., 0],
}


def is_wrong(op: str, name: str, how: str) -> bool:
    key = op, name
    if how in ("a row more", "a row less"):
        return key not in GIVES_ROWS
    if how == "elsewhere":
        return key not in GIVES_DEVICE
    if how == "half":
        return key in ONLY_FLOAT32
    return how != "strided" or ARGUMENTS[op][name].numel() > 1


def refused(op: str, arguments: dict[str, Tensor]) -> OpError:
    with pytest.raises(OpError) as info:
        getattr(reference, op)(*arguments.values(), *EPS.get(op, ()))
    return info.value


@pytest.mark.parametrize(
    ("op", "name", "how"),
    [
        (op, name, how)
        for op, arguments in ARGUMENTS.items()
        for name in arguments
        for how in WRONG
        if is_wrong(op, name, how)
    ],
)
def test_wrong_argument_is_named(op: str, name: str, how: str) -> None:
    arguments = ARGUMENTS[op]
    error = refused(op, arguments | {name: WRONG[how](arguments[name])})
    assert isinstance(error, ValueError)
    assert error.name == f"{op}: {name}"
    assert error.expected and error.got and error.expected != error.got
    assert str(error) == f"{op}: {name}: expected {error.expected}, got {error.got}"


@pytest.mark.parametrize("op", ARGUMENTS)
def test_right_arguments_are_taken(op: str) -> None:
    """The test above would pass for nothing if they were not."""
    getattr(reference, op)(*ARGUMENTS[op].values(), *EPS.get(op, ()))


@pytest.mark.parametrize(
    ("name", "how", "expected", "got"),
    [
        ("starts", "a row more", "shape (3,)", "shape (4,)"),
        ("drafted", "an axis more", "two axes", "shape (1, 2, 2)"),
        ("rows", "wide", "int32", "int64"),
        ("logits", "wide", "float16 or bfloat16 or float32", "float64"),
        ("starts", "elsewhere", "a tensor on cpu", "one on meta"),
        ("logits", "strided", "a contiguous tensor", "strides (14, 2) for shape (4, 7)"),
    ],
)
def test_error_says_what_was_expected(name: str, how: str, expected: str, got: str) -> None:
    arguments = ARGUMENTS["verify_greedy"]
    error = refused("verify_greedy", arguments | {name: WRONG[how](arguments[name])})
    assert (error.expected, error.got) == (expected, got)


@pytest.mark.parametrize("columns", [0, MAX_VOCAB + 1])
@pytest.mark.parametrize(
    ("op", "name", "others"),
    [
        ("score", "logits", ()),
        ("verify_greedy", "logits", ()),
        ("verify_sampled", "target probabilities", ("draft probabilities",)),
        ("draw", "probabilities", ()),
    ],
)
def test_vocabulary_out_of_bounds(op: str, name: str, others: tuple[str, ...], columns: int) -> None:
    arguments = ARGUMENTS[op]
    sized = {n: torch.zeros(*arguments[n].shape[:-1], columns) for n in (name, *others)}
    error = refused(op, arguments | sized)
    assert (error.name, error.expected, error.got) == (f"{op}: {name}", f"1 to {MAX_VOCAB} columns", str(columns))


@pytest.mark.parametrize("columns", [0, MAX_HIDDEN + 1])
@pytest.mark.parametrize("op", ["score", "gather_norm", "sparse_gather"])
def test_hidden_size_out_of_bounds(op: str, columns: int) -> None:
    arguments = ARGUMENTS[op]
    sized = {
        "hidden": torch.zeros(*arguments["hidden"].shape[:-1], columns),
        "weight": torch.zeros(columns + 3 * (op == "score")),
    }
    error = refused(op, arguments | sized)
    assert (error.name, error.expected, error.got) == (f"{op}: hidden", f"1 to {MAX_HIDDEN} columns", str(columns))


@pytest.mark.parametrize("features", [0, 2, 4, 5, 7, 9])
def test_scorer_of_another_number_of_features(features: int) -> None:
    error = refused("score", ARGUMENTS["score"] | {"weight": torch.zeros(features)})
    assert (error.name, error.expected, error.got) == (
        "score: weight",
        "shape (3,) or (8,)",
        f"shape ({features},)",
    )


@pytest.mark.parametrize("eps", [0.0, -1e-5, float("nan")])
def test_eps_is_positive(eps: float) -> None:
    # A row of zeros, as unknown rows give, would be divided by nothing.
    with pytest.raises(OpError, match="gather_norm: eps: expected a number above 0"):
        gather_norm(torch.zeros(2, 4), torch.zeros(1, dtype=torch.int32), torch.ones(4), eps)
    with pytest.raises(OpError, match="sparse_gather: eps: expected a number above 0"):
        sparse_gather(torch.zeros(1, 2, 4), torch.zeros(1, 2).int(), torch.ones(1).int(), torch.ones(4), eps)
