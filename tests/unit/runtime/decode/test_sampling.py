"""Temperature, top-k and top-p against their definitions in plain Python; and the compiled choice against the one that
defines it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssv.plugins import reference
from ssv.runtime.decode import sampling
from ssv.runtime.decode.sampling import FIRST_SELECTED, Sampling, choose, filtered, ranked


def settings(rows: Sequence[tuple[float, int, float]], seed: int = 0, position: int = 0) -> Sampling:
    """(temperature, top_k, top_p) of each row."""
    temperature, top_k, top_p = zip(*rows, strict=True)
    seed_R, position_R = torch.full((len(rows),), seed), torch.full((len(rows),), position)
    return Sampling(torch.tensor(temperature), torch.tensor(top_k), torch.tensor(top_p), seed_R, position_R)


def probabilities(logits_RV: Tensor, of: Sampling) -> Tensor:
    return filtered(logits_RV, of).softmax(dim=1)


def one(logits: Sequence[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> list[float]:
    return probabilities(torch.tensor([logits]), settings([(temperature, top_k, top_p)]))[0].tolist()


def slow_probabilities(logits: Sequence[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if temperature == 0:
        return [1.0 if i == order[0] else 0.0 for i in range(len(logits))]
    kept = order[:top_k] if top_k else order
    weight = {i: math.exp((logits[i] - logits[order[0]]) / temperature) for i in kept}
    total, nucleus, before = sum(weight.values()), [], 0.0
    for i in kept:
        if nucleus and before >= top_p:
            break
        nucleus.append(i)
        before += weight[i] / total
    mass = sum(weight[i] for i in nucleus)
    return [weight[i] / mass if i in nucleus else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("vocab", [1, 2, 5, 99])
def test_equals_the_definition(vocab: int) -> None:
    rng = random.Random(vocab)
    rows, logits = [], []
    for _ in range(60):
        rows.append(
            (
                rng.choice([0.0, 0.3, 1.0, 2.5]),
                rng.choice([0, 0, 1, 2, 7, 1000]),
                rng.choice([1.0, 0.05, 0.5, 0.77, 0.95]),
            )
        )
        logits.append([rng.gauss(0, 3) for _ in range(vocab)])
    found = probabilities(torch.tensor(logits), settings(rows))
    expected = torch.tensor([slow_probabilities(x, *row) for x, row in zip(logits, rows, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    # Without top-p the least likely tokens have less mass than fp32 tells from none.
    exact_R = torch.tensor([top_p < 1 for _, _, top_p in rows])
    assert torch.equal((found > 0)[exact_R], (expected > 0)[exact_R])


@pytest.mark.parametrize("levels", [3, 40, 10_000])
def test_equals_the_definition_where_more_is_kept_than_selected_at_first(levels: int) -> None:
    """Few levels make many equals, at the edge of the selection too."""
    rng, vocab = random.Random(levels), 5000
    rows = [
        *[(1.0, top_k, 1.0) for top_k in (FIRST_SELECTED - 1, FIRST_SELECTED, FIRST_SELECTED + 1, 4999, 5000)],
        *[(2.0, 0, top_p) for top_p in (0.02, 0.3, 0.77, 0.9999)],
        *[(1.3, 0, 1.0), (0.0, 3, 0.9), (1.0, 2000, 0.61), (1.0, 40, 0.5), (0.3, 4000, 0.999)],
    ]
    logits = [[rng.randrange(levels) * 8 / levels for _ in range(vocab)] for _ in rows]
    found = probabilities(torch.tensor(logits), settings(rows))
    expected = torch.tensor([slow_probabilities(x, *row) for x, row in zip(logits, rows, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)
    assert torch.equal(found > 0, expected > 0)


def test_at_the_edge_the_lower_of_equal_tokens_is_kept() -> None:
    logits = torch.zeros(1, 3000)
    logits[0, 2500] = 1.0
    for row, kept in (((1.0, 5, 1.0), 5), ((1.0, 700, 1.0), 700), ((1.0, 1000, 0.5), 500)):
        found = probabilities(logits, settings([row]))[0].nonzero()[:, 0].tolist()
        # Its weight is that of e tokens.
        assert found == [*range(kept - 1 if row[2] == 1 else len(found) - 1), 2500]
        assert abs(len(found) - kept) <= 2


def test_the_vocabulary_is_not_put_in_order() -> None:
    """That of a model has a hundred thousand tokens: sorting them costs as much as half a pass of a small model."""
    sorted_sizes = []

    class Sorts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if "sort" in func.__name__:
                sorted_sizes.append(args[0].shape[-1])
            return func(*args, **(kwargs or {}))

    logits = torch.linspace(0, 400, 20_000).flip(0)[None]
    with Sorts():
        for row in ((0.7, 0, 0.9), (0.7, 40, 1.0), (1.0, 200, 0.5)):
            probabilities(logits, settings([row]))
    assert max(sorted_sizes, default=0) <= FIRST_SELECTED


def test_temperature_alone_is_a_softmax() -> None:
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    found = probabilities(logits, settings([(0.5, 0, 1.0), (1.0, 0, 1.0), (3.0, 0, 1.0)]))
    torch.testing.assert_close(found, (logits / torch.tensor([[0.5], [1.0], [3.0]])).softmax(dim=1))


def test_greedy_rows_are_one_hot() -> None:
    assert one([0.1, 3.0, 2.9], temperature=0.0) == [0.0, 1.0, 0.0]
    assert one([0.1, 3.0, 2.9], temperature=0.0, top_k=2, top_p=0.1) == [0.0, 1.0, 0.0]


def test_of_equal_logits_the_lower_token_comes_first() -> None:
    assert one([1.0, 1.0, 1.0, 1.0], top_k=2) == [0.5, 0.5, 0.0, 0.0]
    assert one([1.0, 1.0, 1.0, 1.0], top_p=0.5) == [0.5, 0.5, 0.0, 0.0]
    assert one([0.0, 1.0, 1.0, 1.0], top_k=1) == [0.0, 1.0, 0.0, 0.0]
    assert one([0.0, 1.0, 1.0], temperature=0.0) == [0.0, 1.0, 0.0]


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert one([1.0, 2.0, 3.0], top_k=50) == pytest.approx(one([1.0, 2.0, 3.0]))
    assert one([1.0, 2.0, 3.0], top_k=3) == pytest.approx(one([1.0, 2.0, 3.0]))


def test_top_p_is_of_what_top_k_left() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    # Of the first two: 4/7 and 3/7.
    assert one(logits, top_k=2, top_p=0.5) == pytest.approx([1.0, 0.0, 0.0, 0.0])
    assert one(logits, top_k=2, top_p=0.6) == pytest.approx([4 / 7, 3 / 7, 0.0, 0.0])
    assert one(logits, top_p=0.6) == pytest.approx([4 / 7, 3 / 7, 0.0, 0.0])
    assert one(logits, top_p=0.75) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0.0])


def test_top_p_is_after_temperature() -> None:
    logits = [2.0, 0.0]
    assert one(logits, temperature=1.0, top_p=0.85) == [1.0, 0.0]
    assert one(logits, temperature=2.0, top_p=0.85)[1] > 0.2


def test_top_p_always_keeps_one() -> None:
    assert one([0.0, 5.0, 1.0], top_p=1e-9) == [0.0, 1.0, 0.0]


def test_tokens_taken_out_before_stay_out() -> None:
    """As end-of-sequence is, before min_tokens."""
    banned = -math.inf
    for row in ((1.0, 0, 1.0), (0.7, 3, 1.0), (1.0, 0, 0.99), (0.0, 0, 1.0)):
        found = one([5.0, banned, 1.0, banned], *row)
        assert found[1] == found[3] == 0.0
        assert sum(found) == pytest.approx(1.0)


def test_half_precision_logits_become_fp32() -> None:
    found = probabilities(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), settings([(0.7, 1, 1.0)]))
    assert found.dtype == torch.float32


def test_a_row_does_not_depend_on_the_others() -> None:
    """Settings of 1 and 0 keep all tokens, whatever the rows beside it ask for, the least likely ones too."""
    logits = torch.tensor([[0.0, -20.0, -30.0]])
    alone = probabilities(logits, settings([(1.0, 0, 1.0)]))
    beside = probabilities(logits.repeat(2, 1), settings([(1.0, 0, 1.0), (1.0, 2, 0.9)]))
    assert torch.equal(alone[0], beside[0])


def test_how_many_tokens_the_others_keep_does_not_matter() -> None:
    """To the last bit: a drawn token must not depend on what it is batched with."""
    logits = torch.randn(1, 4000, generator=torch.Generator().manual_seed(1))
    rows = [(1.0, 40, 0.9), (0.7, 0, 0.3), (1.5, 0, 0.99), (1.0, 3000, 1.0), (0.0, 0, 1.0), (1.0, 0, 1.0)]
    together = probabilities(logits.repeat(len(rows), 1), settings(rows))
    for row, found in zip(rows, together, strict=True):
        assert torch.equal(probabilities(logits, settings([row]))[0], found)


@pytest.mark.parametrize("row", [(1.0, 3, 1.0), (1.0, 0, 0.9), (1.0, 0, 1.0)])
def test_logits_that_are_not_numbers_give_no_token_any_probability(row: tuple[float, int, float]) -> None:
    for bad in (math.nan, math.inf):
        logits = torch.zeros(2, 1000)
        logits[0, 7] = bad
        found = probabilities(logits, settings([row, row]))
        assert not (found[0] > 0).any()
        assert found[1].sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("temperature", [1e-6, 1e-20, 1e-38, 1e-44])
def test_tiny_temperature_is_still_a_distribution(temperature: float) -> None:
    assert one([1.0, 9.0, 3.0], temperature=temperature) == [0.0, 1.0, 0.0]


# --- the compiled choice --------------------------------------------------------------------------------------------


def test_it_was_compiled() -> None:
    assert sampling._sampling is not None, "runtime/decode/_sampling.c was not compiled"


def both(
    monkeypatch: pytest.MonkeyPatch, logits_RV: Tensor, of: Sampling, token_V: Tensor | None = None
) -> tuple[list[int], list[int]]:
    """What the compiled stage chooses and what its definition does."""
    compiled = choose(logits_RV, of, token_V)
    assert compiled.dtype == torch.int32
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_sampling", None)
        defined = choose(logits_RV, of, token_V)
    return compiled.tolist(), defined.tolist()


SETTINGS = [
    *[(0.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 0, 1.0), (40.0, 0, 1.0), (1e-7, 0, 1.0)],
    *[(1.0, 40, 1.0), (0.7, 1, 1.0), (2.5, 3000, 1.0), (1e4, 7, 1.0)],
    *[(0.7, 0, 0.9), (1.0, 0, 0.05), (3.0, 0, 0.999), (1.0, 0, 0.9999999)],
    *[(0.7, 40, 0.9), (5.0, 500, 0.5), (1.0, 7, 1e-6)],
]


@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("vocab", [1, 3, 15, 16, 17, 63, 64, 65, 99, 989, 4096, 20_011])
def test_compiled_choice_is_the_defined_one(monkeypatch: pytest.MonkeyPatch, vocab: int, subset: bool) -> None:
    generator = torch.Generator().manual_seed(vocab)
    token_V = torch.randperm(3 * vocab, generator=generator)[:vocab] if subset else None
    for seed, spread in ((0, 3.0), (-1, 12.0), (2**62 + 12345, 0.1)):
        logits_RV = torch.randn(len(SETTINGS), vocab, generator=generator) * spread
        found, expected = both(monkeypatch, logits_RV, settings(SETTINGS, seed, 17 + vocab), token_V)
        assert found == expected


def test_a_position_beyond_32_bits_counts_by_its_lower_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_RV = torch.zeros(1, 500)
    found, expected = both(monkeypatch, logits_RV, settings([(1.0, 0, 1.0)], 3, 2**32 + 9))
    assert found == expected == choose(logits_RV, settings([(1.0, 0, 1.0)], 3, 9)).tolist()


@pytest.mark.parametrize("row", [(1.0, 5, 1.0), (1.0, 64, 1.0), (1.0, 700, 1.0), (2.0, 300, 0.37)])
@pytest.mark.parametrize("levels", [1, 2, 30])
def test_compiled_choice_among_equals(
    monkeypatch: pytest.MonkeyPatch, row: tuple[float, int, float], levels: int
) -> None:
    """Which of them are kept at the edge is seen in many draws."""
    logits_RV = torch.randint(0, levels, (40, 3000), generator=torch.Generator().manual_seed(levels)).float()
    of = replace(settings([row] * 40), seed_R=torch.arange(40))
    found, expected = both(monkeypatch, logits_RV, of)
    assert found == expected


@pytest.mark.parametrize("row", [(1.0, 3, 1.0), (1.0, 0, 0.9), (1.0, 0, 1.0), (0.0, 0, 1.0)])
def test_compiled_choice_of_what_is_no_distribution(
    monkeypatch: pytest.MonkeyPatch, row: tuple[float, int, float]
) -> None:
    """NaN of either sign, infinity, and nothing that can be chosen: alone, and at every place of a block."""
    for bad in (math.nan, -math.nan, math.inf):
        for place in (0, 15, 63, 64, 130, 199):
            logits_RV = torch.zeros(3, 200)
            logits_RV[1, place] = bad
            found, expected = both(monkeypatch, logits_RV, settings([row] * 3))
            assert found == expected and found[1] == -1 and found[0] == found[2] >= 0
    found, expected = both(monkeypatch, torch.full((1, 200), -math.inf), settings([row]))
    assert found == expected == [-1]


def test_compiled_choice_never_takes_what_was_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_RV = torch.full((len(SETTINGS), 300), -math.inf)
    logits_RV[:, 150], logits_RV[:, 299] = -3.0, -3.5
    for seed in range(20):
        found, expected = both(monkeypatch, logits_RV, settings(SETTINGS, seed))
        assert found == expected and set(found) <= {150, 299}


def test_half_precision_logits_are_chosen_from(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_RV = torch.randn(16, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, expected = both(monkeypatch, logits_RV, settings(SETTINGS))
    assert found == expected


def test_a_seed_is_64_bits() -> None:
    """Its halves are words of the generator's key: none is left out."""
    logits_RV = torch.zeros(1, 4000)
    found = {choose(logits_RV, settings([(1.0, 0, 1.0)], seed)).item() for seed in (1, 1 + 2**32, 1 + 2**62, -(2**63))}
    assert len(found) == 4


