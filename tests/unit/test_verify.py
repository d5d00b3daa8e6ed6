"""Zones, passes and verdicts on tables made by hand; the sampled verdict by the distribution of what it emits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from chi_square import p_value
from torch import Tensor

from ssv.builder.tiers import Policy
from ssv.runtime.verify import (
    Verdict,
    asks_for_pass,
    draw,
    greedy_verdict,
    is_trusted,
    judged_rows,
    sampled_verdict,
)


def asks(reject_prob: Sequence[float], **settings: float) -> bool:
    numbers = {"accept_below": 0.0, "verify_above": 1.0, "risk_budget": 1.0, "max_pending": 9} | settings
    policy = Policy.model_validate(numbers)
    return asks_for_pass(reject_prob, policy, policy.max_pending)


# --- zones and passes -----------------------------------------------------------------------------------------------


def test_zones_have_open_borders() -> None:
    trusted = is_trusted(torch.tensor([[0.0, 0.125, 0.25, 0.5, 1.0]]), torch.tensor([0.25]))
    assert trusted.tolist() == [[True, True, False, False, False]]


def test_nothing_is_trusted_below_zero() -> None:
    assert not is_trusted(torch.zeros(1, 3), torch.zeros(1)).any()


def test_everything_is_trusted_below_one_but_a_certain_rejection() -> None:
    assert is_trusted(torch.tensor([[0.0, 0.999, 1.0]]), torch.ones(1)).tolist() == [[True, True, False]]


def test_zones_are_per_row() -> None:
    assert is_trusted(torch.full((2, 1), 0.25), torch.tensor([0.0, 0.5])).tolist() == [[False], [True]]


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


def test_judged_rows() -> None:
    trusted_BK = torch.tensor([[False, True, False], [True, True, True], [False, False, False], [True, False, True]])
    judged = judged_rows(trusted_BK, torch.tensor([3, 3, 0, 2]))
    assert judged.int().tolist() == [[1, 0, 1, 1], [0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 1, 0]]


def test_judged_rows_without_a_draft() -> None:
    assert judged_rows(torch.zeros(2, 0, dtype=torch.bool), torch.tensor([0, 0])).tolist() == [[True], [True]]


# --- greedy ---------------------------------------------------------------------------------------------------------

GREEDY_CASES = [
    # drafted, judged, target's tokens and the bonus -> kept, next token, rejected
    ([1, 2, 3], [1, 1, 1], [1, 2, 3, 4], (3, 4, False)),
    ([1, 2, 3], [1, 1, 1], [9, 2, 3, 4], (0, 9, True)),
    ([1, 2, 3], [1, 1, 1], [1, 2, 9, 4], (2, 9, True)),
    ([1, 2, 3], [1, 1, 1], [1, 9, 9, 4], (1, 9, True)),
    ([1, 2, 3], [0, 0, 0], [9, 9, 9, 4], (3, 4, False)),
    ([1, 2, 3], [0, 1, 0], [9, 2, 9, 4], (3, 4, False)),
    ([1, 2, 3], [0, 1, 0], [9, 8, 9, 4], (1, 8, True)),
    ([1, 2, 3], [1, 0, 0], [7, 2, 3, 4], (0, 7, True)),
]


def as_row(drafted: list[int], judged: list[int], target: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.tensor([drafted]),
        torch.tensor([[*judged, 1]]).bool(),
        torch.tensor([len(drafted)]),
        torch.tensor([target]),
    )


def as_tuple(verdict: Verdict, row: int = 0) -> tuple[int, int, bool]:
    return int(verdict.num_kept_B[row]), int(verdict.next_token_B[row]), bool(verdict.rejected_B[row])


@pytest.mark.parametrize(("drafted", "judged", "target", "expected"), GREEDY_CASES)
def test_greedy_verdict(
    drafted: list[int], judged: list[int], target: list[int], expected: tuple[int, int, bool]
) -> None:
    assert as_tuple(greedy_verdict(*as_row(drafted, judged, target))) == expected


def test_greedy_verdict_of_ragged_rows() -> None:
    """Padding is neither kept nor rejected, whatever stands there."""
    num_pending_B = torch.tensor([0, 1, 2, 2])
    drafted_BK = torch.tensor([[5, 5], [1, 5], [1, 2], [1, 2]])
    judged_BJ = judged_rows(torch.zeros(4, 2, dtype=torch.bool), num_pending_B)
    target_BJ = torch.tensor([[7, 0, 0], [1, 8, 0], [1, 2, 9], [1, 3, 9]])
    verdict = greedy_verdict(drafted_BK, judged_BJ, num_pending_B, target_BJ)
    assert [as_tuple(verdict, b) for b in range(4)] == [(0, 7, False), (1, 8, False), (2, 9, False), (1, 3, True)]


def test_greedy_verdict_without_a_draft() -> None:
    verdict = greedy_verdict(
        torch.zeros(2, 0).long(), torch.ones(2, 1).bool(), torch.zeros(2).long(), torch.tensor([[3], [4]])
    )
    assert [as_tuple(verdict, b) for b in range(2)] == [(0, 3, False), (0, 4, False)]


# --- sampled --------------------------------------------------------------------------------------------------------


def one_hot(tokens: Sequence[int], vocab: int = 10) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), vocab).float()


@pytest.mark.parametrize(("drafted", "judged", "target", "expected"), GREEDY_CASES)
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_sampled_verdict_of_one_hot_rows_is_the_greedy_one(
    drafted: list[int], judged: list[int], target: list[int], expected: tuple[int, int, bool], uniform: float
) -> None:
    drafted_BK, judged_BJ, num_pending_B, _ = as_row(drafted, judged, target)
    uniforms = torch.full((1, 3), uniform), torch.tensor([uniform])
    verdict = sampled_verdict(
        drafted_BK, judged_BJ, num_pending_B, one_hot(target)[judged_BJ[0]], one_hot(drafted)[None], *uniforms
    )
    assert as_tuple(verdict) == expected


def test_sampled_verdict_without_a_draft() -> None:
    """A pass over rows of which none has drafted: plain sampling from the bonus row."""
    p_RV = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    nothing_BK = torch.zeros(2, 0)
    verdict = sampled_verdict(
        nothing_BK.long(),
        torch.ones(2, 1).bool(),
        torch.zeros(2).long(),
        p_RV,
        torch.zeros(2, 1, 2),
        nothing_BK,
        torch.tensor([0.3, 0.3]),
    )
    assert [as_tuple(verdict, b) for b in range(2)] == [(0, 1, False), (0, 0, False)]


def test_trusted_token_is_kept_where_the_target_gives_it_nothing() -> None:
    p_RV = torch.tensor([[0.0, 0.0, 1.0]])
    q_BKV = torch.tensor([[[1.0, 0.0, 0.0]]])
    judged_BJ = torch.tensor([[False, True]])
    verdict = sampled_verdict(
        torch.tensor([[0]]), judged_BJ, torch.tensor([1]), p_RV, q_BKV, torch.tensor([[0.9]]), torch.tensor([0.5])
    )
    assert as_tuple(verdict) == (1, 2, False)


def test_acceptance_has_the_ratio_as_its_border() -> None:
    p_RV = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).repeat(3, 1)
    q_BKV = torch.tensor([[[0.5, 0.5]]]).repeat(3, 1, 1)
    uniform_BK = torch.tensor([[0.0], [0.4375], [0.5]])
    verdict = sampled_verdict(
        torch.zeros(3, 1).long(),
        torch.ones(3, 2).bool(),
        torch.ones(3).long(),
        p_RV,
        q_BKV,
        uniform_BK,
        torch.tensor([0.75, 0.25, 0.75]),
    )
    assert [as_tuple(verdict, b) for b in range(3)] == [(1, 1, False), (1, 0, False), (0, 1, True)]


Rule = Callable[..., Verdict]


def always_accept(*args: Tensor) -> Verdict:
    *rest, accept_uniform_BK, next_uniform_B = args
    return sampled_verdict(*rest, torch.full_like(accept_uniform_BK, -1.0), next_uniform_B)


def resample_from_target(*args: Tensor) -> Verdict:
    _, judged_BJ, _, target_prob_RV, *_, next_uniform_B = args
    verdict = sampled_verdict(*args)
    p_BJV = target_prob_RV.view(*judged_BJ.shape, -1)
    return replace(verdict, next_token_B=draw(p_BJV[torch.arange(len(p_BJV)), verdict.num_kept_B], next_uniform_B))


def inverted_ratio(*args: Tensor) -> Verdict:
    drafted_BK, judged_BJ, num_pending_B, target_prob_RV, draft_prob_BKV, *uniforms = args
    p_BJV = target_prob_RV.view(*judged_BJ.shape, -1)
    verdict = sampled_verdict(drafted_BK, judged_BJ, num_pending_B, target_prob_RV, draft_prob_BKV, *uniforms)
    p_BK = p_BJV[:, :-1].gather(2, drafted_BK[:, :, None])[:, :, 0]
    q_BK = draft_prob_BKV.gather(2, drafted_BK[:, :, None])[:, :, 0]
    kept_B = (uniforms[0] * p_BK < q_BK).cumprod(dim=1).sum(dim=1)
    return replace(verdict, num_kept_B=kept_B)


COUNT = 30_000
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


def emitted_p_values(rule: Rule, name: str) -> list[float]:
    """Of the first token emitted, of the second where one was kept, and of the third where two were."""
    p_JV, q_KV = (torch.tensor(rows) for rows in DISTRIBUTIONS[name])
    generator = torch.Generator().manual_seed(7)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    drafted_BK = torch.stack([draw(q_V.expand(COUNT, -1), uniform(COUNT)) for q_V in q_KV], dim=1)
    verdict = rule(
        drafted_BK,
        torch.ones(COUNT, 3, dtype=torch.bool),
        torch.full((COUNT,), 2),
        p_JV.repeat(COUNT, 1),
        q_KV.expand(COUNT, -1, -1),
        uniform(COUNT, 2),
        uniform(COUNT),
    )
    kept_B, next_B1 = verdict.num_kept_B, verdict.next_token_B[:, None]
    emitted_BJ = torch.cat((drafted_BK, next_B1), dim=1).scatter(1, kept_B[:, None], next_B1)
    results = []
    for j, p_V in enumerate(p_JV):
        counts_V = torch.bincount(emitted_BJ[kept_B >= j, j], minlength=4)
        results.append(p_value(counts_V.tolist(), p_V.tolist()))
    return results


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_emitted_tokens_have_the_target_distribution(name: str) -> None:
    assert min(emitted_p_values(sampled_verdict, name)) > 1e-4


def test_equal_distributions_reject_nothing() -> None:
    p_JV, q_KV = (torch.tensor(rows) for rows in DISTRIBUTIONS["equal"])
    uniforms = torch.full((4, 2), 1 - 2**-24), torch.rand(4)
    drafted_BK = torch.arange(4)[:, None].expand(-1, 2)
    args = (drafted_BK, torch.ones(4, 3).bool(), torch.full((4,), 2), p_JV.repeat(4, 1), q_KV.expand(4, -1, -1))
    assert sampled_verdict(*args, *uniforms).num_kept_B.tolist() == [2] * 4


@pytest.mark.parametrize("broken", [always_accept, resample_from_target, inverted_ratio])
def test_broken_rule_is_caught(broken: Rule) -> None:
    assert min(emitted_p_values(broken, "different")) < 1e-4


def test_ragged_sampled_rows_read_their_own_target_rows() -> None:
    """Rows of the target are packed: what one row judges shifts the rows of those after it."""
    num_pending_B = torch.tensor([2, 0, 1, 2])
    trusted_BK = torch.tensor([[True, False], [False, False], [False, False], [False, True]])
    judged_BJ = judged_rows(trusted_BK, num_pending_B)
    drafted_BK = torch.tensor([[1, 2], [0, 0], [4, 0], [5, 6]])
    # Of row 0: token 2 and the bonus; of row 1: the bonus; of row 2: token 1 and the bonus; of row 3: token 1 and the bonus.
    p_RV = one_hot([2, 3, 7, 8, 9, 5, 6])
    verdict = sampled_verdict(
        drafted_BK,
        judged_BJ,
        num_pending_B,
        p_RV,
        one_hot([1, 2, 0, 0, 4, 0, 5, 6]).view(4, 2, 10),
        torch.full((4, 2), 0.5),
        torch.full((4,), 0.5),
    )
    assert [as_tuple(verdict, b) for b in range(4)] == [(2, 3, False), (0, 7, False), (0, 8, True), (2, 6, False)]


# --- draw -----------------------------------------------------------------------------------------------------------


def test_draw_by_inversion() -> None:
    weight_RV = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0])
    uniforms = [0.0, 0.2499, 0.25, 0.7499, 0.75, 0.999999, 1.0]
    assert draw(weight_RV.expand(7, -1), torch.tensor(uniforms)).tolist() == [1, 1, 3, 3, 4, 4, 4]


def test_draw_never_gives_what_has_no_weight() -> None:
    generator = torch.Generator().manual_seed(3)
    weight_RV = torch.rand(4000, 50, generator=generator) ** 8
    weight_RV[torch.rand(4000, 50, generator=generator) < 0.6] = 0.0
    weight_RV[:, 17] += 1e-6
    for uniform in (0.0, 0.5, 1 - 2**-24, 1.0):
        index_R = draw(weight_RV, torch.full((4000,), uniform))
        assert bool((weight_RV[torch.arange(4000), index_R] > 0).all())


def test_draw_follows_its_weights() -> None:
    weight_V = torch.tensor([1.0, 0.0, 5.0, 2.0])
    drawn = draw(weight_V.expand(COUNT, -1), torch.rand(COUNT, generator=torch.Generator().manual_seed(4)))
    assert p_value(torch.bincount(drawn, minlength=4).tolist(), (weight_V / 8).tolist()) > 1e-4


def test_chi_square_itself() -> None:
    assert p_value([50, 50], [0.5, 0.5]) == 1.0
    assert abs(p_value([60, 40], [0.5, 0.5]) - 0.0455) < 1e-4
    assert p_value([99, 1], [1.0, 0.0]) == 0.0
    assert p_value([996, 4], [0.999, 0.001]) == 1.0
