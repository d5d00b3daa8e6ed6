"""The definition of the ops, against formulas and loops.

Formulas are in fp64, loops in plain Python; what is emitted is compared with its distribution.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from chi_square import p_value
from torch import Tensor

from ssv.plugins import reference
from ssv.plugins.contract import FLOATS, MAX_HIDDEN, MAX_VOCAB, OpError, Score
from ssv.plugins.reference import choose, confidence, most_likely, random_words, score, sparse_gather

INT32 = torch.iinfo(torch.int32)
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
"""Relative, of a result that is given in such a dtype."""

FLOAT_FIELDS = ("prob_R", "entropy_R", "margin_R", "reject_prob_R")

any_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def ints(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# --- score ----------------------------------------------------------------------------------------------------------


def score_by_hand(hidden_RH: Tensor, logits_RV: Tensor, weight_F: Tensor, bias_1: Tensor) -> Score:
    """The formulas of `ssv.model.scorer` in fp64."""
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


# --- sparse_gather --------------------------------------------------------------------------------------------------


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
    gathered_RH, normed_RH = sparse_gather(hidden_MH, ints(rows), weight_H, 1e-2)
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
    gathered_RH, normed_RH = sparse_gather(hidden_MH, row_R, torch.ones(8), 1e-5)
    assert not gathered_RH[[0, 2, 3, 4]].any() and not normed_RH[[0, 2, 3, 4]].any()
    assert torch.equal(gathered_RH[[1, 5]], hidden_MH[[2, 3]])
    assert gathered_RH.dtype == dtype and normed_RH[[1, 5]].isfinite().all()


def test_gathering_from_no_rows_and_no_rows_of_some() -> None:
    gathered_RH, normed_RH = sparse_gather(torch.empty(0, 8), ints([0, -1, 3]), torch.ones(8).half(), 1e-5)
    assert torch.equal(gathered_RH, torch.zeros(3, 8)) and torch.equal(normed_RH, torch.zeros(3, 8).half())
    gathered_RH, normed_RH = sparse_gather(torch.ones(4, 8), ints([]), torch.ones(8).half(), 1e-5)
    assert gathered_RH.shape == normed_RH.shape == (0, 8)


# --- choose ---------------------------------------------------------------------------------------------------------


def philox_by_hand(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 in Python's numbers, which have any size."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_generator_is_the_published_one(counter: str, key: str, words: str) -> None:
    """Known answers of the authors' Random123."""
    given = [[int(word, 16) for word in text.split()] for text in (counter, key)]
    assert " ".join(f"{word:08x}" for word in philox_by_hand(*given)) == words