def test_compiled_choice_is_the_same_wherever_its_row_stands() -> None:
    logits_1V = torch.randn(1, 3000, generator=torch.Generator().manual_seed(2))
    for row in SETTINGS:
        alone = choose(logits_1V, settings([row], 5)).item()
        together = choose(
            logits_1V.repeat(5, 1), settings([SETTINGS[0], row, SETTINGS[9], SETTINGS[5], row], 5)
        ).tolist()
        assert together[1] == together[4] == alone


def test_the_definition_runs_where_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_sampling", None)
    logits_RV, of = torch.randn(3, 99, generator=torch.Generator().manual_seed(1)), settings([(1.0, 0, 1.0)] * 3, 8)
    expected = reference.choose(filtered(logits_RV, of), of.seed_R, of.position_R).tolist()
    assert choose(logits_RV, of).tolist() == expected


# --- ranking --------------------------------------------------------------------------------------------------------


def ranked_both(
    monkeypatch: pytest.MonkeyPatch, logits_RV: Tensor, of: Sampling, count: int, token_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What was compiled gives, after comparing it with the definition."""
    index_RK, share_RK = ranked(logits_RV, of, count, token_V)
    with monkeypatch.context() as without:
        without.setattr(sampling, "_sampling", None)
        defined_RK, defined_share_RK = ranked(logits_RV, of, count, token_V)
    assert torch.equal(index_RK, defined_RK)
    torch.testing.assert_close(share_RK, defined_share_RK, rtol=1e-4, atol=1e-6)
    return index_RK, share_RK


@pytest.mark.parametrize("vocab", [1, 2, 5, 99, 3000])
@pytest.mark.parametrize("subset", [False, True])
def test_compiled_ranking_is_the_defined_one(monkeypatch: pytest.MonkeyPatch, vocab: int, subset: bool) -> None:
    rng = random.Random(vocab)
    rows = [
        (rng.choice([0.0, 0.3, 1.0, 2.5]), rng.choice([0, 0, 1, 2, 7, 4000]), rng.choice([1.0, 0.05, 0.77, 0.95]))
        for _ in range(40)
    ]
    logits_RV = torch.randn(40, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    token_V = torch.randperm(5000, generator=torch.Generator().manual_seed(1))[:vocab] if subset else None
    of = settings(rows, seed=7, position=31)
    index_RK, share_RK = ranked_both(monkeypatch, logits_RV, of, 4, token_V)
    assert index_RK.shape == (40, min(4, vocab))
    # The first is what the row chooses.
    assert torch.equal(index_RK[:, 0], choose(logits_RV, of, token_V))
    assert bool((share_RK.sum(dim=1) <= 1 + 1e-5).all())
    for (temperature, top_k, _), indices, shares in zip(rows, index_RK.tolist(), share_RK.tolist(), strict=True):
        known = [i for i in indices if i >= 0]
        assert len(set(known)) == len(known) and indices == known + [-1] * (len(indices) - len(known))
        assert shares == sorted(shares, reverse=True) and all(
            (s > 0) == (i >= 0) for s, i in zip(shares, indices, strict=True)
        )
        if temperature and top_k:
            assert len(known) <= top_k


def test_greedy_shares_are_the_softmax() -> None:
    index_RK, share_RK = ranked(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), settings([(0.0, 2, 0.1)]), 4)
    assert index_RK.tolist() == [[1, 3, 2, 0]]
    expected = torch.tensor([3.0, 3.0, 2.0, 1.0]).exp() / torch.tensor([1.0, 3.0, 2.0, 3.0]).exp().sum()
    torch.testing.assert_close(share_RK[0], expected)


def test_what_is_left_out_counts_in_the_shares() -> None:
    """By hand: top-p keeps the first of two tokens, whose logits are 1 apart; the other may still be another model's
    choice."""
    _, share_RK = ranked(torch.tensor([[1.0, 0.0]]), settings([(0.5, 0, 0.5)], seed=3, position=9), 2)
    noise = float(reference.gumbel(torch.tensor(0), torch.tensor(9), torch.tensor(3)))
    kept, left_out = math.exp(0.5 * noise), math.exp(-1.0)
    assert share_RK[0].tolist() == pytest.approx([kept / (kept + left_out), 0.0])


@pytest.mark.parametrize("row", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ranking_of_what_is_no_distribution(
    monkeypatch: pytest.MonkeyPatch, row: list[float], temperature: float
) -> None:
    index_RK, share_RK = ranked_both(monkeypatch, torch.tensor([row]), settings([(temperature, 0, 1.0)]), 2)
    assert index_RK.tolist() == [[-1, -1]] and share_RK.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_was_taken_out_is_not_ranked(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    logits_RV = torch.tensor([[1.0, -math.inf, 0.5, -math.inf]])
    index_RK, _ = ranked_both(monkeypatch, logits_RV, settings([(temperature, 0, 1.0)]), 4)
    assert sorted(index_RK[0].tolist()) == [-1, -1, 0, 2]