def test_random_words_are_those_of_their_counter_and_key() -> None:
    assert random_words(torch.arange(4), torch.tensor(0), torch.tensor(0)).tolist() == [
        0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8,
    ]  # fmt: skip
    rng = random.Random(0)
    for _ in range(50):
        token, position, seed = rng.randrange(2**18), rng.randrange(2**17), rng.randrange(-(2**63), 2**63)
        key = seed % 2**64
        expected = philox_by_hand([token // 4, position, 0, 0], [key % 2**32, key >> 32])[token % 4]
        assert int(random_words(*map(torch.tensor, (token, position, seed)))) == expected


def chosen_by_hand(x_V: Sequence[float], seed: int, position: int, token_V: Sequence[int]) -> int:
    scores = []
    for x, token in zip(x_V, token_V, strict=True):
        word = philox_by_hand([token // 4, position, 0, 0], [seed % 2**32, seed >> 32])[token % 4]
        scores.append(x - math.log(-math.log((word + 0.5) / 2**32)))
    return scores.index(max(scores))


@pytest.mark.parametrize("subset", [False, True])
def test_choice_is_the_largest_of_logit_and_noise(subset: bool) -> None:
    rng = random.Random(1)
    tokens = rng.sample(range(50_000), 23) if subset else list(range(23))
    x_RV = torch.tensor([[rng.gauss(0, 2) if rng.random() < 0.7 else -math.inf for _ in tokens] for _ in range(60)])
    seeds, positions = [rng.randrange(2**63) for _ in x_RV], [rng.randrange(4096) for _ in x_RV]
    found = choose(x_RV, torch.tensor(seeds), torch.tensor(positions), torch.tensor(tokens) if subset else None)
    assert found.dtype == torch.int32
    expected = [chosen_by_hand(*row, tokens) for row in zip(x_RV.tolist(), seeds, positions, strict=True)]
    assert found.tolist() == expected


def test_a_token_has_the_same_noise_in_every_vocabulary() -> None:
    """So a draft that knows some tokens chooses as the target does, if the target chooses one of them."""
    x_RV = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    seed_R, position_R, token_V = torch.arange(200), torch.arange(200) % 7, torch.arange(60, 0, -2)
    whole, part = choose(x_RV, seed_R, position_R), choose(x_RV[:, token_V].contiguous(), seed_R, position_R, token_V)
    known_R = torch.isin(whole, token_V)
    assert 50 < int(known_R.sum()) < 150
    assert torch.equal(token_V[part.long()][known_R], whole.long()[known_R])


def test_choices_of_a_seed_differ_by_position_and_those_of_a_position_by_seed() -> None:
    even_RV, number_R, zero_R = torch.zeros(400, 5000), torch.arange(400), torch.zeros(400).long()
    for seed_R, position_R in ((zero_R, number_R), (number_R, zero_R), (number_R << 32, zero_R)):
        assert len(set(choose(even_RV, seed_R, position_R).tolist())) > 370  # 385 are expected of 400 draws


@pytest.mark.parametrize("by", ["seed", "position"])
def test_choices_follow_their_weights(by: str) -> None:
    count, prob_V = 30_000, torch.tensor([1.0, 0.0, 5.0, 2.0]) / 8
    number_R, other_R = torch.arange(count), torch.full((count,), 11)
    at = (number_R, other_R) if by == "seed" else (other_R, number_R)
    chosen = choose(prob_V.log().repeat(count, 1), *at)
    assert p_value(torch.bincount(chosen, minlength=4).tolist(), prob_V.tolist()) > 1e-4


def test_choices_that_follow_one_another_are_independent() -> None:
    count, zero_RV = 30_000, torch.zeros(30_000, 3)
    first, second = (choose(zero_RV, torch.arange(count), torch.full((count,), position)) for position in (8, 9))
    assert p_value(torch.bincount(3 * first + second, minlength=9).tolist(), [1 / 9] * 9) > 1e-4


def test_what_is_no_distribution_chooses_nothing() -> None:
    """The rows beside it choose theirs."""
    inf, nan = torch.inf, torch.nan
    x_RV = torch.tensor([[-inf, -inf], [-inf, 0.0], [nan, 1.0], [inf, 0.0], [0.0, -inf], [-inf, nan]])
    assert choose(x_RV, torch.zeros(6).long(), torch.zeros(6).long()).tolist() == [-1, 1, -1, -1, 0, -1]


def test_choice_of_no_rows() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    assert choose(torch.empty(0, 5), nothing, nothing).shape == (0,)


def test_chi_square_itself() -> None:
    assert p_value([50, 50], [0.5, 0.5]) == 1.0
    assert abs(p_value([60, 40], [0.5, 0.5]) - 0.0455) < 1e-4
    assert p_value([99, 1], [1.0, 0.0]) == 0.0
    assert p_value([996, 4], [0.999, 0.001]) == 1.0


# --- what the ops do not take ---------------------------------------------------------------------------------------

# Six rows of states of 5 channels, four of which are judged; a vocabulary of 7.
ARGUMENTS: dict[str, dict[str, Tensor]] = {
    "score": {
        "hidden": torch.ones(4, 5),
        "logits": torch.ones(4, 7),
        "weight": torch.ones(8),
        "bias": torch.ones(1),
    },
    "sparse_gather": {"hidden": torch.ones(6, 5), "rows": ints([0, 2, 3, 4]), "weight": torch.ones(5)},
    "choose": {
        "logits": torch.ones(4, 7),
        "seeds": torch.zeros(4).long(),
        "positions": torch.zeros(4).long(),
        "tokens": torch.arange(7),
    },
}
EPS = {"sparse_gather": (1e-5,)}
# What the others' sizes and devices are compared with: one that differs is named there.
GIVES_ROWS = {
    ("score", "logits"),
    ("sparse_gather", "hidden"),
    ("sparse_gather", "rows"),
    ("choose", "logits"),
}
GIVES_DEVICE = {(op, name) for op, name in GIVES_ROWS if name != "rows"}
ONLY_FLOAT32 = {
    ("score", "weight"),
    ("score", "bias"),
    ("choose", "logits"),
}
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "an axis more": lambda x: x[None],
    "an axis less": lambda x: x[0],
    "a row more": lambda x: torch.cat((x, x[:1])),
    "a row less": lambda x: x[1:],
    "another width": lambda x: {torch.int32: x.long, torch.int64: x.int}.get(x.dtype, x.double)(),
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
        ("weight", "a row more", "shape (5,)", "shape (6,)"),
        ("hidden", "an axis more", "two axes", "shape (1, 6, 5)"),
        ("rows", "another width", "int32", "int64"),
        ("hidden", "another width", "float16 or bfloat16 or float32", "float64"),
        ("rows", "elsewhere", "a tensor on cpu", "one on meta"),
        ("rows", "strided", "a contiguous tensor", "strides (2,) for shape (4,)"),
    ],
)
def test_error_says_what_was_expected(name: str, how: str, expected: str, got: str) -> None:
    arguments = ARGUMENTS["sparse_gather"]
    error = refused("sparse_gather", arguments | {name: WRONG[how](arguments[name])})
    assert (error.expected, error.got) == (expected, got)


@pytest.mark.parametrize("columns", [0, MAX_VOCAB + 1])
@pytest.mark.parametrize(
    ("op", "name", "others"),
    [
        ("score", "logits", ()),
        ("choose", "logits", ("tokens",)),
    ],
)
def test_vocabulary_out_of_bounds(op: str, name: str, others: tuple[str, ...], columns: int) -> None:
    arguments = ARGUMENTS[op]
    sized = {n: arguments[n].new_zeros(*arguments[n].shape[:-1], columns) for n in (name, *others)}
    error = refused(op, arguments | sized)
    assert (error.name, error.expected, error.got) == (f"{op}: {name}", f"1 to {MAX_VOCAB} columns", str(columns))


@pytest.mark.parametrize("columns", [0, MAX_HIDDEN + 1])
@pytest.mark.parametrize("op", ["score", "sparse_gather"])
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
    with pytest.raises(OpError, match="sparse_gather: eps: expected a number above 0"):
        sparse_gather(torch.zeros(2, 4), torch.zeros(1, dtype=torch.int32), torch.ones(4), eps)
